"""Accuracy over the depth of reasoning, one curve for each N: does the gain from sleep grow with depth?

Runs of one depth are compared twice: after the same tokens, which is as far as the runs of every N came, and
after the same passes asleep (steps times N), which stand for compute. Where an N was run for several lengths,
with as many seeds, the better one counts. CPU seconds stand beside them. Where all of them are right in the
end, what differs is how soon: the tokens and passes until `SOLVED` of the answers were exact.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from sleep_jax.report import drawing, intervals, labels, load, tables
from sleep_jax.report.curves import NEUTRAL
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Run, RunError

BUDGETS = {"tokens": "after the same tokens", "passes": "after the same passes asleep"}
SOLVED = 0.9


@dataclasses.dataclass(frozen=True)
class Point:
  """The runs of one depth and one N at one budget.

  Attributes:
    depth: of the task.
    num_passes: N.
    by: key of `BUDGETS`.
    budget: tokens, or steps times N.
    seeds: of the runs, ascending.
    exact: per cent, one a seed: at the last evaluation within the budget.
    constant: per cent that the best constant answer gets; None if it was not measured.
    cpu_s: CPU seconds until then, the mean over seeds; None if it was not measured.
  """

  depth: float
  num_passes: int
  by: str
  budget: float
  seeds: tuple[int, ...]
  exact: tuple[float, ...]
  constant: float | None
  cpu_s: float | None

  @property
  def mean(self) -> float:
    """Over the seeds."""
    return statistics.fmean(self.exact)

  @property
  def interval(self) -> tuple[float, float] | None:
    """The mean's 95 % interval over the seeds; None for one seed."""
    return intervals.of_mean(self.exact, 0.0, 100.0) if len(self.exact) > 1 else None


@dataclasses.dataclass(frozen=True)
class Solved:
  """How soon the runs of one depth and one N had `SOLVED` of the answers exact.

  Attributes:
    depth: of the task.
    num_passes: N.
    seeds: of the runs, ascending.
    tokens: one a seed, at the first such evaluation; None if the run ended before.
    passes: steps times N until then, likewise.
    cpu_s: CPU seconds until then, likewise, and None if they were not measured.
    all_tokens: at the end of each run.
    all_passes: likewise.
  """

  depth: float
  num_passes: int
  seeds: tuple[int, ...]
  tokens: tuple[float | None, ...]
  passes: tuple[float | None, ...]
  cpu_s: tuple[float | None, ...]
  all_tokens: tuple[float, ...]
  all_passes: tuple[float, ...]


def solved(runs: Sequence[Run]) -> list[Solved]:
  """How soon each depth was solved with each N by finished runs, of several lengths the longest, ordered."""
  members: dict[tuple[float, int], list[Run]] = {}
  for run in _finished(runs):
    assert run.depth is not None and run.num_passes is not None  # or it is not among them
    members.setdefault((run.depth, run.num_passes), []).append(run)
  found = []
  for (depth, n), same in sorted(members.items()):
    mine = tables.lengths(same)[-1]
    rows = [next((row for row in run.evals if row["exact"] >= SOLVED), None) for run in mine]
    found.append(
      Solved(
        depth, n,
        seeds=tuple(r.seed or 0 for r in mine),
        tokens=tuple(None if row is None else row["tokens"] for row in rows),
        passes=tuple(None if row is None else row["step"] * n for row in rows),
        cpu_s=tuple(None if row is None else row.get("cpu_s") for row in rows),
        all_tokens=tuple(run.evals[-1]["tokens"] for run in mine),
        all_passes=tuple(run.evals[-1]["step"] * n for run in mine),
      )
    )  # fmt: skip
  return found


