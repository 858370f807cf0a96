"""The paper's figure 3 from the JSON lines of Depo runs alone: one panel a k, one curve an N."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from sleep_jax import figures
from sleep_jax.runs import Run, RunError, is_number, settings

# What arXiv 2605.26099 says of its figure 3, in words: it prints no numbers.
PAPER = {
  4: "paper: N = 1 hardly learns it",
  8: "paper: N = 2 stalls",
  16: "paper: only N = 4 begins to learn",
}


def hops(runs: Sequence[Run]) -> list[int]:
  """The k that any run was tested on, ascending."""
  return sorted({k for r in runs for k in r.get("data.test_hops", ()) if _points(r, k)})


def figure_3(runs: Sequence[Run]) -> figures.Drawing:
  """Held-out loss (ANS left out) against steps, by k and N; seeds are averaged where all were evaluated.

  Raises:
    RunError: no Depo run has an evaluation.
  """
  shown = hops(runs)
  if not shown:
    raise RunError("figure 3 (Depo): none of the runs has an evaluation by k")
  figure = Figure(figsize=(2.6 * len(shown) + 0.8, 3.2), layout="constrained")
  panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
  rows, said = [], []
  for axes, k in zip(panels, shown, strict=True):
    for label, members in settings(runs):
      points = [p for r in members if (p := _points(r, k))]
      if not points:
        continue
      steps = sorted(set.intersection(*(set(p) for p in points)))
      mean = [sum(p[s] for p in points) / len(points) for s in steps]
      n = members[0].num_passes
      axes.plot(
        steps,
        mean,
        color=figures.COLOURS.get(n, "#8a2be2"),
        marker=figures.MARKERS.get(n, "X"),
        markersize=3 if len(steps) < 40 else 0,
        label=label,
      )
      rows += [
        {"k": k, "series": label, "num_passes": n, "seeds": len(points), "step": s, "answer_loss": y}
        for s, y in zip(steps, mean, strict=True)
      ]
      said += [f"k = {k}, {label}: {mean[-1]:.2f}"] if mean else []
    axes.set_title(f"k = {k}", fontsize=10)
    axes.set_xlabel(PAPER.get(k, ""), fontsize=7, color=figures.QUIET)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
  panels[0].set_ylabel("held-out loss (nats a token)", fontsize=figures.SIZE)
  panels[-1].legend(fontsize=7, frameon=False)
  figure.suptitle("Depo: k edges further, against training steps", fontsize=11, fontweight="bold")
  return figures.Drawing("figure_3", figure, f"Held-out loss at the end: {'; '.join(said)}.", rows)


def _points(run: Run, k: int) -> dict[int, float]:
  """Step -> loss at k."""
  key = f"k{k}_answer_loss"
  return {row["step"]: row[key] for row in run.rows.get("eval", []) if is_number(row.get(key))}
