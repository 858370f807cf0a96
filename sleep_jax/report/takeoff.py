"""When runs take off: for how many seeds, and by which step.

A run that learns a deep task stands on a plateau for long and then rises within few steps. When it rises
differs between seeds more than between settings, so that a mean over seeds says little: a setting is better
if more of its seeds have taken off by the same step.
"""

import dataclasses
import re
import statistics
from collections.abc import Sequence
from typing import Any

from sleep_jax.report import drawing, tables
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Run
from sleep_jax.scoring.intervals import wilson

_NAME = re.compile(r"(?:(?P<setting>.+)_)?n\d+_s\d+")
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the steps of a run, at which seeds are counted


@dataclasses.dataclass(frozen=True)
class Start:
  """One run.

  Attributes:
    setting: the run's name in front of `_nN_sSEED`; `plain` if there is nothing.
    num_passes: N.
    seed: of weights and data.
    steps: that it was to take.
    reached: its last evaluation's step.
    step: of the first evaluation at which it had taken off; None: it had not.
    cpu_s: CPU seconds until then.
    exact: at its last evaluation.
  """

  setting: str
  num_passes: int
  seed: int
  steps: int
  reached: int
  step: int | None
  cpu_s: float | None
  exact: float

  def by(self, share: float) -> bool | None:
    """Whether it had taken off by this share of its steps; None: it has not come so far."""
    until = share * self.steps
    if self.step is not None and self.step <= until:
      return True
    return False if self.reached >= until else None


def starts(runs: Sequence[Run], threshold: float) -> list[Start]:
  """When each run took off: at the first evaluation with `exact` >= `threshold`.

  Runs without an evaluation, N, a seed or a number of steps are left out.
  """
  found = []
  for run in runs:
    named, rows, steps = _NAME.fullmatch(run.name), run.evals, run.get("train.steps")
    if not rows or run.num_passes is None or run.seed is None or steps is None:
      continue
    off = next((row for row in rows if row["exact"] >= threshold), None)
    found.append(
      Start(
        setting=(named and named["setting"]) or "plain",
        num_passes=run.num_passes,
        seed=run.seed,
        steps=steps,
        reached=rows[-1]["step"],
        step=None if off is None else off["step"],
        cpu_s=None if off is None else off.get("cpu_s"),
        exact=rows[-1]["exact"],
      )
    )
  return found


def rows_of(these: Sequence[Start]) -> list[dict[str, Any]]:
  """A row for each setting and N: seeds, how many had taken off by each of `SHARES`, medians.

  A run that has not come so far is not counted there; `of_SHARE` says how many were.
  """
  rows = []
  order = list(dict.fromkeys(s.setting for s in these))
  for setting in order:
    for n in sorted({s.num_passes for s in these if s.setting == setting}):
      mine = sorted((s for s in these if (s.setting, s.num_passes) == (setting, n)), key=lambda s: s.seed)
      row: dict[str, Any] = {"setting": setting, "num_passes": n, "seeds": len(mine), "steps": mine[0].steps}
      for share in SHARES:
        known = [s.by(share) for s in mine if s.by(share) is not None]
        name, (low, high) = f"{share:g}", wilson(sum(map(bool, known)), len(known))
        row |= {f"off_{name}": sum(map(bool, known)), f"of_{name}": len(known)}
        row |= {f"low_{name}": low, f"high_{name}": high}
      taken = [s.step for s in mine if s.step is not None]
      seconds = [s.cpu_s for s in mine if s.cpu_s is not None]
      row["median_step"] = statistics.median(taken) if taken else None
      row["median_cpu_s"] = statistics.median(seconds) if seconds else None
      row["exact"] = [round(s.exact, 4) for s in mine]
      rows.append(row)
  return rows


def table(rows: Sequence[dict[str, Any]], threshold: float) -> str:
  """The rows as Markdown."""
  titles = ["setting", "N", "steps", *(f"off by {100 * s:g} %" for s in SHARES), "95 % at the end"]
  titles += ["median step", "CPU s", "exact at the end, each seed (%)"]
  cells = []
  for row in rows:
    end = f"{SHARES[-1]:g}"
    interval = f"{100 * row[f'low_{end}']:.0f}-{100 * row[f'high_{end}']:.0f} %" if row[f"of_{end}"] else "-"
    cells.append(
      [row["setting"], str(row["num_passes"]), str(row["steps"])]
      + [f"{row[f'off_{s:g}']} of {row[f'of_{s:g}']}" for s in SHARES]
      + [interval, *("-" if row[k] is None else f"{row[k]:.0f}" for k in ("median_step", "median_cpu_s"))]
      + [", ".join(f"{100 * x:.1f}" for x in row["exact"])]
    )
  note = (
    f"A run has taken off at its first evaluation with at least {100 * threshold:g} % exact. Intervals:"
    " Wilson's, of the share of seeds. Medians are of the runs that took off."
  )
  return f"{tables.markdown(titles, cells)}\n{note}\n"


def figure(these: Sequence[Start], name: str = "takeoff") -> Drawing:
  """For each N a panel: the share of seeds that had taken off, over steps; one line for each setting.

  Only runs that ended count, so that every point of a line is of the same seeds. A thin line is one seed.
  """
  ended = [s for s in these if s.reached >= s.steps]
  passes = sorted({s.num_passes for s in ended})
  columns = max(len(passes), 1)
  title, width = "Seeds that have taken off", 4.2 * columns + 0.6
  drawn, panels = drawing.frame(title, width, 4.0, columns=columns, sharey=True)
  settings, out = list(dict.fromkeys(s.setting for s in ended)), []
  colours = [f"C{i % 10}" for i in range(len(settings))]
  lines = {}
  for axes, n in zip(panels, passes, strict=False):
    counts = set()
    for number, (setting, colour) in enumerate(zip(settings, colours, strict=True)):
      mine = [s for s in ended if (s.setting, s.num_passes) == (setting, n)]
      if not mine:
        continue
      counts.add(len(mine))
      when = sorted(s.step for s in mine if s.step is not None)
      x, y = [0], [0.0]
      for done, step in enumerate(when, 1):
        x, y = [*x, step], [*y, 100 * done / len(mine)]
      x, y = [*x, max(s.steps for s in mine)], [*y, y[-1]]
      dashes = drawing.DASHES[number // 10 % len(drawing.DASHES)]
      thickness = 1.8 if len(mine) > 1 else 0.8
      (line,) = axes.step(
        x, y, where="post", color=colour, linestyle=dashes, linewidth=thickness, label=setting
      )
      lines.setdefault(setting, line)
      out += [
        {"num_passes": n, "setting": setting, "step": a, "off_percent": b, "seeds": len(mine)}
        for a, b in zip(x, y, strict=True)
      ]
    seeds = " or ".join(map(str, sorted(counts)))
    axes.set_title(f"N = {n}, {seeds} seed(s) each", fontsize=drawing.SIZE)
    axes.set_xlabel("optimizer step", fontsize=drawing.SIZE)
    axes.set_ylim(-2, 102)
  panels[0].set_ylabel("seeds that have taken off (%)", fontsize=drawing.SIZE)
  if lines:  # beside the last panel, and of all of them: not every setting was run with every N
    panels[-1].legend(
      handles=list(lines.values()), fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
  ends = "; ".join(f"N = {r['num_passes']} {r['setting']} {r['off_percent']:.0f} %" for r in _last(out))
  return Drawing(name, drawn, f"Share of seeds that have taken off, over steps. At the end: {ends}.", out)


def _last(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  return list({(p["num_passes"], p["setting"]): p for p in points}.values())
