"""Values of the needed quantities, as lines a + b x in the hidden one, and the worked solution."""

import string
from collections.abc import Callable, Mapping, Sequence

from sleep_jax.data.gsm_infinite.config import MOST_VALUE
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.sentences import Expression
from sleep_jax.data.gsm_infinite.structure import ALIAS, COUNT, PRODUCT, Structure

Line = tuple[int, int]  # a + b x


def evaluate(
  structure: Structure,
  order: Sequence[int],
  expressions: Mapping[int, Expression],
  unknown: int | None,
  modulus: int = -1,
) -> dict[int, Line] | None:
  """Computes the needed quantities in terms of the unknown one.

  Args:
    structure: which quantities are implicit, and their children.
    order: the needed quantities, each after all that it is computed from.
    expressions: of the instances among them.
    unknown: the hidden leaf x; None in forward mode.
    modulus: every value is taken modulo this, if there is no unknown; -1 for none.

  Returns:
    Quantity -> (a, b) for a + b x, or None if one is of higher order.
  """
  lines: dict[int, Line] = {}
  for q in order:
    if q == unknown:
      lines[q] = (0, 1)
      continue
    if structure.implicit(q):
      products = [_times(*(lines[c] for c in pair)) for pair in summands(structure, q)]
      terms = [term for term in products if term is not None]
      if len(terms) < len(products):
        return None
      a, b = sum(t[0] for t in terms), sum(t[1] for t in terms)
    else:
      e = expressions[q]
      a = sum(lines[c][0] for c in e.refs)
      b = sum(lines[c][1] for c in e.refs)
      if e.difference:
        a, b = 2 * lines[e.refs[0]][0] - a, 2 * lines[e.refs[0]][1] - b
      if e.literal is not None:
        a, b = (a * e.literal, b * e.literal) if e.times and e.refs else (a + e.literal, b)
    lines[q] = (a if modulus == -1 else a % modulus, b)
  return lines


def summands(structure: Structure, q: int) -> list[tuple[int, ...]]:
  """Returns the products whose sum an implicit quantity is."""
  children = structure.children[q]
  if structure.roles[q] != PRODUCT:
    return [(c,) for c in children]
  half = len(children) // 2
  return list(zip(children[:half], children[half:], strict=True))


def acceptable(structure: Structure, lines: Mapping[int, Line], x: int) -> bool:
  """Returns whether all values lie in 0 .. 1000 and no count is 0."""
  for q, (a, b) in lines.items():
    value = a + b * x
    if not 0 <= value <= MOST_VALUE or (value == 0 and structure.roles[q] == COUNT):
      return False
  return True


def hidden_leaf(order: Sequence[int], expressions: Mapping[int, Expression]) -> int | None:
  """Returns the leaf that reverse mode hides: the last one of the order that is only a number."""
  return next((q for q in reversed(order) if q in expressions and not expressions[q].refs), None)


def solution(
  structure: Structure,
  order: Sequence[int],
  expressions: Mapping[int, Expression],
  lines: Mapping[int, Line],
  name: Callable[[int], str],
  unknown: int | None,
  x: int,
  draws: Draws,
  modulus: int = -1,
) -> str:
  """Returns the worked solution: one definition for each needed quantity, then `Answer: v.`

  With a modulus each definition says so.
  """
  ending = "." if modulus == -1 else f" (mod {modulus})."
  letters = [c for c in string.ascii_letters if unknown is None or c not in "xX"]
  draws.shuffle(letters)
  letter: dict[int, str] = {}
  steps = []
  for q in order:
    if q == unknown:
      letter[q] = "x"
      steps.append(f"Define {name(q)} as x; we do not know it yet.")
      continue
    if structure.roles[q] == ALIAS:
      letter[q] = letter[structure.children[q][0]]
      continue
    if not letters:
      letters += [f"{a}{b}" for a in string.ascii_lowercase for b in string.ascii_lowercase]
    letter[q] = letters.pop()
    formula = _formula(structure, q, expressions)
    parts = [letter[q], formula(lambda c: letter[c]), formula(lambda c: _line(lines[c], nested=True))]
    parts.append(_line(lines[q]))
    shown = [part for i, part in enumerate(parts) if i < 2 or part != parts[i - 1]]
    steps.append(f"Define {name(q)} as {letter[q]}; so {' = '.join(shown)}{ending}")
  if unknown is None:
    return " ".join([*steps, f"Answer: {lines[order[-1]][0]}."])
  a, b = lines[order[-1]]
  value = a + b * x
  steps.append(f"We know {letter[order[-1]]} = {value}, so {_line((a, b))} = {value}.")
  steps.append(f"Hence {_line((0, b))} = {value - a}, and x = {value - a} / {b} = {x}.")
  return " ".join(["We solve an equation.", *steps, f"Answer: {x}."])


def _formula(
  structure: Structure, q: int, expressions: Mapping[int, Expression]
) -> Callable[[Callable[[int], str]], str]:
  """Returns a function that writes the expression of a quantity, given how its operands are written."""

  def write(show: Callable[[int], str]) -> str:
    if structure.implicit(q):
      return " + ".join(" * ".join(show(c) for c in pair) for pair in summands(structure, q))
    e = expressions[q]
    text = (" - " if e.difference else " + ").join(show(c) for c in e.refs)
    if e.literal is None:
      return text
    if not e.refs:
      return str(e.literal)
    inner = f"({text})" if len(e.refs) > 1 else text
    return f"{e.literal} {'*' if e.times else '+'} {inner}"

  return write


def _line(line: Line, nested: bool = False) -> str:
  """Writes a + b x in its shortest form; within a formula in parentheses if it has two terms or a sign."""
  a, b = line
  if b == 0:
    return f"({a})" if nested and a < 0 else str(a)
  term = {1: "x", -1: "-x"}.get(b, f"{b}x")
  text = term if a == 0 else f"{term} {'-' if a < 0 else '+'} {abs(a)}"
  return f"({text})" if nested and (a or b < 0) else text


def _times(a: Line, b: Line | None = None) -> Line | None:
  """Multiplies two lines; None if the product is of second order."""
  if b is None:
    return a
  return None if a[1] and b[1] else (a[0] * b[0], a[0] * b[1] + a[1] * b[0])
