"""How much each pass of each sleep changed the fast weights: a map of windows and passes for each N."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from sleep_jax.report import drawing, intervals
from sleep_jax.report.curves import settings
from sleep_jax.report.drawing import SIZE, Drawing
from sleep_jax.report.load import Run, RunError, is_number

Change = dict[str, list[list[float]]]  # block -> [windows][passes]
MAP = colormaps["Blues"]
MOST_WINDOWS = 12  # that numbers still fit into


def sleep_changes(runs: Sequence[Run], max_settings: int = 4) -> Drawing:
  """Draws the last `sleep` row of the runs: the first setting of each N, of the task with most N.

  A cell is ||S_after - S_before|| / ||S_after|| (Frobenius, mean over the batch), mean over the seeds; with
  several seeds, half of the mean's 95 % interval stands below it. 0: the pass changed nothing. 1: its write
  is as large as S; more than 1: it also undid what was there. The colours reach from 0 to the largest cell.

  Raises:
    RunError: no run has a `sleep` row.
  """
  members = _chosen(runs)[-max_settings:]
  if not members:
    raise RunError("sleep changes: no run has a sleep row in its metrics")
  means = [_over_seeds(group) for group in members]
  blocks = list(dict.fromkeys(b for mean in means for b in mean))
  widths = [max(len(w) for b in mean.values() for w in b) for mean in means]
  windows = max(len(b) for mean in means for b in mean.values())
  top = max([1.0, *(cell[0] for mean in means for b in mean.values() for w in b for cell in w)])
  height = len(blocks) * (0.6 + 0.46 * min(windows, MOST_WINDOWS)) + 1.0
  width = max(5.6, 1.9 + 0.74 * sum(widths) + 0.35 * len(members))
  figure, shown = Figure(figsize=(width, height), layout="constrained"), None
  grid = figure.subplots(len(blocks), len(members), squeeze=False, width_ratios=widths)
  rows = []
  for column, (group, mean) in enumerate(zip(members, means, strict=True)):
    for line, block in enumerate(blocks):
      axes = grid[line][column]
      if block not in mean:
        axes.set_axis_off()
        continue
      shown = axes.imshow(
        [[cell[0] for cell in passes] for passes in mean[block]], cmap=MAP, vmin=0, vmax=top, aspect="auto"
      )
      _label(axes, mean[block], first=column == 0, block=block if len(blocks) > 1 else None)
      if line == 0:
        colour = drawing.style(group[0].num_passes)["color"]
        axes.set_title(f"N = {group[0].num_passes}", fontsize=10, color=colour, fontweight="bold")
      if line == len(blocks) - 1:
        axes.set_xlabel("pass", fontsize=SIZE)
      rows += _write(axes, group, block, mean[block], top)
  assert shown is not None  # a member has a block
  bar = figure.colorbar(shown, ax=grid, shrink=0.9, aspect=14, pad=0.02)
  bar.set_label("relative change of S", fontsize=SIZE)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)
  counts = sorted({len(group) for group in members})
  seeds = "one seed" if counts == [1] else f"mean over {' or '.join(map(str, counts))} seeds ± 95 % interval"
  known = members[0][0]
  depth = f"{known.experiment.letter} = {known.depth}, " if known.depth is not None else ""
  title = f"How much each pass over a window changed S ({depth}{seeds})"
  figure.suptitle(title, fontsize=11, fontweight="bold", x=0.012, ha="left")
  return Drawing("sleep_changes", figure, "Relative change of the fast weights by window and pass.", rows)


def _chosen(runs: Sequence[Run]) -> list[list[Run]]:
  """The runs to draw: of the task with most N, the first setting of each N with all its seeds."""
  tasks: dict[tuple, dict[Any, list[Run]]] = {}
  usable = sorted((r for r in runs if _changes(r)), key=lambda r: (r.num_passes or 0, r.seed or 0))
  for _, members in settings(usable):
    tasks.setdefault(members[0].task, {}).setdefault(members[0].num_passes, members)
  return list(max(tasks.values(), key=len, default={}).values())


def _changes(run: Run) -> Change:
  """The run's last sleep row, as far as it holds numbers."""
  change = run.last("sleep").get("change")
  if not isinstance(change, dict):
    return {}

  def whole(windows: Any) -> bool:
    lines = isinstance(windows, list) and windows and all(isinstance(w, list) and w for w in windows)
    return (
      bool(lines) and len({len(w) for w in windows}) == 1 and all(is_number(x) for w in windows for x in w)
    )

  return {block: windows for block, windows in change.items() if whole(windows)}


def _over_seeds(runs: Sequence[Run]) -> dict[str, list[list[tuple[float, float]]]]:
  """Block -> [windows][passes] of (mean, half of its 95 % interval: NaN for one seed)."""
  every = [_changes(r) for r in runs]
  result = {}
  for block in every[0]:
    same = [c[block] for c in every if block in c and _shape(c[block]) == _shape(every[0][block])]
    result[block] = [
      [_cell([c[w][p] for c in same]) for p in range(len(passes))] for w, passes in enumerate(every[0][block])
    ]
  return result


def _shape(windows: list[list[float]]) -> tuple[int, int]:
  return len(windows), len(windows[0])


def _cell(values: Sequence[float]) -> tuple[float, float]:
  mean = statistics.fmean(values)
  return mean, intervals.of_mean(values)[1] - mean


def _label(axes, windows, *, first: bool, block: str | None) -> None:
  """Numbers windows and passes."""
  axes.set_xticks(range(len(windows[0])), range(1, len(windows[0]) + 1))
  axes.set_yticks(range(len(windows)), range(1, len(windows) + 1) if first else [])
  axes.tick_params(length=0, labelsize=SIZE)
  axes.spines[:].set_visible(False)
  if first:
    axes.set_ylabel(f"block {block}\nwindow" if block is not None else "window", fontsize=SIZE)


def _write(axes, group: Sequence[Run], block: str, windows, top: float) -> list[dict[str, Any]]:
  """Writes the numbers into the cells; the rows that were drawn."""
  rows = []
  for w, passes in enumerate(windows):
    for p, (mean, reach) in enumerate(passes):
      spread = "" if math.isnan(reach) else reach
      rows.append({
        "num_passes": group[0].num_passes, "seeds": len(group), "step": group[0].last("sleep")["step"],
        "block": block, "window": w + 1, "pass": p + 1, "change": mean, "half_interval": spread,
      })  # fmt: skip
      if len(windows) <= MOST_WINDOWS:
        red, green, blue, _ = MAP(mean / top)
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "#202020"
        axes.text(
          p,
          w - (0.1 if spread != "" else 0),
          f"{mean:.2f}",
          ha="center",
          va="center",
          fontsize=8.5,
          color=ink,
        )
        if spread != "":
          axes.text(p, w + 0.24, f"± {spread:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
  return rows
