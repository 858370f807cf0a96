"""Every figure, from the JSON lines of runs alone.

Each figure is a pure function of runs and gives a `Drawing`: the figure together with the rows that it
draws, so that a PNG never travels without its numbers. Only matplotlib's object API is used: there is no
global figure and no display. Accuracies are drawn in per cent; points are what was measured, unsmoothed.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sleep_jax.report.runs import (
  Curve,
  Run,
  RunError,
  constant,
  curves,
  equal_compute_table,
  is_number,
  load_runs,
  summary_table,
  to_markdown,
)

__all__ = [
  "Drawing",
  "Run",
  "RunError",
  "demo_curves",
  "equal_compute_table",
  "figure_2a",
  "figure_2b",
  "load_runs",
  "sleep_changes",
  "summary_table",
  "to_markdown",
]

# Reported for Rule 110 at t = 32 after about 5 B tokens (arXiv:2605.26099, figure 2b), per cent exact.
PAPER_2B = (("N = 1 about 10 %", 10.0), ("N = 2 about 20 %", 20.0), ("N = 3, 4 above 30 %", 30.0))
# The likelier cell for each of four strings of 24: 0.5617 ** 4, by enumeration of all 2 ** 24 strings.
CONSTANT_2B = 9.95
PAPER_LAYOUT = {"data.num_strings": 4, "data.num_cells": 24, "data.boundary": "periodic"}

# Told apart by hue, lightness and marker, also with a colour-blind eye; each dark enough for text on white.
COLOURS = {1: "#636363", 2: "#c4500c", 3: "#00796b", 4: "#0b4fa8", 6: "#a3316f", 8: "#7a5c00"}
MARKERS = {1: "o", 2: "s", 3: "D", 4: "^", 6: "v", 8: "P"}
QUIET = "#707070"
SIZE = 9.0  # points, of all text but titles


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A figure, its file name, a sentence for those who cannot see it, and the rows that it draws."""

  name: str
  figure: Figure
  alt: str
  rows: list[dict[str, Any]]

  def save(self, directory: str | os.PathLike) -> list[Path]:
    """Writes `name`.png (150 dpi), `name`.svg and `name`.csv; returns the three paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    png, svg, table = (directory / f"{self.name}.{end}" for end in ("png", "svg", "csv"))
    self.figure.savefig(png, dpi=150, metadata={"Software": None})
    svg.write_text(self.svg())
    with open(table, "w", newline="") as file:
      writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
      writer.writeheader()
      writer.writerows(self.rows)
    return [png, svg, table]

  def svg(self) -> str:
    """The figure as SVG; the same rows give the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": self.name, "svg.fonttype": "path"}):
      self.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def demo_curves(runs: Sequence[Run], name: str = "demo_curves", by: str = "tokens") -> Drawing:
  """Exact accuracy against what training took, one curve a setting: mean over seeds, with their range.

  Args:
    runs: at least one with an evaluation. Settings beside N that differ are named in the labels.
    name: of the files.
    by: `tokens`, or `cpu_s` for CPU seconds.

  Raises:
    RunError: no run has an evaluation, or one lacks `by`.
  """
  drawn = _curves_of(runs, "figure demo")
  if by == "cpu_s":
    if any(x != x for c in drawn for x in c.cpu_s):
      raise RunError("figure demo: not every run measured its CPU seconds")
    drawn = [dataclasses.replace(c, tokens=c.cpu_s) for c in drawn]
    scale, unit, axis = 1, "cpu_s", "CPU seconds of training"
  else:
    scale, unit = _token_unit(max(c.tokens[-1] for c in drawn))
    axis = f"training tokens ({unit})"
  figure, axes = _frame(_task_title(runs), axis)
  rows, ends = [], []
  for curve, style in zip(drawn, _styles(drawn), strict=True):
    ends.append(_draw(axes, curve, scale, style, _with_seeds(curve)))
    rows += _curve_rows(curve, scale, unit)
  baseline = constant(runs)
  if baseline is not None:
    ends.append(_dashed(axes, baseline, f"best constant {baseline:.1f} %"))
    rows.append(_row("best constant", "constant", unit, y=baseline))
  axes.set_xlim(0, max(c.tokens[-1] for c in drawn) / scale)
  axes.set_ylim(0, 101.5)
  _label_ends(axes, ends)
  said = "; ".join(f"{c.label} ends at {c.mean[-1]:.1f} %" for c in drawn)
  return Drawing(name, figure, f"Exact accuracy against {axis}: {said}.", rows)


