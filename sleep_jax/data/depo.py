"""Depo: the node that comes k edges further on a directed cycle whose shuffled edges are long evicted.

The task of Allen-Zhu (arXiv 2512.17351, after its released generator) as arXiv 2605.26099 uses it. A sequence
is one cycle of at most 75 nodes, its edges in 300 tokens, then ten questions in 60.

    tokens   PAD PAD ... src dst src dst ... src dst | Q(k) start ANS node  Q(k) start ANS node ... PAD
    targets                                          |            ANS node             ANS node

A name is one or more tokens. The last of them comes from a range of its own, so names need no separator. The
context ends and the questions begin at `context_length` exactly. Names, sizes, edge order, starts and k
follow the released generator. Whatever arXiv 2605.26099 leaves open is a field here; the default is the
reading that fits all numbers in the paper. Labels are shifted inside the window that answers: position i
predicts targets[i].
"""

import dataclasses
import functools
import itertools
import math
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.config import Bounds, Count, Seed, at_least, check, check_fields, shown
from sleep_jax.data import limits
from sleep_jax.windows import Batch

PAD = 0
MOST_NAMES = 1 << 16  # names are drawn from a table of all of them
NameLength = Annotated[int, Bounds(least=1), Bounds(most=64)]


@dataclasses.dataclass(frozen=True)
class DepoConfig:
  """The task.

  Attributes:
    max_nodes: N, nodes of the largest cycle, and of every held-out one.
    min_nodes: nodes of the smallest cycle in training. With at least `num_pairs` every sequence has all its
      questions.
    sizes: how n is drawn in training: `original`: with weight 1 / (n + sqrt(N)), as released; `uniform`;
      `largest`: always N (the first switch to try where figure 3 is not reproduced).
    max_hops: K. In training k is even over 1..K, whatever n is, so a walk may go round more than once.
    test_hops: one held-out set for each of these k, over the same graphs and starts.
    num_pairs: questions of a sequence; min(n, num_pairs) are asked, from different starts.
    mini_vocab: V. Names use tokens 1..V, and V + 1..2 V for their last one.
    min_name, max_name: tokens of a name. The length is drawn evenly; a name that is taken is drawn again.
    separator: whether a SEP token stands before each edge.
    bos: whether a BOS token stands before the edges. A context without room for it has none.
    label_ans: whether the loss counts the (trivial) ANS beside the answer, as released.
    pads: `ordinary`: PAD is a token like any other, embedded, attended and written; `masked`: no token
      attends to it and it leaves S unchanged. The paper does not say which.
    context_length, query_length: tokens of the two parts. The first is padded on the left, the second on the
      right.
    held_out_seed: seed of the evaluation sets, which are the same for every run.
  """

  PATH: ClassVar[str] = "data"

  max_nodes: int = 75
  min_nodes: Annotated[int, Bounds(least=2)] = 3
  sizes: Literal["original", "uniform", "largest"] = "original"
  max_hops: Annotated[int, Bounds(least=1), Bounds(most=limits.HOPS)] = 16
  test_hops: tuple[int, ...] = (1, 2, 4, 8, 16)
  num_pairs: Count = 10
  mini_vocab: Count = 50
  min_name: NameLength = 1
  max_name: NameLength = 2
  separator: bool = False
  bos: bool = False
  label_ans: bool = True
  pads: Literal["ordinary", "masked"] = "ordinary"
  context_length: Annotated[int, Bounds(most=limits.LENGTH)] = 300
  query_length: Annotated[int, Bounds(most=limits.LENGTH)] = 60
  held_out_seed: Seed = 1_000_003

  def __post_init__(self):
    check_fields(self)
    at_least(self.max_name, self.min_name, "data.max_name")
    at_least(self.max_nodes, self.min_nodes, "data.max_nodes")
    self._check_names()
    self._check_hops()
    self._check_lengths()

  def _check_names(self) -> None:
    names = sum(self.mini_vocab**length for length in self.name_lengths)
    check(
      names <= MOST_NAMES,
      "data.mini_vocab",
      f"allows {shown(names)} names, at most {MOST_NAMES} can be drawn from; make it or data.max_name"
      " smaller",
    )
    check(
      self.max_nodes <= names,
      "data.max_nodes",
      f"must be at most {names}, the names that data.mini_vocab, min_name and max_name allow,"
      f" got {self.max_nodes}",
    )

  def _check_hops(self) -> None:
    check(len(self.test_hops) > 0, "data.test_hops", "must name at least one k")
    for k in self.test_hops:
      check(
        1 <= k <= self.max_hops,
        "data.test_hops",
        f"must lie in 1..{self.max_hops} (data.max_hops), got {k}",
      )
    check(
      len(set(self.test_hops)) == len(self.test_hops),
      "data.test_hops",
      f"names a k twice: {self.test_hops}",
    )

  def _check_lengths(self) -> None:
    edges = self.max_nodes * (2 * self.max_name + self.separator)
    check(
      self.context_length >= edges,
      "data.context_length",
      f"must hold the {edges} tokens of {self.max_nodes} edges, got {self.context_length}",
    )
    pairs = self.pairs * (2 * self.max_name + 2)
    check(
      self.query_length >= pairs,
      "data.query_length",
      f"must hold the {pairs} tokens of {self.pairs} questions, got {self.query_length}",
    )

  @property
  def name_lengths(self) -> range:
    """The numbers of tokens that a name may have."""
    return range(self.min_name, self.max_name + 1)

  @property
  def length(self) -> int:
    """T, tokens of a sequence."""
    return self.context_length + self.query_length

  @property
  def pairs(self) -> int:
    """Questions of a held-out sequence, and the most of any."""
    return min(self.num_pairs, self.max_nodes)

  @property
  def ans(self) -> int:
    """The token between start and answer. Q(k) is `hop(k)`."""
    return 2 * self.mini_vocab + self.max_hops + 1

  @property
  def vocab_size(self) -> int:
    """Tokens: PAD, names, Q(1..K), ANS, and BOS and SEP as far as they are used."""
    return self.ans + 1 + (2 if self.separator else int(self.bos))

  def hop(self, k: Any) -> Any:
    """The token Q(k), of a number or of each in an array."""
    return 2 * self.mini_vocab + k


