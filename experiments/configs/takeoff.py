"""When does a run take off? The demo of Rule 110 with one setting changed at a time, ten seeds each.

    python -m experiments.sweep --config=experiments/configs/takeoff.py:demo --workdir=work/takeoff --seeds=10
    python -m experiments.takeoff --runs='work/takeoff/*' --out=work/takeoff_figures

    demo  N = 4, 2 and 1 with as many passes over the data each; SETTINGS says what is changed of `plain`: the
          demo as it was before this study, with a constant learning rate and one wide head of fast weights

One seed after the other, all settings of a seed, so that a sweep that is stopped compares equal seeds.
"""

from ml_collections import config_dict

from sleep_jax.experiments.configs import rule110

EXPERIMENT = rule110.EXPERIMENT
PRESETS = ("demo",)
STEPS = rule110.DEMO_STEPS


def _heads(heads: int, width: int) -> dict[str, int]:
  return {"model.fast.num_heads": heads, "model.fast.key_dim": width, "model.fast.value_dim": width}


# Name -> number of steps -> what it changes of `plain`, by dotted key.
SETTINGS = {
  "plain": lambda steps: {},
  "embed2": lambda steps: {"model.embed_std": 2.0},
  "embed4": lambda steps: {"model.embed_std": 4.0},
  "embed_norm": lambda steps: {"model.embed_norm": True},
  "residual_half": lambda steps: {"model.residual_scale": 0.5},  # 1 / sqrt(2 blocks x 2 additions)
  "residual_passes": lambda steps: {"model.residual_scale": (4 * STEPS / steps) ** -0.5},  # the same by N
  "short_memory": lambda steps: {"model.fast.decay_init": (1.0, 16.0)},
  "long_memory": lambda steps: {"model.fast.decay_init": (1 / 64, 1 / 4)},
  "warmup": lambda steps: {"optim.warmup_share": 1 / 8},
  "cosine": lambda steps: {"optim.warmup_share": 1 / 8, "optim.decay_share": 1 / 2},
  "embed_norm_cosine": lambda steps: {"model.embed_norm": True} | SETTINGS["cosine"](steps),
  "long_memory_cosine": lambda steps: SETTINGS["long_memory"](steps) | SETTINGS["cosine"](steps),
  "two_heads_cosine": lambda steps: _heads(2, 32) | SETTINGS["cosine"](steps),
  "four_heads_cosine": lambda steps: _heads(4, 16) | SETTINGS["cosine"](steps),
  "four_wide_heads_cosine": lambda steps: _heads(4, 32) | SETTINGS["cosine"](steps),
  "two_attention_cosine": lambda steps: (
    {"model.blocks": ("attn", "attn", "gdn")} | SETTINGS["two_heads_cosine"](steps)
  ),
  "three_blocks_cosine": lambda steps: (
    {"model.blocks": ("attn", "gdn", "gdn")} | SETTINGS["two_heads_cosine"](steps)
  ),
  "four_blocks_cosine": lambda steps: (
    {"model.blocks": ("attn", "gdn") * 2} | SETTINGS["two_heads_cosine"](steps)
  ),
  "half_rate": lambda steps: {"optim.muon_lr": 5e-3},
  "average": lambda steps: {"optim.average": 0.99},
  "last_pass": lambda steps: {"sleep.backprop_passes": 1},
  "curriculum": lambda steps: {"data.curriculum_steps": steps // 2},
}
# With one pass the first is "plain", the second "residual_half".
ALIKE = ("last_pass", "residual_passes")


def get_config(preset: str = "demo") -> config_dict.ConfigDict:
  """The config that is called `plain`."""
  if preset not in PRESETS:
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  c = rule110.get_config(preset)
  c.optim.update(warmup_share=0.0, decay_share=0.0)
  c.update_from_flattened_dict(_heads(1, 64))
  return c


def sweep(preset: str, seeds: int = 10) -> dict[str, dict[str, object]]:
  """The runs: name -> what it changes, by dotted key."""
  del preset
  runs = {}
  for seed in range(seeds):
    for name, changes in SETTINGS.items():
      for n in (4, 2, 1):
        if name in ALIKE and n == 1:
          continue
        steps = STEPS // n
        chosen = {"sleep.num_passes": n, "train.steps": steps, "seed": seed}
        runs[f"{name}_n{n}_s{seed}"] = chosen | changes(steps)
  return runs