def points(runs: Sequence[Run]) -> list[Point]:
  """Every depth, N and budget that finished runs allow, ordered.

  Raises:
    RunError: two runs share depth, N, steps and seed, or runs of one depth differ in more than these.
  """
  members: dict[float, list[Run]] = {}
  for run in _finished(runs):
    assert run.depth is not None  # or it is not among them
    members.setdefault(run.depth, []).append(run)
  found = []
  for depth, same in sorted(members.items()):
    _check(depth, same)
    passes = sorted({r.num_passes for r in same if r.num_passes})
    for by in BUDGETS:
      groups = {n: tables.lengths([r for r in same if r.num_passes == n]) for n in passes}
      ends = {n: [_end(group, by) for group in these] for n, these in groups.items()}
      budget = min(max(of) for of in ends.values())
      for n in passes:
        rivals = [
          [(run, _at(run, budget, by)) for run in group]
          for group, end in zip(groups[n], ends[n], strict=True)
          if end >= budget
        ]
        # Of several lengths one with most seeds: a lucky seed is not to beat the mean of all.
        pairs = max(rivals, key=lambda these: (len(these), statistics.fmean(x["exact"] for _, x in these)))
        mine, rows = [run for run, _ in pairs], [row for _, row in pairs]
        found.append(
          Point(
            depth, n, by, budget,
            seeds=tuple(r.seed or 0 for r in mine),
            exact=tuple(100 * row["exact"] for row in rows),
            constant=_mean(100 * row["const_exact"] for row in rows if "const_exact" in row),
            cpu_s=_mean(row["cpu_s"] for row in rows if "cpu_s" in row),
          )
        )  # fmt: skip
  return found


def table(found: Sequence[Point], soon: Sequence[Solved], letter: str) -> str:
  """Markdown: for each budget a row a depth, with the mean, its interval and each seed for every N.

  Then how soon each depth was solved, in tokens and in passes.
  """
  parts = []
  for by, title in BUDGETS.items():
    here = [p for p in found if p.by == by]
    shown = sorted({p.num_passes for p in here})
    lines = []
    for depth in sorted({p.depth for p in here}):
      of = {p.num_passes: p for p in here if p.depth == depth}
      constant = _mean(p.constant for p in of.values() if p.constant is not None)
      cells = [_cell(of[n]) if n in of else "not run" for n in shown]
      lines.append([f"{depth:g}", "-" if constant is None else f"{constant:.1f}", *cells])
    headers = [letter, "best constant", *(f"N = {n}" for n in shown)]
    parts.append(f"Exact answers in per cent, {title}.\n\n{tables.markdown(headers, lines)}")
  seeds = sorted({len(p.seeds) for p in found})
  note = (
    f"{' or '.join(map(str, seeds))} seed(s). A cell: the mean, in brackets its 95 % interval over seeds,"
    " then each seed, then CPU seconds on average."
  )
  return "\n".join([*parts, note, "", *_how_soon(soon, letter)])


def _how_soon(soon: Sequence[Solved], letter: str) -> list[str]:
  shown = sorted({s.num_passes for s in soon})
  parts = []
  for name, title in (("tokens", "Thousands of tokens"), ("passes", "Passes asleep (steps times N)")):
    scale = 1e-3 if name == "tokens" else 1.0
    lines = []
    for depth in sorted({s.depth for s in soon}):
      of = {s.num_passes: getattr(s, name) for s in soon if s.depth == depth}
      lines.append([f"{depth:g}", *(_until(of[n], scale) if n in of else "not run" for n in shown)])
    headers = [letter, *(f"N = {n}" for n in shown)]
    parts.append(f"{title} until {100 * SOLVED:g} % were exact.\n\n{tables.markdown(headers, lines)}")
  note = "A cell: the median over seeds, then each seed; `-`: not before the run ended."
  return [*parts, note, ""]


def _until(values: Sequence[float | None], scale: float) -> str:
  def text(value: float | None) -> str:
    return "-" if value is None or value == math.inf else f"{value * scale:,.0f}"

  return f"**{text(_middle(values))}**: {', '.join(map(text, values))}"


def _middle(values: Sequence[float | None]) -> float:
  """The median, where what was not reached is infinite."""
  return statistics.median_high([math.inf if v is None else v for v in values])


