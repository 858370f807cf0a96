"""Several passes over the blocks awake, and where a token leaves them: the looped model of arXiv 2510.25741.

A model that sleeps reads awake in one pass (`predict_passes` = 1), and everything here is then the identity.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import blocks, layers
from sleep_jax.config import ModelConfig


def normed(weights: dict[str, Any], h: jax.Array, cfg: ModelConfig) -> jax.Array:
  """The final norm of h, which the head and the exit gate read and, with `loop_norm`, the next pass."""
  return layers.rms_norm(h, weights["final_norm"], cfg.norm_eps, cfg.norm_cast)


def read(
  weights: dict[str, Any],
  h: jax.Array,
  state: blocks.State,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  cache: blocks.Cache | None = None,
  remat: bool = False,
) -> tuple[list[jax.Array], blocks.State, blocks.Cache | None]:
  """`predict_passes` passes over all blocks; positions are the same in each.

  Args:
    weights: of the whole model.
    h: embedded tokens [B, T, D].
    state, valid, cache, remat: as for `blocks.run`. Pass u of the cache's block i is entry
      u * len(cfg.blocks) + i with `pass_cache` = "own".

  Returns:
    h [B, T, D] after each pass, before the final norm; state and cache.
  """
  outs, size, before, after = [], len(cfg.blocks), cache, cache
  for u in range(cfg.predict_passes):
    first = u * size if cfg.pass_cache == "own" else 0
    mine = None
    if before is not None:
      mine = {i: before[str(first + int(i))] for i in blocks.attention_blocks(cfg)}
    h, state, mine = blocks.run(weights["blocks"], h, state, cfg, valid=valid, cache=mine, remat=remat)
    if after is not None:
      after = after | {str(first + int(i)): slot for i, slot in mine.items()}
    outs.append(h)
    if cfg.loop_norm:
      h = normed(weights, h, cfg)
  return outs, state, after


def gate_logits(weights: dict[str, Any], outs: list[jax.Array], cfg: ModelConfig) -> jax.Array:
  """The exit gate after each pass: [U, B, T] float32. Its weights are declared by `exit_gate`."""
  gate = weights["exit_gate"]
  normal = [normed(weights, h, cfg) for h in outs]
  found = [layers.dense(h, gate["w"], ("batch", "seq", None))[..., 0] for h in normal]
  return jnp.stack([x.astype(jnp.float32) + gate["b"].astype(jnp.float32) for x in found])


def exit_probabilities(logits: jax.Array) -> jax.Array:
  """How likely a token leaves after each pass: p_u = s_u prod_{j<u} (1 - s_j), s = sigmoid(logits).

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


def leave(weights: dict[str, Any], outs: list[jax.Array], cfg: ModelConfig) -> jax.Array:
  """h [B, T, D] with which each token leaves: that of the last pass, or as `exit_threshold` says."""
  if cfg.exit_threshold is None or len(outs) == 1:
    return outs[-1]
  where = exit_pass(exit_probabilities(gate_logits(weights, outs, cfg)), cfg.exit_threshold)
  return sum(jnp.where((where == u)[..., None], h, 0) for u, h in enumerate(outs))
