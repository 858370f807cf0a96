"""Tests of memory: what was said of a word, long after its window was evicted.

    python -m experiments.memory --config=experiments/configs/memory.py:tiny_recall --workdir=work/recall
    python -m experiments.sweep --config=experiments/configs/memory.py:tiny_hops --workdir=work/hops
    python -m experiments.figures --runs='work/hops/*' --out=work/figures
    python -m experiments.memory --config=experiments/configs/memory.py:text --checkpoint=FOLDER \\
      --config.data.task=tracking --config.data.depths=4 --workdir=work/memory/tracking

    smoke             recall of 2 pairs, a few steps: seconds; proves only that the parts fit
    tiny_recall       associative recall (MQAR): 4 or 8 pairs, then 4 of their keys are asked
    tiny_overwriting  4 keys, each written 2 or 4 times: the last value of 4 of them
    tiny_needle       one key with its value in 12, 24 or 36 tokens
    tiny_multikey     2, 4 or 8 keys, one of which is asked
    tiny_multivalue   2 keys with 3 values each, all to be named in their order
    tiny_multiquery   4 or 8 keys, 4 of which are asked
    tiny_tracking     2 chains of 1 or 2 copies: all variables that got a number (RULER's variable tracking)
    tiny_hops         2 chains of 1, 2 or 3 copies: the number of the last variable
    tiny_common       the 2 words that occur 6 times among others that occur once
    tiny_frequent     the 3 commonest words of a text after Zipf's law
    tiny_babi1        4 or 8 facts on who went where: where are 2 persons
    tiny_babi2        4 or 8 facts on who went and carried what: where is an object
    tiny_babi3        5 or 8 such facts: where was an object before it came to a place
    tiny_babi4        2 or 4 facts on what lies north, east, south or west of what, 2 questions
    tiny_babi5        3 or 6 facts on who gave what to whom, 2 questions
    text              a test of a checkpoint, needles by default: 1 or 4 keys, prompts of 512 and 1024 tokens

The `tiny` presets have 2 layers, windows of 12 tokens and N = 2, and take 1000 steps: a minute or two on two
CPU cores. docs/memory.md has what was run. One run is one (task, N, seed); `sweep` lists N = 4, 2, 1.
"""

from typing import Any

from ml_collections import config_dict

from sleep_jax import config
from sleep_jax.data import memory
from sleep_jax.experiments import cli

EXPERIMENT = "sleep_jax.experiments.memory"
# Preset -> its data. Every context is whole windows of 12 tokens, and the questions fit into one.
TINY: dict[str, dict[str, Any]] = {
  "tiny_recall": {"task": "recall", "depths": (4, 8), "queries": 4},
  "tiny_overwriting": {"task": "overwriting", "depths": (2, 4), "lengths": (36,), "queries": 4},
  "tiny_needle": {"task": "needle", "depths": (1,), "lengths": (12, 24, 36)},
  "tiny_multikey": {"task": "needle", "depths": (2, 4, 8)},
  "tiny_multivalue": {"task": "needle", "depths": (2,), "values": 3, "queries": 2},
  "tiny_multiquery": {"task": "needle", "depths": (4, 8), "queries": 4},
  "tiny_tracking": {"task": "tracking", "depths": (1, 2), "chains": 2, "queries": 2},
  "tiny_hops": {"task": "tracking", "depths": (1, 2, 3), "chains": 2, "queries": 2, "asked": "value"},
  "tiny_common": {"task": "common", "depths": (2,), "often": 6, "seldom": 1},
  "tiny_frequent": {"task": "frequent", "depths": (3,), "lengths": (36,)},
  "tiny_babi1": {"task": "babi1", "depths": (4, 8), "persons": 3, "places": 4, "queries": 2},
  "tiny_babi2": {"task": "babi2", "depths": (4, 8), "persons": 2, "places": 4, "objects": 2},
  "tiny_babi3": {"task": "babi3", "depths": (5, 8), "persons": 2, "places": 4, "objects": 2},
  "tiny_babi4": {"task": "babi4", "depths": (2, 4), "queries": 2},
  "tiny_babi5": {"task": "babi5", "depths": (3, 6), "persons": 3, "queries": 2},
}
PRESETS = ("smoke", *TINY, "text")


def get_config(preset: str = "tiny_recall") -> config_dict.ConfigDict:
  """A small hybrid, and the test of each preset; every other field has its default."""
  if preset not in PRESETS:
    raise ValueError(f"unknown preset {preset!r}; {config.nearest(preset, PRESETS)}")
  c = cli.defaults(config.Config(data=memory.MemoryConfig(), model=config.ModelConfig(vocab_size=1)))
  c.model.update(embed_dim=64, mlp_dim=128, blocks=("attn", "gdn"), window=12)
  c.model.attention.update(num_heads=2, head_dim=32)
  c.model.fast.update(num_heads=1, key_dim=64, value_dim=64)
  c.model.fast.decay_init = (1 / 16, 1.0)  # or a window is forgotten before the questions come
  c.sleep.update(num_passes=2, loops="unroll")
  c.optim.update(muon_lr=1e-2, adam_lr=1e-3, newton_schulz_dtype="float32", weight_decay=0.0)
  c.train.update(steps=1000, log_every=50, eval_every=100, save_every=500)
  c.train.update(eval_sequences=1024, eval_batch_size=256)
  if preset == "smoke":
    c.data.update(depths=(2,), lengths=(8, 16), words=4, fillers=2)
    c.model.update(embed_dim=16, mlp_dim=32, window=8)
    c.model.attention.update(num_heads=2, head_dim=8)
    c.model.fast.update(key_dim=16, value_dim=16)
    c.sleep.loops = "scan"
    c.train.update(steps=10, batch_size=16, steps_per_dispatch=5, log_every=5, eval_every=5, save_every=5)
    c.train.update(eval_sequences=64, eval_batch_size=32)
  elif preset == "text":
    c.data.update(task="needle", depths=(1, 4), lengths=(512, 1024), words=256)
    c.model.window = 256
    c.train.update(eval_sequences=16, eval_batch_size=8, batch_size=8)
  else:
    c.data.update(TINY[preset])
  c.model.vocab_size = memory.MemoryConfig(**c.data.to_dict()).vocab_size
  return c


def sweep(preset: str, seeds: int = 1) -> dict[str, dict[str, object]]:
  """The runs of a preset: name -> what it changes, by dotted key."""
  del preset
  return {f"n{n}_s{seed}": {"sleep.num_passes": n, "seed": seed} for seed in range(seeds) for n in (4, 2, 1)}
