"""The chunked form of the rules with a decay per key channel, forward and backward.

Both delta rules of this kind (KDA, Gated DeltaNet-2) are one recurrence over an erase key e and a write z:

    S <- exp(g) S;  S <- S + k (z - S^T e)^T;  o = S^T q                     g, e [B, T, H, K], z [B, T, H, V]

exp(G_i - G_j) no longer factors out of the products of reads and keys, and exp(-G_j) overflows. So a chunk is
halved again and again. What lies in the right half reads from the left one through the border between them:
exp(from the border to i) q_i meets exp(from j to the border) k_j, two factors of at most 1, each a sum over
the tokens in between and over no others. Nothing overflows, nothing is subtracted, and a factor is 0 only if
the product is. Pairs inside the last pieces, of at most LEAF tokens, are taken one by one.

In shape comments `...` stands for [B, H], or [n, B, H] where all chunks are prepared at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import tiling
from kernels.tiling import Plan, dot

LEAF = 4  # tokens whose pairs get an exponential of their own: LEAF K of them a token


def make_plan(q: jax.Array, v: jax.Array, S: jax.Array) -> Plan:
  """The default plan for shapes q [B, T, H, K] and v [B, T, H, V] on the default backend."""
  return tiling.make_plan(q, v, S, solve=True, extra=(LEAF + 4) * q.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def chunked(
  q: jax.Array, k: jax.Array, z: jax.Array, g: jax.Array, e: jax.Array, S: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """Runs the recurrence above over a sequence; a gradient by hand, which keeps the inputs only.

  Args:
    q, k, g, e: [B, T, H, K]. z: [B, T, H, V]. S: [B, H, K, V].
    plan: static.

  Returns:
    o [B, T, H, V] and S after the last token, both in the dtype of S.
  """
  return _forward(plan, q, k, z, g, e, S)


def _chunked_fwd(q, k, z, g, e, S, plan):
  o, S_after = _forward(plan, q, k, z, g, e, S)
  outputs = checkpoint_name(o, "fast_weight_o"), checkpoint_name(S_after, "fast_weight_S")
  return outputs, (q, k, z, g, e, S)


def _chunked_bwd(plan, inputs, cotangents):
  return _backward(plan, *inputs, *cotangents)


chunked.defvjp(_chunked_fwd, _chunked_bwd)


@tiling.blocked
def _forward(plan: Plan, q, k, z, g, e, S):
  T = z.shape[1]
  n, C = plan.chunks(T)

  def one_chunk(S, x):
    c = x if plan.hoist else _prepare(plan, *x)
    seen = plan.dot("...irk,...kv->...irv", c.since[..., :, None, :] * c.reads, S)
    U = _solve(plan, c, c.z - seen[..., 1, :])
    o = seen[..., 0, :] + plan.dot("...ij,...jv->...iv", c.scores, U)
    return _after(plan, c, S, U), o

  x = [tiling.split(x, n, C, S.dtype) for x in (q, k, z, g, e)]
  S, o = tiling.scan(one_chunk, S, _prepare(plan, *x) if plan.hoist else x)
  return tiling.join(o, T), S


@tiling.blocked
def _backward(plan: Plan, q, k, z, g, e, S, do, dS):
  T = z.shape[1]
  n, C = plan.chunks(T)

  def sweep(S, x):  # the forward pass once more, for the writes and the S that each chunk met
    c = x if plan.hoist else _prepare(plan, *x)
    e = c.reads[..., 1, :]
    U = _solve(plan, c, c.z - plan.dot("...ik,...kv->...iv", c.since * e, S))
    return _after(plan, c, S, U), ((c.scores, c.inverse), U, S)

  def retreat(carry, x):
    (dS_after, end), (x, (kept, U, S), do) = carry, x
    c = x if plan.hoist else _prepare(plan, *x, kept=kept)
    dU = plan.dot("...ij,...iv->...jv", c.scores, do)
    dU = dU + plan.dot("...ik,...kv->...iv", c.until * c.k, dS_after)
    if c.inverse is not None:
      dU = plan.dot("...ij,...iv->...jv", c.inverse, dU)  # now of what the system was solved for, so of z
    Y = jnp.stack([do, -dU], -2)  # gradient of what the reads gave
    reads = c.since[..., :, None, :] * c.reads
    dS = c.whole * dS_after + plan.dot("...irk,...irv->...kv", reads, Y)
    found = (S, U, dU, Y, dS_after, end)
    return (dS, _rows(S, dS)), found if plan.hoist else _gradients(plan, c, *found)

  x = [tiling.split(x, n, C, S.dtype) for x in (q, k, z, g, e)]
  c = _prepare(plan, *x) if plan.hoist else x
  S, kept = tiling.scan(sweep, S, c)
  steps = (c, kept, tiling.split(do, n, C, S.dtype))
  (dS, _), grads = tiling.scan(retreat, (dS, _rows(S, dS)), steps, reverse=True)
  if plan.hoist:
    grads = _gradients(plan, c, *grads)
  return *(tiling.join(d, T).astype(x.dtype) for d, x in zip(grads, (q, k, z, g, e), strict=True)), dS


class _Ladder(NamedTuple):
  """The decays between the tokens of a chunk, as factors of at most 1."""

  leaf: tuple[tuple[jax.Array, ...], ...]  # [i][j], j < i: [..., pieces, K] between two tokens of a piece
  rungs: tuple[tuple[jax.Array, jax.Array], ...]  # halves: the right from the border, the left to it


class _Chunk(NamedTuple):
  """What a chunk knows before it meets S. G_i is the sum of the log decays up to token i of the chunk."""

  reads: jax.Array  # [..., C, 2, K] the queries and the erase keys
  k: jax.Array  # [..., C, K]
  z: jax.Array  # [..., C, V]
  since: jax.Array  # [..., C, K] exp(G_i): what is left at token i of the S that entered
  until: jax.Array  # [..., C, K] exp(G_C - G_i): what is left at the end of what token i wrote
  whole: jax.Array  # [..., K, 1] exp(G_C)
  ladder: _Ladder
  scores: jax.Array  # [..., C, C] decayed products of queries and keys, j <= i
  inverse: jax.Array | None  # [..., C, C] from writes without to writes with each other's answers


def _prepare(plan: Plan, q, k, z, g, e, kept=None) -> _Chunk:
  ladder, since, until = _climb(jnp.maximum(g, tiling.FORGET))
  reads = jnp.stack([q, e], -2)
  if kept is None:
    scores = _scores(plan, reads, k, ladder)
    inverse = tiling.unit_lower_inverse(jnp.tril(scores[..., 1, :], -1)) if q.shape[-2] > 1 else None
    kept = scores[..., 0, :], inverse
  whole = since[..., -1, :, None]
  return _Chunk(reads, k, z, since, until, whole, ladder, *kept)


def _climb(g: jax.Array) -> tuple[_Ladder, jax.Array, jax.Array]:
  """The ladder of log decays g [..., C, K], `since` and `until`."""
  C, K = g.shape[-2:]
  size, m = _cut(C)
  a = jnp.exp(_pieces(g, size, m))
  a = [a[..., i, :] for i in range(m)]
  leaf, since = [()], [a[0]]
  for i in range(1, m):
    leaf.append((*(a[i] * x for x in leaf[-1]), a[i]))
    since.append(a[i] * since[-1])
  until = jnp.stack([*leaf[-1], jnp.ones_like(a[0])], -2)
  since = jnp.stack(since, -2)
  rungs = []
  while m < size:
    since, until = (x.reshape(*x.shape[:-3], -1, 2, m, K) for x in (since, until))
    (left, right), (to_border, to_end) = ((x[..., 0, :, :], x[..., 1, :, :]) for x in (since, until))
    rungs.append((right, to_border))
    since = jnp.concatenate([left, left[..., -1:, :] * right], -2)
    until = jnp.concatenate([to_border * right[..., -1:, :], to_end], -2)
    m *= 2
  since, until = (x[..., 0, :C, :] for x in (since, until))
  return _Ladder(tuple(leaf), tuple(rungs)), since, until


def _scores(plan: Plan, reads: jax.Array, k: jax.Array, ladder: _Ladder) -> jax.Array:
  """sum_c reads_ic exp(G_ic - G_jc) k_jc [..., C, 2, C] for j <= i, else 0.

  Linear in reads and in k: `_scores_transposed` gives both gradients.
  """
  C, K = k.shape[-2:]
  size, m = _cut(C)
  reads, k = _pieces(reads, size, m, 2), _pieces(k, size, m)
  near = _near(k, ladder)
  X = plan.dot("...irk,...ijk->...irj", reads, near).reshape(*reads.shape[:-3], 2 * m, m)
  for since, until in ladder.rungs:
    right, left = _right(reads, m), _left(k, m)
    right = (right * since[..., :, None, :]).reshape(*right.shape[:-3], 2 * m, K)
    corner = plan.dot("...ik,...jk->...ij", right, left * until)
    X = X.reshape(*X.shape[:-3], -1, 2, 2 * m, m)
    upper = jnp.concatenate([X[..., 0, :, :], jnp.zeros_like(corner)], -1)
    X = jnp.concatenate([upper, jnp.concatenate([corner, X[..., 1, :, :]], -1)], -2)
    m *= 2
  return X.reshape(*X.shape[:-3], size, 2, size)[..., :C, :, :C]


def _near(k, ladder):
  m = k.shape[-2]
  rows = []
  for i in range(m):
    row = [d * k[..., j, :] for j, d in enumerate(ladder.leaf[i])] + [k[..., i, :]]
    rows += row + [jnp.zeros_like(row[0])] * (m - 1 - i)
  x = jnp.stack(rows, -2)
  return x.reshape(*x.shape[:-2], m, m, x.shape[-1])


def _scores_transposed(plan: Plan, M, reads, k, ladder: _Ladder) -> tuple[jax.Array, jax.Array]:
  """Gradients of reads [..., C, 2, K] and k [..., C, K] from the gradient M [..., C, 2, C] of the scores."""
  C, K = k.shape[-2:]
  size, m = _cut(C)
  M = jnp.stack([M[..., 0, :], jnp.tril(M[..., 1, :], -1)], -2)
  M = jnp.pad(M, [(0, 0)] * (M.ndim - 3) + [(0, size - C), (0, 0), (0, size - C)])
  reads, k = _pieces(reads, size, m, 2), _pieces(k, size, m)
  inside = jnp.stack([M[..., i : i + m, :, i : i + m] for i in range(0, size, m)], -4)  # [..., P, m, 2, m]
  dreads, dk = [], []
  for i in range(m):
    row = inside[..., i, :, :, None]
    terms = [row[..., j, :] * (d * k[..., j, :])[..., None, :] for j, d in enumerate(ladder.leaf[i])]
    dreads.append(sum(terms, row[..., i, :] * k[..., None, i, :]))
  for j in range(m):
    column = lambda i: sum(inside[..., i, r, j, None] * reads[..., i, r, :] for r in (0, 1))
    dk.append(sum((ladder.leaf[i][j] * column(i) for i in range(j + 1, m)), column(j)))
  dreads, dk = jnp.stack(dreads, -3), jnp.stack(dk, -2)
  for since, until in ladder.rungs:
    corner = [M[..., i + m : i + 2 * m, :, i : i + m] for i in range(0, size, 2 * m)]
    corner = jnp.stack(corner, -4)
    corner = corner.reshape(*corner.shape[:-3], 2 * m, m)
    right, left = _right(reads, m), _left(k, m)
    since = since[..., :, None, :]
    right = (right * since).reshape(*right.shape[:-3], 2 * m, K)
    dright = plan.dot("...ij,...jk->...ik", corner, left * until).reshape(*since.shape[:-2], 2, K) * since
    dleft = plan.dot("...ij,...ik->...jk", corner, right) * until
    dreads, dk = _whole(dreads, m), _whole(dk, m, 1)
    dreads = jnp.concatenate([dreads[..., :m, :, :], dreads[..., m:, :, :] + dright], -3)
    dk = jnp.concatenate([dk[..., :m, :] + dleft, dk[..., m:, :]], -2)
    m *= 2
  return dreads[..., 0, :C, :, :], dk[..., 0, :C, :]


def _right(reads, m):
  x = reads.reshape(*reads.shape[:-4], -1, 2, m, 2, reads.shape[-1])
  return x[..., 1, :, :, :]


def _left(k, m):
  x = k.reshape(*k.shape[:-3], -1, 2, m, k.shape[-1])
  return x[..., 0, :, :]


def _whole(x, m, trail=2):
  return x.reshape(*x.shape[: -trail - 2], -1, 2 * m, *x.shape[-trail:])


def _cut(C: int) -> tuple[int, int]:
  levels = (-(-C // LEAF) - 1).bit_length()
  m = -(-C // 2**levels)
  return m * 2**levels, m


def _pieces(x: jax.Array, size: int, m: int, trail: int = 1) -> jax.Array:
  """[..., C, K] -> [..., size / m, m, K], padded with zeros."""
  at = x.ndim - trail - 1
  x = jnp.pad(x, [(0, size - x.shape[at]) if i == at else (0, 0) for i in range(x.ndim)])
  return x.reshape(*x.shape[:at], size // m, m, *x.shape[at + 1 :])


def _solve(plan: Plan, c: _Chunk, X) -> jax.Array:
  return X if c.inverse is None else plan.dot("...ij,...jv->...iv", c.inverse, X)


def _after(plan: Plan, c: _Chunk, S, U) -> jax.Array:
  return c.whole * S + plan.dot("...ik,...iv->...kv", c.until * c.k, U)


def _rows(S, dS) -> jax.Array:
  """[..., K]: what the last G of a chunk owes to S as it leaves."""
  return dot("...kv,v->...k", S * dS, jnp.ones(S.shape[-1], S.dtype))


def _gradients(plan: Plan, c: _Chunk, S, U, dU, Y, dS_after, end):
  """The part of the backward pass that needs no other chunk: gradients of q, k, z, g, e."""
  C = c.k.shape[-2]
  M = plan.dot("...irv,...jv->...irj", Y, U)
  dreads, dk = _scores_transposed(plan, M, c.reads, c.k, c.ladder)
  dreads = dreads + c.since[..., :, None, :] * plan.dot("...irv,...kv->...irk", Y, S)
  dk = dk + c.until * plan.dot("...iv,...kv->...ik", U, dS_after)
  # G_i scales what token i reads and, inversely, what it writes: no sum over pairs of tokens.
  dG = c.reads[..., 0, :] * dreads[..., 0, :] + c.reads[..., 1, :] * dreads[..., 1, :] - c.k * dk
  dg = dot("...ik,ij->...jk", dG, jnp.tril(jnp.ones((C, C), dG.dtype))) + end[..., None, :]
  return dreads[..., 0, :], dk, dU, dg, dreads[..., 1, :]
