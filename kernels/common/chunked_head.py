"""The chunked form of the rules with one decay per head, forward and backward. Derivation: kernels/README.md.

A sequence is split into n chunks of C tokens. Inside a chunk everything is a matrix product; only S goes from
chunk to chunk. The Hebbian rules write U = b v. The delta rules write U = b E. The error E is v less the
answers that S and the earlier tokens of the chunk give: a triangular system, solved after the answers of S
have been subtracted. Everything is computed in the dtype of S: float32, or float64 if the caller works in it.

In shape comments `...` stands for [B, H], or [n, B, H] where all chunks are prepared at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax.kernels.common import tiling
from sleep_jax.kernels.common.tiling import Plan, dot

STEP = 16.0  # log decays are summed in whole sixteenths and a rest


def chunked(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """Runs one rule over a sequence.

  The gradient is written by hand, keeps the inputs only and recomputes the rest. It is plain JAX, so second
  derivatives are reverse or forward mode over reverse mode; `jax.jvp` of the rule itself raises TypeError.

  Args:
    q, k: [B, T, H, K]. v: [B, T, H, V]. g, b: [B, T, H]. S: [B, H, K, V].
    plan: static.

  Returns:
    o [B, T, H, V] in v's dtype and S after the last token.
  """
  return _chunked(plan, q, k, v, g, b, S)


@tiling.blocked
def _forward(plan: Plan, q, k, v, g, b, S):
  n, C = plan.chunks(v.shape[1])
  tokens = [tiling.split(x, n, C, S.dtype) for x in (q, k, v, g, b)]
  chunks, prepared = tiling.prepared(plan, _prepare, tokens)

  def forward_chunk(S_in, x):
    c = prepared(x)
    answers = _twice(plan, c.decay_in) * plan.dot("...ik,...kv->...iv", c.reads, S_in)
    _, U = _writes(plan, c, answers[..., C:, :])
    o = answers[..., :C, :] + plan.dot("...ij,...jv->...iv", c.scores[..., :C, :], U)
    return _S_out(plan, c, S_in, U), o

  S_out, o = tiling.scan(forward_chunk, S, chunks)
  return tiling.join(o, v.shape[1]).astype(v.dtype), S_out


@tiling.blocked
def _backward(plan: Plan, q, k, v, g, b, S, do, dS):
  T = v.shape[1]
  n, C = plan.chunks(T)
  tokens = [tiling.split(x, n, C, S.dtype) for x in (q, k, v, g, b)]
  chunks, prepared = tiling.prepared(plan, _prepare, tokens)

  def recompute(S_in, x):  # the forward pass once more, for the errors and the S before each chunk
    c = prepared(x)
    answers = c.decay_in * plan.dot("...ik,...kv->...iv", c.k, S_in) if plan.solve else None
    E, U = _writes(plan, c, answers)
    if c.inverse is not None:
      E = E - plan.dot("...ij,...jv->...iv", c.scores[..., C:, :], U)
    return _S_out(plan, c, S_in, U), (c.inverse, E, S_in)

  def backward_chunk(carry, x):
    (dS_out, inner_out), (x, (inverse, E, S_in), do) = carry, x
    c = prepared(x, inverse=inverse)
    dU = plan.dot("...ij,...iv->...jv", c.scores[..., :C, :], do)
    dU = dU + c.decay_out * plan.dot("...ik,...kv->...iv", c.k, dS_out)
    if c.inverse is not None:
      dU = plan.dot("...ij,...iv->...jv", c.inverse, dU)
    Y = jnp.concatenate([do, -c.b * dU], -2) if plan.solve else do  # gradient of the answers to the reads
    dS_in = c.decay_all * dS_out + plan.dot("...ik,...iv->...kv", c.reads, _twice(plan, c.decay_in) * Y)
    terms = (S_in, E, dU, Y, dS_out, inner_out)
    return (dS_in, _inner(S_in, dS_in)), terms if plan.hoist else _gradients(plan, c, *terms)

  S_out, kept = tiling.scan(recompute, S, chunks)
  steps = (chunks, kept, tiling.split(do, n, C, S.dtype))
  (dS, _), grads = tiling.scan(backward_chunk, (dS, _inner(S_out, dS)), steps, reverse=True)
  if plan.hoist:
    grads = _gradients(plan, chunks, *grads)
  return *(tiling.join(d, T).astype(x.dtype) for d, x in zip(grads, (q, k, v, g, b), strict=True)), dS


_chunked = tiling.with_gradient(_forward, _backward)


class _Chunk(NamedTuple):
  """What a chunk knows before it meets S. G_i is the sum of the log decays up to token i of the chunk."""

  reads: jax.Array  # [..., C, K] the queries; a delta rule has the keys below them, [..., 2C, K]
  k: jax.Array  # [..., C, K]
  v: jax.Array  # [..., C, V]
  b: jax.Array  # [..., C, 1]
  decay_in: jax.Array  # [..., C, 1] exp(G_i): from the start of the chunk to token i
  decay_out: jax.Array  # [..., C, 1] exp(G_C - G_i): from token i to the end of the chunk
  decay_all: jax.Array  # [..., 1, 1] exp(G_C): from the start to the end
  decay_between: jax.Array  # [..., C or 2C, C] exp(G_i - G_j) where read i sees write j, else 0
  scores: jax.Array  # [..., C or 2C, C] decay times the products of reads and keys
  inverse: jax.Array | None  # [..., C, C] from writes without to writes with each other's answers


def _prepare(plan: Plan, q, k, v, g, b, inverse=None) -> _Chunk:
  C = q.shape[-2]
  lower = jnp.tril(jnp.ones((C, C), g.dtype))
  # exp(G_i - G_j) loses the digits that the sums lose: 1e-4 after 64 tokens of g = -20. Sums of whole
  # sixteenths are exact and the sums of the rests stay small, so their differences keep nearly all digits.
  g = jnp.maximum(g, tiling.FORGET)
  coarse = jnp.round(g * STEP) / STEP
  G = dot("p...j,ij->p...i", jnp.stack([coarse, g - coarse]), lower)
  between = G[..., :, None] - G[..., None, :]
  # Masked before the exponential: above the diagonal it would overflow, and poison the gradient.
  decay = jnp.exp(jnp.where(lower > 0, between[0] + between[1], -jnp.inf))
  decay_in = jnp.exp(G[0] + G[1])[..., None]
  decay_out, decay_all = decay[..., -1, :, None], decay_in[..., -1:, :]
  reads, b = q, b[..., None]
  if plan.solve:
    reads = jnp.concatenate([q, k], -2)
    decay = jnp.concatenate([decay, jnp.tril(decay, -1)], -2)
  scores = decay * plan.dot("...ik,...jk->...ij", reads, k)
  if plan.solve and C > 1 and inverse is None:
    inverse = tiling.unit_lower_inverse(b * scores[..., C:, :])
  return _Chunk(reads, k, v, b, decay_in, decay_out, decay_all, decay, scores, inverse)


def _writes(plan: Plan, c: _Chunk, answers) -> tuple[jax.Array, jax.Array]:
  """v less the answers of S, and the writes U: both [..., C, V]. `answers` is unused without a solve."""
  X = c.v - answers if plan.solve else c.v
  U = c.b * X
  return X, U if c.inverse is None else plan.dot("...ij,...jv->...iv", c.inverse, U)


def _S_out(plan: Plan, c: _Chunk, S_in, U) -> jax.Array:
  return c.decay_all * S_in + plan.dot("...ik,...iv->...kv", c.decay_out * c.k, U)


def _gradients(plan: Plan, c: _Chunk, S_in, E, dU, Y, dS_out, inner_out):
  """The part of the backward pass that needs no other chunk: gradients of q, k, v, g, b.

  inner_out is <S, dS> at the end of the chunk.
  """
  C = c.k.shape[-2]
  dv = c.b * dU
  M = c.decay_between * plan.dot("...iv,...jv->...ij", Y, c.b * E)
  dreads = _twice(plan, c.decay_in) * plan.dot("...iv,...kv->...ik", Y, S_in) + plan.dot(
    "...ij,...jk->...ik", M, c.k
  )
  dk = plan.dot("...ij,...ik->...jk", M, c.reads) + c.decay_out * plan.dot(
    "...iv,...kv->...ik", c.b * E, dS_out
  )
  dq = dreads[..., :C, :]
  if plan.solve:
    dk = dk + dreads[..., C:, :]
  # Closed forms: no sums over pairs of tokens, and no division by b, which may be 0.
  db = tiling.inner(dU, E)
  dG = tiling.inner(c.reads[..., :C, :], dq) - tiling.inner(c.v, dv)
  dg = dot("...i,ij->...j", dG, jnp.tril(jnp.ones((C, C), dG.dtype))) + inner_out[..., None]
  return dq, dk, dv, dg, db


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.sum(tiling.inner(x, y), -1)  # in two steps: one long sum, term by term, loses a digit


def _twice(plan: Plan, x: jax.Array) -> jax.Array:
  return jnp.concatenate([x, x], -2) if plan.solve else x
