"""Does the gain from sleep grow with the depth of reasoning? The demo of Rule 110 at other depths.

    python -m experiments.sweep --config=experiments/configs/depth.py:demo --workdir=work/depth --seeds=5
    python -m experiments.depth --runs='work/depth/*' --out=work/depth_figures

    demo         t = 1, 2, 3, 4, 5, 8 with N = 4, 2 and 1: 150 runs of 1 to 4 CPU minutes. t = 6: `make demo`
    four_blocks  twice the blocks (attention and GDN, twice, as in the paper) at t = 6, 8 and 10, with N = 1
                 for 1,600 and 3,200 steps, N = 2 and 4 for 1,600: 60 runs of 4 to 14 CPU minutes

The strings, the model and the learning rate are the same at every depth, and so is what has to be remembered;
N = 1 takes 3,200 steps, N = 2 half and N = 4 a quarter of them, so that all make as many passes. N = 1 and 2
are also run with the steps of N = 4 (`short_`), so that all read as many tokens. At t = 1 and 2, which all
solve in a tenth of that, they take a quarter. One seed after the other, so that a sweep that is stopped
compares equal seeds.

With one fast-weight block and one pass, nothing that writes into S has read S (tests/test_promises.py), so
that a window cannot be written beside what S already holds. A second such block, or a second pass, has read
it: `four_blocks` asks what passes are worth where blocks have that already.
"""

from ml_collections import config_dict

from sleep_jax.experiments.configs import rule110

EXPERIMENT = rule110.EXPERIMENT
PRESETS = ("demo", "four_blocks")
EASY = 2  # the deepest t that is solved soon
DEPTHS = (1, 2, 4, 8, 3, 5)  # in the order of what one wants to know first
DEEP = (8, 6, 10)  # of `four_blocks`, likewise


def get_config(preset: str = "demo") -> config_dict.ConfigDict:
  """The demo's config, and its blocks twice for `four_blocks`."""
  if preset not in PRESETS:
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  c = rule110.get_config("demo")
  if preset == "four_blocks":
    c.model.blocks = c.model.blocks * 2
  return c


def sweep(preset: str, seeds: int = 5) -> dict[str, dict[str, object]]:
  """The runs: name -> what it changes, by dotted key."""
  runs = {}
  if preset == "four_blocks":
    half = rule110.DEMO_STEPS // 2
    for seed in range(seeds):
      for t in DEEP:
        for prefix, n, steps in (("", 4, half), ("", 2, half), ("half_", 1, half), ("", 1, 2 * half)):
          changes = {"data.rollout_steps": t, "sleep.num_passes": n, "seed": seed}
          runs[f"{prefix}t{t}_n{n}_s{seed}"] = changes | {"train.steps": steps}
    return runs
  for seed in range(seeds):
    for t in DEPTHS:
      most = rule110.DEMO_STEPS // (4 if t <= EASY else 1)
      for n in (4, 2, 1):
        changes = {"data.rollout_steps": t, "sleep.num_passes": n, "seed": seed}
        runs[f"t{t}_n{n}_s{seed}"] = changes | {"train.steps": most // n}
        if n < 4:
          runs[f"short_t{t}_n{n}_s{seed}"] = changes | {"train.steps": most // 4}
  return runs
