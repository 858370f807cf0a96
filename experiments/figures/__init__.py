"""Figures of the experiments: which ones some runs allow, and those with the paper's numbers in them."""

import os
import pathlib
from collections.abc import Iterable, Sequence

from sleep_jax.experiments.figures import depo, gsm_infinite, memory, rule110
from sleep_jax.report import accuracy, changes, costs, load
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Run, RunError

EXPERIMENTS = (rule110.EXPERIMENT, depo.EXPERIMENT, gsm_infinite.EXPERIMENT, memory.EXPERIMENT)


def load_runs(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Run]:
  """`report.load.load_runs` that knows the experiments' names and letters."""
  return load.load_runs(paths, EXPERIMENTS)


def archive_finished(runs: Sequence[Run], folder: pathlib.Path) -> None:
  """Keeps each finished run as one file, NAME.jsonl, and says so."""
  for run in runs:
    if run.rows.get("done"):
      print(f"wrote {load.archive(run, folder)}")


def drawings(runs: Sequence[Run]) -> list[Drawing]:
  """The figures of accuracy that these runs allow, none if no run has been evaluated.

  Figure 2a for the tasks that N = 1 alone was run on, if they differ in their depth t; figure 2b for the
  paper's layout at t = 32; the plain curves for every other task; figures 3 and 4 for Depo and GSM-Infinite;
  one for each test of memory.
  """
  tasks: dict[tuple, list[Run]] = {}
  for run in runs:
    if run.evals:
      tasks.setdefault(run.task, []).append(run)
  rest = list(tasks.values())
  result = []
  plain = [members for members in rest if {r.num_passes for r in members} == {1}]
  if len({members[0].depth for members in plain} - {None}) > 1:
    result.append(rule110.figure_2a([r for members in plain for r in members]))
    rest = [members for members in rest if members not in plain]
  other = [members for members in rest if not rule110.on_paper_layout(members[0])]
  result += [rule110.figure_2b(members) for members in rest if rule110.on_paper_layout(members[0])]
  for number, members in enumerate(other, 1):
    name = f"demo_curves_{number}" if len(other) > 1 else "demo_curves"
    result.append(accuracy.demo_curves(members, name))
    if not any(r.accelerated for r in members) and all("cpu_s" in row for r in members for row in r.evals):
      result.append(accuracy.demo_curves(members, name.replace("curves", "compute"), by="cpu_s"))
  if depo.hops(runs):
    result.append(depo.figure_3(runs))
  if gsm_infinite.operations(runs):
    result.append(gsm_infinite.figure_4(runs))
  return result + [memory.figure(members) for members in memory.tasks(runs).values()]


def about_sleep(runs: Sequence[Run]) -> list[Drawing]:
  """The figures of what sleep does and costs, as far as the runs measured it."""
  result = []
  for draw in (changes.sleep_changes, costs.costs):
    try:
      result.append(draw(runs))
    except RunError:
      continue  # not measured: the page says so
  return result
