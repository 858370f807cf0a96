"""Accuracy over the number of passes at test time, whatever a run was trained with."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sleep_jax.report import drawing, intervals, labels
from sleep_jax.report.drawing import Drawing


def over_test_passes(rows: Sequence[dict[str, Any]], name: str = "test_passes") -> Drawing:
  """One curve for each N of training: the mean over seeds, each seed, the 95 % interval.

  Args:
    rows: with trained_passes, num_passes, seed, exact, low, high (rates) and perhaps const_exact.
    name: of the files.
  """
  figure, (axes,) = drawing.frame("Exact accuracy by passes asleep at test time", 7.6, 4.2)
  tested = sorted({row["num_passes"] for row in rows})
  axes.set_xscale("log", base=2)
  axes.set_xticks(tested, [str(n) for n in tested])
  axes.minorticks_off()
  axes.set_xlim(tested[0] / 1.15, tested[-1] * 1.3)
  axes.set_ylim(0, 101.5)
  axes.set_xlabel("passes asleep at test time (N)", fontsize=drawing.SIZE)
  axes.set_ylabel("exact accuracy (%)", fontsize=drawing.SIZE)
  out, ends, counts = [], [], set()
  for trained in sorted({row["trained_passes"] for row in rows}):
    mine = [row for row in rows if row["trained_passes"] == trained]
    look, label = drawing.style(trained), f"trained with N = {trained}"
    seeds: dict[str, list[tuple[int, float]]] = {}
    for row in mine:
      seeds.setdefault(row["run"], []).append((row["num_passes"], 100 * row["exact"]))
    counts.add(len(seeds))
    points = []
    for n in sorted({row["num_passes"] for row in mine}):
      here = [row for row in mine if row["num_passes"] == n]
      values = [100 * row["exact"] for row in here]
      low, high = (
        intervals.of_mean(values, 0, 100) if len(here) > 1 else (100 * here[0]["low"], 100 * here[0]["high"])
      )
      points.append((n, statistics.fmean(values), low, high))
      out.append(
        {"trained_passes": trained, "num_passes": n, "exact_percent": points[-1][1], "low": low, "high": high}
        | {"seeds": len(here)}
      )
    x, mean, low, high = zip(*points, strict=True)
    if not any(map(math.isnan, (*low, *high))):
      axes.fill_between(x, low, high, color=look["color"], alpha=0.1, linewidth=0)
    if len(seeds) > 1:
      for run, values in seeds.items():
        axes.plot(
          *zip(*sorted(values), strict=True), color=look["color"], linewidth=0.9, alpha=0.6, label=f"_{run}"
        )
    axes.plot(x, mean, linewidth=2.0, markersize=5, label=label, **look)
    ends.append((x[-1], mean[-1], label, look["color"]))
  constants = {round(100 * row["const_exact"], 1) for row in rows if "const_exact" in row}
  note = (
    "mean over seeds, thin lines: each seed, band: 95 % interval"
    if max(counts) > 1
    else "band: 95 % interval over the held-out set"
  )
  for level in sorted(constants):
    drawing.draw_level(axes, level, "constant")
    note += f"; broken line: best constant answer, {level:.1f} %"
  note += f"; {' or '.join(map(str, sorted(counts)))} seed(s)"
  figure.supxlabel(note, fontsize=8, x=0.012, ha="left")  # a text of the figure would lie on the axes' label
  labels.label_ends(axes, ends)
  alt = "; ".join(f"{label}: {y:.1f} % with N = {x}" for x, y, label, _ in ends)
  return Drawing(name, figure, f"Exact accuracy over passes at test time. {alt}.", out)
