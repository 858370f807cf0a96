"""Tests of memory of one model in several forms, on the same prompts: table and figure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sleep_jax.report import drawing
from sleep_jax.report.drawing import Drawing

Forms = Mapping[str, Mapping[str, Any]]


class Set(NamedTuple):
  """A set of prompts: its name in the rows, how hard, how long, and what a guess gets."""

  name: str
  depth: int
  length: int
  chance: float


def table(forms: Forms, sets: Sequence[Set], depth: str) -> str:
  """Right answers of several forms as Markdown; in brackets nats a token, and the share of right words, if
  any.

  Args:
    forms: name -> row; `words_NAME_exact` is there where answers have several words.
    depth: what the depth counts.
  """
  several = any(key.startswith("words_") for row in forms.values() for key in row)
  lines = [
    f"Right answers (nats a token of an answer{'; right words' if several else ''}):",
    "",
    f"| {depth} | tokens | prompts | a guess | {' | '.join(forms)} |",
    f"|---:|---:|---:|---:|{'---:|' * len(forms)}",
  ]
  for of in sets:
    asked = next(iter(forms.values()))[f"{of.name}_asked"]
    cells = " | ".join(_cell(row, of.name, several) for row in forms.values())
    lines.append(f"| {of.depth} | {of.length} | {asked} | {_share(of.chance)} | {cells} |")
  return "\n".join(lines)


def _cell(row: Mapping[str, Any], name: str, several: bool) -> str:
  words = f"; {row[f'words_{name}_exact']:.1%}" if several else ""
  return f"{row[f'{name}_exact']:.1%} ({row[f'{name}_answer_loss']:.3f}{words})"


def _share(chance: float) -> str:
  """
  >>> _share(0.25), _share(1e-7)
  ('25.0%', '<0.1%')
  """
  return f"{chance:.1%}" if chance >= 0.001 else "<0.1%"


def figure(forms: Forms, sets: Sequence[Set], task: str, depth: str) -> Drawing:
  """Right answers by length, a panel for each depth and a line for each form."""
  depths = sorted({of.depth for of in sets})
  title = f"Test of memory, {task}: right answers by length of the prompt"
  drawn, axes = drawing.frame(title, 2.9 * len(depths) + 2.2, 3.4, len(depths), sharey=True)
  rows = []
  for hard, panel in zip(depths, axes, strict=True):
    mine = sorted((of for of in sets if of.depth == hard), key=lambda of: of.length)
    lengths = [of.length for of in mine]
    for name, row in forms.items():
      here = [
        {"exact_percent": 100 * row[f"{of.name}_exact"]}
        | {end: 100 * row[f"{of.name}_{end}"] for end in ("low", "high")}
        for of in mine
      ]
      panel.plot(lengths, [one["exact_percent"] for one in here], marker="o", markersize=4, label=name)
      rows += [
        {"form": name, "depth": hard, "tokens": of.length, **one} for of, one in zip(mine, here, strict=True)
      ]
    guesses = [100 * of.chance for of in mine]
    panel.plot(lengths, guesses, color="0.6", linestyle="--", label="a guess")
    rows += [
      {"form": "a guess", "depth": hard, "tokens": t, "exact_percent": y, "low": "", "high": ""}
      for t, y in zip(lengths, guesses, strict=True)
    ]
    panel.set_title(f"{hard} {depth}", fontsize=drawing.SIZE)
    panel.set_xlabel("tokens of the prompt", fontsize=drawing.SIZE)
    panel.set_ylim(-2, 102)
  axes[0].set_ylabel("right answers (%)", fontsize=drawing.SIZE)
  axes[-1].legend(frameon=False, fontsize=drawing.SIZE, loc="center left", bbox_to_anchor=(1.0, 0.5))
  said = "; ".join(f"{name} {100 * row['exact']:.1f} %" for name, row in forms.items())
  return Drawing(f"memory_{task}", drawn, f"{title}. Over all sets: {said}.", rows)
