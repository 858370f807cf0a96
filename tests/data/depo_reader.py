"""Reads a Depo sequence from its tokens alone, by hand: the judge of generators."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Ids:
  """What tokens mean. `final`: the tokens that end a name; `hop`: token minus this is k."""

  final: range
  hop: int
  ans: int
  sep: int
  bos: int
  pad: int = -1


RELEASED = Ids(final=None, hop=9000, ans=9500, sep=9700, bos=9999)


def ours(cfg) -> Ids:
  V, K = cfg.mini_vocab, cfg.max_hops
  last = 2 * V + K + 1
  return Ids(range(V + 1, 2 * V + 1), hop=2 * V, ans=last, bos=last + 1, sep=last + 2, pad=0)


def released(V) -> Ids:
  return dataclasses.replace(RELEASED, final=range(V + 1, 2 * V + 1))


@dataclasses.dataclass(frozen=True)
class Instance:
  """A sequence as read: edges in order, (k, start, answer) in order, and positions of the labels."""

  edges: list
  queries: list
  labels: list


def read(tokens, ids: Ids) -> Instance:
  """Parses tokens; raises ValueError for anything that is no Depo sequence."""
  place = 0

  def here():
    return tokens[place] if place < len(tokens) else None

  def name():
    nonlocal place
    found = []
    while True:
      token = here()
      if token is None or not 1 <= token < ids.final.stop:
        raise ValueError(f"no name at {place}: {token}")
      found.append(token)
      place += 1
      if token in ids.final:
        return tuple(found)

  def is_hop(token):
    return token is not None and ids.hop < token < ids.ans

  while here() == ids.pad:
    place += 1
  if here() == ids.bos:
    place += 1
  edges, queries, labels = [], [], []
  while not is_hop(here()):
    if here() == ids.sep:
      place += 1
    edges.append((name(), name()))
  while is_hop(here()):
    k = here() - ids.hop
    place += 1
    start = name()
    if here() != ids.ans:
      raise ValueError(f"no ANS at {place}")
    begin = place
    place += 1
    queries.append((k, start, name()))
    labels += range(begin, place)
  if any(token != ids.pad for token in tokens[place:]):
    raise ValueError(f"something comes after the questions, at {place}")
  return Instance(edges, queries, labels)


def verify(found: Instance) -> int:
  """n, after checking that the edges are one cycle and that walking it gives every answer.

  Raises:
    ValueError: where they are not, or it does not.
  """
  after = dict(found.edges)
  if len(after) != len(found.edges):
    raise ValueError("two edges leave one node")
  node, seen = found.edges[0][0], 0
  while True:
    node, seen = after[node], seen + 1
    if node == found.edges[0][0]:
      break
  if seen != len(after):
    raise ValueError(f"a cycle of {seen} among {len(after)} nodes")
  for k, start, answer in found.queries:
    node = start
    for _ in range(k):
      node = after[node]
    if node != answer:
      raise ValueError(f"{k} edges after {start} is {node}, not {answer}")
  return seen
