"""The chunked form that all rules share, forward and backward. Derivation: kernels/README.md.

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
from jax.lax import Precision

MAX_CHUNK = 64  # a compromise, as the next two: kernels/README.md has what others cost
CACHE_BYTES = 2 << 20  # what a block of batch rows should fit into, on a CPU
LEAF = 8  # triangles up to this width are inverted row by row; each row is code to compile
STEP = 16.0  # log decays are summed in whole sixteenths and a rest
FORGET = -1000.0  # exp of it is 0 in every dtype; keeps -inf - -inf = nan out of the sums


class Plan(NamedTuple):
  """What is decided before tracing."""

  solve: bool  # delta rule: solve for the error; else the write is b v
  hoist: bool  # prepare all chunks before the scan (accelerators), or each inside it (CPU: stays in cache)
  block: int  # batch rows that run at a time; must divide B


def make_plan(q: jax.Array, v: jax.Array, S: jax.Array, *, solve: bool) -> Plan:
  """The default plan for shapes q [B, T, H, K] and v [B, T, H, V] on the default backend."""
  (B, T, H, K), V = q.shape, v.shape[-1]
  if jax.default_backend() != "cpu":
    return Plan(solve, hoist=True, block=B)
  _, C = _chunks(T)
  row = H * S.dtype.itemsize * (C * (2 * K + V) + 2 * K * V)
  most = max(1, CACHE_BYTES // row)
  fits = max(m for m in range(1, min(most, B) + 1) if B % m == 0)
  # A few caches' worth runs as well in one piece; blocks far below the cache cost more calls than they save.
  return Plan(solve, hoist=False, block=B if B <= 4 * most or 4 * fits < most else fits)


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


def _blocked(f):
  """Applies f to blocks of batch rows, one after the other: what a block touches stays in cache.

  Traced once per shape, however often a model calls it: hence the jit.
  """

  @functools.partial(jax.jit, static_argnums=0)
  @functools.wraps(f)
  def run(plan: Plan, *args):
    B, m = args[0].shape[0], plan.block
    if m == B:
      return f(plan, *args)
    out = jax.lax.map(lambda block: f(plan, *block), [x.reshape(B // m, m, *x.shape[1:]) for x in args])
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), out)

  return run


@_blocked
def _forward(plan: Plan, q, k, v, g, b, S):
  n, C = _chunks(v.shape[1])

  def one_chunk(S, x):
    c = x if plan.hoist else _prepare(plan, *x)
    seen = _twice(plan, c.since) * _dot("...ik,...kv->...iv", c.reads, S)
    _, U = _writes(plan, c, seen[..., C:, :])
    o = seen[..., :C, :] + _dot("...ij,...jv->...iv", c.scores[..., :C, :], U)
    return _after(c, S, U), o

  x = [_split(x, n, C, S.dtype) for x in (q, k, v, g, b)]
  S, o = _scan(one_chunk, S, _prepare(plan, *x) if plan.hoist else x)
  return _join(o, v.shape[1]).astype(v.dtype), S


@_blocked
def _backward(plan: Plan, q, k, v, g, b, S, do, dS):
  T = v.shape[1]
  n, C = _chunks(T)

  def sweep(S, x):  # the forward pass once more, for the errors and the S that each chunk met
    c = x if plan.hoist else _prepare(plan, *x)
    met = c.since * _dot("...ik,...kv->...iv", c.k, S) if plan.solve else None
    E, U = _writes(plan, c, met)
    if c.inverse is not None:
      E = E - _dot("...ij,...jv->...iv", c.scores[..., C:, :], U)
    return _after(c, S, U), (c.inverse, E, S)

  def retreat(carry, x):
    (dS_after, end), (x, (inverse, E, S), do) = carry, x
    c = x if plan.hoist else _prepare(plan, *x, inverse=inverse)
    dU = _dot("...ij,...iv->...jv", c.scores[..., :C, :], do)
    dU = dU + c.until * _dot("...ik,...kv->...iv", c.k, dS_after)
    if c.inverse is not None:
      dU = _dot("...ij,...iv->...jv", c.inverse, dU)
    Y = jnp.concatenate([do, -c.b * dU], -2) if plan.solve else do  # gradient of what the reads gave
    dS = c.whole * dS_after + _dot("...ik,...iv->...kv", c.reads, _twice(plan, c.since) * Y)
    found = (S, E, dU, Y, dS_after, end)
    return (dS, _inner(S, dS)), found if plan.hoist else _gradients(plan, c, *found)

  x = [_split(x, n, C, S.dtype) for x in (q, k, v, g, b)]
  c = _prepare(plan, *x) if plan.hoist else x
  S, kept = _scan(sweep, S, c)
  (dS, _), grads = _scan(retreat, (dS, _inner(S, dS)), (c, kept, _split(do, n, C, S.dtype)), reverse=True)
  if plan.hoist:
    grads = _gradients(plan, c, *grads)
  return *(_join(d, T).astype(x.dtype) for d, x in zip(grads, (q, k, v, g, b), strict=True)), dS


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
  g = jnp.maximum(g, FORGET)
  coarse = jnp.round(g * STEP) / STEP
  G = _dot("p...j,ij->p...i", jnp.stack([coarse, g - coarse]), lower)
  between = G[..., :, None] - G[..., None, :]
  # Masked before the exponential: above the diagonal it would overflow, and poison the gradient.
  decay = jnp.exp(jnp.where(lower > 0, between[0] + between[1], -jnp.inf))
  since = jnp.exp(G[0] + G[1])[..., None]
  until, whole = decay[..., -1, :, None], since[..., -1:, :]
  reads, b = q, b[..., None]
  if plan.solve:
    reads = jnp.concatenate([q, k], -2)
    decay = jnp.concatenate([decay, jnp.tril(decay, -1)], -2)
  scores = decay * _dot("...ik,...jk->...ij", reads, k)
  if plan.solve and C > 1 and inverse is None:
    inverse = unit_lower_inverse(b * scores[..., C:, :])
  return _Chunk(reads, k, v, b, since, until, whole, decay, scores, inverse)


def _writes(plan: Plan, c: _Chunk, seen) -> tuple[jax.Array, jax.Array]:
  """v less what S answers, and the writes U: both [..., C, V]. `seen` is unused without a solve."""
  X = c.v - seen if plan.solve else c.v
  U = c.b * X
  return X, U if c.inverse is None else _dot("...ij,...jv->...iv", c.inverse, U)


def _after(c: _Chunk, S, U) -> jax.Array:
  return c.whole * S + _dot("...ik,...iv->...kv", c.until * c.k, U)


def _gradients(plan: Plan, c: _Chunk, S, E, dU, Y, dS_after, end):
  """The part of the backward pass that needs no other chunk: gradients of q, k, v, g, b."""
  C = c.k.shape[-2]
  dv = c.b * dU
  M = c.decay * _dot("...iv,...jv->...ij", Y, c.b * E)
  dreads = _twice(plan, c.since) * _dot("...iv,...kv->...ik", Y, S) + _dot("...ij,...jk->...ik", M, c.k)
  dk = _dot("...ij,...ik->...jk", M, c.reads) + c.until * _dot("...iv,...kv->...ik", c.b * E, dS_after)
  dq = dreads[..., :C, :]
  if plan.solve:
    dk = dk + dreads[..., C:, :]
  # Closed forms: no sums over pairs of tokens, and no division by b, which may be 0.
  db = jnp.sum(dU * E, -1)
  dG = jnp.sum(c.reads[..., :C, :] * dq, -1) - jnp.sum(c.v * dv, -1)
  dg = _dot("...i,ij->...j", dG, jnp.tril(jnp.ones((C, C), dG.dtype))) + end[..., None]
  return dq, dk, dv, dg, db


def unit_lower_inverse(A: jax.Array) -> jax.Array:
  """(I + A)^-1 for strictly lower triangular A [..., C, C].

  By blocks: [[X, 0], [-Y L X, Y]] from the inverses X, Y of the diagonal blocks and the block L below.
  All pairs of a level go through one product. No powers of A, so nothing grows that the inverse does not
  hold, and no LAPACK call, which crawls through subnormal numbers when the decay is strong.
  """
  C = A.shape[-1]
  levels = (-(-C // LEAF) - 1).bit_length()
  m = -(-C // 2**levels)
  size = m * 2**levels
  A = jnp.pad(A, [(0, 0)] * (A.ndim - 2) + [(0, size - C)] * 2)
  X = _leaf_inverse(jnp.stack([A[..., i : i + m, i : i + m] for i in range(0, size, m)]))
  while m < size:
    below = jnp.stack([A[..., i + m : i + 2 * m, i : i + m] for i in range(0, size, 2 * m)])
    X, Y = X[0::2], X[1::2]
    corner = -_dot("...ij,...jk->...ik", Y, _dot("...ij,...jk->...ik", below, X))
    upper = jnp.concatenate([X, jnp.zeros_like(X)], -1)
    X = jnp.concatenate([upper, jnp.concatenate([corner, Y], -1)], -2)
    m *= 2
  return X[0, ..., :C, :C]


def _leaf_inverse(A: jax.Array) -> jax.Array:
  m = A.shape[-1]
  eye = jnp.eye(m, dtype=A.dtype)
  rows = []
  for i in range(m):
    row = jnp.broadcast_to(eye[i], (*A.shape[:-2], m))
    for j in range(i):
      row = row - A[..., i, j, None] * rows[j]
    rows.append(row)
  return jnp.stack(rows, -2)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, precision=Precision.HIGHEST)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.sum(x * y, (-1, -2))


def _twice(plan: Plan, x: jax.Array) -> jax.Array:
  return jnp.concatenate([x, x], -2) if plan.solve else x


def _chunks(T: int) -> tuple[int, int]:
  """n and C: as few chunks as MAX_CHUNK allows, of equal length, so that little is padded."""
  n = -(-T // MAX_CHUNK)
  return n, -(-T // n)


def _split(x: jax.Array, n: int, C: int, dtype) -> jax.Array:
  """[B, T, H, ...] -> [n, B, H, C, ...], padded with zeros: no write, no decay."""
  x = x.astype(dtype)
  if n * C > x.shape[1]:
    x = jnp.pad(x, [(0, 0), (0, n * C - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], n, C, *x.shape[2:]), (1, 3), (0, 2))


def _join(x: jax.Array, T: int) -> jax.Array:
  """[n, B, H, C, ...] -> [B, T, H, ...]."""
  x = jnp.moveaxis(x, (0, 2), (1, 3))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def _scan(f, init, xs, reverse: bool = False):
  """`jax.lax.scan`, without the loop if there is one chunk."""
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.scan(f, init, xs, reverse=reverse)
  carry, y = f(init, jax.tree.map(lambda x: x[0], xs))
  return carry, jax.tree.map(lambda y: y[None], y)
