"""Reads everything that is counted from the text of a problem, whoever made it.

Only the text is used, and the names of the core's places, by which core and noise are told apart. All
statistics come from here, for our problems and for the original's.
"""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Mapping

from sleep_jax.data.gsm_infinite import solver
from sleep_jax.data.gsm_infinite.words import TEMPLATES

_CORE = {place: name for name, t in TEMPLATES.items() for group in t.places for place in group}
_PRODUCTS = tuple(t.product for t in TEMPLATES.values())
_LEFT = re.compile(r"(.*?)(?: equals .*| exists, and its number is greater than 0| is greater than 0)")


@dataclasses.dataclass(frozen=True)
class Reading:
  """The statistics of one problem.

  Attributes:
    op, depth, mode, template, answer: as in `Problem`.
    tokens: of question, line break and context; the one number that the caller gives.
    words, characters: of the same.
    chain: needed quantities on the longest path to the terminal one, which counts too; an alias does not.
    asked: `total` (of the second layer), `product` (of the third), `average` or `count`.
    roles: sentences of each role: S needed, R the revealed value, U of the core but not needed, N noise.
    forms: sentences of each role and form, such as `S literal`.
    circular: unneeded sentences that define a quantity by itself, through a total that contains it.
    names_asked, names_needed: noise sentences whose right side mentions the asked quantity, or any needed.
  """

  op: int
  depth: int
  mode: str
  template: str
  tokens: int
  words: int
  characters: int
  chain: int
  asked: str
  answer: int
  roles: Mapping[str, int]
  forms: Mapping[str, int]
  circular: int
  names_asked: int
  names_needed: int

  @property
  def sentences(self) -> int:
    """Number of sentences in the context."""
    return sum(self.roles.values())


def read_problem(question: str, context: str, tokens: int, modulus: int = -1) -> Reading:
  """Reads a word problem.

  Args:
    question, context: its texts.
    tokens: as counted by the caller.
    modulus: of its values; -1 for none.

  Raises:
    UnsolvableError: if the text does not determine the answer.
  """
  text = solver.Text(context)
  asked = solver.asked_of(question)
  needed = set(text.needed(solver.terminal_of(text, question)))
  letters = sentence_roles(question, context)
  forms: collections.Counter[str] = collections.Counter()
  names_asked = names_needed = 0
  for sentence, role in zip(solver.split_sentences(context), letters, strict=True):
    forms[f"{role} {sentence_form(sentence)}"] += 1
    if role == "N":
      named = text.parents(quantity_of(sentence))
      names_asked += asked in named
      names_needed += not needed.isdisjoint(named)
  whole = f"{question}\n{context}"
  answer = solver.solve(question, context, modulus)
  assert isinstance(answer, int), "a symbolic problem"
  return Reading(
    op=solver.count_operations(question, context),
    depth=3 if any(name.startswith("average") for name in (*text.right, *text.unknowns)) else 2,
    mode="reverse" if text.unknowns else "forward",
    template=next(_CORE[place] for place in map(_place, needed) if place in _CORE),
    tokens=tokens,
    words=len(whole.split()),
    characters=len(whole),
    chain=solver.chain_length(question, context),
    asked=_kind(asked),
    answer=answer,
    roles=dict(sorted(collections.Counter(letters).items())),
    forms=dict(sorted(forms.items())),
    circular=sum(_is_circular(text, name) for name in text.right if _place(name) in _CORE),
    names_asked=names_asked,
    names_needed=names_needed,
  )


def sentence_roles(question: str, context: str) -> str:
  """Returns a letter for each sentence of a word problem's context, in its order: S, R, U or N.

  Of a sentence that stands there twice, as happens in the original, only the first is needed.
  """
  text = solver.Text(context)
  needed = set(text.needed(solver.terminal_of(text, question)))
  seen: set[str] = set()
  letters = []
  for sentence in solver.split_sentences(context):
    name = quantity_of(sentence)
    if _place(name) not in _CORE:
      letters.append("N")
    elif name in text.numbers and sentence.endswith(f" equals {text.numbers[name]}"):
      letters.append("R")
    else:
      letters.append("S" if name in needed and sentence not in seen else "U")
    seen.add(sentence)
  return "".join(letters)


def quantity_of(sentence: str) -> str:
  """Returns the name of the quantity that a sentence defines."""
  found = _LEFT.fullmatch(sentence)
  assert found is not None, sentence
  return solver.name_of(found[1])


def sentence_form(sentence: str) -> str:
  """Returns the form: literal, copy, times one, plus one, sum, difference, literal with two, many, hidden."""
  _, equals, right = sentence.partition(" equals ")
  if not equals:
    return "hidden"
  if right.isdigit():
    return "literal"
  number, _, rest = right.partition(" ")
  operator, _, rest = rest.partition(" ") if number.isdigit() else ("", "", right)
  if ", and the " in rest:
    return "many"
  if rest.startswith(("the sum of ", "the difference between ")):
    if operator:
      return "literal with two"
    return "sum" if rest.startswith("the sum") else "difference"
  return f"{operator} one" if operator else "copy"


def _is_circular(text: solver.Text, name: str) -> bool:
  """Returns whether a quantity is among those that it is computed from."""
  seen: set[str] = set()
  queue = text.parents(name)
  while queue:
    parent = queue.pop()
    if parent not in seen:
      seen.add(parent)
      with contextlib.suppress(solver.UnsolvableError):  # the original lost some definitions
        queue += text.parents(parent)
  return name in seen


def _place(name: str) -> str:
  return name.rpartition(" in ")[2]


def _kind(name: str) -> str:
  if name.startswith(_PRODUCTS):
    return "product"
  return next((kind for kind in ("total", "average") if name.startswith(kind)), "count")
