"""What an answer and a sleep cost, by N, each with its spread over the measured calls."""

from collections.abc import Sequence

from sleep_jax.report import drawing
from sleep_jax.report.drawing import SIZE, Drawing
from sleep_jax.report.load import Run, RunError
from sleep_jax.report.tables import milliseconds

PANELS = {
  "wake_ms_per_answer": ("awake", "ms an answer"),
  "sleep_ms_per_window": ("asleep", "ms a window"),
}


def costs(runs: Sequence[Run]) -> Drawing:
  """Milliseconds awake and asleep: a point a run (the median call), with the 10th to 90th percentile.

  Rows of runs that recorded no spread are drawn as points alone.

  Raises:
    RunError: no run has a `cost` row.
  """
  measured = [r for r in runs if r.num_passes and all(milliseconds(r.last("cost"), key) for key in PANELS)]
  if not measured:
    raise RunError("costs: no run has a cost row in its metrics")
  passes = sorted({r.num_passes for r in measured if r.num_passes})
  figure, (awake, asleep) = drawing.frame("What sleep costs, and when (batch 1)", 7.6, 3.0, columns=2)
  rows = []
  for axes, (key, (title, unit)) in zip((awake, asleep), PANELS.items(), strict=True):
    highest = 0.0
    for n in passes:
      members = [r for r in measured if r.num_passes == n]
      look = drawing.style(n)
      for place, run in enumerate(members):
        x = passes.index(n) + 0.1 * (place - (len(members) - 1) / 2)
        taken = milliseconds(run.last("cost"), key)
        assert taken is not None  # or it would not be among `measured`
        middle, low, high = taken
        axes.plot([x], [middle], linestyle="", markersize=5, **look)
        if low is not None and high is not None:
          axes.plot([x, x], [low, high], color=look["color"], linewidth=1.4, alpha=0.7)
        highest = max(highest, middle, high or 0.0)
        rows.append({
          "measure": key, "num_passes": n, "run": run.name, "median_ms": middle,
          "p10_ms": "" if low is None else low, "p90_ms": "" if high is None else high,
        })  # fmt: skip
    axes.set_ylim(0, 1.25 * highest)
    axes.set_xlim(-0.6, len(passes) - 0.4)
    axes.set_xticks(range(len(passes)), [f"N = {n}" for n in passes])
    axes.set_title(title, fontsize=SIZE, loc="left", fontweight="bold")
    axes.set_ylabel(unit, fontsize=SIZE)
    axes.set_xlabel("passes of sleep", fontsize=SIZE)
  counts = sorted({sum(r.num_passes == n for r in measured) for n in passes})
  note = f"{' or '.join(map(str, counts))} run{'s'[: counts != [1]]} of each N; point: median call"
  note += ", line: 10th to 90th percentile" if any(r["p10_ms"] != "" for r in rows) else ""
  figure.supxlabel(note, fontsize=8, color=drawing.QUIET)
  said = "; ".join(f"{r['run']}: {r['median_ms']:.3g} {PANELS[r['measure']][1]}" for r in rows)
  return Drawing("costs", figure, f"Cost by N: {said}.", rows)
