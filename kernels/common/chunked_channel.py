"""The chunked form of the rules with a decay per key channel, forward and backward.

Both delta rules of this kind (KDA, Gated DeltaNet-2) are one recurrence over an erase key e and a write z:

    S <- exp(g) S;  S <- S + k (z - S^T e)^T;  o = S^T q                     g, e [B, T, H, K], z [B, T, H, V]

exp(G_i - G_j) no longer factors out of the products of reads and keys, and exp(-G_j) overflows. So a chunk is
halved again and again. Tokens of the right half read from the left half through the border between them:
exp(from the border to i) q_i times exp(from j to the border) k_j. Both factors are at most 1, and each is the
product of the decays in between and of no others. Nothing overflows, nothing is divided, and a factor is 0
only if the result is. Pairs inside the last pieces, of at most LEAF tokens, are taken one by one.

In shape comments `...` stands for [B, H], or [n, B, H] where all chunks are prepared at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax.kernels.common import tiling
from sleep_jax.kernels.common.tiling import Plan, dot

LEAF = 6  # tokens whose pairs are taken one by one: each pair is code to compile
MAX_CHUNK = {"cpu": 32, "gpu": 64, "tpu": 64}  # kernels/README.md has what others cost; GPU: not measured


def make_plan(q: jax.Array, v: jax.Array, S: jax.Array) -> Plan:
  """The default plan for shapes q [B, T, H, K] and v [B, T, H, V] on the platform the program is for."""
  return tiling.make_plan(q, v, S, solve=True, extra=(LEAF + 4) * q.shape[-1], max_chunk=MAX_CHUNK)


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
  return _chunked(plan, q, k, z, g, e, S)


@tiling.blocked
def _forward(plan: Plan, q, k, z, g, e, S):
  T = z.shape[1]
  n, C = plan.chunks(T)
  tokens = [tiling.split(x, n, C, S.dtype) for x in (q, k, z, g, e)]
  chunks, prepared = tiling.prepared(plan, _prepare, tokens)

  def forward_chunk(S_in, x):
    c = prepared(x)
    answers = plan.dot("...irk,...kv->...irv", c.decay_in[..., :, None, :] * c.reads, S_in)
    U = _solve(plan, c, c.z - answers[..., 1, :])
    o = answers[..., 0, :] + plan.dot("...ij,...jv->...iv", c.scores, U)
    return _S_out(plan, c, S_in, U), o

  S_out, o = tiling.scan(forward_chunk, S, chunks)
  return tiling.join(o, T), S_out


@tiling.blocked
def _backward(plan: Plan, q, k, z, g, e, S, do, dS):
  T = z.shape[1]
  n, C = plan.chunks(T)
  tokens = [tiling.split(x, n, C, S.dtype) for x in (q, k, z, g, e)]
  chunks, prepared = tiling.prepared(plan, _prepare, tokens)

  def recompute(S_in, x):  # the forward pass once more, for the writes and the S before each chunk
    c = prepared(x)
    e = c.reads[..., 1, :]
    U = _solve(plan, c, c.z - plan.dot("...ik,...kv->...iv", c.decay_in * e, S_in))
    return _S_out(plan, c, S_in, U), (None if plan.hoist else (c.scores, c.inverse), U, S_in)

  def backward_chunk(carry, x):
    (dS_out, inner_out), (x, (products, U, S_in), do) = carry, x
    c = prepared(x, products=products)
    dU = plan.dot("...ij,...iv->...jv", c.scores, do)
    dU = dU + plan.dot("...ik,...kv->...iv", c.decay_out * c.k, dS_out)
    if c.inverse is not None:
      dU = plan.dot("...ij,...iv->...jv", c.inverse, dU)  # now of the right-hand side, so of z
    Y = jnp.stack([do, -dU], -2)  # gradient of the answers to the reads
    reads = c.decay_in[..., :, None, :] * c.reads
    dS_in = c.decay_all * dS_out + plan.dot("...irk,...irv->...kv", reads, Y)
    terms = (S_in, U, dU, Y, dS_out, inner_out)
    return (dS_in, tiling.inner(S_in, dS_in)), terms if plan.hoist else _gradients(plan, c, *terms)

  S_out, kept = tiling.scan(recompute, S, chunks)
  steps = (chunks, kept, tiling.split(do, n, C, S.dtype))
  (dS, _), grads = tiling.scan(backward_chunk, (dS, tiling.inner(S_out, dS)), steps, reverse=True)
  if plan.hoist:
    grads = _gradients(plan, chunks, *grads)
  return *(tiling.join(d, T).astype(x.dtype) for d, x in zip(grads, (q, k, z, g, e), strict=True)), dS


_chunked = tiling.with_gradient(_forward, _backward)


class _Ladder(NamedTuple):
  """The decays between the tokens of a chunk, as factors of at most 1."""

  leaf: tuple[tuple[jax.Array, ...], ...]  # [i][j], j < i: [..., pieces, K] from token j of a piece to i
  rungs: tuple[tuple[jax.Array, jax.Array], ...]  # halves: the right from the border, the left to it


class _Chunk(NamedTuple):
  """What a chunk knows before it meets S. G_i is the sum of the log decays up to token i of the chunk."""

  reads: jax.Array  # [..., C, 2, K] the query and the erase key of each token
  k: jax.Array  # [..., C, K]
  z: jax.Array  # [..., C, V]
  decay_in: jax.Array  # [..., C, K] exp(G_i): from the start of the chunk to token i
  decay_out: jax.Array  # [..., C, K] exp(G_C - G_i): from token i to the end of the chunk
  decay_all: jax.Array  # [..., K, 1] exp(G_C): from the start to the end
  ladder: _Ladder
  scores: jax.Array  # [..., C, C] decayed products of queries and keys, j <= i
  inverse: jax.Array | None  # [..., C, C] from writes without to writes with each other's answers


def _prepare(plan: Plan, q, k, z, g, e, products: tuple[jax.Array, jax.Array | None] | None = None) -> _Chunk:
  """`products`: scores and inverse, if an earlier loop made them."""
  ladder, decay_in, decay_out = _climb(jnp.maximum(g, tiling.FORGET))
  reads = jnp.stack([q, e], -2)
  if products is None:
    both = _scores(plan, reads, k, ladder)
    inverse = tiling.unit_lower_inverse(jnp.tril(both[..., 1, :], -1)) if q.shape[-2] > 1 else None
    products = both[..., 0, :], inverse
  return _Chunk(reads, k, z, decay_in, decay_out, decay_in[..., -1, :, None], ladder, *products)


def _climb(g: jax.Array) -> tuple[_Ladder, jax.Array, jax.Array]:
  """The ladder of log decays g [..., C, K], and `decay_in` and `decay_out`: one exponential for each g."""
  C = g.shape[-2]
  size, m = _piece_sizes(C)
  decay = jnp.moveaxis(jnp.exp(_pieces(g, size, m)), -2, 0)
  leaf: list[tuple[jax.Array, ...]] = [()]
  from_start = [decay[0]]
  for i in range(1, m):
    leaf.append((*(decay[i] * x for x in leaf[-1]), decay[i]))
    from_start.append(decay[i] * from_start[-1])
  decay_in = jnp.stack(from_start, -2)
  decay_out = jnp.stack([*leaf[-1], jnp.ones_like(decay[0])], -2)
  rungs = []
  while m < size:
    (left, from_border), (to_border, right) = _halves(decay_in, m), _halves(decay_out, m)
    rungs.append((from_border, to_border))
    decay_in = jnp.concatenate([left, left[..., -1:, :] * from_border], -2)
    decay_out = jnp.concatenate([to_border * from_border[..., -1:, :], right], -2)
    m *= 2
  return _Ladder(tuple(leaf), tuple(rungs)), decay_in[..., 0, :C, :], decay_out[..., 0, :C, :]


def _scores(plan: Plan, reads: jax.Array, k: jax.Array, ladder: _Ladder) -> jax.Array:
  """sum_c reads_ic exp(G_ic - G_jc) k_jc [..., C, 2, C] where j <= i, else 0.

  Linear in reads and in k: `_scores_transposed` gives both gradients.
  """
  C = k.shape[-2]
  size, m = _piece_sizes(C)
  reads, k = _pieces(reads, size, m, 2), _pieces(k, size, m)
  decayed = []  # the keys of a piece, decayed up to each of its tokens
  for i, decays in enumerate(ladder.leaf):
    keys = [d * k[..., j, :] for j, d in enumerate(decays)] + [k[..., i, :]]
    decayed.append(jnp.stack(keys + [jnp.zeros_like(k[..., 0, :])] * (m - 1 - i), -2))
  X = _rows(plan.dot("...irk,...ijk->...irj", reads, jnp.stack(decayed, -3)))
  for from_border, to_border in ladder.rungs:
    right, left = _halves(reads, m, 2)[1], _halves(k, m)[0]
    corner = plan.dot("...ik,...jk->...ij", _rows(right * from_border[..., None, :]), left * to_border)
    above, below = _halves(X, 2 * m)
    X = jnp.concatenate([above, jnp.zeros_like(corner)], -1)
    X = jnp.concatenate([X, jnp.concatenate([corner, below], -1)], -2)
    m *= 2
  return X.reshape(*X.shape[:-3], size, 2, size)[..., :C, :, :C]


def _scores_transposed(plan: Plan, M, reads, k, ladder: _Ladder) -> tuple[jax.Array, jax.Array]:
  """Gradients of reads [..., C, 2, K] and k [..., C, K] from the gradient M [..., C, 2, C] of the scores."""
  C = k.shape[-2]
  size, m = _piece_sizes(C)
  M = jnp.stack([M[..., 0, :], jnp.tril(M[..., 1, :], -1)], -2)
  M = jnp.pad(M, [(0, 0)] * (M.ndim - 3) + [(0, size - C), (0, 0), (0, size - C)])
  reads, k = _pieces(reads, size, m, 2), _pieces(k, size, m)
  inside = jnp.stack([M[..., i : i + m, :, i : i + m] for i in range(0, size, m)], -4)[..., None]
  # Sums of a few terms, written out: as reductions they took half of the whole gradient's time on a CPU.
  dreads, dk = [], []
  for i, decays in enumerate(ladder.leaf):
    keys = [d * k[..., j, :] for j, d in enumerate(decays)] + [k[..., i, :]]
    dreads.append(sum(inside[..., i, :, j, :] * x[..., None, :] for j, x in enumerate(keys)))
  for j in range(m):
    written = [sum(inside[..., i, r, j, :] * reads[..., i, r, :] for r in (0, 1)) for i in range(j, m)]
    dk.append(sum((ladder.leaf[j + i][j] * x for i, x in enumerate(written) if i), written[0]))
  dreads, dk = jnp.stack(dreads, -3), jnp.stack(dk, -2)
  for from_border, to_border in ladder.rungs:
    corner = jnp.stack([M[..., i + m : i + 2 * m, :, i : i + m] for i in range(0, size, 2 * m)], -4)
    corner, from_border = _rows(corner), from_border[..., None, :]
    right, left = _halves(reads, m, 2)[1], _halves(k, m)[0]
    dright = plan.dot("...ij,...jk->...ik", corner, left * to_border).reshape(right.shape) * from_border
    dleft = plan.dot("...ij,...ik->...jk", corner, _rows(right * from_border)) * to_border
    (reads_left, reads_right), (k_left, k_right) = _halves(dreads, m, 2), _halves(dk, m)
    dreads = jnp.concatenate([reads_left, reads_right + dright], -3)
    dk = jnp.concatenate([k_left + dleft, k_right], -2)
    m *= 2
  return dreads[..., 0, :C, :, :], dk[..., 0, :C, :]


def _piece_sizes(C: int) -> tuple[int, int]:
  """Tokens of a chunk, filled up to whole pieces (a power of two of them), and tokens of a piece."""
  levels = (-(-C // LEAF) - 1).bit_length()
  m = -(-C // 2**levels)
  return m * 2**levels, m


def _pieces(x: jax.Array, size: int, m: int, rest: int = 1) -> jax.Array:
  """[..., C, *rest] -> [..., size / m, m, *rest], padded with zeros; `rest` counts dimensions."""
  at = x.ndim - rest - 1
  x = jnp.pad(x, [(0, size - n if i == at else 0) for i, n in enumerate(x.shape)])
  return x.reshape(*x.shape[:at], size // m, m, *x.shape[at + 1 :])


def _halves(x: jax.Array, m: int, rest: int = 1) -> tuple[jax.Array, jax.Array]:
  """[..., pieces, tokens, *rest] -> left and right halves of pieces of 2 m tokens, [..., n, m, *rest]."""
  at = x.ndim - rest - 2
  x = x.reshape(*x.shape[:at], -1, 2, m, *x.shape[at + 2 :])
  left, right = (jax.lax.index_in_dim(x, side, at + 1, keepdims=False) for side in (0, 1))
  return left, right


def _rows(x: jax.Array) -> jax.Array:
  """[..., C, 2, K] -> [..., 2 C, K]."""
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _solve(plan: Plan, c: _Chunk, X) -> jax.Array:
  return X if c.inverse is None else plan.dot("...ij,...jv->...iv", c.inverse, X)


def _S_out(plan: Plan, c: _Chunk, S_in, U) -> jax.Array:
  return c.decay_all * S_in + plan.dot("...ik,...iv->...kv", c.decay_out * c.k, U)


def _gradients(plan: Plan, c: _Chunk, S_in, U, dU, Y, dS_out, inner_out):
  """The part of the backward pass that needs no other chunk: gradients of q, k, z, g, e.

  inner_out [..., K] holds the row sums of S * dS at the end of the chunk.
  """
  C = c.k.shape[-2]
  M = plan.dot("...irv,...jv->...irj", Y, U)
  dreads, dk = _scores_transposed(plan, M, c.reads, c.k, c.ladder)
  dreads = dreads + c.decay_in[..., :, None, :] * plan.dot("...irv,...kv->...irk", Y, S_in)
  dk = dk + c.decay_out * plan.dot("...iv,...kv->...ik", U, dS_out)
  # G_i scales what token i reads and, inversely, what it writes: no sum over pairs of tokens.
  dG = c.reads[..., 0, :] * dreads[..., 0, :] + c.reads[..., 1, :] * dreads[..., 1, :] - c.k * dk
  dg = dot("...ik,ij->...jk", dG, jnp.tril(jnp.ones((C, C), dG.dtype))) + inner_out[..., None, :]
  return dreads[..., 0, :], dk, dU, dg, dreads[..., 1, :]
