"""Bytes that a model needs, counted from shapes: nothing is allocated, no weights are needed.

What a gradient saves is counted on what autodiff keeps. A compiler may keep less (it fuses), and sets
aside scratch memory of its own: `benchmarks/memory.py` measures that at sizes that fit this machine.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import blocks, carry, model, optim, params, windows
from sleep_jax.config import ModelConfig, OptimConfig, SleepConfig

REMAT = ("none", "block", "pass", "window", "offload")


def size(tree: Any) -> int:
  """Bytes of all arrays, or shapes with a dtype, of a tree."""
  return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def weights(cfg: ModelConfig) -> model.Params:
  """The slow weights as shapes, float32."""
  declared = model.declare(cfg)
  return jax.tree.map(
    lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), declared, is_leaf=params.is_weight
  )


def optimizer(cfg: ModelConfig, optim_cfg: OptimConfig) -> int:
  """Bytes of the optimizer's state: a momentum for a Muon weight, two moments for AdamW's, none if frozen.

  With the weights' average, if there is one.
  """
  tx = optim.make(optim_cfg, optim.freeze(optim_cfg, model.declare(cfg)), 1)
  average = size(weights(cfg)) if optim_cfg.average else 0
  return size(jax.eval_shape(tx.init, weights(cfg))) + average


def state(cfg: ModelConfig, batch: int = 1, sleep_cfg: SleepConfig | None = None) -> int:
  """Bytes that cross the border of a window: fast weights and contexts; under sliding eviction kept keys."""
  return size(jax.eval_shape(lambda: model.init_state(cfg, batch, sleep_cfg)))


def cache(cfg: ModelConfig, batch: int = 1) -> int:
  """Bytes of the attention cache of one window, awake."""
  return size(jax.eval_shape(lambda: model.open_window(model.init_state(cfg, batch), cfg, batch)[1]))


def saved(function: Callable[..., Any], *args: Any, space: Any = jax.memory.Space.Device) -> int:
  """Bytes that the gradient of `function` keeps of its forward pass, beside its arguments.

  Args:
    function: of trees of arrays; differentiated by all of them.
    args: shapes.
    space: where: on the device, or what is moved to the host's memory.
  """
  found = []

  def run(*args):
    out, backward = jax.vjp(function, *args)
    ours = {id(x) for x in jax.tree.leaves(args)}
    kept = {id(x): x for x in jax.tree.leaves(backward) if id(x) not in ours}
    arrays = [x for x in kept.values() if hasattr(x, "dtype")]
    found.append(size([x for x in arrays if jax.typeof(x).memory_space == space]))
    return out

  jax.eval_shape(run, *args)
  return found[-1]


def gradient(cfg: ModelConfig, sleep_cfg: SleepConfig, tokens: int, answers: int = 1, batch: int = 1) -> int:
  """Bytes on the device that a gradient keeps of its forward pass at its peak, weights and gradients aside.

  What the outermost recomputation keeps, and on the way back, inside of it, what the recomputation of one
  window, one pass and one block keep in turn.

  Args:
    cfg, sleep_cfg: the model; `sleep_cfg.remat` is the policy.
    tokens: T.
    answers: last positions of the sequence, which have a loss.
    batch: B.
  """
  slow, remat = weights(cfg), sleep_cfg.remat
  arranged, total = _of_a_loss(cfg, sleep_cfg, tokens, answers, batch, jax.memory.Space.Device)
  if remat == "none":
    return total
  length = min(cfg.window, tokens)
  h = jax.ShapeDtypeStruct((batch, length, cfg.embed_dim), jnp.dtype(cfg.dtype))
  start = jax.eval_shape(lambda: model.init_state(cfg, batch, sleep_cfg))
  memory = jax.eval_shape(carry.first_pass, start)

  def run(first, last, remat):
    def part(slow, h, memory):
      return blocks.run(blocks.arrange(slow, cfg, first, last), h, memory, cfg, remat=remat)[:2]

    return saved(part, slow["blocks"], h, memory)

  kinds = {(kind, i in cfg.without_mlp): i for i, kind in enumerate(cfg.blocks)}
  total += max(run(i, i + 1, False) for i in kinds.values())
  if remat in ("pass", "window", "offload"):
    total += run(sleep_cfg.first_block, sleep_cfg.last_block, True)
  if remat == "window":
    inner = dataclasses.replace(sleep_cfg, remat="pass")

    def window(slow, arranged, memory):
      ids = jnp.zeros((batch, length), jnp.int32)
      return model.consolidate(slow, ids, memory, cfg, inner, arranged=arranged)

    total += saved(window, slow, arranged, start)
  return total


def on_host(cfg: ModelConfig, sleep_cfg: SleepConfig, tokens: int, answers: int = 1, batch: int = 1) -> int:
  """Bytes that a gradient keeps in the host's memory; 0 but for `sleep.remat` = `offload`.

  Args: as of `gradient`.
  """
  return _of_a_loss(cfg, sleep_cfg, tokens, answers, batch, jax.memory.Space.Host)[1]


def _of_a_loss(
  cfg: ModelConfig, sleep_cfg: SleepConfig, tokens: int, answers: int, batch: int, space: Any
) -> tuple[model.Arranged, int]:
  """The blocks as the model arranges them, and the bytes that the gradient of the loss keeps in a place."""
  segments = windows.plan([i >= tokens - answers for i in range(tokens)], cfg.window, sleep_cfg)

  def loss(slow, arranged):
    zeros = jnp.zeros((batch, tokens), jnp.int32)
    made = windows.Batch(zeros, zeros, jnp.ones(zeros.shape, jnp.float32))
    return model.loss(slow, made, segments, cfg, sleep_cfg, arranged=arranged)[0]

  # Equal blocks run under one loop, over their weights stacked; the stacks count as weights, not as kept.
  slow = weights(cfg)
  arranged = jax.eval_shape(lambda slow: model.arrange(slow, cfg, sleep_cfg), slow)
  return arranged, saved(loss, slow, arranged, space=space)