def figure_soon(soon: Sequence[Solved], letter: str, name: str = "solved") -> Drawing:
  """How soon each depth was solved: a panel for tokens and one for passes, the median over seeds and each
  seed.

  A run that ended before it was solved is an empty triangle where it ended.
  """
  drawn, panels = drawing.frame(f"How soon {100 * SOLVED:g} % are exact, by depth of reasoning", 10.4, 4.3, 2)
  shown, rows, says = sorted({s.num_passes for s in soon}), [], []
  for axes, field, title in zip(panels, ("tokens", "passes"), ("tokens", "passes asleep"), strict=True):
    ends = []
    for n in shown:
      look, mine = drawing.style(n), [s for s in soon if s.num_passes == n]
      colour = look["color"]
      for s in mine:
        for value, end in zip(getattr(s, field), getattr(s, f"all_{field}"), strict=True):
          if value is None:
            axes.scatter(
              [s.depth], [end], s=34, marker="^", facecolors="none", edgecolors=colour, linewidth=1.0
            )
          else:
            axes.scatter([s.depth], [value], s=9, alpha=0.55, color=colour, linewidth=0)
      known = [(s.depth, middle) for s in mine if (middle := _middle(getattr(s, field))) < math.inf]
      if known:
        axes.plot(*zip(*known, strict=True), linewidth=2.0, markersize=5, label=f"N = {n}", **look)
        ends.append((*known[-1], f"N = {n}", colour))
      texts = [f"{value:,.0f} at {letter} = {depth:g}" for depth, value in known]
      says.append(f"N = {n}, {title}: {', '.join(texts) or 'at no depth'}")
    depths = sorted({s.depth for s in soon})
    axes.set_yscale("log")
    axes.set_xticks(depths, [f"{d:g}" for d in depths])
    axes.set_xlim(depths[0] - 0.2, depths[-1] + 0.12 * (depths[-1] - depths[0] + 1))
    axes.set_title(f"{title} (log scale)", fontsize=drawing.SIZE)
    axes.set_xlabel(f"depth {letter}", fontsize=drawing.SIZE)
    labels.label_ends(axes, ends)
  for s in soon:
    each = zip(s.seeds, s.tokens, s.passes, s.cpu_s, s.all_tokens, s.all_passes, strict=True)
    for seed, tokens, passes, cpu_s, all_tokens, all_passes in each:
      row = {"depth": s.depth, "num_passes": s.num_passes, "seed": seed, "tokens": tokens, "passes": passes}
      rows.append(row | {"cpu_s": cpu_s, "all_tokens": all_tokens, "all_passes": all_passes})
  panels[0].set_ylabel(f"until {100 * SOLVED:g} % are exact", fontsize=drawing.SIZE)
  note = "lines: median over seeds, where known; dots: seeds; empty triangles: not solved when the run ended"
  drawn.supxlabel(note, fontsize=8, x=0.012, ha="left")
  return Drawing(name, drawn, f"Until {100 * SOLVED:g} % are exact, medians. {'; '.join(says)}.", rows)


