"""Loss on text by how much of it was read, of several forms of a model: a figure."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from sleep_jax.report.context import ranges
from sleep_jax.report.drawing import SIZE, Drawing


def figure(forms: Mapping[str, Mapping[str, Any]], window: int) -> Drawing:
  """Draws the loss by position of every form.

  Args:
    forms: name -> row.
    window: L, marked by a line.
  """
  drawn = Figure(figsize=(7.2, 4.2), layout="constrained")
  axes = drawn.subplots()
  rows = []
  for name, row in forms.items():
    points = [(a, b, row[f"loss_at_{a}_{b}"]) for a, b in ranges(row) if row[f"loss_at_{a}_{b}"] is not None]
    axes.plot(
      [(a + b) / 2 for a, b, _ in points], [x for *_, x in points], marker="o", markersize=4, label=name
    )
    rows += [{"form": name, "from": a, "to": b, "loss": x} for a, b, x in points]
  axes.axvline(window, color="0.7", linewidth=0.8, linestyle="--")
  axes.set_xlabel("tokens of the text read before (dashed: L)", fontsize=SIZE)
  axes.set_ylabel("nats a token", fontsize=SIZE)
  axes.set_title("Loss by position, on the same tokens", fontsize=11, fontweight="bold", loc="left")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=SIZE)
  return Drawing("perplexity", drawn, "Loss by how much of the text was read before.", rows)
