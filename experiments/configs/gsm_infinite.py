"""GSM-Infinite: word problems among noise, the question first and long evicted (arXiv 2605.26099, figure 4).

    python -m experiments.gsm_infinite --config=experiments/configs/gsm_infinite.py:tiny --workdir=work/gsm/n2
    python -m experiments.gsm_infinite --config=experiments/configs/gsm_infinite.py:jet_2b \\
      --config.pretrained.folder=checkpoints/Jet-Nemotron-2B --workdir=work/jet/n4
    python -m experiments.sweep --config=experiments/configs/gsm_infinite.py:scratch --workdir=work/gsm --list
    python -m experiments.figures --runs='work/gsm/*' --figure=4 --out=figures

    tiny     2 and 3 operations, 50-100 tokens, L = 36 (the question is always evicted), numbers up to 9, the
             zoo alone, 2 layers, 1000 steps: 2 min 10 s on two cores, data included. The commonest answers
             get 16.4 %, and the number that a text gives most often 62.1 and 77.7 % at 2 and 3 operations:
             compare with that. N = 2 came to 60 / 77, 91 / 89 and 95 / 85 % with three seeds
             (results/gsm_infinite/tiny_seeds)
    mini     2 to 4 operations, 70-140 tokens, L = 48, otherwise as `tiny` with a model half as wide again and
             2000 steps. The number that a text gives most often gets 53.9, 66.4 and 7.0 %. Not run to its
             end yet
    small    2-4 operations, 400-600 tokens, L = 256, 8 layers; for one GPU. Not run yet
    scratch  the paper's settings, from scratch instead of from a pretrained model: 1-8 operations, 2,000 to
             3,300 tokens, L = 2000, batch 256, Muon 1e-3, the middle half of the blocks looped. Not run yet.
             The paper fine-tunes 2 B parameters for 700 steps, which this does not match

The symbolic subset (which variables equal a number, given a tree of assignments; exact match of the sorted
list) takes `--config.data.subset=symbolic` and room for longer answers, 8 tokens an operation. With `tiny`:
--config.data.cut.answer_tokens=24 --config.data.cut.max_tokens=130.

From a checkpoint (`pretrained.folder`: in published format, or the workdir of a run that began with one),
which says the architecture and the tokenizer; the paper's settings, 1-8 operations as in `scratch`. None
has run yet at full size. FLOP are those of N = 4 without recomputation; the authors took one to two
H100-days a run:

    jet_2b        Jet-Nemotron 2B, hard eviction, L = 2000, 700 steps, the middle 14 of 28 blocks looped.
                  1.1e19 FLOP; figure 4a: 0.81 at 6 operations with sleep, 0.74 without
    ouro          Ouro 1.4B with six inserted layers, hard eviction, L = 2000, 1000 steps, all blocks
                  looped. 2.0e19 FLOP; figure 4b: 0.62 at 6 operations with N = 4, 0.42 without
    ouro_memory   stage 1 for a sliding window: one epoch, the inserted layers alone, hard eviction (N = 1:
                  sliding), L = 512. 6.4e18 FLOP
    ouro_sliding  stage 2, from stage 1: two epochs, everything, sliding window, L = 512. 1.4e19 FLOP;
                  figure 5: 0.91 at 2 operations with sleep, 0.60 without

At T = 4000 a gradient keeps 1.2 (Jet) to 1.4 GB (Ouro) a sequence. A batch of 256 is therefore taken in 32
parts of 8 (`train.microbatches`), which with weights, gradients and optimizer fit one device of 80 GB, on
paper. `problems` = 76,800 is what two epochs in 600 steps of 256 come to; L of stage 1 is our reading.

One run is one (N, seed): --config.sleep.num_passes, --config.seed. `sweep` lists N = 1, 2, 4 (`jet_2b` also
6). Stage 2 of each N starts from stage 1 of the same: --config.pretrained.folder='work/stage1/{run}'.
"""

from ml_collections import config_dict

from sleep_jax import config, pretrained
from sleep_jax.data.batching import CutConfig
from sleep_jax.data.gsm_infinite import task
from sleep_jax.experiments import cli
from sleep_jax.pretrained import jet_nemotron, memory, ouro

