"""Tests of memory from JSON lines: a panel for each depth at each length, a curve an N, and a guess."""

from collections.abc import Sequence

from sleep_jax.report import panels
from sleep_jax.report.curves import by_step, constant
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Experiment, Run, RunError, is_whole

EXPERIMENT = Experiment("Memory", "data.depths")


def tasks(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """The runs of each task that have an evaluation."""
  found: dict[str, list[Run]] = {}
  for run in runs:
    task = run.get("data.task")
    if isinstance(task, str) and run.get("data.depths") is not None and sets([run]):
      found.setdefault(task, []).append(run)
  return found


def sets(runs: Sequence[Run]) -> list[tuple[int, int]]:
  """(depth, length) of every held-out set that any run was tested on, ascending."""
  asked = set()
  for run in runs:
    depths, lengths = run.get("data.depths"), run.get("data.lengths")
    if isinstance(depths, list) and isinstance(lengths, list):
      asked |= {(d, t) for d in depths for t in lengths if is_whole(d) and is_whole(t)}
  return sorted(of for of in asked if by_step(runs, f"{_name(*of)}_exact", scale=100.0, bounds=(0.0, 100.0)))


def _name(depth: int, length: int) -> str:
  return f"d{depth}_t{length}"


def figure(runs: Sequence[Run]) -> Drawing:
  """Right answers against steps, by depth, length and N.

  Raises:
    RunError: no run of a test of memory has an evaluation, or they are of several tasks.
  """
  found = tasks(runs)
  if len(found) != 1:
    said = f"the runs are of several tasks ({', '.join(sorted(found))})" if found else "no run was tested"
    raise RunError(f"the figure of a test of memory needs runs of one task: {said}")
  [(task, members)] = found.items()
  names = {_name(*of): f"depth {of[0]}, {of[1]} tokens" for of in sets(members)}
  return panels.draw(
    f"memory_{task}",
    f"Test of memory, {task}: right answers",
    "set",
    [panels.Group(name, title) for name, title in names.items()],
    [
      panels.Measure(
        "exact_percent", "right answers (%)", "{group}_exact", scale=100.0, top=101.5,
        baselines={
          "a guess": lambda name: constant(members, f"{name}_chance"),
          "commonest answer": lambda name: constant(members, f"{name}_majority"),
        },
      )
    ],
    members,
    held_out="held-out answers",
  )  # fmt: skip
