"""Rule 110: the paper's figures 2a and 2b, from the JSON lines of runs alone."""

from collections.abc import Sequence

import matplotlib

from sleep_jax.report import accuracy, drawing, labels
from sleep_jax.report.curves import constant
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Experiment, Run

EXPERIMENT = Experiment("Rule 110", "data.rollout_steps", "t")

# Reported at t = 32 after about 5 B tokens (arXiv:2605.26099, figure 2b), per cent exact: label, value, N.
PAPER_2B = (
  ("N = 1 about 10 %", 10.0, 1), ("N = 2 about 20 %", 20.0, 2), ("N = 3, 4 above 30 %", 30.0, 4),
)  # fmt: skip
# The likelier cell for each of four strings of 24: 0.5617 ** 4, by enumeration of all 2 ** 24 strings.
CONSTANT_2B = 9.95
PAPER_LAYOUT = {"data.num_strings": 4, "data.num_cells": 24, "data.boundary": "periodic"}


def on_paper_layout(run: Run) -> bool:
  """Whether a run's task is that of the paper's figure 2b: t = 32, four periodic strings of 24 cells."""
  return run.depth == 32 and all(run.get(key, value) == value for key, value in PAPER_LAYOUT.items())


def figure_2a(runs: Sequence[Run]) -> Drawing:
  """The paper's figure 2a: N = 1 alone, one curve per t, on its axes (0 to 40 M tokens, 25 to 100 %).

  Longer runs widen the axis. The best constant of each t is a faint broken line, or, where it lies
  below the axis, a note; should a curve end below 25 %, the axis goes down to 0 and marks where the
  paper's begins.

  Raises:
    RunError: no Rule 110 run with N = 1 has an evaluation.
  """
  runs = [r for r in runs if r.num_passes == 1 and r.experiment == EXPERIMENT and r.depth is not None]
  drawn = accuracy.evaluated(runs, "figure 2a (N = 1, Rule 110)")
  figure, (axes,) = drawing.frame("Rule 110 without sleep (N = 1): exact accuracy by depth t", 7.6, 4.2)
  accuracy.label_axes(axes, "training tokens (M)")
  depths = sorted({c.runs[0].depth for c in drawn})
  low = 0 if any(c.mean[-1] < 25 for c in drawn) else 25
  axes.set_xlim(0, max(40, *(c.x[-1] / 1e6 for c in drawn)))
  axes.set_ylim(low, 101)
  axes.set_yticks([0, 25, 50, 75, 100][low // 25 :])
  rows, ends, notes = [], [], []
  for curve in drawn:
    look = _look(depths, curve.runs[0].depth)
    drawing.draw_curve(axes, curve, 1e6, look)
    rows += accuracy.curve_rows(curve, 1e6, "M")
    label = curve.label.removeprefix("N = 1, ") if len(drawn) > 1 else f"t = {depths[0]}"
    ends.append((curve.x[-1] / 1e6, curve.mean[-1], label, look["color"]))
  for t in depths:
    baseline = constant(r for r in runs if r.depth == t)
    if baseline is None:
      continue
    rows.append(accuracy.row(f"best constant, t = {t}", "constant", "M", exact_percent=baseline))
    if baseline < low:
      notes.append(f"t = {t}: {baseline:.1f} %")
    else:
      drawing.draw_level(axes, baseline, "constant", _look(depths, t)["color"])
  if notes:
    text = f"best constant answer, below this axis:  {',  '.join(notes)}"
    figure.supxlabel(text, fontsize=7.5, color=drawing.QUIET)
  if low == 0:
    axes.axhline(25, color="#d0d0d0", linewidth=0.8, zorder=0)
    axes.annotate(
      "the paper's axis begins here", (0.995, 25.6), xycoords=("axes fraction", "data"), fontsize=7.5,
      color=drawing.QUIET, ha="right",
    )  # fmt: skip
  levels = [] if len(notes) == len(depths) else [("best constant answer of each t", drawing.BROKEN)]
  drawing.legend(figure, drawn, levels, accuracy.HELD_OUT)
  labels.label_ends(axes, ends)
  said = accuracy.ends(drawn)
  return Drawing("figure_2a", figure, f"Exact accuracy of N = 1 against training tokens: {said}.", rows)


def _look(depths: Sequence[float], t: float) -> dict[str, str]:
  """Colour and marker of a depth: from light to dark."""
  place = depths.index(t)
  share = 0.6 * (1 - place / max(len(depths) - 1, 1))
  colour = matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](share))
  return {"color": colour, "marker": "os^Dv<>P"[place % 8], "clip_on": True}


def figure_2b(runs: Sequence[Run]) -> Drawing:
  """The paper's figure 2b: Rule 110 at t = 32, one curve per N, exact accuracy against tokens in B.

  What the paper reports for the end of its runs (about 5 B tokens) stands beside the axis as open markers.

  Raises:
    RunError: no run on the paper's layout (t = 32, four strings of 24 cells) has an evaluation.
  """
  drawn = accuracy.evaluated(
    [r for r in runs if on_paper_layout(r)], "figure 2b (t = 32, four strings of 24 cells)"
  )
  figure, (axes, strip) = drawing.frame(
    "Rule 110, t = 32: exact accuracy by passes of sleep (N)",
    7.6,
    4.2,
    columns=2,
    sharey=True,
    width_ratios=(6, 1),
  )
  accuracy.label_axes(axes, "training tokens (B)")
  axes.set_xlim(0, max(c.x[-1] for c in drawn) / 1e9)
  axes.set_ylim(0, 50 if max(y for c in drawn for values in c.seeds for y in values) < 49 else 101.5)
  strip.set_xlim(0, 1)
  strip.set_axis_off()
  strip.annotate("paper, at about\n5 B tokens:", (0.0, 36), fontsize=8, color=drawing.QUIET)
  for label, y, passes in PAPER_2B:
    look = drawing.style(passes)
    strip.plot([0.12], [y], **look, markerfacecolor="white", markersize=7, linestyle="")
    strip.annotate(
      label.replace(" above", "\nabove").replace(" about", "\nabout"), (0.12, y), xytext=(8, 0),
      textcoords="offset points", va="center", fontsize=8, color=look["color"],
    )  # fmt: skip
  panel = accuracy.draw(axes, drawn, 1e9, "B", CONSTANT_2B)
  accuracy.finish([panel])
  rows = panel.rows + [
    accuracy.row(f"paper: {label}", "paper", "B", exact_percent=y) for label, y, _ in PAPER_2B
  ]
  reported = ", ".join(label for label, _, _ in PAPER_2B)
  alt = f"Exact accuracy at t = 32: {accuracy.ends(drawn)}. The paper: {reported}."
  return Drawing("figure_2b", figure, alt, rows)
