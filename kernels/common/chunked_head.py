"""The chunked form of the rules with one decay per head, forward and backward. Derivation: kernels/README.md.

A sequence is cut into n chunks of C tokens. Inside a chunk everything is a matrix product; only S goes from
chunk to chunk. The Hebbian rules write U = b v. The delta rules write U = b E, where E is the error that is
left of v after what S and the earlier tokens of the chunk already answer: a triangular system, solved after S
has been subtracted. Everything is computed in the dtype of S: float32, or float64 if the caller works in it.

In shape comments `...` stands for [B, H], or [n, B, H] where all chunks are prepared at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sleep_jax.kernels.common import tiling
from sleep_jax.kernels.common.tiling import Plan, dot

STEP = 16.0  # log decays are summed in whole sixteenths and a rest


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
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
  return _forward(plan, q, k, v, g, b, S)


def _chunked_fwd(q, k, v, g, b, S, plan):
  o, S_after = _forward(plan, q, k, v, g, b, S)
  outputs = checkpoint_name(o, "fast_weight_o"), checkpoint_name(S_after, "fast_weight_S")
  return outputs, (q, k, v, g, b, S)


def _chunked_bwd(plan, inputs, cotangents):
  return _backward(plan, *inputs, *cotangents)


chunked.defvjp(_chunked_fwd, _chunked_bwd)


@tiling.blocked
def _forward(plan: Plan, q, k, v, g, b, S):
  n, C = plan.chunks(v.shape[1])

  def one_chunk(S, x):
    c = x if plan.hoist else _prepare(plan, *x)
    seen = _twice(plan, c.since) * plan.dot("...ik,...kv->...iv", c.reads, S)
    _, U = _writes(plan, c, seen[..., C:, :])
    o = seen[..., :C, :] + plan.dot("...ij,...jv->...iv", c.scores[..., :C, :], U)
    return _after(plan, c, S, U), o

  x = [tiling.split(x, n, C, S.dtype) for x in (q, k, v, g, b)]
  S, o = tiling.scan(one_chunk, S, _prepare(plan, *x) if plan.hoist else x)
  return tiling.join(o, v.shape[1]).astype(v.dtype), S


@tiling.blocked
def _backward(plan: Plan, q, k, v, g, b, S, do, dS):
  T = v.shape[1]
  n, C = plan.chunks(T)

  def sweep(S, x):  # the forward pass once more, for the errors and the S that each chunk met
    c = x if plan.hoist else _prepare(plan, *x)
    met = c.since * plan.dot("...ik,...kv->...iv", c.k, S) if plan.solve else None
    E, U = _writes(plan, c, met)
    if c.inverse is not None:
      E = E - plan.dot("...ij,...jv->...iv", c.scores[..., C:, :], U)
    return _after(plan, c, S, U), (c.inverse, E, S)

  def retreat(carry, x):
    (dS_after, end), (x, (inverse, E, S), do) = carry, x
    c = x if plan.hoist else _prepare(plan, *x, inverse=inverse)
    dU = plan.dot("...ij,...iv->...jv", c.scores[..., :C, :], do)
    dU = dU + c.until * plan.dot("...ik,...kv->...iv", c.k, dS_after)
    if c.inverse is not None:
      dU = plan.dot("...ij,...iv->...jv", c.inverse, dU)
    Y = jnp.concatenate([do, -c.b * dU], -2) if plan.solve else do  # gradient of what the reads gave
    dS = c.whole * dS_after + plan.dot("...ik,...iv->...kv", c.reads, _twice(plan, c.since) * Y)
    found = (S, E, dU, Y, dS_after, end)
    return (dS, _inner(S, dS)), found if plan.hoist else _gradients(plan, c, *found)

  x = [tiling.split(x, n, C, S.dtype) for x in (q, k, v, g, b)]
  c = _prepare(plan, *x) if plan.hoist else x
  S, kept = tiling.scan(sweep, S, c)
  (dS, _), grads = tiling.scan(
    retreat, (dS, _inner(S, dS)), (c, kept, tiling.split(do, n, C, S.dtype)), reverse=True
  )
  if plan.hoist:
    grads = _gradients(plan, c, *grads)
  return *(tiling.join(d, T).astype(x.dtype) for d, x in zip(grads, (q, k, v, g, b), strict=True)), dS


class _Chunk(NamedTuple):
  """What a chunk knows before it meets S. G_i is the sum of the log decays up to token i of the chunk."""

  reads: jax.Array  # [..., C, K] the queries; a delta rule has the keys below them, [..., 2C, K]
  k: jax.Array  # [..., C, K]
  v: jax.Array  # [..., C, V]
  b: jax.Array  # [..., C, 1]
  since: jax.Array  # [..., C, 1] exp(G_i): what is left at token i of the S that entered
  until: jax.Array  # [..., C, 1] exp(G_C - G_i): what is left at the end of what token i wrote
  whole: jax.Array  # [..., 1, 1] exp(G_C)
  decay: jax.Array  # [..., C or 2C, C] exp(G_i - G_j) where read i sees write j, else 0
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
  since = jnp.exp(G[0] + G[1])[..., None]
  until, whole = decay[..., -1, :, None], since[..., -1:, :]
  reads, b = q, b[..., None]
  if plan.solve:
    reads = jnp.concatenate([q, k], -2)
    decay = jnp.concatenate([decay, jnp.tril(decay, -1)], -2)
  scores = decay * plan.dot("...ik,...jk->...ij", reads, k)
  if plan.solve and C > 1 and inverse is None:
    inverse = tiling.unit_lower_inverse(b * scores[..., C:, :])
  return _Chunk(reads, k, v, b, since, until, whole, decay, scores, inverse)


def _writes(plan: Plan, c: _Chunk, seen) -> tuple[jax.Array, jax.Array]:
  """v less what S answers, and the writes U: both [..., C, V]. `seen` is unused without a solve."""
  X = c.v - seen if plan.solve else c.v
  U = c.b * X
  return X, U if c.inverse is None else plan.dot("...ij,...jv->...iv", c.inverse, U)


def _after(plan: Plan, c: _Chunk, S, U) -> jax.Array:
  return c.whole * S + plan.dot("...ik,...iv->...kv", c.until * c.k, U)


def _gradients(plan: Plan, c: _Chunk, S, E, dU, Y, dS_after, end):
  """The part of the backward pass that needs no other chunk: gradients of q, k, v, g, b."""
  C = c.k.shape[-2]
  dv = c.b * dU
  M = c.decay * plan.dot("...iv,...jv->...ij", Y, c.b * E)
  dreads = _twice(plan, c.since) * plan.dot("...iv,...kv->...ik", Y, S) + plan.dot(
    "...ij,...jk->...ik", M, c.k
  )
  dk = plan.dot("...ij,...ik->...jk", M, c.reads) + c.until * plan.dot(
    "...iv,...kv->...ik", c.b * E, dS_after
  )
  dq = dreads[..., :C, :]
  if plan.solve:
    dk = dk + dreads[..., C:, :]
  # Closed forms: no sums over pairs of tokens, and no division by b, which may be 0.
  db = tiling.inner(dU, E)
  dG = tiling.inner(c.reads[..., :C, :], dq) - tiling.inner(c.v, dv)
  dg = dot("...i,ij->...j", dG, jnp.tril(jnp.ones((C, C), dG.dtype))) + end[..., None]
  return dq, dk, dv, dg, db


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.sum(tiling.inner(x, y), -1)  # in two steps: one long sum, term by term, loses a digit


def _twice(plan: Plan, x: jax.Array) -> jax.Array:
  return jnp.concatenate([x, x], -2) if plan.solve else x
