"""Tables of our problems beside the original's, as Markdown.

A cell is `ours / the original's`, each with its standard error; a star is a difference of more than four
standard errors, which chance brings once in 16,000.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sleep_jax.data.gsm_infinite.study import statistics
from sleep_jax.data.gsm_infinite.study.reading import Reading
from sleep_jax.data.gsm_infinite.study.statistics import FORMS, KINDS, Estimate

STAR = 4.0  # standard errors
LEAST = 50  # problems in a row; the error of fewer says little
WITH_NOISE = ("tokens", "words", "characters", "sentences", "N", "noise share", "tokens a sentence")
NAMES = ("names asked", "names needed")
CORE = ("S", "U", "chain", "majority", *(f"asked {kind}" for kind in KINDS))
ALL_FORMS = tuple(f"{role} {form}" for role in "SUN" for form in FORMS)
SUBSETS = {2: "medium", 3: "hard"}

Key = Callable[[Reading], Any]
Deviations = dict[str, float]  # what is compared -> standard errors between the two


def against_readings(ours: Sequence[Reading], by: str) -> tuple[str, Deviations]:
  """Compares ours with the original's sample of texts with noise, cut to the kinds of problems that ours has.

  Args:
    ours: readings of our problems.
    by: the columns: `operations`, or `cell` (d and mode).

  Returns:
    A table with a row for each statistic, and the deviations of all its cells.
  """
  kinds = {(r.op, r.depth, r.mode) for r in ours}
  theirs = [r for r in statistics.reference_readings() if (r.op, r.depth, r.mode) in kinds]
  key: Key = (lambda r: r.op) if by == "operations" else (lambda r: (r.depth, r.mode))
  left, right = _grouped(ours, key), _grouped(theirs, key)
  columns = sorted(right)
  heads = [f"op {c}" if by == "operations" else f"d = {c[0]}, {c[1]}" for c in columns]
  rows = [("problems", *(f"{len(left[c])} / {len(right[c])}" for c in columns))]
  found: Deviations = {}
  metrics = [*WITH_NOISE, *NAMES, *CORE, *(() if by == "operations" else ALL_FORMS)]
  for metric in metrics:
    cells = []
    for c, head in zip(columns, heads, strict=True):
      a, b = (statistics.estimate(side[c], metric) for side in (left, right))
      apart = statistics.deviations(left[c], right[c], metric)
      cells.append(_cell(a, b, apart))
      if a.value or b.value:
        found[f"{metric} at {head}"] = apart
    if any(cell != "–" for cell in cells):
      rows.append((metric, *cells))
  cells = []
  for c in columns:
    _, apart = statistics.answer_distance([r.answer for r in left[c]], [r.answer for r in right[c]])
    cells.append(f"{apart:+.1f}")
  rows.append(("answers: chi-squared, deviations from its mean", *cells))
  return _markdown(("", *heads), rows), found


def against_facts(ours: Sequence[Reading]) -> tuple[str, Deviations]:
  """Compares ours with values measured of the original for each d, mode and number of operations.

  Noise and length do not matter for these statistics.

  Returns:
    A table with a row for each kind of problem of which there are enough, and the deviations of its cells.
  """
  groups = _grouped(ours, lambda r: (SUBSETS[r.depth], r.mode, r.op))
  rows, found = [], {}
  for (subset, mode, op), readings in sorted(groups.items()):
    known = statistics.reference_facts()["core"].get(f"{subset} {mode}", {}).get(str(op), {})
    cells, apart = [], {}
    for metric in CORE:
      if metric not in known:
        cells.append("–")
        continue
      error, far = statistics.against_fact(metric, known[metric], readings)
      a, b = statistics.estimate(readings, metric), Estimate(known[metric], error)
      cells.append(_cell(a, b, far))
      if a.value or b.value:
        apart[f"{metric} at {subset}, {mode}, op {op}"] = far
    if known and len(readings) >= LEAST:
      found |= apart
      rows.append((f"{subset}, {mode}", op, len(readings), *cells))
  return _markdown(("", "op", "problems", *CORE), rows), found


def verdict(found: Deviations) -> str:
  """Summarises deviations: how many are large, how many would be by chance, and which they are."""
  expected = {2: 0.0455, 3: 0.0027, 4: 0.000063}
  over = {bound: [x for x in found.values() if x > bound] for bound in expected}
  counts = ", ".join(f"{len(over[x])} beyond {x} (by chance {expected[x] * len(found):.1f})" for x in over)
  largest = sorted(((x, name) for name, x in found.items() if x > 3), reverse=True)
  names = "; ".join(f"{name} {x:.1f}" for x, name in largest)
  return f"{len(found)} comparisons, standard errors apart: {counts}{f'. Beyond 3: {names}' if names else ''}"


def _grouped(readings: Sequence[Reading], key: Key) -> Mapping[Any, list[Reading]]:
  groups: dict[Any, list[Reading]] = collections.defaultdict(list)
  for r in readings:
    groups[key(r)].append(r)
  return groups


def _cell(a: Estimate, b: Estimate, apart: float) -> str:
  if not a.value and not b.value:
    return "–"
  return f"{a} / {b}{' *' if apart > STAR else ''}"


def _markdown(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
