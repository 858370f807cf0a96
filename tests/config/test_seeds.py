"""Seeds that are accepted differ, in every stream that they begin."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sleep_jax import config, params
from sleep_jax.data import batching, rule110
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.rule110 import Rule110Config

MOST = 2**32 - 1
SEEDS = st.integers(0, MOST)
TASK = Rule110Config(num_strings=4, num_cells=32)


@jax.jit
def streams(key):
  """The beginnings of a run's weights, of its data, and of tokens that are sampled."""
  init_key, data_key = jax.random.split(key)
  weights = params.init({"w": params.matrix(4, 4, axes=(None, None))}, init_key)
  tokens = jax.random.categorical(key, jnp.zeros((32, 1000)))
  return (
    weights["w"],
    rule110.strings(TASK, data_key, jnp.arange(2)),
    rule110.strings(TASK, key, jnp.arange(2)),
    tokens,
  )


@settings(max_examples=40)
@given(SEEDS, SEEDS)
@example(0, MOST)
@example(1, 2**31)
@example(2**31 - 1, 2**31)
def test_two_seeds_have_different_streams(a, b):
  config.check_seed(a, "seed")
  config.check_seed(b, "seed")
  if a == b:
    return
  for x, y in zip(streams(jax.random.key(a)), streams(jax.random.key(b)), strict=True):
    assert np.any(np.asarray(x) != np.asarray(y))
  assert np.any(batching._order(64, a, 1) != batching._order(64, b, 1))
  assert Draws("gsm_infinite", a, 0, -1).sample(range(64), 64) != Draws("gsm_infinite", b, 0, -1).sample(
    range(64), 64
  )


def test_small_seeds_have_the_streams_that_they_had():
  """The key of a seed is its 32 bits, as when only int32 was accepted."""
  for seed in (0, 1, 2**31 - 1, 2**31, MOST):
    assert np.asarray(jax.random.key_data(jax.random.key(seed))).tolist() == [0, seed]
