"""Figure of training throughput: tokens/s by window length and by N, beside the roofline and the paper's
axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sleep_jax.report import drawing
from sleep_jax.report.drawing import Drawing

FORMS = {"windowed": "o", "sliding": "s", "parallel": "D"}
# Of the window lengths, in order; N is an axis here, so its colours are free.
COLOURS = ("#0b4fa8", "#c4500c", "#00796b", "#7a5c00", "#a3316f")
PAPER, ROOFLINE = "axis of the paper's figure, H200", "roofline of the chip"
COLUMNS = ("form", "L", "N", "tokens/s", "roofline")


def draw(rows: Sequence[Mapping[str, Any]], title: str, paper: Mapping[int, tuple[float, float]]) -> Drawing:
  """Draws the rows of `benchmarks.throughput` that have a speed.

  Args:
    rows: `form`, `L`, `N`, `tokens/s` and `roofline`, either of the last two may be None.
    title: of the figure.
    paper: N -> the range of the paper's axis, tokens/s; empty where nothing of the paper compares.

  Returns:
    Two panels: the forms at N = 1 over L, and the windows one after the other over N.
  """
  rows = [{name: row[name] for name in COLUMNS} for row in rows if row["tokens/s"] is not None]
  figure, (by_length, by_passes) = drawing.frame(title, 9.2, 4.2, 2)
  lengths = sorted({row["L"] for row in rows})
  _by_length(by_length, rows, lengths, paper.get(1))
  _by_passes(by_passes, rows, lengths, paper)
  for axes in (by_length, by_passes):
    axes.set_ylabel("tokens/s", fontsize=drawing.SIZE)
  said = "; ".join(f"{row['form']}, L = {row['L']}, N = {row['N']}: {row['tokens/s']:,.0f}" for row in rows)
  return Drawing("throughput_figure", figure, f"{title}, tokens/s. {said}.", rows)


def _by_length(
  axes: Axes, rows: Sequence[Mapping[str, Any]], lengths: Sequence[int], paper: tuple[float, float] | None
) -> None:
  """One pass a token: does going through the windows one after the other cost anything?"""
  axes.set_title("N = 1: one window after the other, or all at once", fontsize=drawing.SIZE)
  places = {length: i for i, length in enumerate(lengths)}
  if paper is not None:
    axes.axhspan(*paper, color=drawing.QUIET, alpha=0.15, linewidth=0, label=PAPER)
  for (form, marker), colour in zip(FORMS.items(), COLOURS, strict=False):
    at = sorted((places[row["L"]], row["tokens/s"]) for row in rows if (row["form"], row["N"]) == (form, 1))
    if at:
      axes.plot(*zip(*at, strict=True), marker=marker, color=colour, linewidth=1.6, label=form)
  axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
  axes.set_xlabel("L, tokens", fontsize=drawing.SIZE)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize=8, frameon=False)
  axes.set_ylim(bottom=0)


def _by_passes(
  axes: Axes,
  rows: Sequence[Mapping[str, Any]],
  lengths: Sequence[int],
  paper: Mapping[int, tuple[float, float]],
) -> None:
  """The windows one after the other, N passes each."""
  axes.set_title("one window after the other, N passes each", fontsize=drawing.SIZE)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  for n, (low, high) in paper.items():
    axes.fill_between([n / 1.15, n * 1.15], low, high, color=drawing.QUIET, alpha=0.25, linewidth=0)
  entries: list[Any] = [Patch(color=drawing.QUIET, alpha=0.25, linewidth=0, label=PAPER)] if paper else []
  for length, colour in zip(lengths, COLOURS * len(lengths), strict=False):
    own = sorted(
      (row for row in rows if (row["form"], row["L"]) == ("windowed", length)), key=lambda row: row["N"]
    )
    if not own:
      continue
    passes = [row["N"] for row in own]
    speeds = [row["tokens/s"] for row in own]
    look = {"marker": "o", "color": colour, "linewidth": 1.6}
    entries += axes.plot(passes, speeds, label=f"L = {length:,}", **look)
    most = [(row["N"], row["roofline"]) for row in own if row["roofline"] is not None]
    if most:
      axes.plot(*zip(*most, strict=True), color=colour, linewidth=1.0, linestyle=drawing.BROKEN)
  ticks = sorted({row["N"] for row in rows if row["form"] == "windowed"})
  axes.set_xticks(ticks, [str(n) for n in ticks])
  axes.minorticks_off()
  axes.set_xlabel("N, passes", fontsize=drawing.SIZE)
  if any(row["roofline"] is not None for row in rows):
    entries.append(
      Line2D([], [], color=drawing.QUIET, linewidth=1.0, linestyle=drawing.BROKEN, label=ROOFLINE)
    )
  axes.legend(handles=entries, fontsize=8, frameon=False, loc="upper right")
