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
  """What one sequence costs, measured here and now over 30 warm calls, batch 1.

  Returns:
    wake_ms_per_answer: one token read awake with `model.decode`, median.
    sleep_ms_per_window: one window of L tokens slept on, N passes, median.
    wake_ms_per_answer_p10, _p90, sleep_ms_per_window_p10, _p90: percentiles of the same calls.
    state_bytes: what is kept of everything read so far.
  """
  state = model.init_state(cfg, 1, sleep_cfg)
  fast, cache = model.open_window(state, cfg, 1)
  token, window = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, cfg.window), jnp.int32)
  awake = jax.jit(lambda w, s, c: model.decode(w, token, s, c, cfg))
  asleep = jax.jit(lambda w, s: model.consolidate(w, window, s, cfg, sleep_cfg.forward_only))
  return {
    **_milliseconds("wake_ms_per_answer", awake, weights, fast, cache),
    **_milliseconds("sleep_ms_per_window", asleep, weights, state),
    "state_bytes": state_bytes(cfg, sleep_cfg),
  }


def state_bytes(cfg: ModelConfig, sleep_cfg: SleepConfig | None = None) -> int:
  """Bytes of one sequence's state: fast weights, convolution inputs and what sliding eviction keeps."""
  state = jax.eval_shape(lambda: model.init_state(cfg, 1, sleep_cfg))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _milliseconds(name: str, function: Callable[..., Any], *args: Any) -> dict[str, float]:
  """Wall milliseconds of a call, after one that compiles: median, 10th and 90th percentile."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(COST_ROUNDS):
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - begin)
  tenths = statistics.quantiles(times, n=10, method="inclusive")
  return {name + end: 1e3 * tenths[i] for end, i in (("", 4), ("_p10", 0), ("_p90", 8))}
