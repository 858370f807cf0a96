"""What makes several runs one curve: settings that differ in the seed alone, their mean and its interval."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sleep_jax.report import intervals
from sleep_jax.report.load import Run, flatten, is_number

# Settings that cannot move a curve: how often one looks, and how XLA is asked for the same numbers.
NEUTRAL = frozenset((
  *("seed", "sleep.num_passes", "sleep.remat", "sleep.loops", "model.fast.kernel", "mesh.data", "mesh.model"),
  "model.attention.implementation",
  *("train.log_every", "train.eval_every", "train.save_every"),
  *("train.steps_per_dispatch", "train.eval_batch_size", "train.keep_checkpoints"),
))  # fmt: skip


def settings(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
  """Groups runs that differ in nothing but the seed: `(label, runs)`, in the order of `runs`.

  A label names N and whatever else tells the groups apart ("N = 1, Muon lr 0.01"), so that nothing
  that was changed beside N can hide in a curve. Unequal `train.steps` are named only where labels would
  otherwise be the same: elsewhere the end of the curve shows them.
  """
  flat = {id(r): {k: v for k, v in flatten(r.config).items() if k not in NEUTRAL} for r in runs}
  groups: dict[tuple, list[Run]] = {}
  for run in runs:
    groups.setdefault((run.num_passes, tuple(sorted(flat[id(run)].items()))), []).append(run)
  seen = [flat[id(r)] for r in runs]
  varying = {k for values in seen for k, v in values.items() if any(other.get(k) != v for other in seen)}

  def label(run: Run, keys: Iterable[str]) -> str:
    phrases = (_phrase(run, k, flat[id(run)].get(k, "none")) for k in sorted(keys))
    return ", ".join([f"N = {run.num_passes}", *phrases])

  short = [label(members[0], varying - {"train.steps"}) for members in groups.values()]
  full = [label(members[0], varying) for members in groups.values()]
  names = [f if short.count(s) > 1 else s for s, f in zip(short, full, strict=True)]
  return list(zip(names, groups.values(), strict=True))


def _phrase(run: Run, key: str, value: str) -> str:
  if key == run.experiment.field and run.experiment.letter:
    return f"{run.experiment.letter} = {value}"
  phrases = {
    "train.steps": f"{value} steps",
    "optim.muon_lr": f"Muon lr {value}",
    "train.init_from": f"from {Path(value).name}",
  }
  return phrases.get(key, f"{key.rpartition('.')[2]} {value}")


@dataclasses.dataclass(frozen=True)
class Curve:
  """Runs that differ in their seed alone, at the points where all of them were evaluated.

  Attributes:
    label: the setting's.
    runs: its runs.
    x: where, ascending: tokens, CPU seconds or steps.
    mean: over the runs.
    low, high: the mean's 95 % interval over the seeds; with one seed, the interval that its evaluations
      carry for their held-out set; NaN where there is neither.
    seeds: the values of each run, in the order of `runs`.
  """

  label: str
  runs: tuple[Run, ...]
  x: tuple[float, ...]
  mean: tuple[float, ...]
  low: tuple[float, ...]
  high: tuple[float, ...]
  seeds: tuple[tuple[float, ...], ...]

  @property
  def num_passes(self) -> int | None:
    """N."""
    return self.runs[0].num_passes

  @property
  def has_interval(self) -> bool:
    """Whether every point has its interval."""
    return not any(map(math.isnan, (*self.low, *self.high)))


def curves(runs: Sequence[Run], by: str = "tokens") -> list[Curve]:
  """Exact accuracy in per cent, one curve a setting; runs without an evaluation are left out.

  Args:
    by: what x is: `tokens`, or `cpu_s`, CPU seconds on average over the runs (NaN where not measured).
  """

  def points(run: Run) -> dict[Any, dict[str, Any]]:
    return {row["tokens"]: row for row in run.evals}

  drawn = grouped(runs, points, "exact", scale=100.0, bounds=(0.0, 100.0))
  if by == "tokens":
    return drawn
  result = []
  for curve in drawn:
    rows = [points(r) for r in curve.runs]
    x = (statistics.fmean(_value(p[tokens], by) for p in rows) for tokens in curve.x)
    result.append(dataclasses.replace(curve, x=tuple(x)))
  return result


def by_step(runs: Sequence[Run], key: str, *, scale: float, bounds: tuple[float, float]) -> list[Curve]:
  """What the evaluations measured under a key against training steps, one curve a setting."""
  return grouped(
    runs,
    lambda r: {row["step"]: row for row in r.rows.get("eval", []) if is_number(row.get(key))},
    key,
    scale=scale,
    bounds=bounds,
  )


def grouped(
  runs: Sequence[Run],
  points: Callable[[Run], dict[Any, dict[str, Any]]],
  key: str,
  *,
  scale: float,
  bounds: tuple[float, float],
) -> list[Curve]:
  """Curves of what `points` (run -> x -> eval row) has under `key`, times `scale`.

  A point needs an evaluation of every seed: a mean whose members change on the way would show steps
  that no run took. Seeds without a common evaluation become a curve each.
  """
  result = []
  prefix = key.removesuffix("exact") if key.endswith("exact") else None  # rates carry `low` and `high`
  for label, members in settings(runs):
    rows = {id(r): points(r) for r in members}
    members = [r for r in members if rows[id(r)]]
    if not members:
      continue
    together = set.intersection(*(set(rows[id(r)]) for r in members))
    parts = [(label, members)] if together else [(f"{label}, seed {r.seed}", [r]) for r in members]
    for name, part in parts:
      x = sorted(set.intersection(*(set(rows[id(r)]) for r in part)))
      seeds = [tuple(scale * rows[id(r)][at][key] for at in x) for r in part]
      if len(part) > 1:
        ranges = [intervals.of_mean(at, *bounds) for at in zip(*seeds, strict=True)]
      elif prefix is not None:
        of = rows[id(part[0])]
        ranges = [tuple(scale * _value(of[at], prefix + end) for end in ("low", "high")) for at in x]
      else:
        ranges = [(math.nan, math.nan)] * len(x)
      low, high = zip(*ranges, strict=True)
      mean = tuple(map(statistics.fmean, zip(*seeds, strict=True)))
      result.append(Curve(name, tuple(part), tuple(x), mean, low, high, tuple(seeds)))
  return result


def _value(row: dict[str, Any], key: str) -> float:
  value = row.get(key)
  return value if is_number(value) else math.nan


def constant(runs: Iterable[Run], key: str = "const_exact") -> float | None:
  """Per cent that the best constant answer gets, as the runs measured it on their held-out sets (mean)."""
  values = [r.last("eval").get(key) for r in runs]
  values = [100 * v for v in values if is_number(v)]
  return sum(values) / len(values) if values else None
