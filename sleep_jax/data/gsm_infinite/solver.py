"""Answers and counts operations from the text alone; shares no code with the generator.

What a reader has to know and no sentence says: the total of a place is the sum of all kinds that are
mentioned for it on the left of a sentence; the total of the third layer is the sum of count x average; and
a quantity that "exists" or "is greater than 0" is the unknown that the one revealed value determines.
"""

import dataclasses
import functools
import re
from fractions import Fraction

_SENTENCE = re.compile(r"\. (?=The number of|The average|The total)")
_EXISTS = re.compile(r"(.*?)(?: exists, and its number)? is greater than 0")
_LITERAL = re.compile(r"(\d+)(?: (plus|times) (.*))?")
_PRODUCTS = {  # totals of the third layer, and the averages that they sum over
  "total number of newborn animal children": "average number of newborn children",
  "total number of teachers from all schools": "average number of teachers",
  "total number of movie nominations": "average number of nominations",
}
_ASSIGN = re.compile(r"assign (V\d+) = (?:(V\d+)(?: ([+-]) 1)?|(-?\d+))")

Polynomial = tuple[Fraction, ...]  # in the unknown, from the constant up


class UnsolvableError(ValueError):
  """The text does not determine what is asked."""


@dataclasses.dataclass(frozen=True)
class Expression:
  """`literal plus/times (sum or difference of refs)`; each part may be absent."""

  literal: int | None
  times: bool
  refs: tuple[str, ...]
  difference: bool


def solve(question: str, context: str, modulus: int = -1) -> int | list[str]:
  """Returns the answer.

  Args:
    question, context: of one problem, forward, reverse or symbolic.
    modulus: the answer of a forward problem is taken modulo this; -1 for none. (Sums and products commute
      with it, so that it need not be applied to every value.)

  Returns:
    A whole number, or for a symbolic problem the sorted names of all variables with the asked value.

  Raises:
    UnsolvableError: if the text does not determine the answer.
  """
  if context.startswith("assign "):
    value = int(re.findall(r"-?\d+", question)[0])
    return sorted(name for name, x in _assigned(context).items() if x == value)
  text = Text(context)
  asked = asked_of(question)
  if not text.unknowns:
    (answer,) = _at_most_constant(text.value(asked))
    return _whole(answer) if modulus == -1 else _whole(answer) % modulus
  if asked not in text.unknowns:
    raise UnsolvableError(f"asks for {asked!r}, which is not the unknown")
  name, revealed = text.revealed()
  left = text.value(name)
  if len(left) != 2:
    raise UnsolvableError("the equation is not of first order")
  return _whole((revealed - left[0]) / left[1])


def count_operations(question: str, context: str) -> int:
  """Returns op: the sum of the costs of all needed quantities, as the README of this package defines them."""
  if context.startswith("assign "):
    return len(_assigned(context))
  text = Text(context)
  return sum(text.cost(name) for name in text.needed(terminal_of(text, question)))


def chain_length(question: str, context: str) -> int:
  """Returns the needed quantities on the longest path from a number to the terminal quantity."""
  text = Text(context)

  @functools.cache
  def depth(name: str) -> int:
    return 1 + max([depth(p) for p in text.parents(name)], default=0)

  return depth(terminal_of(text, question))


def split_sentences(context: str) -> list[str]:
  """Splits a context into sentences, without the full stops between and after them."""
  if context.startswith("assign "):
    return context.rstrip(".").split(". ")
  return _SENTENCE.split(context.removesuffix("."))