def figure_2a(runs: Sequence[Run]) -> Drawing:
  """The paper's figure 2a: N = 1 alone, one curve per t, on its axes (0 to 40 M tokens, 25 to 100 %).

  Longer runs widen the axis. The best constant of each t is a faint dashed line, or, where it lies
  below the axis, a note; should a curve end below 25 %, the axis goes down to 0 and marks where the
  paper's begins.

  Raises:
    RunError: no run with N = 1 and a `data.rollout_steps` has an evaluation.
  """
  runs = [r for r in runs if r.num_passes == 1 and r.rollout_steps is not None]
  drawn = _curves_of(runs, "figure 2a (N = 1, Rule 110)")
  figure, axes = _frame("Rule 110 without sleep (N = 1): exact accuracy by depth t", "training tokens (M)")
  steps = sorted({c.runs[0].rollout_steps for c in drawn})
  colours = matplotlib.colormaps["viridis"]
  rows, ends, notes = [], [], []
  low = 0 if any(c.mean[-1] < 25 for c in drawn) else 25
  for curve in drawn:
    place = steps.index(curve.runs[0].rollout_steps)
    colour = matplotlib.colors.to_hex(colours(0.6 * (1 - place / max(len(steps) - 1, 1))))
    style = {"color": colour, "marker": "os^Dv<>P"[place % 8], "clip_on": True}
    label = curve.label.removeprefix("N = 1, ") if len(drawn) > 1 else f"t = {steps[0]}"
    ends.append(_draw(axes, curve, 1e6, style, _with_seeds(curve, label)))
    rows += _curve_rows(curve, 1e6, "M")
  for place, t in enumerate(steps):
    baseline = constant(r for r in runs if r.rollout_steps == t)
    if baseline is None:
      continue
    rows.append(_row(f"best constant, t = {t}", "constant", "M", y=baseline))
    if baseline < low:
      notes.append(f"t = {t}: {baseline:.1f} %")
    else:
      colour = matplotlib.colors.to_hex(colours(0.6 * (1 - place / max(len(steps) - 1, 1))))
      _dashed(axes, baseline, "", colour, alpha=0.45)
  if notes:
    text = f"best constant, below this axis:  {',  '.join(notes)}"
    figure.supxlabel(text, fontsize=7.5, color=QUIET)
  if low == 0:
    axes.axhline(25, color="#d0d0d0", linewidth=0.8, zorder=0)
    axes.annotate(
      "the paper's axis begins here", (0.995, 25.6), xycoords=("axes fraction", "data"), fontsize=7.5,
      color=QUIET, ha="right",
    )  # fmt: skip
  axes.set_xlim(0, max(40, *(c.tokens[-1] / 1e6 for c in drawn)))
  axes.set_ylim(low, 101)
  axes.set_yticks([0, 25, 50, 75, 100][low // 25 :])
  _label_ends(axes, ends)
  said = "; ".join(f"{c.label} ends at {c.mean[-1]:.1f} %" for c in drawn)
  return Drawing("figure_2a", figure, f"Exact accuracy of N = 1 against training tokens: {said}.", rows)


def on_paper_layout(run: Run) -> bool:
  """Whether a run's task is that of the paper's figure 2b: t = 32, four periodic strings of 24 cells."""
  return run.rollout_steps == 32 and all(run.get(key, value) == value for key, value in PAPER_LAYOUT.items())


def figure_2b(runs: Sequence[Run]) -> Drawing:
  """The paper's figure 2b: Rule 110 at t = 32, one curve per N, exact accuracy against tokens in B.

  What the paper reports for the end of its runs (about 5 B tokens) stands beside the axis as open markers.

  Raises:
    RunError: no run on the paper's layout (t = 32, four strings of 24 cells) has an evaluation.
  """
  runs = [r for r in runs if on_paper_layout(r)]
  drawn = _curves_of(runs, "figure 2b (t = 32, four strings of 24 cells)")
  figure, axes = _frame(
    "Rule 110, t = 32: exact accuracy by passes of sleep", "training tokens (B)", paper=True
  )
  rows, ends = [], []
  for curve, style in zip(drawn, _styles(drawn), strict=True):
    ends.append(_draw(axes, curve, 1e9, style, _with_seeds(curve)))
    rows += _curve_rows(curve, 1e9, "B")
  _dashed(axes, CONSTANT_2B, "")
  axes.annotate(
    f"best constant {CONSTANT_2B} %", (0.99, CONSTANT_2B), xycoords=("axes fraction", "data"), xytext=(0, -4),
    textcoords="offset points", ha="right", va="top", fontsize=SIZE, color=QUIET,
  )  # fmt: skip
  rows.append(_row("best constant", "constant", "B", y=CONSTANT_2B))
  axes.set_xlim(0, max(c.tokens[-1] for c in drawn) / 1e9)
  axes.set_ylim(0, 50 if max(y for c in drawn for y in c.high) < 49 else 101.5)
  _label_ends(axes, ends)

  strip = figure.axes[1]
  strip.annotate("paper, at about\n5 B tokens:", (0.0, 36), fontsize=8, color=QUIET)
  for (label, y), passes in zip(PAPER_2B, (1, 2, 4), strict=True):
    style = {k: v for k, v in _style(passes).items() if k != "color"}
    strip.plot(
      [0.12], [y], **style, color=COLOURS[passes], markerfacecolor="white", markersize=7, linestyle=""
    )
    strip.annotate(
      label.replace(" above", "\nabove").replace(" about", "\nabout"), (0.12, y), xytext=(8, 0),
      textcoords="offset points", va="center", fontsize=8, color=COLOURS[passes],
    )  # fmt: skip
    rows.append(_row(f"paper: {label}", "paper", "B", y=y))
  said = "; ".join(f"{c.label} ends at {c.mean[-1]:.1f} %" for c in drawn)
  reported = ", ".join(label for label, _ in PAPER_2B)
  return Drawing("figure_2b", figure, f"Exact accuracy at t = 32: {said}. The paper: {reported}.", rows)


def sleep_changes(runs: Sequence[Run], max_runs: int = 4) -> Drawing:
  """How much each pass of each sleep changed S: a map of windows x passes for each N and fast-weight block.

  Draws the last `sleep` row of the first run (lowest seed) of each N, of the task with most of them:
  ||S_after - S_before|| / ||S_after|| (Frobenius, mean over the batch). 1 means that the pass wrote all there
  is, 0 that it changed nothing.

  Raises:
    RunError: no run has a `sleep` row.
  """
  tasks: dict[tuple, dict[Any, Run]] = {}
  for run in sorted((r for r in runs if _changes(r)), key=lambda r: (r.num_passes or 0, r.seed or 0)):
    tasks.setdefault(run.task, {}).setdefault(run.num_passes, run)
  members = list(max(tasks.values(), key=len, default={}).values())[-max_runs:]
  if not members:
    raise RunError("sleep changes: no run has a sleep row in its metrics")
  blocks = list(dict.fromkeys(b for r in members for b in _changes(r)))
  widths = [max(len(w) for b in _changes(r).values() for w in b) for r in members]
  windows = max(len(b) for r in members for b in _changes(r).values())
  height = len(blocks) * (0.55 + 0.34 * min(windows, 12)) + 0.9
  figure = Figure(
    figsize=(max(5.4, 1.9 + 0.62 * sum(widths) + 0.35 * len(members)), height), layout="constrained"
  )
  grid = figure.subplots(len(blocks), len(members), squeeze=False, width_ratios=widths)
  rows = []
  for column, run in enumerate(members):
    for line, block in enumerate(blocks):
      axes, change = grid[line][column], _changes(run).get(block)
      if change is None:
        axes.set_axis_off()
        continue
      shown = axes.imshow(change, cmap="Blues", vmin=0, vmax=1, aspect="auto")
      axes.set_xticks(range(len(change[0])), range(1, len(change[0]) + 1))
      axes.set_yticks(range(len(change)), range(1, len(change) + 1) if column == 0 else [])
      axes.tick_params(length=0, labelsize=SIZE)
      axes.spines[:].set_visible(False)
      if line == 0:
        axes.set_title(f"N = {run.num_passes}", fontsize=10, color=_style(run.num_passes)["color"])
      if line == len(blocks) - 1:
        axes.set_xlabel("pass", fontsize=SIZE)
      if column == 0:
        axes.set_ylabel(f"block {block}\nwindow" if len(blocks) > 1 else "window", fontsize=SIZE)
      for w, passes in enumerate(change):
        for p, value in enumerate(passes):
          rows.append({"run": run.name, "num_passes": run.num_passes, "step": run.last("sleep")["step"],
                       "block": block, "window": w + 1, "pass": p + 1, "change": value})  # fmt: skip
          if len(change) <= 12:
            ink = "white" if value > 0.6 else "#202020"
            axes.text(p, w, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
  bar = figure.colorbar(shown, ax=grid, shrink=0.9, aspect=14, pad=0.02)
  bar.set_label("relative change of S", fontsize=SIZE)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)
  t = members[0].rollout_steps
  title = "How much each pass over a window changed S" + (f" (t = {t})" if t is not None else "")
  figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
  return Drawing("sleep_changes", figure, "Relative change of the fast weights by window and pass.", rows)


# ---- parts of a drawing --------------------------------------------------------------------------


def _changes(run: Run) -> dict[str, list[list[float]]]:
  change = run.last("sleep").get("change") or {}
  return {
    b: w for b, w in change.items() if w and all(passes and all(map(is_number, passes)) for passes in w)
  }


def _curves_of(runs: Sequence[Run], what: str) -> list[Curve]:
  drawn = curves(runs)
  if not drawn:
    raise RunError(f"{what}: none of the runs has an evaluation for it")
  return drawn


def _frame(title: str, x_label: str, paper: bool = False) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(7.6, 4.2), layout="constrained")
  if paper:
    axes, strip = figure.subplots(1, 2, sharey=True, width_ratios=(9, 1))
    strip.set_xlim(0, 1)
    strip.set_axis_off()
  else:
    axes = figure.subplots()
  figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
  axes.set_xlabel(x_label, fontsize=SIZE)
  axes.set_ylabel("exact accuracy (%)", fontsize=SIZE)
  axes.tick_params(labelsize=SIZE, color=QUIET)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#ececec", linewidth=0.8)
  axes.set_axisbelow(True)
  return figure, axes


def _style(passes: int | None) -> dict[str, str]:
  return {"color": COLOURS.get(passes, "#8a2be2"), "marker": MARKERS.get(passes, "X")}


def _styles(drawn: Sequence[Curve]) -> list[dict[str, Any]]:
  """Colour and marker tell N; the dashes tell settings of one N apart."""
  passes = [c.num_passes for c in drawn]
  dashes = ("-", (0, (5, 1.5)), (0, (1, 1.2)), "-.")
  return [_style(n) | {"linestyle": dashes[passes[:i].count(n) % 4]} for i, n in enumerate(passes)]


def _draw(axes: Axes, curve: Curve, scale: float, style: dict[str, Any], label: str) -> tuple:
  """Draws the curve and its band; returns the label and where it points: (x, y, text, colour)."""
  x = [t / scale for t in curve.tokens]
  size = 4 if len(x) < 40 else 0
  axes.plot(x, curve.mean, label=curve.label, linewidth=1.8, markersize=size, **{"clip_on": False} | style)
  if len(curve.runs) > 1:
    axes.fill_between(x, curve.low, curve.high, color=style["color"], alpha=0.16, linewidth=0)
  return x[-1], curve.mean[-1], label, style["color"]


def _dashed(axes: Axes, y: float, label: str, colour: str = QUIET, alpha: float = 1.0) -> tuple:
  axes.axhline(
    y, color=colour, linewidth=1.1, linestyle=(0, (4, 3)), alpha=alpha, label="_constant", zorder=1
  )
  return None, y, label, colour


def _label_ends(axes: Axes, ends: Sequence[tuple], gap: float = 0.058) -> None:
  """Writes each label beside the end of its curve, pushed apart to `gap` of the height, in order."""
  low, high = axes.get_ylim()
  right = axes.get_xlim()[1]
  ends = sorted(ends, key=lambda end: end[1])
  places = _spread([(y - low) / (high - low) for _, y, _, _ in ends], gap)
  for (x, y, text, colour), place in zip(ends, places, strict=True):
    axes.annotate(
      text, xy=(right if x is None else x, max(y, low)), xytext=(1.03, place), textcoords="axes fraction",
      color=colour, fontsize=SIZE, va="center", annotation_clip=False,
      arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 3, "alpha": 0.5},
    )  # fmt: skip


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
  """Places in 0..1, at least `gap` apart, each group of neighbours centred on what it wanted (ascending)."""
  groups: list[tuple[float, int]] = []  # centre, members
  for y in wanted:
    centre, count = y, 1
    while groups and centre - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
      other, others = groups.pop()
      centre, count = (centre * count + other * others) / (count + others), count + others
    reach = gap * (count - 1) / 2
    groups.append((min(max(centre, reach), 0.985 - reach), count))
  return [centre + gap * (i - (count - 1) / 2) for centre, count in groups for i in range(count)]


