"""How a gradient grows on its way back through the fast weights at random initialisation: a window, a pass.

    python -m experiments.stability --config=experiments/configs/rule110.py:fig2b --passes=1,2,4,8,16,32
    python -m experiments.stability --config=experiments/configs/rule110.py:fig2b --config.model.embed_std=4 \
      --seeds=3 --out=work/stability

For each N: the norm of the gradient of all weights, and the factors by which one window, one pass and the
first pass of a window multiply the norm of the gradient with respect to the fast weights. A factor well
above 1 means that clipping leaves little but the direction of the oldest windows. With --out also JSON lines,
Markdown and a figure.
"""

import json
import math
import tempfile
from typing import Any

import jax
from absl import flags

from sleep_jax import config, model, train
from sleep_jax.experiments import cli, tasks
from sleep_jax.report import stability as report
from sleep_jax.scoring import stability

CONFIG = cli.define_config_flag()
PASSES = flags.DEFINE_list("passes", ["1", "2", "4", "8", "16", "32"], "values of N")
SEEDS = flags.DEFINE_integer("seeds", 1, "seeds 0 .. SEEDS - 1 of weights and data", lower_bound=1)
SEQUENCES = flags.DEFINE_integer(
  "sequences", 16, "of the batch, at most those that the task gives", lower_bound=1
)
OUT = flags.DEFINE_string(
  "out", None, "folder for the results and the figure. Default: they are printed only"
)


def measure(values: dict[str, Any], passes: list[int], seed: int, sequences: int) -> list[dict[str, Any]]:
  """A row for each N, of weights and data drawn from one seed.

  Args:
    values: a config as nested plain data.
  """
  values = values | {"seed": seed}
  with tempfile.TemporaryDirectory() as folder:  # a tokenizer, if the task trains one
    cfg, task = tasks.open_task(values, folder)
    mesh = train.check_fits(cfg, task)
    with task.steps(cfg, train.optimization(cfg).one_step, mesh) as steps:
      segments, make = steps.sample()
      batch = jax.tree.map(lambda x: x[:sequences], make())
  weights = jax.jit(lambda: model.init(cfg.model, jax.random.split(jax.random.key(seed))[0]))()
  rows = []
  for n in passes:
    how = config.replace(cfg.sleep, num_passes=n, backprop_passes=None)
    growth = stability.gradient_growth(weights, batch, segments, cfg.model, how)
    rows.append(
      {
        "num_passes": n,
        "seed": seed,
        "gradient_norm": growth.total,
        "growth_a_window": growth.a_window,
        "growth_a_pass": growth.a_pass,
        "growth_first_pass": growth.first_pass,
        "by_window": list(growth.by_window),
        "by_pass": [list(norms) for norms in growth.by_pass],
      }
    )
  return rows


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  passes = cli.whole_numbers("passes", PASSES.value)
  config.check(bool(passes), "--passes", "needs at least one N")
  folder = None if OUT.value is None else cli.folder_to_write("out", OUT.value)
  rows = []
  for seed in range(SEEDS.value):
    rows += measure(values, passes, seed, SEQUENCES.value)
  text = report.table(rows)
  print(text)
  if folder is not None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
      json.dumps({k: None if isinstance(x, float) and math.isnan(x) else x for k, x in r.items()})
      for r in rows
    )
    (folder / "stability.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "stability.md").write_text(text + "\n", encoding="utf-8")
    for path in report.figure(rows).save(folder):
      print(f"wrote {path}")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
