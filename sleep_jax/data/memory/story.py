"""What a test of memory is made of: words, what a sequence says and asks, and what a test must define."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PAD = 0
COMPARED = 256  # numbers that are compared two by two; XLA takes seconds to compile a sort


class Story(NamedTuple):
  """What a sequence says and asks, before the filler; token ids, int32.

  Attributes:
    statements: [S, W], in their order.
    questions: [Q, P]; a shorter one, and one that is not asked, has PAD in front.
    answers: [Q, A]; PAD behind a shorter one, PAD alone where nothing is asked.
  """

  statements: jax.Array
  questions: jax.Array
  answers: jax.Array


class Shape(NamedTuple):
  """Sizes of a story: S, W, P and the A of its own answers."""

  statements: int
  words: int
  question: int
  answer: int


@dataclasses.dataclass(frozen=True)
class Words:
  """Token ids: PAD, the marks of the test, the filler, then each kind of word.

  Attributes:
    marks: name -> token, of words with a meaning of their own.
    kinds: name -> tokens; `filler` is one of them.
  """

  marks: Mapping[str, int]
  kinds: Mapping[str, range]

  def of(self, kind: str, index: jax.Array) -> jax.Array:
    """The tokens of words of a kind, by number."""
    return self.kinds[kind].start + index

  @property
  def count(self) -> int:
    """Size of the vocabulary."""
    return max(kind.stop for kind in self.kinds.values())


@dataclasses.dataclass(frozen=True)
class Test:
  """One test of memory. `cfg` is a `MemoryConfig`, whose module imports the tests.

  Attributes:
    depth: what `data.depths` counts, in the plural.
    least: the lowest depth.
    kinds: kind of word -> field of the config that says how many there are.
    marks: names of the words with a meaning of their own.
    fields: fields of the config that only some tests have, and this one too.
    shape: (cfg, depth, length) -> sizes of the story.
    needs: (cfg, depth, length) -> kind -> how many different words of it one sequence has.
    most_queries: (cfg, depth) -> how many questions there can be, and what limits them.
    draw: (cfg, words, key, depth, length) -> the story; pure, with all sizes static.
    chance: (cfg, depth, length) -> how often the best guess at one question is right, of somebody who read
      that question and nothing else.
    scattered: whether the filler lies between the statements, not behind them.
    blanks: whether a question may be left out or be shorter.
  """

  depth: str
  kinds: Mapping[str, str]
  shape: Callable[[Any, int, int], Shape]
  needs: Callable[[Any, int, int], Mapping[str, int]]
  most_queries: Callable[[Any, int], tuple[int, str]]
  draw: Callable[[Any, Words, jax.Array, int, int], Story]
  chance: Callable[[Any, int, int], float]
  least: int = 1
  marks: tuple[str, ...] = ()
  fields: tuple[str, ...] = ()
  scattered: bool = True
  blanks: bool = False


def ranks(x: jax.Array) -> jax.Array:
  """The place of each of [n] in ascending order; of equal ones the first comes first.

  >>> ranks(jnp.asarray([5, 3, 5, 1])).tolist()
  [2, 1, 3, 0]
  """
  if x.shape[0] > COMPARED:
    return jnp.argsort(jnp.argsort(x, stable=True))
  i = jnp.arange(x.shape[0])
  before = (x < x[:, None]) | ((x == x[:, None]) & (i < i[:, None]))
  return jnp.sum(before, axis=1, dtype=jnp.int32)


def ascending(x: jax.Array) -> jax.Array:
  """Sorts [n]."""
  return jnp.zeros_like(x).at[ranks(x)].set(x)


def shuffled(key: jax.Array, size: int) -> jax.Array:
  """The numbers below `size` in random order."""
  return ranks(jax.random.bits(key, (size,), jnp.uint32))


def below(key: jax.Array, size: Any, shape: tuple[int, ...] = ()) -> jax.Array:
  """Numbers below `size`, at most 2^16, evenly to 2^-16: half of the program that `jax.random.randint` is."""
  return (jax.random.bits(key, shape, jnp.uint32) % jnp.uint32(size)).astype(jnp.int32)


def choose(key: jax.Array, count: int, size: int) -> jax.Array:
  """`count` different numbers below `size`, in random order."""
  return shuffled(key, size)[:count]


def columns(*words: jax.Array | int) -> jax.Array:
  """Statements or questions [n, W] from their words, each [n] or one for all of them."""
  return jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, words)), axis=-1).astype(jnp.int32)


def one_in_order(count: int, size: int) -> float:
  """The chance to name `count` different words of `size` in the right order.

  >>> one_in_order(2, 5)
  0.05
  """
  chance = 1.0
  for i in range(count):
    chance /= max(size - i, 1)
  return chance
