"""GSM-Infinite after the paper's figure 4, from JSON lines: a panel an operation count, a curve an N."""

from collections.abc import Sequence

from sleep_jax.report import figures, figures_groups
from sleep_jax.report.runs import Run, RunError, constant

# Exact match that arXiv 2605.26099 prints in figure 4a (Jet-Nemotron 2B, fine-tuned): without loop and best.
PAPER = {6: "paper, Jet-Nemotron 2B: 74.2 to 81.2 %", 8: "paper, Jet-Nemotron 2B: 35.1 to 38.8 %"}
MOST = 20  # operations that a problem may have
BASELINES = {"majority": "commonest answer", "shortcut": "commonest number"}


def operations(runs: Sequence[Run]) -> list[int]:
  """The numbers of operations that any run was tested on, ascending."""
  return [op for op in range(1, MOST + 1) if any(figures_groups.points(r, f"op{op}_exact") for r in runs)]


def figure_4(runs: Sequence[Run]) -> figures.Drawing:
  """Exact match on a run's first held-out set, beside what needs no reading; seeds are averaged.

  Raises:
    RunError: no GSM-Infinite run has an evaluation.
  """
  shown = operations(runs)
  if not shown:
    raise RunError("figure 4 (GSM-Infinite): none of the runs has an evaluation by operations")
  return figures_groups.draw(
    "figure_4",
    "GSM-Infinite: exact answers against training steps",
    "exact (%)",
    ("operations", "exact_percent"),
    [
      figures_groups.Panel(
        op,
        f"{op} operation{'s'[: op > 1]}",
        f"op{op}_exact",
        PAPER.get(op, ""),
        {
          name: level
          for key, name in BASELINES.items()
          if (level := constant(runs, f"op{op}_{key}")) is not None
        },
      )
      for op in shown
    ],
    runs,
    scale=100.0,
    top=101.5,
    caption=lambda said: f"Exact at the end, per cent: {'; '.join(said)}.",
  )
