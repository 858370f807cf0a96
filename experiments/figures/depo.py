"""The paper's figure 3 from the JSON lines of Depo runs alone: a column a k, one curve an N."""

import math
from collections.abc import Sequence

from sleep_jax.report import panels
from sleep_jax.report.curves import by_step, constant
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Experiment, Run, RunError, is_whole

EXPERIMENT = Experiment("Depo", "data.test_hops")

# What arXiv 2605.26099 says of its figure 3, in words: it prints no numbers.
PAPER = {
  4: "paper: N = 1 hardly learns it",
  8: "paper: N = 2 stalls",
  16: "paper: only N = 4 begins to learn",
}


def hops(runs: Sequence[Run]) -> list[int]:
  """The k that any run was tested on, ascending."""
  asked = {
    k
    for r in runs
    if isinstance(r.get("data.test_hops"), list)
    for k in r.get("data.test_hops")
    if is_whole(k)
  }
  return sorted(k for k in asked if by_step(runs, f"k{k}_answer_loss", scale=1.0, bounds=(0.0, math.inf)))


def figure_3(runs: Sequence[Run]) -> Drawing:
  """Held-out loss (ANS left out) and right answers against steps, by k and N.

  Raises:
    RunError: no Depo run has an evaluation.
  """
  shown = hops(runs)
  if not shown:
    raise RunError("figure 3 (Depo): none of the runs has an evaluation by k")
  sizes = {r.get("data.max_nodes") for r in runs if r.get("data.test_hops")}
  nodes = sizes.pop() if len(sizes) == 1 else None
  nodes = nodes if is_whole(nodes) and nodes > 0 else None  # of every held-out cycle
  one_token = all(r.get("data.max_name") == 1 for r in runs if r.get("data.test_hops"))
  return panels.draw(
    "figure_3",
    "Depo: which node comes k edges further on a cycle that was evicted?",
    "k",
    [panels.Group(k, f"k = {k}", PAPER.get(k, "")) for k in shown],
    [
      panels.Measure(
        "exact_percent", "right answers (%)", "k{group}_exact", scale=100.0, top=101.5,
        baselines={
          "a guess": lambda k: 100 / nodes if nodes else None,
          "commonest answer": lambda k: constant(runs, f"k{k}_majority"),
        },
      ),
      panels.Measure(
        "answer_loss", "held-out loss\n(nats a token)", "k{group}_answer_loss",
        baselines={"a guess": lambda k: math.log(nodes) if nodes and one_token else None},
      ),
    ],
    runs,
    held_out="held-out answers",
  )  # fmt: skip
