"""What the text of a problem says about it, whoever made it: the one source of all statistics.

Nothing but the text is used, and the names of the core's places, which tell the core from the noise.
"""

import collections
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
  """One problem.

  Attributes:
    op, depth, mode, template, answer: as in `Problem`.
    tokens: of question, line break and context; the one number that the caller gives.
    words, characters: of the same.
    chain: needed quantities on the longest way to the terminal one, it included; an alias is none.
    asked: `total` (of the second layer), `product` (of the third), `average` or `count`.
    roles: sentences of each role: S needed, R the revealed value, U of the core but not needed, N noise.
    forms: sentences of each role and form, as `S literal`.
    names_asked, names_needed: noise sentences whose right side names what is asked, or anything needed.
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
  names_asked: int
  names_needed: int

  @property
  def sentences(self) -> int:
    """Sentences of the context."""
    return sum(self.roles.values())


def read(question: str, context: str, tokens: int, modulus: int = -1) -> Reading:
  """Reads a word problem.

  Args:
    modulus: of its values; -1 for none.

  Raises:
    UnsolvableError: if the text does not determine the answer.
  """
  text = solver.Text(context)
  asked = solver.asked_of(question)
  needed = set(text.needed(solver.terminal_of(text, question)))
  letters = roles(question, context)
  forms: collections.Counter[str] = collections.Counter()
  names_asked = names_needed = 0
  for sentence, role in zip(solver.split_sentences(context), letters, strict=True):
    forms[f"{role} {form(sentence)}"] += 1
    if role == "N":
      named = text.parents(left_of(sentence))
      names_asked += asked in named
      names_needed += not needed.isdisjoint(named)
  whole = f"{question}\n{context}"
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
    answer=solver.solve(question, context, modulus),
    roles=dict(sorted(collections.Counter(letters).items())),
    forms=dict(sorted(forms.items())),
    names_asked=names_asked,
    names_needed=names_needed,
  )


def roles(question: str, context: str) -> str:
  """A letter for each sentence of a word problem's context, in its order: S, R, U or N.

  A sentence that is there twice (the original has such) is needed once.
  """
  text = solver.Text(context)
  needed = set(text.needed(solver.terminal_of(text, question)))
  seen: set[str] = set()
  letters = []
  for sentence in solver.split_sentences(context):
    name = left_of(sentence)
    if _place(name) not in _CORE:
      letters.append("N")
    elif name in text.numbers and sentence.endswith(f" equals {text.numbers[name]}"):
      letters.append("R")
    else:
      letters.append("S" if name in needed and sentence not in seen else "U")
    seen.add(sentence)
  return "".join(letters)


def left_of(sentence: str) -> str:
  """The name of the quantity that a sentence is about."""
  return solver.name_of(_LEFT.fullmatch(sentence)[1])


def form(sentence: str) -> str:
  """The form: literal, copy, times one, plus one, sum, difference, literal with two, many, hidden."""
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


def _place(name: str) -> str:
  return name.rpartition(" in ")[2]


def _kind(name: str) -> str:
  if name.startswith(_PRODUCTS):
    return "product"
  return next((kind for kind in ("total", "average") if name.startswith(kind)), "count")
