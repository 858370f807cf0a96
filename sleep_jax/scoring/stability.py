"""How a gradient grows on its way back through the fast weights: a window, a pass."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import blocks, carry, looped, model, windows
from sleep_jax.config import ConfigError, ModelConfig, SleepConfig
from sleep_jax.sleep import loop


@dataclasses.dataclass(frozen=True)
class Growth:
  """Norms of the gradient of the loss, on a batch.

  Attributes:
    total: of all weights.
    by_window: of the fast weights on entry of each window that is slept on, from first to last.
    by_pass: of those of the repeated blocks on entry of each pass over each of these windows, [windows][N].
  """

  total: float
  by_window: tuple[float, ...]
  by_pass: tuple[tuple[float, ...], ...]

  @property
  def a_window(self) -> float:
    """The factor by which a window multiplies the norm on its way back: geometric mean. NaN of one window."""
    return _factor(self.by_window[1:], self.by_window[:-1])

  @property
  def a_pass(self) -> float:
    """The factor by which a pass does, within a window. NaN of one pass."""
    return _factor(
      [x for norms in self.by_pass for x in norms[1:]], [x for norms in self.by_pass for x in norms[:-1]]
    )

  @property
  def first_pass(self) -> float:
    """The factor by which the *first* pass of a window does: from the entry of its second pass to its own."""
    return _factor(
      [norms[1] for norms in self.by_pass if len(norms) > 1],
      [norms[0] for norms in self.by_pass if len(norms) > 1],
    )


def gradient_growth(
  weights: model.Params,
  batch: windows.Batch,
  segments: windows.Plan,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> Growth:
  """Measures it: the gradient of the loss by a zero that is added to every S at the entry of every pass.

  The first window starts from S = 0, whose gradient counts like any other's.

  Args:
    weights: of the model.
    batch: B sequences.
    segments: their plan.
    cfg, sleep_cfg: the model, under hard eviction.

  Raises:
    ConfigError: if no window is slept on, or the model keeps caches over windows.
  """
  if cfg.eviction != "hard":
    raise ConfigError(
      "model.eviction: must be 'hard', where a gradient goes back through the fast weights alone"
    )
  slept = sum(s.count for s in segments if s.asleep)
  if not slept:
    raise ConfigError("model.window: no window is slept on, every one is only read")
  size, passes = batch.inputs.shape[0], sleep_cfg.num_passes
  first, last = sleep_cfg.looped(len(cfg.blocks))
  fast = {i: s.S for i, s in model.init_state(cfg, size, sleep_cfg).fast.items()}
  repeated = {i: S for i, S in fast.items() if first <= int(i) < last}

  def zeros(like: dict[str, jax.Array], *counts: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda S: jnp.zeros((*counts, *S.shape), S.dtype), like)

  def loss(weights, added):
    return perturbed_loss(weights, added, batch, segments, cfg, sleep_cfg)

  # It runs once: compiled without optimising, it is ready in a quarter of the time.
  grads = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options={"xla_backend_optimization_level": 0})
  by_weight, by_S = jax.device_get(grads(weights, (zeros(fast, slept), zeros(repeated, slept, passes))))

  def norms(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """[windows] or [windows, N], over all blocks."""
    return np.sqrt(
      sum(np.sum(np.square(x, dtype=np.float64), axis=(-4, -3, -2, -1)) for x in gradients.values())
    )

  return Growth(
    total=float(optax.tree.norm(by_weight)),
    by_window=tuple(norms(by_S[0]).tolist()),
    by_pass=tuple(map(tuple, norms(by_S[1]).tolist())),
  )


def perturbed_loss(
  weights: model.Params,
  added: tuple[dict[str, jax.Array], dict[str, jax.Array]],
  batch: windows.Batch,
  segments: windows.Plan,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> jax.Array:
  """`model.loss` with something added to the fast weights; with zeros it is `model.loss`.

  Args:
    added: by block, [windows, B, H, K, V] on entry of each window that is slept on; and, of the repeated
      blocks, [windows, N, B, H, K, V] on entry of each pass.
  """
  first, last = sleep_cfg.looped(len(cfg.blocks))
  prelude, repeated, coda = (
    blocks.arrange(weights["blocks"], cfg, *part) for part in ((0, first), (first, last), (last, None))
  )
  state: model.State = model.init_state(cfg, batch.inputs.shape[0], sleep_cfg)
  logits, window = [], 0
  h: jax.Array
  opened: model.State
  for segment in segments:
    for w in range(segment.count):
      part = slice(segment.start + w * segment.length, segment.start + (w + 1) * segment.length)
      tokens, valid = batch.inputs[:, part], None if batch.valid is None else batch.valid[:, part]
      if batch.begins is not None:
        state = carry.begin(state, batch.begins[:, part.start])
      if not segment.asleep:
        out, state = model.predict(weights, tokens, state, cfg, reads=segment.reads, valid=valid)
        logits.append(out)
        continue
      start: model.State = _add(carry.open_window(state, cfg), {i: x[window] for i, x in added[0].items()})
      h, opened, _ = blocks.run(prelude, model.embed(weights, tokens, cfg, valid), start, cfg, valid=valid)

      def one_pass(
        looping: Any, extra: Any, start: Any = start, opened: Any = opened, valid: Any = valid
      ) -> tuple[Any, Any]:
        h, memory = looping
        memory = memory if sleep_cfg.state == "carry" else start.within(first, last)
        before = opened | _add(carry.rewind(memory, start), extra)
        h, after, _ = blocks.run(repeated, h, before, cfg, valid=valid)
        again = looped.final_norm(weights, h, cfg) if cfg.loop_norm and sleep_cfg.num_passes > 1 else h
        return (again, after.within(first, last)), (h, after)

      each = {i: x[window] for i, x in added[1].items()}
      (h, memory), by_pass = loop(
        one_pass, (h, opened.within(first, last)), each, length=sleep_cfg.num_passes, unroll=False
      )
      if segment.reads:  # awake, in the first pass
        awake, after = jax.tree.map(lambda x: x[0], by_pass)
        awake, _, _ = blocks.run(coda, awake, after, cfg, valid=valid)
        logits.append(model.logits_of(weights, awake[:, np.asarray(segment.reads)], cfg))
      _, state, _ = blocks.run(coda, h, opened | memory, cfg, valid=valid)
      window += 1
  where = windows.answer_positions(segments)
  return model.cross_entropy(
    jnp.concatenate(logits, axis=1), batch.targets[:, where], batch.loss_mask[:, where]
  )


def _add(state: model.State, added: dict[str, jax.Array]) -> model.State:
  fast = {i: dataclasses.replace(s, S=s.S + added[i]) for i, s in state.fast.items()}
  return dataclasses.replace(state, fast=fast)


def _factor(later: Any, earlier: Any) -> float:
  """Geometric mean of earlier / later: how much larger a norm is one step further back."""
  pairs = [(a, b) for a, b in zip(later, earlier, strict=True) if a > 0 and b > 0]
  return math.exp(sum(math.log(b / a) for a, b in pairs) / len(pairs)) if pairs else math.nan