def figure(found: Sequence[Point], letter: str, name: str = "depth") -> Drawing:
  """A panel a budget: mean over seeds, each seed, 95 % interval, best constant answer; x is the depth."""
  drawn, panels = drawing.frame("Exact answers by depth of reasoning", 10.4, 4.3, len(BUDGETS), sharey=True)
  rows, says = [], []
  for axes, (by, title) in zip(panels, BUDGETS.items(), strict=True):
    here = [p for p in found if p.by == by]
    ends = []
    for n in sorted({p.num_passes for p in here}):
      curve = [p for p in here if p.num_passes == n]
      look, x = drawing.style(n), [p.depth for p in curve]
      bands = [p.interval for p in curve]
      known = [(at, *band) for at, band in zip(x, bands, strict=True) if band is not None]
      if len(known) == len(curve):
        at, low, high = zip(*known, strict=True)
        axes.fill_between(at, low, high, color=look["color"], alpha=0.1, linewidth=0)
      for p in curve:
        axes.scatter([p.depth] * len(p.exact), p.exact, s=9, alpha=0.55, color=look["color"], linewidth=0)
      axes.plot(x, [p.mean for p in curve], linewidth=2.0, markersize=5, label=f"N = {n}", **look)
      ends.append((x[-1], curve[-1].mean, f"N = {n}", look["color"]))
      rows += [_row(p) for p in curve]
      says.append(
        f"N = {n} {title}: " + ", ".join(f"{p.mean:.0f} % at {letter} = {p.depth:g}" for p in curve)
      )
    levels = {p.depth: p.constant for p in here if p.constant is not None}
    if levels:
      axes.plot(
        *zip(*sorted(levels.items()), strict=True),
        color=drawing.QUIET, linewidth=1.1, linestyle=drawing.BROKEN, label="_constant",
      )  # fmt: skip
    depths = sorted({p.depth for p in here})
    axes.set_xticks(depths, [f"{d:g}" for d in depths])
    axes.set_xlim(depths[0] - 0.2, depths[-1] + 0.12 * (depths[-1] - depths[0] + 1))
    axes.set_ylim(0, 101.5)
    axes.set_title(title, fontsize=drawing.SIZE)
    axes.set_xlabel(f"depth {letter}", fontsize=drawing.SIZE)
    labels.label_ends(axes, ends)
  panels[0].set_ylabel("exact answers (%)", fontsize=drawing.SIZE)
  seeds = " or ".join(map(str, sorted({len(p.seeds) for p in found})))
  note = (
    f"lines: mean over {seeds} seed(s); dots: each seed; bands: 95 % interval; broken: best constant answer"
  )
  drawn.supxlabel(note, fontsize=8, x=0.012, ha="left")
  return Drawing(name, drawn, f"Exact answers over depth. {'; '.join(says)}.", rows)


def _finished(runs: Sequence[Run]) -> list[Run]:
  """Those that are done and say their depth and N."""
  return [r for r in runs if r.evals and r.rows.get("done") and r.num_passes and r.depth is not None]


def _check(depth: float, runs: Sequence[Run]) -> None:
  seen: dict[tuple[Any, ...], str] = {}
  for run in runs:
    other = seen.setdefault((run.num_passes, run.seed, run.get("train.steps")), run.name)
    if other != run.name:
      raise RunError(f"depth {depth:g}: {other} and {run.name} have the same N and seed; name one of them")
  settings = [
    {k: v for k, v in load.flatten(run.config).items() if k not in NEUTRAL | {"train.steps"}} for run in runs
  ]
  fields = sorted({k for s in settings for k, v in s.items() if any(other.get(k) != v for other in settings)})
  if fields:
    raise RunError(f"depth {depth:g}: the runs differ in {', '.join(fields)}; name those of one setting")


def _at(run: Run, budget: float, by: str) -> dict[str, Any]:
  """The last evaluation within the budget."""
  if (row := tables.reached(run, budget, by)) is None:
    raise RunError(f"{run.name} has no evaluation within {budget:,.0f} {by}")
  return row


def _end(runs: Sequence[Run], by: str) -> float:
  """What all of these runs had cost at the end."""
  return min(tables.spent(run, run.evals[-1], by) or 0 for run in runs)


def _mean(values: Iterable[float]) -> float | None:
  known = list(values)
  return statistics.fmean(known) if known else None


def _cell(point: Point) -> str:
  interval = point.interval
  around = "" if interval is None else f" ({interval[0]:.0f} - {interval[1]:.0f})"
  cost = "" if point.cpu_s is None else f"; {tables.seconds(point.cpu_s)} s"
  return f"**{point.mean:.1f}**{around}: {', '.join(f'{x:.1f}' for x in point.exact)}{cost}"


def _row(point: Point) -> dict[str, Any]:
  low, high = point.interval or (None, None)
  return {
    "by": point.by,
    "budget": point.budget,
    "depth": point.depth,
    "num_passes": point.num_passes,
    "exact_percent": point.mean,
    "low": low,
    "high": high,
    "constant_percent": point.constant,
    "cpu_s": point.cpu_s,
    "seeds": " ".join(map(str, point.seeds)),
    "each": " ".join(f"{x:.2f}" for x in point.exact),
  }
