"""Which quantity is computed from which: the dependency graph of the needed quantities, and of the rest.

An edge runs from a quantity to one that is computed with it. The structure gives the edges into implicit
quantities. Those into instances (counts, averages) are drawn here and become sentences. `RNG` stands for a
number that is written in the sentence itself.
"""

import dataclasses

from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.structure import ALIAS, PRODUCT, TOTAL, Structure

RNG = -1
MOST_EDGES = 3  # up to which the edge budget raises an instance, before the instance draws its last ones
MOST_UNNEEDED_EDGES = 4


@dataclasses.dataclass
class Graph:
  """The quantities of a problem and their dependencies.

  Attributes:
    order: needed quantities, each after all that it is computed from; the last is the terminal one.
    parents: what the sentence of an instance refers to, in the order of its text; may hold RNG.
    present: all quantities of the problem in the order in which they entered, needed ones first.
    untried: implicit quantities that were never considered as needed.
  """

  order: list[int]
  parents: dict[int, list[int]]
  present: list[int]
  untried: list[int]


def count_operations(structure: Structure, graph: Graph) -> int:
  """Returns op: the number of edges into needed quantities, those from RNG included, into aliases not."""
  return sum(
    len(structure.children[q] if structure.implicit(q) else graph.parents[q])
    for q in graph.order
    if structure.roles[q] != ALIAS
  )


def draw_needed(structure: Structure, size: int, reverse: bool, draws: Draws) -> Graph | None:
  """Draws the needed quantities and their edges; None for an attempt that does not work out.

  Args:
    structure: the quantities that there may be.
    size: s, the number of edges that are placed before each instance draws its own last ones.
    reverse: the terminal quantity is a total if there is one.
    draws: the stream.
  """
  most = max(draws.between(1, size), draws.between(1, size))
  wanted = draws.between(most, size)
  chosen, untried = _choose(structure, most, wanted, draws)
  if not chosen:
    return None
  explicit: dict[int, list[int]] = {}
  order = _arrange(structure, chosen, explicit, reverse, draws)
  if order is None:
    return None
  if len(order) == 2 and draws.coin():
    _add_third(structure, order, explicit, draws)
  if not _fill(structure, order, explicit, size, draws):
    return None
  return Graph(order, explicit, list(order), untried)


def add_unneeded(structure: Structure, graph: Graph, draws: Draws) -> None:
  """Adds all other instances, and totals that they use, to a graph; no needed quantity depends on them.

  As in the benchmark, a total may define a count that it contains. Such a circle has no value, and nothing
  that is needed depends on it.
  """
  present, parents = graph.present, graph.parents
  seen = set(present)
  missing = [q for q in structure.instances if q not in seen]
  untried = [q for q in graph.untried if q not in seen]
  independent: list[int] = []

  def enter(q: int) -> None:
    if q not in seen:
      seen.add(q)
      present.append(q)

  while missing:
    a = draws.pop(missing)
    if draws.coin():
      pool = list(independent)
      independent.append(a)
    else:
      pool = present + [q for q in untried if any(c in seen for c in structure.children[q])]
    k, most = 1, min(MOST_UNNEEDED_EDGES, len(pool) + 1)
    while k < most and draws.coin():
      k += 1
    if k == len(pool) + 1:  # all of it: implicit ones first, then instances, then totals that were absent
      chosen = [RNG, *sorted(pool, key=lambda q: (q not in seen, not structure.implicit(q)))]
    elif draws.coin():
      chosen = [RNG, *draws.sample(pool, k - 1)]
    else:
      chosen = draws.sample(pool, k)
    enter(a)
    parents[a] = chosen
    for q in chosen:
      if q != RNG and q not in seen:
        for ancestor in _ancestors(structure, q):
          if not structure.implicit(ancestor) and ancestor not in seen:
            parents[ancestor] = [RNG]
            missing.remove(ancestor)
          enter(ancestor)
        enter(q)
        untried.remove(q)


def _ancestors(structure: Structure, implicit: int) -> list[int]:
  """Returns all that an implicit quantity is computed from, children of children before their parents."""
  ancestors = []
  for child in structure.children[implicit]:
    ancestors += [*structure.children[child], child]
  return ancestors


def _choose(structure: Structure, most: int, wanted: int, draws: Draws) -> tuple[list[int], list[int]]:
  """Draws the quantities that will be needed: implicit ones, then instances.

  Args:
    structure: the quantities that there may be.
    most: edges that the implicit ones may have together.
    wanted: edges for which instances are added.
    draws: the stream.

  Returns:
    The chosen quantities, and the implicit ones that were never considered.
  """
  levels: list[list[int]] = [[], []]  # products; totals and aliases
  for q in range(len(structure.instances), len(structure.roles)):
    levels[0 if structure.roles[q] == PRODUCT else 1].append(q)
  chosen: list[int] = []
  seen: set[int] = set()
  edges = 0
  level = 0
  while level < len(levels):
    if not levels[level]:
      level += 1
      continue
    q = draws.pop(levels[level])
    new = [c for c in (*_ancestors(structure, q), q) if c not in seen]
    cost = sum(len(structure.children[c]) for c in new)
    if edges + cost <= most:
      edges += cost
      chosen += new
      seen.update(new)
      level = 0
    else:
      level += 1
  missing = [q for q in structure.instances if q not in seen]
  for _ in range(min(wanted - edges - 1, len(missing))):
    chosen.append(draws.pop(missing))
  return chosen, levels[0] + levels[1]


