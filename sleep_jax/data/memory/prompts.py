"""The tests of memory as text for any tokenizer: a prompt of so many tokens, and the words of its answer.

The facts and questions are those of `sequences.story`; names and numbers are drawn for each prompt. Of the
filler there is as much as the tokens allow. Common and frequent words are drawn here, since their number
depends on the length.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sleep_jax.config import check
from sleep_jax.data.memory import counting, wording
from sleep_jax.data.memory.config import MemoryConfig
from sleep_jax.data.memory.sequences import story
from sleep_jax.data.memory.story import PAD, one_in_order

INTRODUCTION = "Read the text and remember what it says; a question follows it."
Count = Callable[[str], int]


class Prompt(NamedTuple):
  """A prompt, which ends where the answer begins, and the words of the answer in order."""

  text: str
  answers: tuple[str, ...]

  @property
  def expected(self) -> str:
    """The answer as it would follow the prompt.

    >>> Prompt("1 + 1 =", ("2",)).expected
    ' 2'
    """
    return " " + ", ".join(self.answers)


def check_text(cfg: MemoryConfig) -> None:
  """Raises `ConfigError` where a test cannot be asked as text: too few names, or several questions."""
  check(
    cfg.queries == 1 or cfg.task == "needle",
    "data.queries",
    f"must be 1 where data.task = {cfg.task} is asked as text, got {cfg.queries}",
  )
  for depth, length in cfg.sets:
    for kind, count in cfg.test.needs(cfg, depth, length).items():
      if cfg.test.kinds[kind] == "words":
        most, field = wording.pool_size(kind), "keys" if cfg.task == "overwriting" else "depths"
        check(count <= most, f"data.{field}", f"asks for {count} {kind}s, of which text has {most} names")
  for kind in ("person", "place", "object"):
    size, most = getattr(cfg, f"{kind}s"), wording.pool_size(kind)
    check(size <= most, f"data.{kind}s", f"must be at most {most}, the names that text has, got {size}")


def chance(cfg: MemoryConfig, depth: int) -> float:
  """How often the best guess is right, of somebody who read the question alone."""
  if cfg.task == "needle":
    return one_in_order(cfg.values * cfg.queries, wording.DRAWN["value"])
  if cfg.task in ("recall", "overwriting"):
    return 1 / wording.DRAWN["value"]
  if cfg.task == "tracking":
    if cfg.asked == "value":
      return 1 / wording.DRAWN["number"]
    return one_in_order(depth + 1, wording.DRAWN["variable"])
  if cfg.task == "common":
    return 1 / math.comb(wording.pool_size("word"), depth)
  if cfg.task == "frequent":
    return one_in_order(depth, wording.DRAWN["coded"])
  return cfg.chance(depth, 0)


def prompt(
  cfg: MemoryConfig,
  seed: int,
  index: int,
  depth: int,
  length: int,
  count: Count,
  sentences: Sequence[str] = wording.NOISE,
) -> Prompt:
  """Makes one prompt: a pure function of its arguments.

  Args:
    cfg: the test.
    seed, index: of the prompt; the facts are the same at every length.
    depth: how hard, as `data.depths`.
    length: tokens of the prompt, the question included, at most.
    count: text -> tokens.
    sentences: of the filler, in their order, from one that is drawn, again from the first behind the last.

  Raises:
    ConfigError: if the text does not fit the length without any filler.
  """
  draw = random.Random(f"{seed} {index} {depth} {cfg.task}")
  if cfg.task == "common":
    return _common(cfg, draw, depth, length, count)
  if cfg.task == "frequent":
    return _frequent(cfg, draw, depth, length, count)
  told, asked, answers = _told(cfg, draw, seed, index, depth)
  begin = draw.randrange(len(sentences))
  places = f"{seed} {index} {depth} {length}"

  def text(fillers: int) -> str:
    filler = [sentences[(begin + i) % len(sentences)] for i in range(fillers)]
    if not cfg.test.scattered:
      return _whole(" ".join([*told, *filler]), asked)
    here = iter(told)
    taken = set(random.Random(f"{places} {fillers}").sample(range(fillers + len(told)), len(told)))
    rest = iter(filler)
    return _whole(" ".join(next(here if i in taken else rest) for i in range(fillers + len(told))), asked)

  return Prompt(text(_most(text, 0, length, length, count)), answers)


def _whole(body: str, question: str) -> str:
  return f"{INTRODUCTION}\n\n{body}\n\nQuestion: {question}\nAnswer:"


def _most(text: Callable[[int], str], least: int, most: int, length: int, count: Count) -> int:
  """The largest n in least .. most, by bisection, with which the text has at most `length` tokens."""
  short = count(text(least))
  check(
    short <= length,
    "data.lengths",
    f"must hold the {short} tokens of the shortest such text, got {length}",
  )
  fits, step = least, 1
  while fits < most and count(text(min(fits + step, most))) <= length:
    fits, step = min(fits + step, most), 2 * step
  too_many = min(fits + step, most + 1)
  while too_many - fits > 1:
    middle = (fits + too_many) // 2
    if count(text(middle)) <= length:
      fits = middle
    else:
      too_many = middle
  return fits


@functools.lru_cache(maxsize=64)
def _drawer(cfg: MemoryConfig, depth: int):
  """seed, index -> the story; compiled once."""

  def drawn(seed, index):
    return story(cfg, jax.random.fold_in(jax.random.key(seed), index), depth, cfg.lengths[0])

  return jax.jit(drawn)


def _told(
  cfg: MemoryConfig, draw: random.Random, seed: int, index: int, depth: int
) -> tuple[list[str], str, tuple[str, ...]]:
  """Sentences, question and answer of a story."""
  made = jax.tree.map(np.asarray, _drawer(cfg, depth)(np.uint32(seed), np.uint32(index)))
  words = cfg.vocabulary
  name_of = {token: mark for mark, token in words.marks.items()}
  for kind, tokens in words.kinds.items():
    used = sorted({int(t) for part in made for t in part.ravel() if int(t) in tokens})
    if used:
      name_of |= zip(used, wording.names(draw, kind, len(used)), strict=True)
  read = lambda row: [name_of[int(token)] for token in row if token != PAD]  # noqa: E731
  told = [wording.TELL[cfg.task](read(row)) for row in made.statements]
  question = wording.ASK[cfg.task](read(made.questions.ravel()))
  return told, question, tuple(read(made.answers.ravel()))


def _common(cfg: MemoryConfig, draw: random.Random, depth: int, length: int, count: Count) -> Prompt:
  """A numbered list: `depth` words `often` times, others `seldom` times."""
  pool = wording.names(draw, "word", wording.pool_size("word"))
  asked = f"What are the {depth} commonest words of the list? Name them in alphabetical order."

  def text(others: int) -> str:
    listed = [*pool[:depth] * cfg.often, *pool[depth : depth + others] * cfg.seldom]
    random.Random(f"{pool[:3]} {others}").shuffle(listed)
    return _whole(" ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), asked)

  most = _most(text, 1, len(pool) - depth, length, count)
  return Prompt(text(most), tuple(sorted(pool[:depth])))


def _frequent(cfg: MemoryConfig, draw: random.Random, depth: int, length: int, count: Count) -> Prompt:
  """Coded words after Zipf's law, the commonest of them dots that say nothing."""
  coded = wording.names(draw, "coded", cfg.words)
  asked = (
    f"What are the {depth} commonest words of the coded text, the dots left out? Name the commonest first."
  )

  def text(words: int) -> str:
    counts = counting.occurrences(words, cfg.words)
    written = [w for w, n in zip(["...", *coded], counts, strict=False) for _ in range(n)]
    random.Random(f"{coded[:3]} {words}").shuffle(written)
    return _whole(" ".join(written), asked)

  words = _most(text, 1, length, length, count)
  cfg.test.needs(cfg, depth, words)  # the words that are asked for must differ in how often they occur
  return Prompt(text(words), tuple(coded[:depth]))
