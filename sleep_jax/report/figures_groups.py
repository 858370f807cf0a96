"""Figures with a panel a group (hops, operations) and a curve a setting, from the JSON lines alone."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from sleep_jax.report import figures
from sleep_jax.report.runs import Run, is_number, settings


@dataclasses.dataclass(frozen=True)
class Panel:
  """One group.

  Attributes:
    value: of the CSV's column: k, or the number of operations.
    title: above the panel.
    key: of the eval rows, what is drawn.
    note: below the panel.
    baselines: name -> a level, drawn broken, in the unit of the axis.
  """

  value: int
  title: str
  key: str
  note: str = ""
  baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)


def points(run: Run, key: str, scale: float = 1.0) -> dict[int, float]:
  """Step -> scale x what the evaluations measured under a key."""
  return {row["step"]: scale * row[key] for row in run.rows.get("eval", []) if is_number(row.get(key))}


def draw(
  name: str,
  title: str,
  axis: str,
  columns: tuple[str, str],
  panels: Sequence[Panel],
  runs: Sequence[Run],
  *,
  scale: float = 1.0,
  top: float | None = None,
  caption: Callable[[Sequence[str]], str],
) -> figures.Drawing:
  """Draws panels; seeds are averaged where all were evaluated.

  Args:
    name: of the files.
    columns: what the CSV calls the group and the value.
    scale: of the values.
    top: of the axis.
    caption: makes the text below the figure of `GROUP, SETTING: last value`, one for each curve.
  """
  figure = Figure(figsize=(2.6 * len(panels) + 0.8, 3.2), layout="constrained")
  axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  rows, said = [], []
  for axes, panel in zip(axes_of, panels, strict=True):
    for label, members in settings(runs):
      measured = [p for r in members if (p := points(r, panel.key, scale))]
      if not measured:
        continue
      steps = sorted(set.intersection(*(set(p) for p in measured)))
      mean = [sum(p[s] for p in measured) / len(measured) for s in steps]
      n = members[0].num_passes
      axes.plot(
        steps,
        mean,
        color=figures.COLOURS.get(n, "#8a2be2"),
        marker=figures.MARKERS.get(n, "X"),
        markersize=3 if len(steps) < 40 else 0,
        label=label,
      )
      same = {columns[0]: panel.value, "series": label, "num_passes": n, "seeds": len(measured)}
      rows += [same | {"step": s, columns[1]: y} for s, y in zip(steps, mean, strict=True)]
      said += [f"{panel.title}, {label}: {mean[-1]:.2f}"] if mean else []
    for (baseline, level), style in zip(panel.baselines.items(), itertools.cycle(("--", ":"))):
      axes.axhline(level, color=figures.QUIET, linestyle=style, linewidth=1, label=baseline)
      same = {columns[0]: panel.value, "series": baseline, "num_passes": "", "seeds": ""}
      rows.append(same | {"step": "", columns[1]: level})
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.note, fontsize=7, color=figures.QUIET)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0, top=top)
  axes_of[0].set_ylabel(axis, fontsize=figures.SIZE)
  axes_of[-1].legend(fontsize=7, frameon=False)
  figure.suptitle(title, fontsize=11, fontweight="bold")
  return figures.Drawing(name, figure, caption(said), rows)
