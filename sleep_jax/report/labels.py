"""Labels that stand where curves end, clear of the curves and of each other; nothing leads to them.

A leader line looks like a curve that went flat. The label has its curve's colour instead, and the place
around the last point where it covers the least.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from sleep_jax.report.drawing import SIZE, figure_of

THICK, THIN = 1.0, 0.12  # what it counts to cover two pixels of a mean, and of a seed or a baseline
FAR, MOST_POINTS = 1e6, 20_000  # pixels from the page's corner, and points of one line, that are looked at
HALO = (patheffects.withStroke(linewidth=2.5, foreground="white"),)
# Where a label may stand: (sideways, upwards) from the last point, in points and in text heights; -1: it ends
# at the point, 0: it is centred over it, 1: it begins behind it.
SIDES: dict[int, Literal["left", "center", "right"]] = {1: "left", 0: "center", -1: "right"}
AROUND = [(1, 0.0)]
for up in (1.05, 2.1, 3.15, 4.2, 5.25, 6.3, 7.35):
  AROUND += [(side, sign * up) for sign in (1, -1) for side in (1, 0, -1)]


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
  """Writes (x, y, text, colour) at each curve's last point.

  Args:
    axes: with everything else drawn and its limits set. Lines whose label begins with "_" (seeds, baselines)
      may be covered where there is no better place, bands always.
  """
  figure = figure_of(axes)
  texts = [_text(axes, x, y, text, colour) for x, y, text, colour in ends]
  figure.draw_without_rendering()  # the layout, so that places on the page are known
  page = Bbox(figure.bbox)
  height = max((text.get_window_extent().height for text in texts), default=0.0)
  lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
  strokes = [(_on_page(axes, line), str(line.get_label()), line.get_color()) for line in lines]
  taken: list[tuple[Bbox, np.ndarray]] = []
  low, high = axes.get_ylim()
  # From the edges to the middle, so that labels pile up where there is room for them.
  order = sorted(zip(ends, texts, strict=True), key=lambda pair: min(pair[0][1] - low, high - pair[0][1]))
  for (x, y, _, colour), text in order:
    at = axes.transData.transform((x, y))
    box = text.get_window_extent()
    weighed = [
      (
        points,
        THIN if label.startswith("_") else THICK,
        0.0 if label.startswith("_") or other == colour else height,
      )
      for points, label, other in strokes
    ]
    costs = [
      _cost(_placed(at, box, height, place), at, place, weighed, taken, axes.get_window_extent(), page)
      for place in AROUND
    ]
    side, up = AROUND[int(np.argmin(costs))]
    taken.append((_placed(at, box, height, (side, up)), at))
    text.set_horizontalalignment(SIDES[side])
    text.xyann = (7.0 * side, up * height * 72 / figure.dpi)


def _text(axes: Axes, x: float, y: float, text: str, colour: str) -> Annotation:
  return axes.annotate(
    text, (x, y), xytext=(7.0, 0.0), textcoords="offset points", ha="left", va="center", color=colour,
    fontsize=SIZE, fontweight="bold", annotation_clip=False, path_effects=HALO, zorder=4,
  )  # fmt: skip


def _placed(at: np.ndarray, box: Bbox, height: float, place: tuple[int, float]) -> Bbox:
  """The label's box at a place around its point, in pixels."""
  side, up = place
  gap = 7.0 * side * box.height / SIZE
  left = at[0] + gap - {1: 0.0, 0: box.width / 2, -1: box.width}[side]
  return Bbox.from_bounds(left, at[1] + up * height - box.height / 2, box.width, box.height)


def _cost(
  box: Bbox,
  at: np.ndarray,
  place: tuple[int, float],
  strokes: Sequence[tuple[np.ndarray, float, float]],
  taken: Sequence[tuple[Bbox, np.ndarray]],
  axes: Bbox,
  page: Bbox,
) -> float:
  """How bad a place is: other labels and the page's end count most, then covered curves, then distance.

  A label above or below the curve of another colour reads as its label, so that a margin there counts too.
  """
  covered = 0.0
  for points, weight, margin in strokes:
    inside = (points[:, 0] > box.x0 - 2) & (points[:, 0] < box.x1 + 2)
    inside &= (points[:, 1] > box.y0 - margin / 2) & (points[:, 1] < box.y1 + margin / 2)
    covered += weight * float(np.sum(inside))
  clash = sum(box.overlaps(other) for other, _ in taken)
  # Labels of curves that end side by side stand in the order of the curves.
  turned = sum(
    abs(at[0] - end[0]) < 3 * box.height and (at[1] - end[1]) * (box.y0 - other.y0) < 0
    for other, end in taken
  )
  outside = box.y0 < axes.y0 or box.y1 > axes.y1 + box.height / 2 or box.x0 < axes.x0 or box.x1 > page.x1
  return 1e4 * (clash + outside) + 1e3 * turned + 3.0 * covered + 6.0 * abs(place[1]) + 10.0 * (place[0] != 1)


def _on_page(axes: Axes, line: Line2D) -> np.ndarray:
  """Points along a line, two pixels apart, in pixels; further where it is longer than any page."""
  corners = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
  corners = np.clip(corners[np.isfinite(corners).all(axis=1)], -FAR, FAR)
  if len(corners) < 2:
    return corners
  along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(corners, axis=0).T))])
  places = np.arange(0.0, along[-1], max(2.0, along[-1] / MOST_POINTS))
  return np.column_stack([np.interp(places, along, corners[:, i]) for i in (0, 1)])
