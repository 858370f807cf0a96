"""How long several runs that share some cores will still take, from how far each of them is."""

import dataclasses


@dataclasses.dataclass
class Ledger:
  """What one run has done and what it has cost so far, in seconds of one core's share.

  Attributes:
    work: all of its work, in any unit that is the same for all runs.
    steps: all of its steps, over which the work is spread evenly.
    running: whether it has begun and not ended.
    ended: whether it is over.
    step: its last known step.
    since: the step from which `stepping` counts; None before the first one.
    starting, stepping: what it cost before and after that step.
  """

  work: float
  steps: int
  running: bool = False
  ended: bool = False
  step: int = 0
  since: int | None = None
  starting: float = 0.0
  stepping: float = 0.0

  def spend(self, seconds: float) -> None:
    """Books some time."""
    if self.since is None:
      self.starting += seconds
    else:
      self.stepping += seconds

  def reach(self, step: int) -> None:
    """Notes a step; the first one ends the start."""
    self.step = step
    if self.since is None:
      self.since = step

  @property
  def share(self) -> float:
    """How much of its work is done, 0 to 1."""
    return 1.0 if self.ended else min(1.0, self.step / self.steps)


def done_share(runs: list[Ledger]) -> float:
  """How much of all work is done, 0 to 1."""
  return sum(r.work * r.share for r in runs) / sum(r.work for r in runs)


def remaining_s(runs: list[Ledger], jobs: int) -> float | None:
  """Seconds until all runs have ended, `jobs` cores being busy all the time; None before anything is known.

  What a unit of work costs is taken from the steps that were timed, what a start costs from the starts. The
  longest run bounds the answer: no two cores can share it.
  """
  timed = [r for r in runs if r.stepping and r.since is not None and r.step > r.since]
  if not timed:
    return None
  pace = sum(r.stepping for r in timed) / sum(r.work * (r.step - r.since) / r.steps for r in timed)
  started = [r.starting for r in runs if r.since is not None]
  start = sum(started) / len(started)
  left = [
    pace * r.work * (1 - r.share) + (max(0.0, start - r.starting) if r.since is None else 0.0)
    for r in runs
    if not r.ended
  ]
  return max(sum(left) / jobs, max(left)) if left else 0.0
