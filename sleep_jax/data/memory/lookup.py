"""Tests that ask for what was said of a word: needles, associative recall, overwriting, variable tracking.

needle       key value                        asked: key      answer: its values, as the text orders them
recall       key value, all before the filler asked: key      answer: its value
overwriting  key value, each key several times asked: key     answer: the value that it had last
tracking     variable number, or variable variable              one chain of copies from each number
             asked: number -> its variables, in the order of copying; or: last variable -> its number
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sleep_jax.data.memory.story import (
  Shape,
  Story,
  Test,
  Words,
  choose,
  columns,
  one_in_order,
  ranks,
  shuffled,
)

if TYPE_CHECKING:
  from sleep_jax.data.memory.config import MemoryConfig


def _needles(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """`depth` keys with `values` different values each, in random order; the first `queries` keys are asked."""
  del length
  key_key, value_key, order_key = jax.random.split(key, 3)
  count = depth * cfg.values
  keys = words.of("key", choose(key_key, depth, cfg.words))
  values = words.of("value", choose(value_key, count, cfg.words)).reshape(depth, cfg.values)
  place = shuffled(order_key, count)  # of each pair
  pairs = columns(jnp.repeat(keys, cfg.values), values.ravel())
  nth = jax.vmap(ranks)(place.reshape(depth, cfg.values))  # of the values of a key
  in_order = jnp.zeros_like(values).at[jnp.arange(depth)[:, None], nth].set(values)
  asked = slice(cfg.queries)
  return Story(
    jnp.zeros_like(pairs).at[place].set(pairs), columns(keys[asked]), in_order[asked].astype(jnp.int32)
  )


def _overwriting(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """`keys` keys, each written `depth` times, in random order; no value is written twice."""
  del length
  key_key, value_key, order_key = jax.random.split(key, 3)
  count = cfg.keys * depth
  keys = words.of("key", choose(key_key, cfg.keys, cfg.words))
  values = words.of("value", choose(value_key, count, cfg.words))
  written = shuffled(order_key, count) // depth  # which key each statement is about
  last = jnp.zeros(cfg.keys, jnp.int32).at[written].max(jnp.arange(count))
  asked = slice(cfg.queries)
  return Story(columns(keys[written], values), columns(keys[asked]), columns(values[last[asked]]))


def _tracking(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """`chains` chains of a number and `depth` + 1 variables, mixed at random; each keeps its own order."""
  del length
  variable_key, number_key, order_key = jax.random.split(key, 3)
  links, asked = depth + 1, slice(cfg.queries)
  variables = words.of("variable", choose(variable_key, cfg.chains * links, cfg.words))
  variables = variables.reshape(cfg.chains, links)
  numbers = words.of("number", choose(number_key, cfg.chains, cfg.words))
  turn = shuffled(order_key, cfg.chains * links) // links  # which chain each statement is about
  source = jnp.concatenate([numbers[:, None], variables[:, :-1]], axis=1)
  links_of_chains = columns(variables.ravel(), source.ravel())
  statements = links_of_chains[ranks(turn)]  # the links of a chain lie side by side
  if cfg.asked == "variables":
    return Story(statements, columns(numbers[asked]), variables[asked].astype(jnp.int32))
  return Story(statements, columns(variables[asked, -1]), columns(numbers[asked]))


def _needle_shape(cfg: "MemoryConfig", depth: int, length: int) -> Shape:
  del length
  return Shape(depth * cfg.values, 2, 1, cfg.values)


def _needle_needs(cfg: "MemoryConfig", depth: int, length: int) -> dict[str, int]:
  del length
  return {"key": depth, "value": depth * cfg.values}


NEEDLE = Test(
  depth="keys",
  kinds={"key": "words", "value": "words"},
  fields=("values",),
  shape=_needle_shape,
  needs=_needle_needs,
  most_queries=lambda cfg, depth: (depth, "the least of data.depths"),
  draw=_needles,
  chance=lambda cfg, depth, length: one_in_order(cfg.values, cfg.words),
)

RECALL = Test(
  depth="pairs",
  kinds={"key": "words", "value": "words"},
  shape=_needle_shape,
  needs=_needle_needs,
  most_queries=lambda cfg, depth: (depth, "the least of data.depths"),
  draw=_needles,
  chance=lambda cfg, depth, length: 1 / cfg.words,
  scattered=False,
)

OVERWRITING = Test(
  depth="writes",
  kinds={"key": "words", "value": "words"},
  fields=("keys",),
  shape=lambda cfg, depth, length: Shape(cfg.keys * depth, 2, 1, 1),
  needs=lambda cfg, depth, length: {"key": cfg.keys, "value": cfg.keys * depth},
  most_queries=lambda cfg, depth: (cfg.keys, "data.keys"),
  draw=_overwriting,
  chance=lambda cfg, depth, length: 1 / cfg.words,
)

TRACKING = Test(
  depth="hops",
  least=0,  # the variable that got the number is asked for
  kinds={"variable": "words", "number": "words"},
  fields=("chains", "asked"),
  shape=lambda cfg, depth, length: Shape(
    cfg.chains * (depth + 1), 2, 1, depth + 1 if cfg.asked == "variables" else 1
  ),
  needs=lambda cfg, depth, length: {"variable": cfg.chains * (depth + 1), "number": cfg.chains},
  most_queries=lambda cfg, depth: (cfg.chains, "data.chains"),
  draw=_tracking,
  chance=lambda cfg, depth, length: one_in_order(depth + 1 if cfg.asked == "variables" else 1, cfg.words),
)