class Text:
  """The definitions in a context."""

  def __init__(self, context: str):
    self.right: dict[str, str] = {}  # name -> what follows "equals"
    self.unknowns: list[str] = []
    self.numbers: dict[str, int] = {}  # value statements of what is defined in another way too
    bare: list[tuple[str, int]] = []
    for sentence in split_sentences(context):
      left, equals, right = sentence.partition(" equals ")
      if not equals:
        self.unknowns.append(name_of(_matched(_EXISTS, left)[1]))
        continue
      name = name_of(left)
      if right.isdigit():
        bare.append((name, int(right)))
      else:
        self.right.setdefault(name, right)
    for name, number in bare:
      if name.startswith("total") or name in self.unknowns or name in self.right:
        self.numbers[name] = number
      else:
        self.right[name] = str(number)
    self.counts: dict[str, list[str]] = {}  # place -> names of its counts
    for name in [*self.right, *self.unknowns]:
      if not name.startswith(("average", "total")):
        self.counts.setdefault(name.rpartition(" in ")[2], [])
        if name not in self.counts[name.rpartition(" in ")[2]]:
          self.counts[name.rpartition(" in ")[2]].append(name)
    self._values: dict[str, Polynomial] = {}

  def revealed(self) -> tuple[str, int]:
    """Returns the quantity whose value is given beside its definition, and the value."""
    if len(self.numbers) != 1:
      raise UnsolvableError(f"{len(self.numbers)} values are revealed, not one")
    return next(iter(self.numbers.items()))

  def parents(self, name: str) -> list[str]:
    """Returns the quantities that a quantity is computed from."""
    if name in self.unknowns:
      return []
    if name.startswith("total"):
      return [p for pair in self._summands(name) for p in pair]
    return list(self._expression(name).refs)

  def needed(self, terminal: str) -> list[str]:
    """Returns the terminal quantity and all its ancestors."""
    found, queue = {terminal: None}, [terminal]
    while queue:
      for parent in self.parents(queue.pop()):
        if parent not in found:
          found[parent] = None
          queue.append(parent)
    return list(found)

  def cost(self, name: str) -> int:
    """Returns the operations of one quantity."""
    if name in self.unknowns:
      return 1
    number = not name.startswith("total") and self._expression(name).literal is not None
    return len(self.parents(name)) + number

  def value(self, name: str) -> Polynomial:
    """Returns a quantity as a polynomial in the unknown."""
    if name not in self._values:
      self._values[name] = ()  # marks what is being computed
      self._values[name] = self._compute(name)
    if not self._values[name]:
      raise UnsolvableError(f"{name!r} depends on itself")
    return self._values[name]

  def _compute(self, name: str) -> Polynomial:
    if name in self.unknowns:
      return (Fraction(0), Fraction(1))
    if name.startswith("total"):
      total: Polynomial = (Fraction(0),)
      for pair in self._summands(name):
        total = _add(total, functools.reduce(_multiply, map(self.value, pair)))
      return total
    e = self._expression(name)
    result: Polynomial | None = None
    for ref in e.refs:
      x = self.value(ref)
      result = x if result is None else _add(result, tuple(-c for c in x) if e.difference else x)
    if e.literal is None:
      if result is None:
        raise UnsolvableError(f"nothing defines {name!r}")
      return result
    number = (Fraction(e.literal),)
    return number if result is None else (_multiply if e.times else _add)(number, result)

  def _summands(self, name: str) -> list[tuple[str, ...]]:
    phrase, _, place = name.rpartition(" in ")
    counts = self.counts.get(place, [])
    if phrase not in _PRODUCTS:
      return [(count,) for count in counts]
    return [(count, f"{_PRODUCTS[phrase]} per {count}") for count in counts]

  def _expression(self, name: str) -> Expression:
    if name not in self.right:
      raise UnsolvableError(f"nothing defines {name!r}")
    text, literal, times = self.right[name], None, False
    if found := _LITERAL.fullmatch(text):
      literal, times, text = int(found[1]), found[2] == "times", found[3] or ""
    difference = text.startswith("the difference between ")
    if difference or text.startswith("the sum of "):
      text = text.removeprefix("the difference between ").removeprefix("the sum of ")
      parts = re.split(r", and (?=the )|, (?=the )| and (?=the )", text)
    else:
      parts = [text] if text else []
    return Expression(literal, times, tuple(map(name_of, parts)), difference)


def _matched(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
  found = re.fullmatch(pattern, text)
  if found is None:
    raise UnsolvableError(f"this is no sentence of such a problem: {text!r:.200}")
  return found


def name_of(reference: str) -> str:
  """Returns a quantity's name, given how a sentence refers to it."""
  return re.sub(r"^[Tt]he (?:number of )?", "", reference)


def asked_of(question: str) -> str:
  """Returns the name of the quantity that a question asks for."""
  if found := re.fullmatch(r"What is the (.*)\?", question):
    return found[1]
  kind, place = _matched(r"How many (.*) does (.*) have\?", question).groups()
  return f"{kind} in {place}"


def terminal_of(text: Text, question: str) -> str:
  """Returns the quantity that no needed one uses: the revealed one in reverse mode, else the asked one."""
  return text.revealed()[0] if text.unknowns else asked_of(question)


def _add(a: Polynomial, b: Polynomial) -> Polynomial:
  size = max(len(a), len(b))
  none = Fraction(0)
  return _trim([(a[i] if i < len(a) else none) + (b[i] if i < len(b) else none) for i in range(size)])


def _multiply(a: Polynomial, b: Polynomial) -> Polynomial:
  result = [Fraction(0)] * (len(a) + len(b) - 1)
  for i, x in enumerate(a):
    for j, y in enumerate(b):
      result[i + j] += x * y
  return _trim(result)


def _trim(coefficients: list[Fraction]) -> Polynomial:
  while len(coefficients) > 1 and coefficients[-1] == 0:
    coefficients.pop()
  return tuple(coefficients)


def _at_most_constant(value: Polynomial) -> Polynomial:
  if len(value) > 1:
    raise UnsolvableError("the answer depends on an unknown")
  return value


def _whole(x: Fraction) -> int:
  if x.denominator != 1:
    raise UnsolvableError(f"the answer is {x}, no whole number")
  return int(x)


def _assigned(context: str) -> dict[str, int]:
  """Returns the variables whose value the statements determine, with the value."""
  found = {m[1]: m for m in (_matched(_ASSIGN, sentence) for sentence in split_sentences(context))}
  values = {name: int(m[4]) for name, m in found.items() if m[4]}
  children: dict[str, list[str]] = {}
  for name, m in found.items():
    children.setdefault(m[2], []).append(name)
  queue = list(values)
  while queue:
    parent = queue.pop()
    for name in children.get(parent, []):
      values[name] = values[parent] + {"+": 1, "-": -1, None: 0}[found[name][3]]
      queue.append(name)
  return values
