"""Tests that ask which words are the commonest: a list with two frequencies, and text after Zipf's law.

common    words in random order, `depth` of them `often` times, the others `seldom` times
          answer: those `depth` words, in the order of their numbers
frequent  of n words floor(n k^-2 / zeta(2)) are the one of rank k; rank 1 is filler
          answer: the words of the ranks 2 .. `depth` + 1, the commonest first
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.config import check
from sleep_jax.data.memory.story import (
  Shape,
  Story,
  Test,
  Words,
  ascending,
  choose,
  columns,
  one_in_order,
  shuffled,
)

if TYPE_CHECKING:
  from sleep_jax.data.memory.config import MemoryConfig

ALPHA = 2.0
ZETA = math.pi**2 / 6


def uncommon(depth: int, often: int, seldom: int, length: int) -> int:
  """How many words there is room for beside the common ones; negative if these do not fit.

  >>> uncommon(depth=2, often=6, seldom=3, length=24)
  4
  """
  return (length - depth * often) // seldom


def occurrences(length: int, words: int) -> np.ndarray:
  """How often the word of each rank occurs among `length`, for the ranks 1 .. `words` + 1, as far as it does.

  >>> occurrences(length=36, words=8).tolist()
  [21, 5, 2, 1]
  """
  ranks = np.arange(1, words + 2)
  counts = np.floor(length * ranks**-ALPHA / ZETA).astype(int)
  return counts[counts > 0]


def _others(cfg: "MemoryConfig", depth: int, length: int) -> int:
  return min(uncommon(depth, cfg.often, cfg.seldom, length), cfg.words - depth)


def _common(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  word_key, order_key = jax.random.split(key)
  chosen = words.of("word", choose(word_key, depth + _others(cfg, depth, length), cfg.words))
  often, seldom = jnp.repeat(chosen[:depth], cfg.often), jnp.repeat(chosen[depth:], cfg.seldom)
  listed = jnp.concatenate([often, seldom])
  answer = ascending(chosen[:depth])[None].astype(jnp.int32)
  return Story(
    columns(listed[shuffled(order_key, len(listed))]), columns(jnp.asarray([words.marks["ask"]])), answer
  )


def _common_needs(cfg: "MemoryConfig", depth: int, length: int) -> dict[str, int]:
  check(
    cfg.often > cfg.seldom,
    "data.often",
    f"must be above data.seldom = {cfg.seldom}, or no word is a common one, got {cfg.often}",
  )
  room = uncommon(depth, cfg.often, cfg.seldom, length)
  check(
    room >= 1,
    "data.lengths",
    f"must hold {depth} words {cfg.often} times and others {cfg.seldom} times, at least"
    f" {depth * cfg.often + cfg.seldom} tokens, got {length}",
  )
  return {"word": depth + 1}


def _frequent(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  word_key, order_key = jax.random.split(key)
  counts = occurrences(length, cfg.words)[1:]
  ranked = words.of("word", choose(word_key, len(counts), cfg.words))
  written = jnp.repeat(ranked, jnp.asarray(counts), total_repeat_length=int(counts.sum()))
  answer = ranked[None, :depth].astype(jnp.int32)
  return Story(
    columns(written[shuffled(order_key, len(written))]), columns(jnp.asarray([words.marks["ask"]])), answer
  )


def _frequent_needs(cfg: "MemoryConfig", depth: int, length: int) -> dict[str, int]:
  if cfg.words < depth:
    return {"word": depth}
  counts = [*occurrences(length, cfg.words)[1 : depth + 2].tolist(), 0]
  apart = len(counts) > depth and all(a > b for a, b in zip(counts[:depth], counts[1:], strict=False))
  check(
    apart,
    "data.lengths",
    f"must be longer for the {depth} commonest words to differ in how often they occur, got {length}",
  )
  return {"word": depth}


COMMON = Test(
  depth="common words",
  kinds={"word": "words"},
  marks=("ask",),
  fields=("often", "seldom"),
  shape=lambda cfg, depth, length: Shape(
    depth * cfg.often + cfg.seldom * _others(cfg, depth, length), 1, 1, depth
  ),
  needs=_common_needs,
  most_queries=lambda cfg, depth: (1, "of this task"),
  draw=_common,
  chance=lambda cfg, depth, length: 1 / math.comb(cfg.words, depth),
)

FREQUENT = Test(
  depth="frequent words",
  kinds={"word": "words"},
  marks=("ask",),
  shape=lambda cfg, depth, length: Shape(int(occurrences(length, cfg.words)[1:].sum()), 1, 1, depth),
  needs=_frequent_needs,
  most_queries=lambda cfg, depth: (1, "of this task"),
  draw=_frequent,
  chance=lambda cfg, depth, length: one_in_order(depth, cfg.words),
)
