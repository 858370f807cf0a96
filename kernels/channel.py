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
    seen = plan.dot("...rik,...kv->...riv", c.since[..., None, :, :] * c.reads, S)
    U = _solve(plan, c, c.z - seen[..., 1, :, :])
    o = seen[..., 0, :, :] + plan.dot("...ij,...jv->...iv", c.scores[..., 0, :, :], U)
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
    e = c.reads[..., 1, :, :]
    U = _solve(plan, c, c.z - plan.dot("...ik,...kv->...iv", c.since * e, S))
    return _after(plan, c, S, U), (c.inverse, U, S)

  def retreat(carry, x):
    (dS_after, end), (x, (inverse, U, S), do) = carry, x
    c = x if plan.hoist else _prepare(plan, *x, inverse=inverse)
    dU = plan.dot("...ij,...iv->...jv", c.scores[..., 0, :, :], do)
    dU = dU + plan.dot("...ik,...kv->...iv", c.until * c.k, dS_after)
    if c.inverse is not None:
      dU = plan.dot("...ij,...iv->...jv", c.inverse, dU)  # now of what the system was solved for, so of z
    Y = jnp.stack([do, -dU], -3)  # gradient of what the reads gave
    reads = c.since[..., None, :, :] * c.reads
    dS = c.whole * dS_after + plan.dot("...rik,...riv->...kv", reads, Y)
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

  leaf: jax.Array  # [..., pieces, m, m, K] exp(G_i - G_j) inside a piece where i >= j, else 0
  rungs: tuple[tuple[jax.Array, jax.Array], ...]  # halves: the right from the border, the left to it


class _Chunk(NamedTuple):
  """What a chunk knows before it meets S. G_i is the sum of the log decays up to token i of the chunk."""

  reads: jax.Array  # [..., 2, C, K] the queries and the erase keys
  k: jax.Array  # [..., C, K]
  z: jax.Array  # [..., C, V]
  since: jax.Array  # [..., C, K] exp(G_i): what is left at token i of the S that entered
  until: jax.Array  # [..., C, K] exp(G_C - G_i): what is left at the end of what token i wrote
  whole: jax.Array  # [..., K, 1] exp(G_C)
  ladder: _Ladder
  scores: jax.Array  # [..., 2, C, C] decayed products of reads and keys; a token erases what was before it
  inverse: jax.Array | None  # [..., C, C] from writes without to writes with each other's answers


def _prepare(plan: Plan, q, k, z, g, e, inverse=None) -> _Chunk:
  ladder, since, until = _climb(jnp.maximum(g, tiling.FORGET))
  reads = jnp.stack([q, e], -3)
  scores = _scores(plan, reads, k, ladder)
  if q.shape[-2] > 1 and inverse is None:
    inverse = tiling.unit_lower_inverse(scores[..., 1, :, :])
  whole = since[..., -1, :, None]
  return _Chunk(reads, k, z, since, until, whole, ladder, scores, inverse)


