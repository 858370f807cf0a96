"""Language modelling on your own files, every window read and then slept on.

    python -m experiments.text --config=experiments/configs/text.py:tiny --config.data.files='books/*.txt' \\
      --config.data.held_out=last_book.txt --workdir=work/text/n2

    tiny        T = 512, L = 64, 2 layers, a tokenizer of 512 tokens from the files themselves, 120 steps of 8
                sequences, about 50 CPU seconds and as much for compiling; proves that the parts fit
    scratch     T = 2048, L = 512, 8 layers, 6 M parameters. Not run yet
    checkpoint  from a checkpoint (`pretrained.folder`), whose architecture and tokenizer it has: six inserted
                fast-weight layers are trained alone, hard eviction, T = 2048, L = 512. Not run yet.
                Then everything: --config.pretrained.folder=FIRST_RUN --config.pretrained.trained=all

One run is one (N, seed): --config.sleep.num_passes, --config.seed. `sweep` lists N = 1, 2, 4. Compared runs
share their seed and so their data, in order.
"""

from ml_collections import config_dict

from sleep_jax import config, pretrained
from sleep_jax.data.text.rows import TextConfig
from sleep_jax.experiments import cli

EXPERIMENT = "sleep_jax.experiments.text"
PRESETS = ("tiny", "scratch", "checkpoint")


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
  """What each preset changes of the defaults."""
  c = cli.defaults(config.Config(data=TextConfig(), model=config.ModelConfig(vocab_size=4096)))
  c.data.update(length=2048, vocab_size=4096)
  c.model.update(
    embed_dim=256, blocks=("attn", "gdn") * 4, window=512, tied_embeddings=True, embed_std=0.0625
  )
  c.model.fast.decay_init = (1 / 16, 1.0)
  c.sleep.update(when="always", num_passes=2, remat="pass", loops="flat")
  c.optim.update(muon_lr=5e-3, adam_lr=1e-3, warmup_steps=50)
  c.train.update(steps=4000, batch_size=16, steps_per_dispatch=1, eval_every=500, save_every=500)
  c.train.update(eval_sequences=64, eval_batch_size=8)
  if preset == "tiny":
    c.data.update(length=512, vocab_size=512)
    c.model.update(
      vocab_size=512, embed_dim=64, mlp_dim=128, blocks=("attn", "gdn"), window=64, embed_std=0.125
    )
    c.model.attention.num_heads = 2
    c.model.fast.update(num_heads=1, key_dim=64, value_dim=64)
    c.sleep.remat = "none"
    c.optim.update(muon_lr=1e-2, adam_lr=3e-3, newton_schulz_dtype="float32", warmup_steps=20)
    c.train.update(steps=120, batch_size=8, log_every=20, eval_every=60, save_every=60)
    c.train.update(eval_sequences=16, eval_batch_size=8)
  elif preset == "checkpoint":
    _from_checkpoint(c)
  elif preset != "scratch":
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  return c


def _from_checkpoint(c: config_dict.ConfigDict) -> None:
  """Changes the setting to that of a fine-tuning; what the checkpoint says has no field."""
  for group, names in ((c.data, ("tokenizer", "vocab_size")), (c.optim, ("trained",))):
    for name in names:
      del group[name]
  del c.train["init_from"], c.train["init_ignore"]
  c.pretrained = cli.defaults(pretrained.StartConfig())
  del c.pretrained.fast["kernel"], c.pretrained.fast["conv_context"]  # of the whole model, below
  c.pretrained.update(memory_layers=6, trained="memory")
  c.model = config_dict.create(window=512, eviction="hard", dtype="float32", matmul_dtype="same")
  c.model.fast = config_dict.create(kernel=config_dict.placeholder(str), conv_context="carry")
  c.model.attention = config_dict.create(implementation=config_dict.placeholder(str))
  c.optim.update(muon_lr=1e-3, adam_lr=1e-4)
  c.train.update(steps=500, batch_size=4, microbatches=4, eval_every=100, save_every=50)
  c.train.update(eval_sequences=32, eval_batch_size=1)


def sweep(preset: str, seeds: int = 1) -> dict[str, dict[str, object]]:
  """The runs of a preset: name -> what it changes, by dotted key."""
  return {f"n{n}_s{seed}": {"sleep.num_passes": n, "seed": seed} for seed in range(seeds) for n in (4, 2, 1)}
