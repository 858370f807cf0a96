"""Statistics of problems with their sampling errors, beside those of the original generator.

Statistics of texts come from `reading.read_problem`, on both sides. The original is known from two files:

    reference_readings.jsonl   readings of the 319 solvable problems of its sample with noise
    reference.json             measured values without noise: of 400 problems a row, of 8,000 in `large`
"""

import collections
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sleep_jax.data.gsm_infinite.study.reading import Reading

HERE = pathlib.Path(__file__).parent
_FINE = (
  "S sum",
  "S difference",
  "S literal with two",
  "S many",
  "U sum",
  "U difference",
  "U literal with two",
  "U many",
)
FACT_PROBLEMS = 400  # in a row of reference.json
KINDS = ("total", "product", "average", "count")
FORMS = (
  "literal", "copy", "times one", "plus one", "sum", "difference", "literal with two", "many", "hidden",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean or share with its standard error."""

  value: float
  error: float

  def __str__(self) -> str:
    digits = 3 if abs(self.value) < 1 else 2 if abs(self.value) < 10 else 1 if abs(self.value) < 1000 else 0
    return f"{self.value:.{digits}f}±{self.error:.{digits}f}"


# Name -> (numerator, denominator) for one problem; the statistic is the quotient of their sums.
METRICS: dict[str, Callable[[Reading], tuple[float, float]]] = {
  "tokens": lambda r: (r.tokens, 1),
  "words": lambda r: (r.words, 1),
  "characters": lambda r: (r.characters, 1),
  "sentences": lambda r: (r.sentences, 1),
  **{role: lambda r, role=role: (r.roles.get(role, 0), 1) for role in "SUN"},
  "chain": lambda r: (r.chain, 1),
  "noise share": lambda r: (r.roles.get("N", 0), r.sentences),
  "tokens a sentence": lambda r: (r.tokens, r.sentences),
  "names asked": lambda r: (r.names_asked, r.roles.get("N", 0)),
  "names needed": lambda r: (r.names_needed, r.roles.get("N", 0)),
  "U circular": lambda r: (r.circular, r.roles.get("U", 0)),
  **{f"asked {kind}": lambda r, kind=kind: (r.asked == kind, 1) for kind in KINDS},
  **{
    f"{role} {form}": lambda r, role=role, form=form: (r.forms.get(f"{role} {form}", 0), r.roles.get(role, 0))
    for role in "SUN"
    for form in FORMS
  },
}


def estimate(readings: Sequence[Reading], metric: str) -> Estimate:
  """Estimates one of `METRICS`, or `majority`: the share of the commonest answer, which a constant scores."""
  if metric == "majority":
    share = collections.Counter(r.answer for r in readings).most_common(1)[0][1] / len(readings)
    return Estimate(share, math.sqrt(share * (1 - share) / len(readings)))
  above, below = np.array([METRICS[metric](r) for r in readings], float).T
  if not below.sum():
    return Estimate(0.0, 0.0)
  value = above.sum() / below.sum()
  return Estimate(float(value), _spread(above - value * below) * math.sqrt(len(above)) / float(below.sum()))


def deviations(ours: Sequence[Reading], theirs: Sequence[Reading], metric: str) -> float:
  """Returns the standard errors between two samples, by the error that both have if their law is the same."""
  if metric == "majority":
    one, other = estimate(ours, metric), estimate(theirs, metric)
    share = (one.value * len(ours) + other.value * len(theirs)) / (len(ours) + len(theirs))
    error = math.sqrt(share * (1 - share) * (1 / len(ours) + 1 / len(theirs)))
    return abs(one.value - other.value) / error if error else 0.0
  pairs = [np.array([METRICS[metric](r) for r in side], float).T for side in (ours, theirs)]
  above, below = np.concatenate(pairs, axis=1)
  if not all(side[1].sum() for side in pairs):
    return 0.0
  value = above.sum() / below.sum()
  error = _spread(above - value * below) * math.hypot(*(math.sqrt(len(b)) / b.sum() for _, b in pairs))
  apart = abs(pairs[0][0].sum() / pairs[0][1].sum() - pairs[1][0].sum() / pairs[1][1].sum())
  return apart / error if error else 0.0


def _spread(residuals: np.ndarray) -> float:
  return float(np.sqrt(np.sum(residuals**2) / max(len(residuals) - 1, 1)))


def answer_distance(ours: Sequence[object], theirs: Sequence[object]) -> tuple[float, float]:
  """Compares the distributions of two samples of answers.

  Returns:
    Chi-squared over the answers that are expected at least five times on either side, the rest together; and
    its deviation from its mean, the degrees of freedom, in standard deviations.
  """
  a, b = collections.Counter(ours), collections.Counter(theirs)
  total = len(ours) + len(theirs)
  smaller = min(len(ours), len(theirs)) / total
  common = [x for x in a.keys() | b.keys() if (a[x] + b[x]) * smaller >= 5]
  rows = [(a[x], b[x]) for x in common]
  rows.append((len(ours) - sum(x for x, _ in rows), len(theirs) - sum(y for _, y in rows)))
  rows = [(x, y) for x, y in rows if x + y]
  chi = 0.0
  for x, y in rows:
    for counted, size in ((x, len(ours)), (y, len(theirs))):
      expected = (x + y) * size / total
      chi += (counted - expected) ** 2 / expected
  freedom = max(len(rows) - 1, 1)
  return chi, (chi - freedom) / math.sqrt(2 * freedom)


@functools.cache
def reference_readings() -> tuple[Reading, ...]:
  """Returns the original's sample with noise: 40 problems for each number of operations; all d and modes."""
  lines = HERE.joinpath("reference_readings.jsonl").read_text(encoding="utf-8").splitlines()
  return tuple(Reading(**json.loads(line)) for line in lines)


@functools.cache
def reference_facts() -> dict[str, dict[str, dict[str, Any]]]:
  """Returns measured values of the original: `core`, `large` by `subset mode` and op; `forms` of all ops."""
  return json.loads(HERE.joinpath("reference.json").read_text(encoding="utf-8"))


def against_fact(
  metric: str, value: float, readings: Sequence[Reading], num: int = FACT_PROBLEMS
) -> tuple[float, float]:
  """Compares a value measured of `num` problems of the original with ours.

  Returns:
    The standard error of the value, from the spread of ours and its rounding; and the standard errors between
    the two.
  """
  ours = estimate(readings, metric)
  step = 0.1 if metric == "U" else 0.001 if metric in _FINE else 0.01
  if metric == "majority" or metric.startswith("asked"):
    share = (ours.value * len(readings) + value * num) / (len(readings) + num)
    sampled = math.sqrt(share * (1 - share) / num)
    own = math.sqrt(share * (1 - share) / len(readings))
  else:
    sampled, own = ours.error * math.sqrt(len(readings) / num), ours.error
  error = math.hypot(sampled, step / math.sqrt(12))
  return error, abs(ours.value - value) / math.hypot(error, own)


def as_json(r: Reading) -> str:
  """Returns a reading as a line of `reference_readings.jsonl`."""
  return json.dumps(dataclasses.asdict(r), separators=(",", ":"))
