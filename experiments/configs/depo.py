"""Depo: which node comes k edges further on a cycle that is long evicted (figure 3 of arXiv 2605.26099).

    python -m experiments.depo --config=experiments/configs/depo.py:tiny --workdir=work/depo/n2
    python -m experiments.sweep --config=experiments/configs/depo.py:paper --workdir=work/depo --list
    python -m experiments.figures --runs='work/depo/*' --figure=3 --out=figures

    smoke  the tiny task, a few steps: seconds; proves only that the parts fit
    tiny   6 nodes in one window, k = 1 and 2, 2 layers, 1000 steps: about a minute. N = 2, seed 0 gave 99.6 %
           at k = 1 and 91.6 % at k = 2 (a guess: 16.7 %) after 51 CPU seconds of steps; k = 2 after the same
           tokens: 46.2 % with N = 1, 98.9 % with N = 4 (results/depo)
    mini   12 nodes in one window, k = 1 to 4, 2 layers, 3000 steps. Not run to its end yet
    small  25 nodes in two windows, 4 layers, k up to 8; for one GPU and under an hour. Not run yet
    paper  75 nodes, T = 360, L = 75, 10 layers of Jet-Nemotron's architecture, D = 512 (68,424,256
           parameters), batch 128, 100 k steps; 1-2 H100-days a run in the paper. Not run yet; the paper:
           N = 1 hardly learns k >= 4, N = 2 stalls from k = 8, only N = 4 begins to learn k = 16

One run is one (N, seed): --config.sleep.num_passes, --config.seed. `sweep` lists N = 1, 2, 4. If figure 3 is
not reproduced, try --config.data.sizes=largest first.

The paper's text says 10 layers of the Jet-Nemotron architecture with D = 512 and no more. `paper` divides
Jet-Nemotron 2B by three: 4 heads of attention, 128 wide, 2 of keys and values, without QK-norm, with bias; 4
fast-weight heads with K = 96 and V = 256; an MLP of 3008; attention at 5/10 and 7/10 of the depth, as there
at 14/28 and 19/28, JetBlocks elsewhere (attention to the last 1,152 tokens, in 2 of its 28 blocks, is no
other than attention where L = 75). Otherwise than there, decay is slow at the start and the head is not the
embedding, whose scale is 1. The paper's figure 3 says a 4-layer GDN hybrid:
--config.model.blocks="('attn','gdn','attn','gdn')".
"""

from ml_collections import config_dict

from sleep_jax import config
from sleep_jax.data import depo
from sleep_jax.experiments import cli

EXPERIMENT = "sleep_jax.experiments.depo"
PRESETS = ("smoke", "tiny", "mini", "small", "paper")
JET = (*("jet",) * 5, "attn", "jet", "attn", "jet", "jet")  # after Jet-Nemotron's 28


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
  """The paper's setting, and what each preset changes of it; every other field has its default."""
  c = cli.defaults(config.Config(data=depo.DepoConfig(), model=config.ModelConfig(vocab_size=118)))
  c.model.update(embed_dim=512, mlp_dim=3008, blocks=JET, window=75)
  c.model.attention.update(num_heads=4, num_kv_heads=2, rope_theta=1e6, qk_norm=False, bias=True)
  c.model.fast.update(num_heads=4, key_dim=96, value_dim=256)
  c.model.fast.decay_init = (1 / 16, 1.0)  # or a window is forgotten before the answers come
  c.sleep.remat = "pass"
  c.train.update(steps=100_000, batch_size=128, steps_per_dispatch=50, log_every=50, eval_every=1000)
  c.train.update(save_every=1000, eval_sequences=512, eval_batch_size=128)

  plain = {"num_kv_heads": None, "rope_theta": 1e4, "qk_norm": True, "bias": False}  # the defaults again
  if preset == "small":
    c.data.update(max_nodes=25, max_hops=8, test_hops=(1, 2, 4, 8), context_length=100)
    c.model.update(embed_dim=256, mlp_dim=512, blocks=("attn", "gdn") * 2, window=50)
    c.model.attention.update(plain, num_heads=8)
    c.model.fast.update(num_heads=8, key_dim=64, value_dim=64)
    c.data.update(num_pairs=8, query_length=48)
    c.train.steps = 20_000
  elif preset in ("tiny", "mini", "smoke"):
    c.data.update(max_nodes=6, mini_vocab=8, max_name=1, max_hops=2, test_hops=(1, 2), num_pairs=3)
    c.data.update(context_length=12, query_length=12, sizes="largest")
    c.model.update(embed_dim=64, mlp_dim=128, blocks=("attn", "gdn"), window=12)
    c.model.attention.update(plain, num_heads=2, head_dim=32)
    c.model.fast.update(num_heads=1, key_dim=64, value_dim=64)
    c.sleep.update(remat="none", loops="unroll", num_passes=2)
    c.optim.update(muon_lr=1e-2, adam_lr=1e-3, newton_schulz_dtype="float32", weight_decay=0.0)
    c.train.update(steps=1000, steps_per_dispatch=10, eval_every=100, save_every=500)
    if preset == "mini":
      c.data.update(max_nodes=12, mini_vocab=16, max_hops=4, test_hops=(1, 2, 4), num_pairs=6)
      c.data.update(context_length=24, query_length=24)
      c.model.window = 24
      c.train.update(steps=3000, eval_every=250)
    elif preset == "smoke":
      c.model.update(embed_dim=16, mlp_dim=32)
      c.model.attention.update(num_heads=2, head_dim=8)
      c.model.fast.update(key_dim=16, value_dim=16)
      c.sleep.loops = "scan"
      c.train.update(steps=10, batch_size=16, steps_per_dispatch=5, log_every=5, eval_every=5, save_every=5)
      c.train.update(eval_sequences=64, eval_batch_size=32)
  elif preset != "paper":
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  c.model.vocab_size = depo.DepoConfig(**c.data.to_dict()).vocab_size
  return c


def sweep(preset: str, seeds: int = 1) -> dict[str, dict[str, object]]:
  """The runs of a preset: name -> what it changes, by dotted key."""
  return {f"n{n}_s{seed}": {"sleep.num_passes": n, "seed": seed} for seed in range(seeds) for n in (4, 2, 1)}