def _with_seeds(curve: Curve, label: str | None = None) -> str:
  label = label or curve.label
  return f"{label} ({len(curve.runs)} seeds)" if len(curve.runs) > 1 else label


def _task_title(runs: Sequence[Run]) -> str:
  depths = {r.rollout_steps for r in runs}
  shown = f"Rule 110, t = {depths.pop()}: exact" if len(depths) == 1 and None not in depths else "Exact"
  return f"{shown} accuracy by passes of sleep (N)"


def _token_unit(tokens: float) -> tuple[float, str]:
  """Scale and unit in which `tokens` reads well on an axis."""
  if tokens >= 1e9:
    return 1e9, "B"
  return (1e6, "M") if tokens >= 1e5 else (1e3, "k")


def _column(unit: str) -> str:
  return unit if unit == "cpu_s" else f"tokens_{unit}"


def _row(series: str, kind: str, unit: str, **values: Any) -> dict[str, Any]:
  """A CSV row; `tokens_UNIT` (or `cpu_s`) is what the axis shows, accuracies are per cent."""
  empty = {"num_passes": "", "rollout_steps": "", "seeds": "", _column(unit): "", "exact_percent": ""}
  exact = {"exact_percent": values.pop("y", "")}
  return {"series": series, "kind": kind} | empty | exact | {"low_percent": "", "high_percent": ""} | values


def _curve_rows(curve: Curve, scale: float, unit: str) -> list[dict[str, Any]]:
  run = curve.runs[0]
  known = {"num_passes": run.num_passes, "rollout_steps": run.rollout_steps, "seeds": len(curve.runs)}
  return [
    _row(
      curve.label,
      "curve",
      unit,
      **known,
      **{_column(unit): x / scale},
      y=mean,
      low_percent=low,
      high_percent=high,
    )
    for x, mean, low, high in zip(curve.tokens, curve.mean, curve.low, curve.high, strict=True)
  ]
