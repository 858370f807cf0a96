"""Tests finished runs as they are not trained: with other N, on other held-out sets, at other depths.

    python -m experiments.evaluate --run=work/n2 --config.sleep.num_passes=4
    python -m experiments.evaluate --run='work/demo/*' --passes=1,2,4,8 --out=work/demo/passes
    python -m experiments.evaluate --run=work/n2 --config.data.rollout_steps=8
    --config.train.eval_sequences=16384

Takes runs of any experiment of this package, finished or not; their newest checkpoint counts, and nothing is
written into their folders. --config.GROUP.FIELD=VALUE changes what a run was trained with; the weights must
still fit. Prints a line each, then a table; with --out also writes both as JSON lines and Markdown, and the
figure of the accuracy over N at test time.
"""

import glob
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from sleep_jax import config, model, params, train
from sleep_jax.experiments import cli, config_file, tasks
from sleep_jax.pretrained import from_run
from sleep_jax.report import passes, tables
from sleep_jax.scoring import by_group

CONFIG = cli.define_config_flag()
RUNS = flags.DEFINE_string("run", None, "workdirs, with commas between them or as a pattern: 'work/demo/*'")
PASSES = flags.DEFINE_list("passes", [], "values of N at test time, 1,2,4. Default: the N of the run")
STEP = flags.DEFINE_integer("step", None, "which saved step. Default: the newest", lower_bound=1)
OUT = flags.DEFINE_string(
  "out", None, "folder for the results and the figure. Default: they are printed only"
)
RULES = flags.DEFINE_string(
  "rules", None, "a config file that registers the rules of the runs' own blocks; it is executed"
)


def folders(text: str) -> list[pathlib.Path]:
  """The workdirs that --run names, each once, in order.

  Raises:
    ConfigError: if a part of it names none.
  """
  found: dict[pathlib.Path, None] = {}
  for part in filter(None, text.split(",")):
    literal = pathlib.Path(part)
    matches = [literal] if literal.exists() else [pathlib.Path(p) for p in sorted(glob.glob(part))]
    runs = [path for path in matches if from_run.is_run(path)]
    config.check(bool(runs), "--run", f"{part} is no workdir of a run, and matches none")
    found |= dict.fromkeys(runs)
  config.check(bool(found), "--run", "names no workdir of a run")
  return list(found)


def evaluate(
  folder: pathlib.Path, changes: dict[str, str | None], numbers: list[int], step: int | None
) -> Iterator[tuple[dict[str, Any], str]]:
  """A row for each N, and the line about it.

  Args:
    folder: workdir of the run.
    changes: of its config, as they were typed.
    numbers: values of N; none: the run's own, or what `changes` says.
    step: which saved step. None: the newest.

  Yields:
    run, seed, trained_passes, num_passes, step and the scalars of the evaluation; and a line with its score.

  Raises:
    ConfigError: if the changed config does not fit, or is another model's than the weights.
    What `from_run.load_run` raises.
  """
  run = from_run.load_run(folder, step=step)
  values = config.to_dict(run.config)
  tokenizer = folder / "tokenizer.json"
  if "tokenizer" in values["data"] and not values["data"]["tokenizer"] and tokenizer.is_file():
    values["data"]["tokenizer"] = str(tokenizer)  # the one that it was trained with, whatever else is changed
  values["train"]["init_from"] = None  # the weights are here
  before, _ = tasks.open_task(values, folder)
  typed = cli.defaults(before)
  changed = config_file.change(typed, changes)
  values = typed.to_dict()
  for n in numbers or [values["sleep"]["num_passes"]]:
    values["sleep"] |= {"num_passes": n, "backprop_passes": None}
    cfg, task = tasks.open_task(values, folder)
    _check_same_model(folder, run.weights, cfg)
    mesh = train.check_fits(cfg, task)
    with task.steps(cfg, train.optimization(cfg).one_step, mesh) as steps:
      scores = steps.evaluation()(run.weights)
    row = {
      "run": str(folder),
      "seed": cfg.seed,
      "trained_passes": before.sleep.num_passes,
      "num_passes": n,
      "step": run.step,
      **{f"config.{name}": value for name, value in changed.items()},
      **{name: x for name, x in scores.items() if isinstance(x, (int, float))},
    }
    if "low" not in row:
      right = row["exact"] * cfg.train.eval_sequences
      row["low"], row["high"] = by_group.wilson(right, cfg.train.eval_sequences)
    yield (
      row,
      f"{folder}, trained with N = {before.sleep.num_passes}, asleep with N = {n}: {task.score(scores)}",
    )


def _check_same_model(folder: pathlib.Path, weights: model.Params, cfg: config.Config) -> None:
  """Raises `ConfigError` with the first weight that the changed config declares otherwise."""
  declared = {
    params.name_of(path): w.shape
    for path, w in jax.tree_util.tree_leaves_with_path(model.declare(cfg.model), is_leaf=params.is_weight)
  }
  held = {params.name_of(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(weights)}
  for name in sorted(declared.keys() | held.keys()):
    config.check(
      declared.get(name) == held.get(name),
      "--config.model",
      f"is another model than that of {folder}: {name} is {declared.get(name, 'absent')},"
      f" the run has {held.get(name, 'none')}",
    )


COLUMNS = {
  "run": "run",
  "trained_passes": "trained with N",
  "num_passes": "tested with N",
  "step": "step",
  "exact": "exact",
  "interval": "95 %",
  "const_exact": "best constant",
}


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as Markdown; the columns of groups (hops, operations) where every row has them."""
  groups = [
    k for k in rows[0] if k.endswith("_exact") and k != "const_exact" and all(k in row for row in rows)
  ]
  lines = []
  for row in rows:
    shown = {
      **{
        title: str(row[name])
        for name, title in COLUMNS.items()
        if name in row and isinstance(row[name], (str, int))
      },
      "exact": tables.percent(row["exact"]),
      "95 %": f"{tables.percent(row['low'])} - {tables.percent(row['high'])}",
      "best constant": tables.percent(row["const_exact"]) if "const_exact" in row else tables.MISSING,
      **{name.removesuffix("_exact"): tables.percent(row[name]) for name in groups},
    }
    lines.append(shown)
  names = list(lines[0])
  head = [f"| {' | '.join(names)} |", f"|{'|'.join(['---'] * len(names))}|"]
  return "\n".join(head + [f"| {' | '.join(line[name] for name in names)} |" for line in lines])


def save(rows: list[dict[str, Any]], folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes evaluation.jsonl, evaluation.md and the figure; the paths."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / "evaluation.jsonl", folder / "evaluation.md"]
  paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  paths[1].write_text(table(rows) + "\n", encoding="utf-8")
  return paths + passes.over_test_passes(rows).save(folder)


def main() -> int:
  if RULES.value is not None:
    config_file.load(RULES.value)
  where, numbers = folders(cli.required("run", RUNS.value)), cli.whole_numbers("passes", PASSES.value)
  config.check(
    not (numbers and "sleep.num_passes" in CONFIG.texts),
    "--passes",
    "and --config.sleep.num_passes say the same thing; give one of them",
  )
  if OUT.value is not None:
    out = cli.folder_to_write("out", OUT.value)
    config.check(
      not from_run.is_run(out), "--out", f"{out} is the workdir of a run, nothing is written there"
    )
  rows = []
  for folder in where:
    for row, line in evaluate(folder, CONFIG.texts, numbers, STEP.value):
      print(line, flush=True)
      rows.append(row)
  print(f"\n{table(rows)}")
  if OUT.value is not None:
    for path in save(rows, pathlib.Path(OUT.value)):
      print(f"wrote {path}")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
