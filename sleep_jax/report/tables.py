"""The tables that compare runs; a value that a run did not measure is "not measured"."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sleep_jax.report.load import Run, is_number


def percent(rate: float) -> str:
  """0.981 -> "98.1 %"."""
  return f"{100 * rate:.1f} %"


def amount(number: float, unit: str = "") -> str:
  """1331200 -> "1.33 M"."""
  for scale, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
    if abs(number) >= scale:
      return f"{number / scale:.3g}{letter}{unit}"
  return f"{number:.3g}{unit}"


def seconds(value: float) -> str:
  """3012.4 -> "3,012"; under ten seconds two figures."""
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def spread(value: tuple[float, float | None, float | None]) -> str:
  """(0.12, 0.11, 0.15) -> "0.12 (0.11 - 0.15)"; without its ends the middle alone."""
  middle, low, high = value
  ends = f" ({low:.3g} - {high:.3g})" if low is not None and high is not None else ""
  return f"{middle:.3g}{ends}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
  "run": ("run", str),
  "num_passes": ("N", str),
  "depth": ("depth", str),
  "seed": ("seed", str),
  "muon_lr": ("Muon lr", "{:g}".format),
  "steps": ("steps", "{:,}".format),
  "tokens": ("tokens", amount),
  "exact": ("exact", percent),
  "bit": ("per bit", percent),
  "const_exact": ("best constant, exact", percent),
  "const_bit": ("best constant, per bit", percent),
  "cpu_s": ("CPU s", seconds),
  "wake_ms_per_answer": ("awake ms / answer (p10 - p90)", spread),
  "sleep_ms_per_window": ("sleep ms / window (p10 - p90)", spread),
  "state_bytes": ("state bytes", "{:,}".format),
  "equal_cpu_s": ("CPU s that every run reached", seconds),
  "equal_exact": ("exact by then", percent),
  "equal_at": ("evaluated at CPU s", seconds),
  "longest_cpu_s": ("CPU s that a run of every N reached", seconds),
  "longest_exact": ("exact by then", percent),
  "longest_at": ("evaluated at CPU s", seconds),
}
MISSING = "not measured"


def summary_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """One row a run, of `COLUMNS` keys: rates in 0..1, times in the units of the names, None if not measured.

  Steps, tokens, accuracies and CPU seconds are those of the last evaluation, so that they belong
  together; a run without one shows how far it trained. Milliseconds are (median, 10th, 90th percentile).
  """
  table = []
  for run in runs:
    measured, cost = run.last("eval"), run.last("cost")
    progress = measured or run.last("done") or run.last("train")
    table.append(
      _identity(run)
      | {k: _number(progress, k, rename) for k, rename in (("steps", "step"), ("tokens", "tokens"))}
      | {k: _number(measured, k) for k in ("exact", "bit", "const_exact", "const_bit")}
      | {"cpu_s": _number(progress, "cpu_s")}
      | {k: milliseconds(cost, k) for k in ("wake_ms_per_answer", "sleep_ms_per_window")}
      | {"state_bytes": _number(cost, "state_bytes")}
    )
  return table


def milliseconds(cost: dict[str, Any], key: str) -> tuple[float, float | None, float | None] | None:
  """(median, 10th percentile, 90th) of a `cost` row's key; the ends are None in rows without a spread."""
  middle, low, high = (_number(cost, key + end) for end in ("", "_p10", "_p90"))
  return None if middle is None else (middle, low, high)


def _identity(run: Run) -> dict[str, Any]:
  return {
    "run": run.name,
    "num_passes": run.num_passes,
    "depth": None if run.depth is None else f"{run.experiment.letter} = {run.depth}",
    "seed": run.seed,
    "muon_lr": _number(run.get("optim") or {}, "muon_lr") if isinstance(run.get("optim"), dict) else None,
  }


def _number(row: dict[str, Any], key: str, name: str | None = None) -> Any:
  value = row.get(name or key)
  return value if is_number(value) else None


def spent(run: Run, row: dict[str, Any], by: str) -> float | None:
  """What a run had cost at an eval row: `tokens`, `cpu_s`, or `passes` (asleep: steps times N).

  Passes stand for compute: CPU seconds depend on what else a machine did, and mean nothing on an accelerator.
  None if it was not measured.
  """
  if by == "passes":
    return row["step"] * run.num_passes if run.num_passes else None
  return _number(row, by)


