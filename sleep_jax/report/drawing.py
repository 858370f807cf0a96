"""What every figure is made of: the drawing with its rows, one look, and labels that stand where curves end.

Only matplotlib's object API is used: there is no global figure and no display.
"""

import csv
import dataclasses
import io
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sleep_jax.report.curves import Curve

# N by colour and marker, told apart by hue, lightness and shape, also with a colour-blind eye; each dark
# enough for text on white. The baseline N = 1 is grey.
COLOURS = {1: "#636363", 2: "#c4500c", 3: "#00796b", 4: "#0b4fa8", 6: "#a3316f", 8: "#7a5c00"}
MARKERS = {1: "o", 2: "s", 3: "D", 4: "^", 6: "v", 8: "P"}
OTHER_COLOUR, OTHER_MARKER = "#8a2be2", "X"
QUIET = "#6b6b6b"
SIZE = 9.0  # points, of all text but titles
BROKEN = (0, (4, 3))  # dashes of a baseline
LONGEST = 32  # characters of a label at a curve's end
CHARACTER = 0.068  # inches, of a text in 8 points
MOST_LINES = 4  # of one explanation in a legend
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), "-.")


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


def frame(
  title: str, width: float, height: float, columns: int = 1, **subplots: Any
) -> tuple[Figure, list[Axes]]:
  """An empty figure with its title and a row of axes; sizes in inches."""
  figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05))
  figure.suptitle(title, fontsize=11, fontweight="bold", x=0.012, ha="left")
  axes = list(figure.subplots(1, columns, squeeze=False, **subplots)[0])
  for one in axes:
    plain(one)
  return figure, axes


def figure_of(axes: Axes) -> Figure:
  """The figure that the axes stand in."""
  figure = axes.get_figure(root=True)
  assert figure is not None
  return figure


def plain(axes: Axes, grid: Literal["both", "x", "y"] = "y") -> None:
  """The look of all axes: two spines, a quiet grid behind the data."""
  axes.tick_params(labelsize=SIZE, color=QUIET)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(QUIET)
  axes.grid(axis=grid, color="#ececec", linewidth=0.8)
  axes.set_axisbelow(True)


def style(passes: int | None) -> dict[str, Any]:
  """Colour and marker of an N."""
  if passes is None:
    return {"color": OTHER_COLOUR, "marker": OTHER_MARKER}
  return {"color": COLOURS.get(passes, OTHER_COLOUR), "marker": MARKERS.get(passes, OTHER_MARKER)}


def styles(drawn: Sequence[Curve]) -> list[dict[str, Any]]:
  """Colour and marker tell N; the dashes tell settings of one N apart."""
  passes = [c.num_passes for c in drawn]
  return [style(n) | {"linestyle": DASHES[passes[:i].count(n) % 4]} for i, n in enumerate(passes)]


def short_names(drawn: Iterable[Curve]) -> dict[str, str]:
  """What stands at the ends of curves, by their labels: the label, or N and a letter where it is too long.

  `legend` says what the letters mean.
  """
  passes = {c.label: c.num_passes for c in drawn}
  long = [label for label in passes if len(label) > LONGEST]
  letters = {label: f"N = {passes[label]}, {_letter(i)}" for i, label in enumerate(long)}
  return {label: letters.get(label, label) for label in passes}


def _letter(i: int) -> str:
  """A .. Z, AA, AB, ..."""
  return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def draw_curve(axes: Axes, curve: Curve, scale: float, look: dict[str, Any]) -> None:
  """Draws the band of the interval, a thin line for each seed of several, and the mean over them."""
  x = [at / scale for at in curve.x]
  colour = look["color"]
  if curve.has_interval:
    axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.1, linewidth=0, zorder=1)
  if len(curve.runs) > 1:
    for run, values in zip(curve.runs, curve.seeds, strict=True):
      name = f"_{curve.label}, seed {run.seed}"
      axes.plot(x, values, color=colour, linewidth=0.9, alpha=0.6, label=name, zorder=2)
  every = max(1, math.ceil(len(x) / 20))  # a marker on the last point, and not on all of many
  marked = list(range(len(x) - 1, -1, -every))
  look = {"clip_on": False, "solid_capstyle": "round"} | look
  axes.plot(x, curve.mean, label=curve.label, linewidth=2.0, markersize=5, markevery=marked, zorder=3, **look)


def draw_level(axes: Axes, y: float, label: str, colour: str = QUIET, dashes: Any = BROKEN) -> None:
  """Draws a baseline: a broken line over the whole width."""
  axes.axhline(y, color=colour, linewidth=1.1, linestyle=dashes, label=f"_{label}", zorder=1.5)


def legend(
  figure: Figure,
  drawn: Iterable[Curve],
  levels: Sequence[tuple[str, Any]] = (),
  held_out: str = "held-out set",
) -> None:
  """Says below the axes what lines and bands are, as far as they were drawn.

  Args:
    levels: (text, dashes) of each baseline.
    held_out: what one seed's interval is over.
  """
  drawn, width = list(drawn), figure.get_figwidth()
  names = short_names(drawn)
  several = [c for c in drawn if len(c.runs) > 1]
  entries: list[Any] = []
  if several:
    seeds = " or ".join(map(str, sorted({len(c.runs) for c in several})))
    entries.append(Line2D([], [], color=QUIET, linewidth=2.0, label=f"mean over {seeds} seeds"))
    entries.append(Line2D([], [], color=QUIET, linewidth=0.8, alpha=0.8, label="one seed"))
  if any(c.has_interval for c in several):
    entries.append(_band("95 % interval of the mean"))
  single = [c for c in drawn if len(c.runs) == 1]
  if single:
    alone = (
      "one seed"
      if not several
      else f"one seed only ({', '.join(dict.fromkeys(names[c.label] for c in single))})"
    )
    entries.append(Line2D([], [], color=QUIET, linewidth=2.0, label=alone))
  if any(c.has_interval for c in single):
    entries.append(_band(f"95 % interval over the {held_out}"))
  entries += [
    Line2D([], [], color=QUIET, linewidth=1.1, linestyle=dashes, label=text) for text, dashes in levels
  ]
  entries += [
    Line2D([], [], linestyle="none", label=_explained(label, name, width))
    for label, name in names.items()
    if name != label
  ]
  figure.legend(
    handles=entries, loc="outside lower center", fontsize=8, frameon=False,
    ncols=_columns([entry.get_label() for entry in entries], width),
    handlelength=1.8, columnspacing=1.6,
  )  # fmt: skip


def _explained(label: str, name: str, width: float) -> str:
  """`A: head_dim 8, ...` in lines that fit a figure of `width` inches."""
  said = f"{name.rpartition(', ')[2]}: {label.partition(', ')[2]}"
  line = int((width - 0.8) / CHARACTER)
  return textwrap.fill(said, line, max_lines=MOST_LINES, placeholder=" ... (all in the CSV file)")


def _columns(texts: Sequence[str], width: float) -> int:
  """How many legend entries stand side by side in a figure of `width` inches: all, or else two, or one."""
  widths = [CHARACTER * max(map(len, text.splitlines())) + 0.5 for text in texts]  # and its line and gap
  if sum(widths) <= width:
    return len(texts)
  return 2 if 2 * max(widths) <= width else 1


def _band(text: str) -> Patch:
  return Patch(color=QUIET, alpha=0.22, linewidth=0, label=text)
