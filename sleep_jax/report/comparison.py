"""The small table that compares N: after the same data and after the same compute, each seed shown.

Passes asleep stand for compute: they are the same on every machine, and CPU seconds stand beside them.
"""

import statistics
from collections.abc import Sequence

from sleep_jax.report import intervals
from sleep_jax.report.claims import Standing, standings
from sleep_jax.report.curves import constant
from sleep_jax.report.load import Run, is_number
from sleep_jax.report.tables import MISSING, amount, budgets, milliseconds, reached, seconds, spread

Table = tuple[list[str], list[list[str]]]  # headers; rows of cells, the first one their name


def comparison(runs: Sequence[Run]) -> Table:
  """Exact accuracy of each N after the same tokens, and after the same passes asleep (steps times N).

  Of each N the best setting counts (`claims.standings`), a shorter run at its end or a longer one on its way.
  Budgets are the largest that a run of every N reached. Nothing is interpolated.

  Args:
    runs: of one task, evaluated, each with its N.

  Returns:
    Headers and rows. An accuracy is the mean over seeds with its 95 % interval; the row below has each seed.
  """
  runs = [r for r in runs if r.evals and r.num_passes]
  shown = sorted({r.num_passes for r in runs if r.num_passes})
  rows = []
  for by in ("tokens", "passes"):
    budget = budgets(runs, by)[1]
    if budget is not None:
      said = f"{amount(budget)} tokens" if by == "tokens" else f"{budget:,.0f} passes asleep"
      rows += _accuracy(f"after the same {said}", standings(runs, by, budget), shown, by, budget)
  for key, name in (
    ("wake_ms_per_answer", "awake: ms an answer"),
    ("sleep_ms_per_window", "asleep: ms a window"),
  ):
    rows.append([f"{name} (10th - 90th percentile)", *(_milliseconds(runs, n, key) for n in shown)])
  rows.append(["bytes of state", *(_state(runs, n) for n in shown)])
  return ["exact answers", *(f"N = {n}" for n in shown)], rows


def aligned(table: Table) -> str:
  """The table for a terminal: columns aligned, numbers to the right."""
  headers, body = table
  widths = [max(len(line[i]) for line in [headers, *body]) for i in range(len(headers))]
  lines = [headers, ["-" * w for w in widths], *body]
  return "\n".join(
    "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
    for line in lines
  )


def seeds_of(runs: Sequence[Run]) -> str:
  """ "seeds 0 to 4", "seed 0": those of the runs, for the table's caption."""
  seeds = sorted({r.seed for r in runs if r.seed is not None})
  if len(seeds) < 2:
    return f"seed {seeds[0]}" if seeds else "seed not recorded"
  if seeds == list(range(seeds[0], seeds[-1] + 1)):
    return f"seeds {seeds[0]} to {seeds[-1]}"
  return f"seeds {', '.join(map(str, seeds))}"


def note(runs: Sequence[Run]) -> str:
  """What stands below the table: the baseline, and what is in brackets."""
  level = constant(runs)
  known = "not measured" if level is None else f"{level:.1f} %"
  several = len({r.seed for r in runs}) > 1
  brackets = " In brackets: the 95 % interval of the mean over seeds." if several else ""
  return f"Best constant answer: {known}.{brackets}"


def _accuracy(
  name: str, found: Sequence[Standing], shown: Sequence[int], by: str, budget: float
) -> list[list[str]]:
  """Rows of one budget: the mean with its interval, each seed, CPU seconds that it took."""
  of = {s.num_passes: s for s in found}
  means, seeds, spent = [], [], []
  for n in shown:
    standing = of.get(n)
    if standing is None:
      for cells, cell in ((means, "not reached"), (seeds, ""), (spent, "")):
        cells.append(cell)
      continue
    low, high = intervals.of_mean(standing.exact, 0.0, 100.0)
    interval = f" ({low:.0f} - {high:.0f})" if len(standing.exact) > 1 else ""
    means.append(f"{standing.mean:.1f} %{interval}")
    ordered = sorted(zip(standing.runs, standing.exact, strict=True), key=lambda pair: pair[0].seed or 0)
    seeds.append(", ".join(f"{y:.1f}" for _, y in ordered))
    cost = [row.get("cpu_s") for r in standing.runs if (row := reached(r, budget, by))]
    known = [value for value in cost if is_number(value)]
    spent.append(seconds(statistics.fmean(known)) if known and len(known) == len(cost) else MISSING)
  rows = [[name, *means]]
  if any(len(s.exact) > 1 for s in found):
    rows.append([seeds_of([r for s in found for r in s.runs]), *seeds])
  return [*rows, ["CPU seconds for it", *spent]]


def _milliseconds(runs: Sequence[Run], passes: int, key: str) -> str:
  """Median over the runs of one N of what their `cost` rows say."""
  values = [milliseconds(r.last("cost"), key) for r in runs if r.num_passes == passes]
  values = [v for v in values if v is not None]
  if not values:
    return MISSING
  middle = statistics.median(v[0] for v in values)
  lows = [v[1] for v in values if v[1] is not None]
  highs = [v[2] for v in values if v[2] is not None]
  if not len(lows) == len(highs) == len(values):
    return spread((middle, None, None))
  return spread((middle, statistics.median(lows), statistics.median(highs)))


def _state(runs: Sequence[Run], passes: int) -> str:
  sizes = {r.last("cost").get("state_bytes") for r in runs if r.num_passes == passes} - {None}
  return f"{sizes.pop():,}" if len(sizes) == 1 and all(map(is_number, sizes)) else MISSING
