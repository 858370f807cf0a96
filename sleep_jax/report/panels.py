"""Figures with a panel a group (hops, operations) and a curve a setting, against training steps."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sleep_jax.report import drawing, labels
from sleep_jax.report.curves import by_step
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Run

LEVELS = (drawing.BROKEN, (0, (1, 1.4)))  # dashes of the first baseline and of the second


@dataclasses.dataclass(frozen=True)
class Measure:
  """A line of panels: one quantity of every group.

  Attributes:
    name: of the quantity, in the CSV.
    axis: label of the vertical axis.
    key: of the eval rows; {group} in it is the group's value.
    scale: of the rows' values.
    top: of the axis; None: whatever fits.
    baselines: name -> run keys or numbers: group -> level in the axis's unit, None where it is not known.
  """

  name: str
  axis: str
  key: str
  scale: float = 1.0
  top: float | None = None
  baselines: Mapping[str, Callable[[Any], float | None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Group:
  """A column of panels: its value, what stands above it, and a remark under the title."""

  value: int | str
  title: str
  note: str = ""


def draw(
  name: str,
  title: str,
  column: str,
  groups: Sequence[Group],
  measures: Sequence[Measure],
  runs: Sequence[Run],
  held_out: str,
) -> Drawing:
  """Draws a panel for each measure of each group: mean over seeds, each seed, 95 % intervals, baselines.

  Args:
    name: of the files.
    column: what the CSV calls the group.
    held_out: what one seed's interval is over ("held-out answers").
  """
  width, height = 2.75 * len(groups) + 1.3, 2.35 * len(measures) + 1.25
  figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.06))
  figure.suptitle(title, fontsize=11, fontweight="bold", x=0.012, ha="left")
  grid = figure.subplots(len(measures), len(groups), sharey="row", sharex=True, squeeze=False)
  rows, said, drawn_all, levels_all, waiting = [], [], [], {}, []
  for measure, line in zip(measures, grid, strict=True):
    for group, axes in zip(groups, line, strict=True):
      drawing.plain(axes)
      bounds = (0.0, 100.0) if measure.top is not None else (0.0, math.inf)
      drawn = by_step(runs, measure.key.format(group=group.value), scale=measure.scale, bounds=bounds)
      looks = drawing.styles(drawn)
      for curve, look in zip(drawn, looks, strict=True):
        drawing.draw_curve(axes, curve, 1.0, look)
        same = {column: group.value, "measure": measure.name, "series": curve.label}
        rows += _rows(same, curve)
        said.append(f"{group.title}, {curve.label}: {curve.mean[-1]:.2f} {measure.name}")
      for (baseline, level_of), dashes in zip(measure.baselines.items(), itertools.cycle(LEVELS)):
        level = level_of(group.value)
        if level is not None:
          drawing.draw_level(axes, level, baseline, dashes=dashes)
          levels_all[baseline] = dashes
          rows.append(
            _row({column: group.value, "measure": measure.name, "series": baseline}, "baseline", value=level)
          )
      drawn_all += drawn
      waiting.append((axes, drawn, looks))
    line[0].set_ylabel(measure.axis, fontsize=drawing.SIZE)
    line[0].set_ylim(bottom=0, top=measure.top)
  for group, axes in zip(groups, grid[0], strict=True):
    axes.set_title(group.title + (f"\n{group.note}" if group.note else ""), fontsize=drawing.SIZE)
  for axes in grid[-1]:
    axes.set_xlabel("training steps", fontsize=drawing.SIZE)
  drawing.legend(figure, drawn_all, list(levels_all.items()), held_out)
  names = drawing.short_names(drawn_all)
  for axes, drawn, looks in waiting:
    axes.set_xlim(left=0)
    ends = [(c.x[-1], c.mean[-1], names[c.label], k["color"]) for c, k in zip(drawn, looks, strict=True)]
    labels.label_ends(axes, ends)
  return Drawing(name, figure, f"{title}. At the end: {'; '.join(said)}.", rows)


def _row(same: dict, kind: str, **values) -> dict:
  columns = ("num_passes", "seeds", "seed", "step", "value", "low", "high")
  return same | {"kind": kind} | dict.fromkeys(columns, "") | values


def _rows(same: dict, curve) -> list[dict]:
  """A row for each point of the mean, then of each seed, if there are several."""
  known = {"num_passes": curve.num_passes, "seeds": len(curve.runs)}
  rows = []
  for x, mean, low, high in zip(curve.x, curve.mean, curve.low, curve.high, strict=True):
    interval = {} if math.isnan(low) else {"low": low, "high": high}
    rows.append(_row(same, "curve", **known, step=x, value=mean, **interval))
  if len(curve.runs) > 1:
    for run, values in zip(curve.runs, curve.seeds, strict=True):
      rows += [
        _row(same, "seed", **known, seed=run.seed, step=x, value=y)
        for x, y in zip(curve.x, values, strict=True)
      ]
  return rows