def reached(run: Run, budget: float, by: str) -> dict[str, Any] | None:
  """The last eval row that cost at most `budget` (`by`: of `spent`); None if the run stopped before.

  Nothing is interpolated: a run that is evaluated rarely is shown as it was at its last look.
  """
  costs = [(cost, row) for row in run.evals if (cost := spent(run, row, by)) is not None]
  if not costs or costs[-1][0] < budget:
    return None
  within = [row for cost, row in costs if cost <= budget]
  return within[-1] if within else None


def budgets(runs: Sequence[Run], by: str) -> tuple[float | None, float | None]:
  """What every run spent at least, and what a run of every N spent; each None if nobody measured it."""
  ends = [(r.num_passes, end) for r in runs if (end := _end(r, by)) is not None]
  if not ends:
    return None, None
  longest = {n: max(v for m, v in ends if m == n) for n, _ in ends}
  return min(v for _, v in ends), min(longest.values())


def _end(run: Run, by: str) -> float | None:
  """What a run had cost at its last evaluation."""
  costs = [cost for row in run.evals if (cost := spent(run, row, by)) is not None]
  return costs[-1] if costs else None


def lengths(runs: Sequence[Run]) -> list[list[Run]]:
  """Runs of one N by `train.steps`, shortest first; all together if no seed was run for several."""
  ordered = sorted(runs, key=lambda r: r.seed or 0)
  if len({r.seed for r in ordered}) == len(ordered):
    return [ordered]
  steps = sorted({r.get("train.steps") or 0 for r in ordered})
  return [[r for r in ordered if (r.get("train.steps") or 0) == length] for length in steps]


def longest(runs: Sequence[Run]) -> list[Run]:
  """Of each N its longest `lengths`: shorter runs beside them are there to be compared at their own end."""
  kept = [lengths([r for r in runs if r.num_passes == n])[-1] for n in {r.num_passes for r in runs}]
  return [run for run in runs if any(run is other for group in kept for other in group)]


def equal_compute_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Exact accuracy at equal CPU seconds: one row for each run that shares its task, of `COLUMNS` keys.

  Runs on an accelerator are left out: there CPU seconds measure nothing.

  The budget is the largest that all runs with an evaluation reached. Where some N was also run for
  longer, a second one follows, the largest that at least one run of every N reached.
  """
  table = []
  for task in dict.fromkeys(r.task for r in runs):
    members = [r for r in runs if r.task == task and not r.accelerated]
    if len(members) < 2:
      continue
    equal, longest = budgets(members, "cpu_s")
    for run in members:
      row = _identity(run)
      for name, budget in (("equal", equal), ("longest", longest)):
        at = reached(run, budget, "cpu_s") if budget is not None else None
        row |= {
          f"{name}_cpu_s": budget,
          f"{name}_exact": at and at["exact"],
          f"{name}_at": at and at["cpu_s"],
        }
      table.append(row)
  if all(row["longest_cpu_s"] == row["equal_cpu_s"] for row in table):
    table = [{k: v for k, v in row.items() if not k.startswith("longest")} for row in table]
  return table


def cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
  """Headers and printed cells of a table; depth and learning rate are left out where no run has one."""
  keys = [k for k in rows[0] if k not in ("depth", "muon_lr") or any(r[k] is not None for r in rows)]
  known = [(k, *COLUMNS.get(k, (k, str))) for k in keys]
  body = [[MISSING if row[k] is None else show(row[k]) for k, _, show in known] for row in rows]
  return [header for _, header, _ in known], body


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
  """A table as GitHub Markdown, numbers to the right; empty for no rows."""
  if not rows:
    return ""
  headers, body = cells(rows)
  return markdown(headers, body)


def markdown(headers: Iterable[str], body: Iterable[Iterable[str]]) -> str:
  """Printed cells as GitHub Markdown; the first column is text, the others are numbers."""
  headers = list(headers)
  rule = ["---", *["---:"] * (len(headers) - 1)]
  lines = [headers, rule, *([c.replace("|", r"\|") for c in row] for row in body)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
