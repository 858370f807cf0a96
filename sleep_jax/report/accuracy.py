"""Exact accuracy against what training took: a curve a setting, and the rows behind any such figure."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from sleep_jax.report import drawing, labels
from sleep_jax.report.curves import Curve, constant, curves
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Run, RunError
from sleep_jax.report.tables import longest

HELD_OUT = "held-out sequences"


def demo_curves(runs: Sequence[Run], name: str = "demo_curves", by: str = "tokens") -> Drawing:
  """Exact accuracy, one curve a setting: mean over seeds, each seed, the mean's 95 % interval.

  Args:
    runs: at least one with an evaluation. Settings beside N that differ are named in the labels.
    name: of the files.
    by: `tokens`, or `cpu_s` for CPU seconds.

  Raises:
    RunError: no run has an evaluation, or one lacks `by`.
  """
  figure, (axes,) = drawing.frame(f"{title(runs)} by passes of sleep (N)", 7.6, 4.2)
  panel = _panel(axes, runs, by)
  finish([panel])
  return Drawing(
    name, figure, f"Exact accuracy against {axes.get_xlabel()}: {ends(panel.drawn)}.", panel.rows
  )


def side_by_side(runs: Sequence[Run], name: str = "demo") -> Drawing:
  """`demo_curves` against tokens and, beside it, against CPU seconds, of the longest runs of each N.

  Raises:
    RunError: no run has an evaluation, or one lacks its CPU seconds.
  """
  figure, both = drawing.frame(f"{title(runs)} by passes of sleep (N)", 9.6, 4.0, columns=2, sharey=True)
  runs = longest(runs)
  panels = [_panel(axes, runs, by) for axes, by in zip(both, ("tokens", "cpu_s"), strict=True)]
  for axes, said in zip(both, ("for the same data", "for the same compute"), strict=True):
    axes.set_title(said, fontsize=10, loc="left")
  both[1].set_ylabel("")
  finish(panels)
  rows = [
    {"axis": column(panel.unit)} | {"x" if k == column(panel.unit) else k: v for k, v in r.items()}
    for panel in panels
    for r in panel.rows
  ]
  alt = "; ".join(f"against {p.axes.get_xlabel()}: {ends(p.drawn)}" for p in panels)
  return Drawing(name, figure, f"Exact accuracy {alt}.", rows)


@dataclasses.dataclass
class Panel:
  """Axes with curves in them: what was drawn, in which unit, and what the legend has to explain."""

  axes: Axes
  drawn: list[Curve]
  scale: float
  unit: str
  rows: list[dict[str, Any]]
  levels: list[tuple[str, Any]]


def _panel(axes: Axes, runs: Sequence[Run], by: str) -> Panel:
  drawn = evaluated(runs, "figure demo", by)
  if any(math.isnan(x) for c in drawn for x in c.x):
    raise RunError("figure demo: not every run measured its CPU seconds")
  longest = max(c.x[-1] for c in drawn)
  scale, unit = (1.0, "cpu_s") if by == "cpu_s" else token_unit(longest)
  label_axes(axes, "CPU seconds of training" if by == "cpu_s" else f"training tokens ({unit})")
  axes.set_xlim(0, longest / scale or 1.0)
  axes.set_ylim(0, 101.5)
  return draw(axes, drawn, scale, unit, constant(runs))


def draw(axes: Axes, drawn: list[Curve], scale: float, unit: str, baseline: float | None) -> Panel:
  """Draws curves and the best constant answer, in per cent."""
  rows, levels = [], []
  for curve, look in zip(drawn, drawing.styles(drawn), strict=True):
    drawing.draw_curve(axes, curve, scale, look)
    rows += curve_rows(curve, scale, unit)
  if baseline is not None:
    drawing.draw_level(axes, baseline, "constant")
    rows.append(row("best constant", "constant", unit, exact_percent=baseline))
    levels.append((f"best constant answer: {baseline:.1f} %", drawing.BROKEN))
  return Panel(axes, drawn, scale, unit, rows, levels)


def finish(panels: Sequence[Panel]) -> None:
  """Adds a legend for all panels, then each curve's name at its last point."""
  first = panels[0]
  drawing.legend(drawing.figure_of(first.axes), first.drawn, first.levels, HELD_OUT)
  names = drawing.short_names(c for panel in panels for c in panel.drawn)
  for panel in panels:
    looks = drawing.styles(panel.drawn)
    labels.label_ends(
      panel.axes,
      [
        (c.x[-1] / panel.scale, c.mean[-1], names[c.label], k["color"])
        for c, k in zip(panel.drawn, looks, strict=True)
      ],
    )


