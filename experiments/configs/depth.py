"""Does the gain from sleep grow with the depth of reasoning? The demo of Rule 110 at other depths.

    python -m experiments.sweep --config=experiments/configs/depth.py:demo --workdir=work/depth --seeds=5
    python -m experiments.depth --runs='work/depth/*' --out=work/depth_figures

    demo  t = 1, 2, 3, 4, 5, 8 with N = 4, 2 and 1: 150 runs of 1 to 4 CPU minutes. t = 6 is `make demo`

The strings, the model and the learning rate are the same at every depth, and so is what has to be remembered;
N = 1 takes 3,200 steps, N = 2 half and N = 4 a quarter of them, so that all make as many passes. N = 1 and 2
are also run with the steps of N = 4 (`short_`), so that all read as many tokens. At t = 1 and 2, which all
solve in a tenth of that, they take a quarter. One seed after the other, so that a sweep that is stopped
compares equal seeds.
"""

from ml_collections import config_dict

from sleep_jax.experiments.configs import rule110

EXPERIMENT = rule110.EXPERIMENT
PRESETS = ("demo",)
EASY = 2  # the deepest t that is solved soon
DEPTHS = (1, 2, 4, 8, 3, 5)  # in the order of what one wants to know first


def get_config(preset: str = "demo") -> config_dict.ConfigDict:
  """The demo's config."""
  if preset not in PRESETS:
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  return rule110.get_config(preset)


def sweep(preset: str, seeds: int = 5) -> dict[str, dict[str, object]]:
  """The runs: name -> what it changes, by dotted key."""
  del preset
  runs = {}
  for seed in range(seeds):
    for t in DEPTHS:
      most = rule110.DEMO_STEPS // (4 if t <= EASY else 1)
      for n in (4, 2, 1):
        changes = {"data.rollout_steps": t, "sleep.num_passes": n, "seed": seed}
        runs[f"t{t}_n{n}_s{seed}"] = changes | {"train.steps": most // n}
        if n < 4:
          runs[f"short_t{t}_n{n}_s{seed}"] = changes | {"train.steps": most // 4}
  return runs
