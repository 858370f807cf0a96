"""What sleep did to the fast weights, pass by pass."""

import dataclasses

import jax
import jax.numpy as jnp

from sleep_jax import carry, model, windows
from sleep_jax.config import ModelConfig, SleepConfig


def sleep_changes(
  weights: model.Params,
  batch: windows.Batch,
  segments: windows.Plan,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> dict[str, list[list[float]]]:
  """How much each pass changed the fast weights, for each window that is slept on.

  Returns:
    Block -> [windows][passes] of ||S_after - S_before|| / ||S_after||: Frobenius over all heads, mean over
    the batch.
  """
  state = model.init_state(cfg, batch.inputs.shape[0], sleep_cfg)
  changes: dict[str, list[list[float]]] = {i: [] for i in state.fast}

  @jax.jit
  def passes(weights, state, tokens, valid):
    done = [state]
    for n in range(1, sleep_cfg.num_passes + 1):
      so_far = dataclasses.replace(sleep_cfg.forward_only, num_passes=n)
      done.append(model.consolidate(weights, tokens, state, cfg, so_far, valid=valid))
    return done[-1], [
      {i: _change(a.fast[i].S, b.fast[i].S) for i in changes} for a, b in zip(done, done[1:], strict=False)
    ]

  @jax.jit
  def awake(weights, state, tokens, valid):
    return model.predict(weights, tokens, state, cfg, reads=(0,), valid=valid)[1]

  last_sleep = max((s.start for s in segments if s.asleep), default=-1)
  for segment in segments:
    for w in range(segment.count if segment.start <= last_sleep else 0):
      part = slice(segment.start + w * segment.length, segment.start + (w + 1) * segment.length)
      valid = None if batch.valid is None else batch.valid[:, part]
      if batch.begins is not None:
        state = carry.begin(state, batch.begins[:, part.start])
      if not segment.asleep:  # a window that is answered writes too
        state = awake(weights, state, batch.inputs[:, part], valid)
        continue
      state, by_pass = passes(weights, state, batch.inputs[:, part], valid)
      for i in changes:
        changes[i].append([float(c[i]) for c in by_pass])
  return changes


def _change(before: jax.Array, after: jax.Array) -> jax.Array:
  """Relative change of S, mean over the batch; scalar."""
  axes = tuple(range(1, after.ndim))
  size = jnp.sqrt(jnp.sum(jnp.square(after), axis=axes))
  moved = jnp.sqrt(jnp.sum(jnp.square(after - before), axis=axes))
  return jnp.mean(moved / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