def label_axes(axes: Axes, across: str) -> None:
  """Says what the two axes are."""
  axes.set_xlabel(across, fontsize=drawing.SIZE)
  axes.set_ylabel("exact accuracy (%)", fontsize=drawing.SIZE)


def evaluated(runs: Sequence[Run], what: str, by: str = "tokens") -> list[Curve]:
  """The curves of the runs.

  Raises:
    RunError: none of them has an evaluation.
  """
  drawn = curves(runs, by)
  if not drawn:
    raise RunError(f"{what}: none of the runs has an evaluation for it")
  return drawn


def title(runs: Sequence[Run]) -> str:
  """ "Rule 110, t = 6: exact accuracy", as far as the runs agree on it."""
  experiments = {r.experiment for r in runs}
  if len(experiments) > 1 or not (known := experiments.pop()).title:
    return "Exact accuracy"
  depths = {r.depth for r in runs}
  depth = f", {known.letter} = {depths.pop()}" if len(depths) == 1 and None not in depths else ""
  return f"{known.title}{depth}: exact accuracy"


def ends(drawn: Sequence[Curve]) -> str:
  """Where each curve ends, in words."""
  return "; ".join(f"{c.label} ends at {c.mean[-1]:.1f} %" for c in drawn)


def token_unit(tokens: float) -> tuple[float, str]:
  """Scale and unit in which `tokens` reads well on an axis."""
  if tokens >= 1e9:
    return 1e9, "B"
  return (1e6, "M") if tokens >= 1e5 else (1e3, "k")


def row(series: str, kind: str, unit: str, **values: Any) -> dict[str, Any]:
  """A CSV row; `tokens_UNIT` (or `cpu_s`) is what the axis shows, accuracies are per cent."""
  columns = (
    "num_passes",
    "depth",
    "seeds",
    "seed",
    column(unit),
    "exact_percent",
    "low_percent",
    "high_percent",
  )
  return {"series": series, "kind": kind} | dict.fromkeys(columns, "") | values


def column(unit: str) -> str:
  """The CSV's name of the horizontal axis."""
  return unit if unit == "cpu_s" else f"tokens_{unit}"


def curve_rows(curve: Curve, scale: float, unit: str) -> list[dict[str, Any]]:
  """A row for each point of the mean, then one for each point of each seed, if there are several."""
  run = curve.runs[0]
  depth = "" if run.depth is None else run.depth
  known = {"num_passes": run.num_passes, "depth": depth, "seeds": len(curve.runs)}
  rows = []
  for x, mean, low, high in zip(curve.x, curve.mean, curve.low, curve.high, strict=True):
    interval = {} if math.isnan(low) else {"low_percent": low, "high_percent": high}
    rows.append(
      row(curve.label, "curve", unit, **known, **{column(unit): x / scale}, exact_percent=mean, **interval)
    )
  if len(curve.runs) > 1:
    for member, values in zip(curve.runs, curve.seeds, strict=True):
      for x, y in zip(curve.x, values, strict=True):
        rows.append(
          row(
            curve.label, "seed", unit, **known, seed=member.seed, **{column(unit): x / scale}, exact_percent=y
          )
        )
  return rows