def layout(cfg: DepoConfig) -> np.ndarray:
  """Returns where the loss may be: [T] bool, whatever the lengths of the names."""
  i = np.arange(cfg.length)
  first = cfg.context_length + cfg.min_name + (0 if cfg.label_ans else 1)
  return (i >= first) & (i < cfg.length - 1)


def check_window(cfg: DepoConfig, window: int) -> None:
  """Raises `ConfigError` unless windows end where the questions begin, and one holds them all."""
  check(
    cfg.context_length % window == 0,
    "model.window",
    f"must divide data.context_length = {cfg.context_length} so that no window holds edges and questions,"
    f" got {window}",
  )
  check(
    cfg.query_length <= window,
    "model.window",
    f"must hold the {cfg.query_length} tokens of the questions (data.query_length), got {window}",
  )


def answer_of(cfg: DepoConfig, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns which question each target answers.

  Args:
    cfg: the task.
    targets, mask: [B, M], at the positions of `layout`.

  Returns:
    [B, M] int32: 0 .. num_pairs - 1 at the tokens of an answer's name, -1 at ANS and where nothing counts.
  """
  named = (mask > 0) & (targets != cfg.ans)
  before = jnp.concatenate([jnp.zeros_like(named[:, :1]), named[:, :-1]], axis=1)
  return jnp.where(named, jnp.cumsum(named & ~before, axis=1) - 1, -1).astype(jnp.int32)


def batch(cfg: DepoConfig, key: jax.Array, step: jax.Array, size: int, hops: int | None = None) -> Batch:
  """Makes batch number `step` of a stream: sequences step * size .. (step + 1) * size - 1.

  Args:
    cfg: the task.
    key: typed PRNG key of the stream; a sequence is a pure function of it and of its index.
    step: whole number; (step + 1) * size must not exceed 2^31.
    size: B, sequences.
    hops: None: training. Otherwise a held-out set: k of every question, on cycles of `max_nodes`.

  Returns:
    B sequences of T tokens; `valid` marks the pads if `pads` is `masked`, else it is None.

  Raises:
    ConfigError: if `hops` is outside the trained range.
  """
  _check_hops(cfg, hops)
  one = functools.partial(_sequence, cfg, hops=hops)
  inputs, labelled = jax.vmap(lambda i: one(jax.random.fold_in(key, i)))(step * size + jnp.arange(size))
  shifted = jnp.concatenate([inputs[:, 1:], jnp.zeros_like(inputs[:, :1])], axis=1)
  mask = jnp.concatenate([labelled[:, 1:], jnp.zeros_like(labelled[:, :1])], axis=1)
  valid = inputs != PAD if cfg.pads == "masked" else None
  return Batch(inputs, jnp.where(mask, shifted, 0), mask.astype(jnp.float32), valid)


def _check_hops(cfg: DepoConfig, hops: int | None) -> None:
  if hops is not None:
    check(1 <= hops <= cfg.max_hops, "hops", f"must lie in 1..{cfg.max_hops} (data.max_hops), got {hops}")


def _sequence(cfg: DepoConfig, key: jax.Array, hops: int | None) -> tuple[jax.Array, jax.Array]:
  """Draws one sequence: tokens [T] int32, and which of them are labels, [T] bool."""
  size_key, name_key, cycle_key, edge_key, start_key, hop_key = jax.random.split(key, 6)
  N, slots = cfg.max_nodes, jnp.arange(cfg.max_nodes)
  n = _size(cfg, size_key) if hops is None else jnp.int32(N)
  tokens, weights = (jnp.asarray(x) for x in _names(cfg))
  # The n largest of log(weight) + Gumbel noise are n different names, in the order of successive draws in
  # which names that are taken are drawn again.
  drawn = jax.lax.top_k(weights + jax.random.gumbel(name_key, weights.shape), N)[1]
  cycle = tokens[drawn[_shuffled(cycle_key, n, N)]]  # [N, max_name]; names from n on are not used
  order = _shuffled(edge_key, n, N)
  sep = jnp.full((N, int(cfg.separator)), cfg.ans + 2)
  edges = jnp.concatenate([sep, cycle[order], cycle[(order + 1) % n]], axis=1)
  edges = jnp.where((slots < n)[:, None], edges, PAD).ravel()
  if cfg.bos:
    edges = jnp.concatenate([jnp.asarray([cfg.ans + 1]), edges])
  context, _ = _packed(edges, jnp.zeros_like(edges, bool), cfg.context_length, to_the_right=True)

  start = _shuffled(start_key, n, N)[: cfg.pairs]
  k = jax.random.randint(hop_key, start.shape, 1, cfg.max_hops + 1) if hops is None else hops
  question = jnp.broadcast_to(cfg.hop(k), start.shape)[:, None]
  ans = jnp.full_like(question, cfg.ans)
  pairs = jnp.concatenate([question, cycle[start], ans, cycle[(start + k) % n]], axis=1)
  pairs = jnp.where((slots[: cfg.pairs] < n)[:, None], pairs, PAD)
  labels = np.arange(pairs.shape[1]) >= pairs.shape[1] - cfg.max_name - int(cfg.label_ans)
  labels = jnp.broadcast_to(jnp.asarray(labels), pairs.shape) & (pairs != PAD)
  queries, labelled = _packed(pairs.ravel(), labels.ravel(), cfg.query_length, to_the_right=False)
  return jnp.concatenate([context, queries]), jnp.concatenate([jnp.zeros_like(context, bool), labelled])


def _size(cfg: DepoConfig, key: jax.Array) -> jax.Array:
  """Draws n of a training sequence."""
  n = np.arange(cfg.min_nodes, cfg.max_nodes + 1)
  if cfg.sizes == "largest":
    return jnp.int32(cfg.max_nodes)
  if cfg.sizes == "uniform":
    return jax.random.randint(key, (), cfg.min_nodes, cfg.max_nodes + 1)
  return cfg.min_nodes + jax.random.categorical(key, -np.log(n + math.sqrt(cfg.max_nodes)).astype(np.float32))


@functools.lru_cache(maxsize=8)
def _names(cfg: DepoConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns all possible names, [names, max_name] with PAD behind the last token, and log weights [names]."""
  V, tokens, weights = cfg.mini_vocab, [], []
  for length in cfg.name_lengths:
    for name in itertools.product(range(1, V + 1), repeat=length):
      tokens.append((*name[:-1], name[-1] + V, *[PAD] * (cfg.max_name - length)))
      weights.append(-length * math.log(V))
  return np.asarray(tokens, np.int32), np.asarray(weights, np.float32)


def _shuffled(key: jax.Array, count: jax.Array, size: int) -> jax.Array:
  """Returns slots 0 .. size - 1: the first `count` of them in random order, then the others."""
  order = jax.random.bits(key, (size,), jnp.uint32) >> 1
  return jnp.argsort(jnp.where(jnp.arange(size) < count, order, order | jnp.uint32(1 << 31)))


def _packed(
  tokens: jax.Array, labels: jax.Array, length: int, *, to_the_right: bool
) -> tuple[jax.Array, jax.Array]:
  """Removes the pads between tokens and pushes tokens and labels to one end of [length]."""
  is_token = tokens != PAD
  place = jnp.cumsum(is_token) - 1
  if to_the_right:
    place = place + length - jnp.sum(is_token)
  place = jnp.where(is_token & (place >= 0), place, length)  # out of bounds: dropped
  packed = jnp.zeros((length,), jnp.int32).at[place].set(tokens.astype(jnp.int32), mode="drop")
  return packed, jnp.zeros((length,), bool).at[place].set(labels, mode="drop")
