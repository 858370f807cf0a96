"""The paper's figure 3 from the JSON lines of Depo runs alone: one panel a k, one curve an N."""

from collections.abc import Sequence

from sleep_jax.report import figures, figures_groups
from sleep_jax.report.runs import Run, RunError

# What arXiv 2605.26099 says of its figure 3, in words: it prints no numbers.
PAPER = {
  4: "paper: N = 1 hardly learns it",
  8: "paper: N = 2 stalls",
  16: "paper: only N = 4 begins to learn",
}


def hops(runs: Sequence[Run]) -> list[int]:
  """The k that any run was tested on, ascending."""
  return sorted(
    {k for r in runs for k in r.get("data.test_hops", ()) if figures_groups.points(r, f"k{k}_answer_loss")}
  )


def figure_3(runs: Sequence[Run]) -> figures.Drawing:
  """Held-out loss (ANS left out) against steps, by k and N; seeds are averaged where all were evaluated.

  Raises:
    RunError: no Depo run has an evaluation.
  """
  shown = hops(runs)
  if not shown:
    raise RunError("figure 3 (Depo): none of the runs has an evaluation by k")
  return figures_groups.draw(
    "figure_3",
    "Depo: k edges further, against training steps",
    "held-out loss (nats a token)",
    ("k", "answer_loss"),
    [figures_groups.Panel(k, f"k = {k}", f"k{k}_answer_loss", PAPER.get(k, "")) for k in shown],
    runs,
    caption=lambda said: f"Held-out loss at the end: {'; '.join(said)}.",
  )
