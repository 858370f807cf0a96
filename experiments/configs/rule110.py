"""Rule 110: what a string of cells has become after t steps, asked when it is long evicted.

    python -m experiments.rule110 --config=experiments/configs/rule110.py:demo --workdir=work/rule110
    python -m experiments.sweep --config=experiments/configs/rule110.py:demo --workdir=work/demo --jobs=2

    tiny        2 strings of 6 cells, t = 1, 20 steps: seconds; proves only that the parts fit
    demo        2 strings of 12 cells, t = 6, 2 layers: minutes on 2 CPU cores. Expect N = 1 < 2 (README)
    demo_rates  the same with N = 1 at half and twice the learning rate (docs/results.md)
    fig2a       figure 2a of arXiv 2605.26099: N = 1; t = 4, 8, 10, 12, 14, 16; 40 M tokens. The paper:
                t = 4 and 8 are solved early, accuracy falls steeply as t grows
    fig2a_cpu   the same as CPU cores like it: 16 parts a batch, whose activations stay in the caches, loops
                written out, products of bfloat16 (worth it with AMX): about two hours of a core a run
    fig2b       figure 2b: t = 32; N = 1, 2, 3, 4; 5 B tokens; under an A6000-day a run in the paper. Not run
                yet; the paper: 10 %, 20 %, above 30 %, above 30 %

One run is one (t, N, seed): --config.data.rollout_steps, --config.sleep.num_passes, --config.seed. Compared
runs share their seed and so their data, in order. `sweep` lists the runs of a preset.
"""

from ml_collections import config_dict

from sleep_jax import config
from sleep_jax.data import rule110
from sleep_jax.experiments import cli

EXPERIMENT = "sleep_jax.experiments.rule110"
PRESETS = ("tiny", "demo", "demo_rates", "fig2a", "fig2a_cpu", "fig2b")
DEMO_STEPS = 3200  # of N = 1; the others take as many passes, and so about as much compute, in fewer steps
# Of N = 4. The others are run with so few as well: then all read the same tokens, and the rate falls for all.
FEWEST = DEMO_STEPS // 4


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
  """The paper's setting, and what each preset changes of it; every other field has its default."""
  c = cli.defaults(config.Config(data=rule110.Rule110Config(), model=config.ModelConfig(vocab_size=3)))
  c.model.fast.decay_init = (1 / 16, 1.0)  # or a window is forgotten before the answers come
  c.train.update(steps=800, batch_size=512, save_every=200)  # 40 M tokens

  if preset in ("fig2a", "fig2a_cpu"):
    c.data.rollout_steps = 4
    if preset == "fig2a_cpu":
      c.model.matmul_dtype, c.sleep.loops = "bfloat16", "unroll"
      c.train.update(microbatches=16, steps_per_dispatch=5, log_every=10, eval_every=20, save_every=20)
      c.train.update(eval_sequences=1024, eval_batch_size=128)
  elif preset == "fig2b":
    c.train.update(steps=98_000, eval_every=1000, save_every=1000, steps_per_dispatch=50, log_every=50)
  elif preset in ("demo", "demo_rates", "tiny"):
    c.data.update(num_strings=2, num_cells=12, rollout_steps=6)
    c.model.update(embed_dim=64, mlp_dim=128, blocks=("attn", "gdn"), window=12)
    c.model.attention.update(num_heads=2, head_dim=32)
    c.model.fast.update(num_heads=2, key_dim=32, value_dim=32)
    c.sleep.loops = "unroll"
    c.optim.update(muon_lr=1e-2, adam_lr=1e-3, newton_schulz_dtype="float32", weight_decay=0.0)
    c.train.update(steps=DEMO_STEPS, batch_size=128, log_every=50, eval_sequences=2048)
    if preset != "tiny":  # and two heads: `two_heads_cosine` of results/rule110/takeoff
      c.optim.update(warmup_share=1 / 8, decay_share=1 / 2)
    else:
      c.data.update(num_cells=6, rollout_steps=1)
      c.model.update(embed_dim=16, mlp_dim=32, window=6)
      c.model.attention.update(num_heads=2, head_dim=8)
      c.model.fast.update(num_heads=1, key_dim=16, value_dim=16)
      c.sleep.loops = "scan"
      c.train.update(steps=20, batch_size=16, steps_per_dispatch=5, log_every=5, eval_every=10, save_every=10)
      c.train.update(eval_sequences=256, eval_batch_size=128)
  else:
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  return c


def sweep(preset: str, seeds: int = 1) -> dict[str, dict[str, object]]:
  """The runs of a preset: name -> what it changes, by dotted key."""
  runs = {}
  for seed in range(seeds):
    if preset in ("fig2a", "fig2a_cpu"):
      for t in (4, 8, 10, 12, 14, 16):
        runs[f"t{t:02}_n1_s{seed}"] = {"data.rollout_steps": t, "seed": seed}
    elif preset == "fig2b":
      for n in (1, 2, 3, 4):
        runs[f"t32_n{n}_s{seed}"] = {"sleep.num_passes": n, "seed": seed}
    elif preset == "demo_rates":
      for rate in (5e-3, 2e-2):  # beside the demo's 1e-2
        runs[f"n1_lr{rate:g}_s{seed}"] = {"optim.muon_lr": rate, "seed": seed}
    else:
      for n in (4, 2, 1):
        changes = {"sleep.num_passes": n, "seed": seed}
        runs[f"n{n}_s{seed}"] = changes | ({"train.steps": DEMO_STEPS // n} if preset == "demo" else {})
        if preset == "demo" and DEMO_STEPS // n > FEWEST:
          runs[f"short_n{n}_s{seed}"] = changes | {"train.steps": FEWEST}
  return runs
