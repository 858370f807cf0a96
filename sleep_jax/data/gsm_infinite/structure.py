"""Which kinds each place has, and the quantities that follow from it.

A quantity is a small whole number, an index into the lists of `Structure`:

    COUNT    how many of a kind a place has            a sentence defines it
    AVERAGE  of something per kind and place (d = 3)   a sentence defines it
    ALIAS    an average, as the total of averages sees it (d = 3); costs no operation
    TOTAL    of all kinds of a place                   the sum of the place's counts, never stated
    PRODUCT  total of the third layer (d = 3)          the sum of count x average, never stated
"""

import dataclasses
import math

from sleep_jax.data.gsm_infinite.draws import Draws

COUNT, AVERAGE, ALIAS, TOTAL, PRODUCT = "count", "average", "alias", "total", "product"

MAX_EDGES = 20  # at most so many pairs (place, kind)
MAX_WIDTH = 5  # at most so many places, and kinds: the names in a group
_CENTRES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the widths 1 .. 5, as shares of the edge budget


@dataclasses.dataclass(frozen=True)
class Structure:
  """The pairs (place, kind) that exist, and the quantities over them.

  Attributes:
    roles: role of each quantity.
    place, kind: indices for each quantity; kind is -1 for the totals, which are over all kinds.
    children: what each implicit quantity is computed from; () for the others.
    instances: the quantities that a sentence defines: the counts, then the averages.
  """

  roles: tuple[str, ...]
  place: tuple[int, ...]
  kind: tuple[int, ...]
  children: tuple[tuple[int, ...], ...]
  instances: tuple[int, ...]

  def implicit(self, q: int) -> bool:
    """Returns whether the quantity follows from others, so that no sentence defines it."""
    return q >= len(self.instances)


def structure_of_pairs(pairs: list[tuple[int, int]], num_places: int, depth: int) -> Structure:
  """Returns the structure over given pairs.

  Args:
    pairs: (place, kind), each once, in the order in which their quantities are numbered.
    num_places: places 0 .. num_places - 1, each of which has a kind.
    depth: 2, or 3 for averages too.
  """
  e = len(pairs)
  at: list[list[int]] = [[] for _ in range(num_places)]
  for i, (place, _) in enumerate(pairs):
    at[place].append(i)
  places, kinds = [p for p, _ in pairs], [k for _, k in pairs]
  roles, place, kind = [COUNT] * e, list(places), list(kinds)
  children: list[tuple[int, ...]] = [()] * e
  if depth == 3:
    roles += [AVERAGE] * e + [ALIAS] * e
    place, kind = place * 3, kind * 3
    children += [()] * e + [(e + i,) for i in range(e)]
  roles += [TOTAL] * num_places
  children += [tuple(ids) for ids in at]
  if depth == 3:
    roles += [PRODUCT] * num_places
    children += [tuple(ids) + tuple(2 * e + i for i in ids) for ids in at]
  totals = len(roles) - len(place)
  place += list(range(num_places)) * (totals // num_places)
  kind += [-1] * totals
  return Structure(tuple(roles), tuple(place), tuple(kind), tuple(children), tuple(range(e * (depth - 1))))


def draw_structure(draws: Draws, size: int, depth: int, reverse: bool) -> Structure | None:
  """Draws a structure; None for an attempt that does not work out.

  Args:
    draws: the stream.
    size: s, half the operation budget, which decides how wide the layers tend to be.
    depth: d, 2 or 3.
    reverse: whether it is for reverse mode, which has smaller structures.
  """
  width_ends = _width_ends(size)
  widths = []
  for _ in range(2):
    u = draws.uniform()
    width = 1 + sum(u >= end for end in width_ends[:-1])
    if size <= 5 and reverse:
      width = min(width, 3)
    elif size <= 5 and depth == 2:
      width = max(width, 2)
    widths.append(width)
  low, high = sorted(widths)
  least = (depth - 1) * low
  cap = high**2 if depth == 2 else high**2 + high
  edges = min(draws.between(least, MAX_EDGES), draws.between(least, MAX_EDGES), cap)

  sizes = [low, low]  # places, kinds
  p = draws.uniform()
  while min(sizes) < high:
    if sizes[0] * sizes[1] >= edges and (sizes[1] == edges or draws.uniform() >= p):
      break
    sizes[draws.choice([layer for layer in (0, 1) if sizes[layer] < high])] += 1
  num_places, num_kinds = sizes
  if edges > num_places * num_kinds:
    return None

  taken = {(draws.index(num_places), kind) for kind in range(num_kinds)}
  missing = [
    place for place in range(num_places) if all((place, kind) not in taken for kind in range(num_kinds))
  ]
  if len(taken) + len(missing) > edges:
    return None
  taken.update([(place, draws.index(num_kinds)) for place in missing])
  free = [pair for pair in _grid(num_places, num_kinds) if pair not in taken]
  taken.update(draws.sample(free, edges - len(taken)))
  return structure_of_pairs(
    [pair for pair in _grid(num_places, num_kinds) if pair in taken], num_places, depth
  )


def _grid(num_places: int, num_kinds: int) -> list[tuple[int, int]]:
  return [(place, kind) for place in range(num_places) for kind in range(num_kinds)]


def _width_ends(size: int) -> tuple[float, ...]:
  """Returns cumulative probabilities of the widths 1 .. 5, the softmax of minus squared distances."""
  if size not in _WIDTH_ENDS:
    share = (size - 1) / (MAX_EDGES - 1)
    weights = [math.exp(-((share - c) ** 2)) for c in _CENTRES]
    ends = [sum(weights[: i + 1]) / sum(weights) for i in range(MAX_WIDTH)]
    _WIDTH_ENDS[size] = tuple(round(end, 9) for end in ends)  # the same on every platform
  return _WIDTH_ENDS[size]


_WIDTH_ENDS: dict[int, tuple[float, ...]] = {}
