"""Expressions of quantities, and their English."""

import dataclasses
from collections.abc import Sequence

from sleep_jax.data.gsm_infinite.dependencies import RNG
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.structure import ALIAS, AVERAGE, PRODUCT, TOTAL, Structure
from sleep_jax.data.gsm_infinite.words import Template


@dataclasses.dataclass(frozen=True)
class Expression:
  """The right side of a sentence: `literal plus/times (sum or difference of refs)`; each part may be absent.

  Attributes:
    literal: the number; None if there is none.
    times: whether the number multiplies; otherwise it is added.
    refs: quantities, in the order of the text.
    difference: whether the second of two is subtracted from the first; otherwise all are added.
  """

  literal: int | None
  times: bool
  refs: tuple[int, ...]
  difference: bool


def draw_expression(parents: Sequence[int], number_range: int, draws: Draws) -> Expression:
  """Draws number and signs of an instance's expression; references keep the order of `parents`.

  The order matters. Where z uses y and x, and y = k + x or y = k x, the difference y - x is never negative,
  but most values of x - y are refused. A shuffle would therefore change which problems are made.
  """
  refs = [p for p in parents if p != RNG]
  literal, times = None, False
  if len(refs) < len(parents):
    times = draws.coin()
    literal = draws.between(2 if times else 1, number_range - 1)
  return Expression(literal, times, tuple(refs), len(refs) == 2 and draws.coin())


def quantity_name(
  structure: Structure, template: Template, places: Sequence[str], kinds: Sequence[str], q: int
) -> str:
  """Returns the name of quantity q."""
  place, kind, role = places[structure.place[q]], structure.kind[q], structure.roles[q]
  if role == TOTAL:
    return f"{template.total} in {place}"
  if role == PRODUCT:
    return f"{template.product} in {place}"
  if role in (AVERAGE, ALIAS):
    return f"{template.average} per {kinds[kind]} in {place}"
  return f"{kinds[kind]} in {place}"


def reference_to(name: str) -> str:
  """Returns how a sentence refers to a quantity of this name."""
  return f"the {name}" if name.startswith(("total", "average")) else f"the number of {name}"


def right_side(e: Expression, references: Sequence[str] | dict[int, str]) -> str:
  """Returns the text after "equals"."""
  if not e.refs:
    return str(e.literal)
  refs = [references[q] for q in e.refs]
  if len(refs) == 1:
    text = refs[0]
  elif len(refs) == 2:
    text = f"the {'difference between' if e.difference else 'sum of'} {refs[0]} and {refs[1]}"
  else:
    text = f"the sum of {', '.join(refs[:-1])}, and {refs[-1]}"
  return text if e.literal is None else f"{e.literal} {'times' if e.times else 'plus'} {text}"


def statement(reference: str, right: str) -> str:
  """Returns the sentence that defines a quantity, without its full stop."""
  return f"T{reference[1:]} equals {right}"


def hidden_statement(reference: str) -> str:
  """Returns the sentence about a quantity whose value is asked (reverse mode), without its full stop."""
  ending = (
    "is greater than 0" if reference.startswith("the average") else "exists, and its number is greater than 0"
  )
  return f"T{reference[1:]} {ending}"


def question_about(name: str) -> str:
  """Returns the question about a quantity of this name."""
  if name.startswith(("total", "average")):
    return f"What is the {name}?"
  kind, _, place = name.rpartition(" in ")
  return f"How many {kind} does {place} have?"