def _arrange(
  structure: Structure, chosen: list[int], explicit: dict[int, list[int]], reverse: bool, draws: Draws
) -> list[int] | None:
  """Orders the chosen quantities from the last to the first and adds edges so that all are needed.

  The edges are written to `explicit`. Returns None if a quantity remains that nothing can use.
  """
  unplaced = list(chosen)
  order: list[int] = []
  wanted: set[int] = set()  # N1: those on which a placed quantity depends
  while unplaced:
    free = _unused(structure, unplaced)  # N2: those on which no unplaced quantity depends
    if order:
      q = draws.choice([q for q in free if q in wanted])
    else:
      q = _draw_terminal(structure, free, reverse, draws)
    order.insert(0, q)
    unplaced.remove(q)
    wanted.update(structure.children[q])
    if not structure.implicit(q):
      explicit[q] = []
    if not unplaced:
      break
    free = _unused(structure, unplaced)
    if not any(c in wanted for c in free):
      if structure.implicit(q):
        return None
      _link(structure, q, free, wanted, explicit, draws)
    elif not structure.implicit(q) and draws.coin():
      _link(structure, q, unplaced, wanted, explicit, draws)
  return order


def _unused(structure: Structure, quantities: list[int]) -> list[int]:
  """Returns those quantities from which no other one of the list is computed implicitly."""
  used = {child for q in quantities for child in structure.children[q]}
  return [q for q in quantities if q not in used]


def _draw_terminal(structure: Structure, free: list[int], reverse: bool, draws: Draws) -> int:
  """Draws the quantity that is asked (forward) or revealed (reverse: a product, else a total, else any)."""
  if reverse:
    for role in (PRODUCT, TOTAL):
      candidates = [q for q in free if structure.roles[q] == role]
      if candidates:
        return draws.choice(candidates)
  return draws.choice(free)


def _link(
  structure: Structure,
  q: int,
  candidates: list[int],
  wanted: set[int],
  explicit: dict[int, list[int]],
  draws: Draws,
) -> None:
  """Adds an edge into q from one of the candidates; implicit and already wanted ones are more likely."""
  weights = []
  for c in candidates:
    bonus = structure.implicit(c) + (c in wanted)
    weights.append(_exp(draws.magnitude(), bonus) if bonus else 1.0)
  chosen = draws.weighted(candidates, weights)
  explicit[q].append(chosen)
  wanted.add(chosen)


def _exp(x: float, times: int) -> float:
  """Returns exp(times * x) for x >= 0 from its series, whose order of additions is the same everywhere."""
  total = term = 1.0
  y = x * times / 16
  for n in range(1, 12):
    term *= y / n
    total += term
  for _ in range(4):
    total *= total
  return total


def _add_third(structure: Structure, order: list[int], explicit: dict[int, list[int]], draws: Draws) -> None:
  """Adds an instance to a chain of two, before it or after it."""
  first, second = order
  third = next((q for q in structure.instances if q not in order), None)
  if third is None:
    return
  if draws.coin():
    if not structure.implicit(first):
      explicit[third] = []
      explicit[first].append(third)
      order.insert(0, third)
  else:
    explicit[third] = [second]
    order.append(third)


def _fill(
  structure: Structure, order: list[int], explicit: dict[int, list[int]], size: int, draws: Draws
) -> bool:
  """Draws the last edges into the instances; False if they cannot take as many as the budget asks for."""
  counts = {q: len(structure.children[q] if structure.implicit(q) else explicit[q]) for q in order}
  capacity = {q: min(MOST_EDGES, max(1, i)) for i, q in enumerate(order) if not structure.implicit(q)}
  for _ in range(size - sum(counts.values())):
    free = [q for q in order if q in capacity and counts[q] < capacity[q]]
    if not free:
      return False
    counts[draws.choice(free)] += 1

  for i, q in enumerate(order):
    if structure.implicit(q):
      continue
    parents, pool = explicit[q], order[:i]
    k = min((2 if draws.coin() else 1) if counts[q] == 1 else counts[q] + 1, i + 1)
    if parents:  # one edge fewer. The benchmark takes the last quantity out of the pool, parent or not
      k, pool = k - 1, pool[:-1]
    if k == len(pool) + 1:
      drawn = [RNG, *pool]
    elif draws.coin():
      drawn = [RNG, *draws.sample(pool, max(k - 1, 0))]
    else:
      drawn = draws.sample(pool, k)
    parents += [p for p in drawn if p not in parents]
    _drop_twins(structure, parents)
  return True


def _drop_twins(structure: Structure, parents: list[int]) -> None:
  """Removes an alias that stands beside its own average: they have the same text."""
  for q in list(parents):
    if q != RNG and structure.roles[q] == ALIAS and structure.children[q][0] in parents:
      parents.remove(q)
