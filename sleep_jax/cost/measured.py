"""What one sequence costs, measured here and now: milliseconds awake and asleep, bytes of state."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import model
from sleep_jax.config import ModelConfig, SleepConfig

COST_ROUNDS = 30


def cost(weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig) -> dict[str, float]:
  """What one sequence costs, measured here and now: medians over warm calls, batch 1.

  Returns:
    wake_ms_per_answer: one token read awake with `model.decode`.
    sleep_ms_per_window: one window of L tokens slept on, N passes.
    state_bytes: what is kept of everything read so far.
  """
  state = model.init_state(cfg, 1, sleep_cfg)
  fast, cache = model.open_window(state, cfg, 1)
  token, window = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, cfg.window), jnp.int32)
  awake = jax.jit(lambda w, s, c: model.decode(w, token, s, c, cfg))
  asleep = jax.jit(lambda w, s: model.consolidate(w, window, s, cfg, sleep_cfg.forward_only))
  return {
    "wake_ms_per_answer": _median_ms(awake, weights, fast, cache),
    "sleep_ms_per_window": _median_ms(asleep, weights, state),
    "state_bytes": state_bytes(cfg, sleep_cfg),
  }


def state_bytes(cfg: ModelConfig, sleep_cfg: SleepConfig | None = None) -> int:
  """Bytes of one sequence's state: fast weights, convolution inputs and what sliding eviction keeps."""
  state = jax.eval_shape(lambda: model.init_state(cfg, 1, sleep_cfg))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _median_ms(function: Callable[..., Any], *args: Any) -> float:
  """Median wall milliseconds of a call, after one that compiles."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(COST_ROUNDS):
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - begin)
  return statistics.median(times) * 1e3
