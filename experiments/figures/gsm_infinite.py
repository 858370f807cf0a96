"""GSM-Infinite after the paper's figure 4, from JSON lines: a panel an operation count, a curve an N."""

from collections.abc import Sequence

from sleep_jax.report import panels
from sleep_jax.report.curves import by_step, constant
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Experiment, Run, RunError

EXPERIMENT = Experiment("GSM-Infinite", "data.operations")

# Exact match that arXiv 2605.26099 prints in figure 4a (Jet-Nemotron 2B, fine-tuned): without loop and best.
PAPER = {6: "paper, Jet-Nemotron 2B: 74.2 to 81.2 %", 8: "paper, Jet-Nemotron 2B: 35.1 to 38.8 %"}
MOST = 20  # operations that a problem may have


def operations(runs: Sequence[Run]) -> list[int]:
  """The numbers of operations that any run was tested on, ascending."""
  return [op for op in range(1, MOST + 1) if by_step(runs, f"op{op}_exact", scale=100.0, bounds=(0.0, 100.0))]


def figure_4(runs: Sequence[Run]) -> Drawing:
  """Exact match on a run's first held-out set, beside what needs no reading.

  Raises:
    RunError: no GSM-Infinite run has an evaluation.
  """
  shown = operations(runs)
  if not shown:
    raise RunError("figure 4 (GSM-Infinite): none of the runs has an evaluation by operations")
  return panels.draw(
    "figure_4",
    "GSM-Infinite: exact answers by number of operations",
    "operations",
    [panels.Group(op, f"{op} operation{'s'[: op > 1]}", PAPER.get(op, "")) for op in shown],
    [
      panels.Measure(
        "exact_percent", "exact answers (%)", "op{group}_exact", scale=100.0, top=101.5,
        baselines={
          "commonest answer": lambda op: constant(runs, f"op{op}_majority"),
          "commonest number": lambda op: constant(runs, f"op{op}_shortcut"),
        },
      )
    ],
    runs,
    held_out="held-out problems",
  )  # fmt: skip