def _climb(g: jax.Array) -> tuple[_Ladder, jax.Array, jax.Array]:
  """The ladder of log decays g [..., C, K], `since` and `until`."""
  C, K = g.shape[-2:]
  levels = (-(-C // LEAF) - 1).bit_length()
  m = -(-C // 2**levels)
  size = m * 2**levels
  g = _pieces(g, size, m)
  i, j, t = jnp.ogrid[:m, :m, :m]
  between = dot("ijt,...tk->...ijk", ((j < t) & (t <= i)).astype(g.dtype), g)
  # Masked before the exponential, as everywhere: above the diagonal there is nothing to see.
  leaf = jnp.exp(jnp.where((i >= j), between, -jnp.inf))
  since = between[..., :, 0, :] + g[..., :1, :]  # of a piece, as logs, until the top is reached
  until = between[..., -1, :, :]
  rungs = []
  while m < size:
    since, until = (x.reshape(*x.shape[:-3], -1, 2, m, K) for x in (since, until))
    (left, right), (to_border, to_end) = ((x[..., 0, :, :], x[..., 1, :, :]) for x in (since, until))
    rungs.append((jnp.exp(right), jnp.exp(to_border)))
    since = jnp.concatenate([left, left[..., -1:, :] + right], -2)
    until = jnp.concatenate([to_border + right[..., -1:, :], to_end], -2)
    m *= 2
  since, until = (jnp.exp(x[..., 0, :C, :]) for x in (since, until))
  return _Ladder(leaf, tuple(rungs)), since, until


def _scores(plan: Plan, reads: jax.Array, k: jax.Array, ladder: _Ladder) -> jax.Array:
  """sum_c reads_ic exp(G_ic - G_jc) k_jc [..., 2, C, C]: queries see j <= i, erase keys j < i.

  Linear in reads and in k: `_scores_transposed` gives both gradients.
  """
  C, K = k.shape[-2:]
  pieces, m = ladder.leaf.shape[-4], ladder.leaf.shape[-2]
  size = pieces * m
  reads, k = _pieces(reads, size, m), _pieces(k, size, m)
  X = jnp.sum(reads[..., :, None, :] * (ladder.leaf * k[..., None, :, :])[..., None, :, :, :, :], -1)
  for since, until in ladder.rungs:
    halves = [x.reshape(*x.shape[:-3], -1, 2, m, K) for x in (reads, k)]
    right, left = halves[0][..., 1, :, :], halves[1][..., 0, :, :]
    right, left = right * since[..., None, :, :, :], left * until
    corner = plan.dot("...rnik,...njk->...rnij", right, left)
    X = X.reshape(*X.shape[:-3], -1, 2, m, m)
    upper = jnp.concatenate([X[..., 0, :, :], jnp.zeros_like(corner)], -1)
    X = jnp.concatenate([upper, jnp.concatenate([corner, X[..., 1, :, :]], -1)], -2)
    m *= 2
    reads, k = (x.reshape(*x.shape[:-4], -1, m, K) for x in halves)
  X = X[..., 0, :C, :C]
  return jnp.stack([X[..., 0, :, :], jnp.tril(X[..., 1, :, :], -1)], -3)


def _scores_transposed(plan: Plan, M, reads, k, ladder: _Ladder) -> tuple[jax.Array, jax.Array]:
  """Gradients of reads [..., 2, C, K] and k [..., C, K] from the gradient M [..., 2, C, C] of the scores."""
  C, K = k.shape[-2:]
  pieces, m = ladder.leaf.shape[-4], ladder.leaf.shape[-2]
  size = pieces * m
  M = jnp.stack([M[..., 0, :, :], jnp.tril(M[..., 1, :, :], -1)], -3)
  M = jnp.pad(M, [(0, 0)] * (M.ndim - 2) + [(0, size - C)] * 2)
  reads, k = _pieces(reads, size, m), _pieces(k, size, m)
  inside = jnp.stack([M[..., i : i + m, i : i + m] for i in range(0, size, m)], -3)[..., None]
  leaf = ladder.leaf[..., None, :, :, :, :]
  dreads = jnp.sum(inside * (leaf * k[..., None, :, None, :, :]), -2)
  dk = jnp.sum(inside * leaf * reads[..., :, None, :], (-5, -3))
  for since, until in ladder.rungs:
    reads, dreads, k, dk = (x.reshape(*x.shape[:-3], -1, 2, m, K) for x in (reads, dreads, k, dk))
    since = since[..., None, :, :, :]
    corner = jnp.stack([M[..., i + m : i + 2 * m, i : i + m] for i in range(0, size, 2 * m)], -3)
    right = since * plan.dot("...rnij,...njk->...rnik", corner, k[..., 0, :, :] * until)
    left = until * plan.dot("...rnij,...rnik->...njk", corner, reads[..., 1, :, :] * since)
    dreads = dreads + jnp.stack([jnp.zeros_like(right), right], -3)
    dk = dk + jnp.stack([left, jnp.zeros_like(left)], -3)
    m *= 2
    reads, dreads, k, dk = (x.reshape(*x.shape[:-4], -1, m, K) for x in (reads, dreads, k, dk))
  return dreads[..., 0, :C, :], dk[..., 0, :C, :]


def _pieces(x: jax.Array, size: int, m: int) -> jax.Array:
  """[..., C, K] -> [..., size / m, m, K], padded with zeros."""
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)])
  return x.reshape(*x.shape[:-2], size // m, m, x.shape[-1])


def _solve(plan: Plan, c: _Chunk, X) -> jax.Array:
  return X if c.inverse is None else plan.dot("...ij,...jv->...iv", c.inverse, X)


def _after(plan: Plan, c: _Chunk, S, U) -> jax.Array:
  return c.whole * S + plan.dot("...ik,...iv->...kv", c.until * c.k, U)


def _rows(S, dS) -> jax.Array:
  """[..., K]: what the last G of a chunk owes to S as it leaves."""
  return jnp.sum(S * dS, -1)


def _gradients(plan: Plan, c: _Chunk, S, U, dU, Y, dS_after, end):
  """The part of the backward pass that needs no other chunk: gradients of q, k, z, g, e."""
  C = c.k.shape[-2]
  M = plan.dot("...riv,...jv->...rij", Y, U)
  dreads, dk = _scores_transposed(plan, M, c.reads, c.k, c.ladder)
  dreads = dreads + c.since[..., None, :, :] * plan.dot("...riv,...kv->...rik", Y, S)
  dk = dk + c.until * plan.dot("...iv,...kv->...ik", U, dS_after)
  # G_i scales what token i reads and, inversely, what it writes: no sum over pairs of tokens.
  dG = jnp.sum(c.reads * dreads, -3) - c.k * dk
  dg = dot("...ik,ij->...jk", dG, jnp.tril(jnp.ones((C, C), dG.dtype))) + end[..., None, :]
  return dreads[..., 0, :, :], dk, dU, dg, dreads[..., 1, :, :]