EXPERIMENT = "sleep_jax.experiments.gsm_infinite"
PRETRAINED = ("jet_2b", "ouro", "ouro_memory", "ouro_sliding")
PRESETS = ("tiny", "mini", "small", "scratch", *PRETRAINED)


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
  """The paper's setting from scratch, and what each preset changes of it; the rest are defaults."""
  cut = CutConfig(max_tokens=3312, answer_tokens=6, tails=(400, 800, 1312), bucket_batches=4)
  c = cli.defaults(config.Config(data=task.TaskConfig(cut=cut), model=config.ModelConfig(vocab_size=1024)))
  c.model.update(embed_dim=1024, blocks=("attn", "gdn") * 8, window=2000, dtype="bfloat16")
  c.model.attention.num_heads = 16
  c.model.fast.update(num_heads=8, key_dim=128, value_dim=128, decay_init=(1 / 16, 1.0))
  c.sleep.update(remat="window", num_passes=4, first_block=4, last_block=12)
  c.optim.muon_lr = 1e-3
  c.train.update(steps=5000, batch_size=256, steps_per_dispatch=1, eval_every=250, save_every=250)
  c.train.update(eval_sequences=1600, eval_batch_size=64)

  if preset == "small":
    c.data.update(subset="medium", operations=(2, 4), min_tokens=400, max_tokens=600, vocab_size=768)
    c.data.cut.update(max_tokens=612, tails=(64, 128))
    c.model.update(embed_dim=512, blocks=("attn", "gdn") * 4, window=256, vocab_size=768)
    c.model.attention.num_heads = 8
    c.model.fast.update(num_heads=4)
    c.sleep.update(remat="pass", first_block=2, last_block=6)
    c.train.update(steps=20_000, batch_size=128, eval_every=1000, save_every=1000, eval_sequences=1536)
  elif preset in ("tiny", "mini"):
    c.data.update(subset="medium", operations=(2, 3), min_tokens=50, max_tokens=100, number_range=10)
    c.data.update(templates=(1.0, 0.0, 0.0), vocab_size=1024, tokenizer_texts=256)
    c.data.cut.update(max_tokens=110, answer_tokens=5, tails=(), bucket_batches=1)
    c.model.update(embed_dim=64, mlp_dim=128, blocks=("attn", "gdn"), window=36, dtype="float32")
    c.model.attention.num_heads = 2
    c.model.fast.update(num_heads=1, key_dim=64, value_dim=64)
    c.sleep.update(remat="none", loops="unroll", num_passes=2, first_block=0, last_block=2)
    c.optim.update(muon_lr=1e-2, adam_lr=1e-3, newton_schulz_dtype="float32")
    c.train.update(steps=1000, batch_size=32, log_every=50, eval_every=200, save_every=500)
    c.train.update(eval_sequences=512, eval_batch_size=128)
    if preset == "mini":
      c.data.update(operations=(2, 4), min_tokens=70, max_tokens=140)
      c.data.cut.max_tokens = 150
      c.model.update(embed_dim=96, mlp_dim=192, window=48)
      c.model.attention.num_heads = 3
      c.train.update(steps=2000, eval_sequences=384)
  elif preset in PRETRAINED:
    _from_checkpoint(c, preset)
  elif preset != "scratch":
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  return c


def _from_checkpoint(c: config_dict.ConfigDict, preset: str) -> None:
  """Changes the paper's setting to that of a fine-tuning; what the checkpoint says has no field."""
  for group, names in ((c.data, ("tokenizer", "vocab_size", "tokenizer_texts")), (c.optim, ("trained",))):
    for name in names:
      del group[name]
  del c.train["init_from"], c.train["init_ignore"]
  c.pretrained = cli.defaults(pretrained.StartConfig())
  del c.pretrained.fast["kernel"], c.pretrained.fast["conv_context"]  # of the whole model, below
  c.model = config_dict.create(window=2000, eviction="hard", dtype="bfloat16", matmul_dtype="same")
  c.model.fast = config_dict.create(kernel=config_dict.placeholder(str), conv_context="carry")
  c.model.attention = config_dict.create(implementation=config_dict.placeholder(str))
  c.data.problems = 76_800
  c.train.update(eval_every=100, save_every=100, microbatches=32)
  if preset == "jet_2b":
    c.train.steps = 700
    c.sleep.update(first_block=7, last_block=21)
    return
  c.sleep.update(first_block=0, last_block=None)
  c.train.steps = {"ouro": 1000, "ouro_memory": 300, "ouro_sliding": 600}[preset]
  c.pretrained.memory_layers = 0 if preset == "ouro_sliding" else 6
  if preset != "ouro":
    c.model.window = 512
    c.data.cut.tails = (256,)
  if preset == "ouro_memory":
    c.pretrained.trained = "memory"
  elif preset == "ouro_sliding":
    c.model.eviction = "sliding"


def published(preset: str) -> config.ModelConfig:
  """The architecture of a preset's checkpoint, for `launch.plan`, which needs no checkpoint.

  Raises:
    ConfigError: for a preset that starts from none.
  """
  config.one_of(preset, PRETRAINED, "--config")
  if preset == "jet_2b":
    return jet_nemotron.config_2b()
  plain = ouro.config_1_4b()
  return memory.memory_config(plain) if preset == "ouro_sliding" else plain  # stage 1 has inserted it


def sweep(preset: str, seeds: int = 1) -> dict[str, dict[str, object]]:
  """The runs of a preset: name -> what it changes, by dotted key."""
  runs = {}
  for seed in range(seeds):
    for n in (6, 4, 2, 1) if preset == "jet_2b" else (4, 2, 1):
      runs[f"n{n}_s{seed}"] = {"sleep.num_passes": n, "seed": seed}
      if preset == "ouro_memory" and n == 1:  # only the sleeping models learn to read without their cache
        runs[f"n{n}_s{seed}"]["model.eviction"] = "sliding"
  return runs
