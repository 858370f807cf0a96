"""Several passes over the blocks awake, and where a token exits: the looped model of arXiv 2510.25741.

A model that sleeps reads awake in one pass (`predict_passes` = 1), and everything here is then the identity.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import attention, blocks, carry, layers, products
from sleep_jax.config import ATTENTION, ModelConfig

# The caches of an open window, one dict a pass that has a cache of its own.
Cache = tuple[blocks.Caches, ...]


def init_cache(
  cfg: ModelConfig,
  batch: int,
  state: carry.State | None = None,
  *,
  room: int = 0,
  pads: jax.Array | None = None,
) -> Cache:
  """A window of which nothing is read yet.

  Args:
    state: inside a pass; the cache begins with what it kept. None: nothing was kept.
    room, pads: as for `attention.init_cache`.
  """
  passes = cfg.predict_passes if cfg.pass_cache == "own" else 1
  kept = {} if state is None else state.kept
  kinds = {str(i): kind for i, kind in enumerate(cfg.blocks) if kind in ATTENTION}
  return tuple(
    {
      i: attention.init_cache(cfg, batch, kept.get(i), rotated=kind != "nope", room=room, pads=pads)
      for i, kind in kinds.items()
    }
    for _ in range(passes)
  )


def final_norm(weights: dict[str, Any], h: jax.Array, cfg: ModelConfig) -> jax.Array:
  """The final norm of h, which the head and the exit gate read and, with `loop_norm`, the next pass."""
  return layers.norm(h, weights["final_norm"], cfg)


def read(
  weights: dict[str, Any],
  groups: tuple[blocks.Group, ...],
  h: jax.Array,
  state: carry.State,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  cache: Cache | None = None,
  remat: bool = False,
) -> tuple[list[jax.Array], carry.State, Cache | None]:
  """`predict_passes` passes over all blocks; positions are the same in each.

  Args:
    weights: of the whole model.
    groups: its blocks, from `blocks.arrange`.
    h: embedded tokens [B, T, D].
    state, valid, remat: as for `blocks.run`.
    cache: earlier tokens of the same window. None: h is the whole window.

  Returns:
    h [B, T, D] after each pass, before the final norm; state and cache.
  """
  outs, caches = [], list(cache or ())
  for u in range(cfg.predict_passes):
    place = u if cfg.pass_cache == "own" else 0
    before = None if cache is None else cache[place]
    h, state, after = blocks.run(groups, h, state, cfg, valid=valid, caches=before, remat=remat)
    if cache is not None:
      caches[place] = after
    outs.append(h)
    if cfg.loop_norm:
      h = final_norm(weights, h, cfg)
  return outs, state, None if cache is None else tuple(caches)


def gate_logits(weights: dict[str, Any], outs: list[jax.Array], cfg: ModelConfig) -> jax.Array:
  """The exit gate after each pass: [U, B, T] float32. Its weights are declared by `exit_gate`."""
  gate = weights["exit_gate"]
  normal = [final_norm(weights, h, cfg) for h in outs]
  logits = [products.dense(h, gate["w"], ("batch", "seq", None))[..., 0] for h in normal]
  return jnp.stack([x.astype(jnp.float32) + gate["b"].astype(jnp.float32) for x in logits])


def exit_probabilities(logits: jax.Array) -> jax.Array:
  """How likely a token exits after each pass: p_u = s_u prod_{j<u} (1 - s_j), s = sigmoid(logits).

  >>> exit_probabilities(jnp.zeros((3, 1, 1))).ravel().tolist()
  [0.5, 0.25, 0.25]

  Args:
    logits: [U, B, T] float32; the last pass takes the rest, whatever its gate says.

  Returns:
    [U, B, T] float32, which sums to 1 over U.
  """
  leaves = jax.nn.sigmoid(logits).at[-1].set(1.0)
  stays = jnp.cumprod(1 - leaves[:-1], axis=0)
  return leaves * jnp.concatenate([jnp.ones_like(leaves[:1]), stays])


def exit_pass(probabilities: jax.Array, threshold: float) -> jax.Array:
  """The first pass (from 0) at which the probabilities sum up to `threshold`, else the last: [B, T] int32."""
  reached = jnp.cumsum(probabilities, axis=0) >= threshold
  return jnp.argmax(reached.at[-1].set(True), axis=0).astype(jnp.int32)


def exit_hidden(weights: dict[str, Any], outs: list[jax.Array], cfg: ModelConfig) -> jax.Array:
  """The hidden state [B, T, D] each token exits with: the last pass's, or the first to reach
  `exit_threshold`.
  """
  if cfg.exit_threshold is None or len(outs) == 1:
    return outs[-1]
  where = exit_pass(exit_probabilities(gate_logits(weights, outs, cfg)), cfg.exit_threshold)
  chosen = (jnp.where((where == u)[..., None], h, 0) for u, h in enumerate(outs))
  return functools.reduce(operator.add, chosen)
