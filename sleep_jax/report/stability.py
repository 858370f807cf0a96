"""The growth of gradients through the fast weights, as a table and as a figure."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sleep_jax.report import drawing
from sleep_jax.report.drawing import Drawing

GROWTHS = {
  "growth_a_window": "a window",
  "growth_a_pass": "a pass",
  "growth_first_pass": "the first pass of a window",
}


def mean(values: Sequence[float]) -> float:
  """Geometric mean of the values that are numbers; NaN of none."""
  known = [x for x in values if x is not None and x > 0]
  return math.exp(statistics.fmean(map(math.log, known))) if known else math.nan


def table(rows: Sequence[dict[str, Any]]) -> str:
  """One row for each N, geometric means over seeds, as Markdown.

  Args:
    rows: with num_passes, gradient_norm and the growths.
  """
  seeds = len({row["seed"] for row in rows})
  titles = ["N", "gradient norm", *(f"growth {text}" for text in GROWTHS.values())]
  lines = [f"| {' | '.join(titles)} |", f"|{'---:|' * len(titles)}"]
  for n in sorted({row["num_passes"] for row in rows}):
    mine = [row for row in rows if row["num_passes"] == n]
    values = [mean([row[name] for row in mine]) for name in ("gradient_norm", *GROWTHS)]
    lines.append(f"| {n} | {' | '.join('-' if math.isnan(x) else f'{x:.3g}' for x in values)} |")
  return "\n".join([*lines, "", f"Geometric means over {seeds} seed(s)."])


def figure(rows: Sequence[dict[str, Any]], name: str = "stability") -> Drawing:
  """Left: the growth factors over N; right: the gradient norm at each window, one curve for each N.

  Args:
    rows: as for `table`, with by_window.
    name: of the files.
  """
  drawn, (left, right) = drawing.frame("Gradients on their way back through sleep", 9.6, 4.0, columns=2)
  passes, out = sorted({row["num_passes"] for row in rows}), []
  for (key, text), marker in zip(GROWTHS.items(), "osD", strict=True):
    points = [(n, mean([row[key] for row in rows if row["num_passes"] == n])) for n in passes]
    points = [(n, y) for n, y in points if not math.isnan(y)]
    if points:
      left.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=text)
      out += [{"curve": text, "x": n, "y": y} for n, y in points]
  left.axhline(1.0, color=drawing.QUIET, linewidth=1.1, linestyle=drawing.BROKEN)
  left.set_xscale("log", base=2)
  left.set_xticks(passes, [str(n) for n in passes])
  left.minorticks_off()
  left.set_xlabel("passes asleep (N)", fontsize=drawing.SIZE)
  left.set_ylabel("growth of the gradient's norm", fontsize=drawing.SIZE)
  left.legend(fontsize=8, frameon=False)
  x: list[int] = []
  for n in passes:
    mine = [row["by_window"] for row in rows if row["num_passes"] == n]
    norms = [mean(values) for values in zip(*mine, strict=True)]
    x = list(range(1, len(norms) + 1))
    right.plot(x, norms, markersize=5, label=f"N = {n}", **drawing.style(n))
    out += [
      {"curve": f"norm at each window, N = {n}", "x": at, "y": y} for at, y in zip(x, norms, strict=True)
    ]
  right.set_yscale("log")
  right.set_xticks(x)
  right.set_xlabel("window, the oldest first", fontsize=drawing.SIZE)
  right.set_ylabel("norm of the gradient at its beginning", fontsize=drawing.SIZE)
  right.legend(fontsize=8, frameon=False)
  factors = ", ".join(f"{row['curve']} {row['y']:.2g}" for row in out if row["x"] == passes[-1])
  return Drawing(name, drawn, f"Growth of gradients over N and windows; at N = {passes[-1]}: {factors}.", out)
