"""How good the answers are, what they cost, and what sleep did to the fast weights."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import blocks, model, processes
from sleep_jax.config import ATTENTION, ModelConfig, SleepConfig

COST_ROUNDS = 30


def score(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over a batch, from which `rates` makes rates.

  Args:
    logits: [B, M, vocab].
    targets: [B, M].
    mask: [B, M], 1 where the answer counts.

  Returns:
    nats (summed cross-entropy), right [M] and asked [M] (answers a position), exact (sequences whose
    answers are all right) and sequences.
  """
  asked = mask > 0
  right = (jnp.argmax(logits, axis=-1) == targets) & asked
  return {
    "nats": model.cross_entropy(logits, targets, mask) * jnp.sum(mask),
    "right": jnp.sum(right, axis=0),
    "asked": jnp.sum(asked, axis=0),
    "exact": jnp.sum(jnp.all(right | ~asked, axis=1)),
    "sequences": jnp.asarray(targets.shape[0]),
  }


def rates(sums: dict[str, Any]) -> dict[str, float]:
  """Rates from summed scores: loss (nats an answer), exact, bit, string_0 .. string_{M-1}."""
  right, asked = np.asarray(sums["right"], float), np.asarray(sums["asked"], float)
  return {
    "loss": float(sums["nats"]) / asked.sum(),
    "exact": float(sums["exact"]) / float(sums["sequences"]),
    "bit": right.sum() / asked.sum(),
    **{f"string_{i}": r / a for i, (r, a) in enumerate(zip(right, asked, strict=True))},
  }


def best_constant(targets: np.ndarray) -> dict[str, float]:
  """What the best answer that ignores the question scores on these targets.

  Args:
    targets: [sequences, M].

  Returns:
    const_exact: share of the commonest answer vector; const_bit: share of the commonest single answer.
  """
  targets = np.asarray(targets)
  _, vectors = np.unique(targets, axis=0, return_counts=True)
  _, singles = np.unique(targets, return_counts=True)
  return {"const_exact": vectors.max() / len(targets), "const_bit": singles.max() / targets.size}


def make_evaluate(
  held_out: Callable[[jax.Array], model.Batch],
  num_batches: int,
  segments: model.Plan,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> Callable[[model.Params], dict[str, float]]:
  """An evaluation on a fixed held-out set, one device call.

  Args:
    held_out: index -> batch; pure, traced.
    num_batches: batches 0 .. num_batches - 1 are the set.

  Returns:
    weights -> rates, with the best constant's beside them.
  """
  where = model.answer_positions(segments)
  plain = dataclasses.replace(sleep_cfg, remat="none", backprop_passes=None)

  @jax.jit
  def sums(weights):
    def one(index):
      batch = held_out(index)
      logits, _ = model.forward(weights, batch, segments, cfg, plain)
      return score(logits, batch.targets[:, where], batch.loss_mask[:, where])

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(one, jnp.arange(num_batches)))

  answers = jax.jit(lambda: jax.lax.map(lambda i: held_out(i).targets[:, where], jnp.arange(num_batches)))()
  constant = best_constant(processes.gather(answers).reshape(-1, len(where)))
  return lambda weights: rates(jax.device_get(sums(weights))) | constant


def sleep_changes(
  weights: model.Params, batch: model.Batch, segments: model.Plan, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> dict[str, list[list[float]]]:
  """How much each pass changed the fast weights, for each window that is slept on.

  Returns:
    Block -> [windows][passes] of ||S_after - S_before|| / ||S_after||: Frobenius over all heads, mean over
    the batch.
  """
  state = model.init_state(cfg, batch.inputs.shape[0], sleep_cfg)
  changes: dict[str, list[list[float]]] = {i: [] for i in state if cfg.blocks[int(i)] not in ATTENTION}

  @jax.jit
  def passes(weights, state, tokens, valid):
    done = [state]
    for n in range(1, sleep_cfg.num_passes + 1):
      so_far = dataclasses.replace(sleep_cfg, num_passes=n, backprop_passes=None, remat="none")
      done.append(model.consolidate(weights, tokens, state, cfg, so_far, valid=valid))
    return done[-1], [
      {i: _change(a[i].S, b[i].S) for i in changes} for a, b in zip(done, done[1:], strict=False)
    ]

  @jax.jit
  def awake(weights, state, tokens, valid):
    return model.predict(weights, tokens, state, cfg, reads=(0,), valid=valid)[1]

  last_sleep = max((s.start for s in segments if not s.reads), default=-1)
  for segment in segments:
    for w in range(segment.count if segment.start <= last_sleep else 0):
      part = slice(segment.start + w * segment.length, segment.start + (w + 1) * segment.length)
      valid = None if batch.valid is None else batch.valid[:, part]
      if segment.reads:  # a window that is answered writes too
        state = awake(weights, state, batch.inputs[:, part], valid)
        continue
      state, by_pass = passes(weights, state, batch.inputs[:, part], valid)
      for i in changes:
        changes[i].append([float(c[i]) for c in by_pass])
  return changes


def cost(weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig) -> dict[str, float]:
  """What one sequence costs, measured here and now: medians over warm calls, batch 1.

  Returns:
    wake_ms_per_answer: one token read awake with `model.decode`.
    sleep_ms_per_window: one window of L tokens slept on, N passes.
    state_bytes: what is kept of everything read so far.
  """
  state = model.init_state(cfg, 1, sleep_cfg)
  cache = blocks.init_cache(cfg, 1)
  token, window = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, cfg.window), jnp.int32)
  plain = dataclasses.replace(sleep_cfg, remat="none", backprop_passes=None)
  awake = jax.jit(lambda w, s, c: model.decode(w, token, s, c, cfg))
  asleep = jax.jit(lambda w, s: model.consolidate(w, window, s, cfg, plain))
  return {
    "wake_ms_per_answer": _median_ms(awake, weights, state, cache),
    "sleep_ms_per_window": _median_ms(asleep, weights, state),
    "state_bytes": state_bytes(cfg, sleep_cfg),
  }


def state_bytes(cfg: ModelConfig, sleep_cfg: SleepConfig | None = None) -> int:
  """Bytes of one sequence's state: fast weights, convolution inputs and what sliding eviction keeps."""
  state = jax.eval_shape(lambda: model.init_state(cfg, 1, sleep_cfg))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _change(before: jax.Array, after: jax.Array) -> jax.Array:
  """Relative change of S, mean over the batch; scalar."""
  axes = tuple(range(1, after.ndim))
  size = jnp.sqrt(jnp.sum(jnp.square(after), axis=axes))
  moved = jnp.sqrt(jnp.sum(jnp.square(after - before), axis=axes))
  return jnp.mean(moved / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))


def _median_ms(function: Callable[..., Any], *args: Any) -> float:
  """Median wall milliseconds of a call, after one that compiles."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(COST_ROUNDS):
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - begin)
  return statistics.median(times) * 1e3
