"""Attention by blocks: online softmax in pure JAX, with a backward pass written by hand.

Scores exist for one block of queries and one of keys at a time, a tile. One loop goes over the tiles in which
some query sees some key: those above the diagonal and behind the reach are left out before anything is
traced. The loop carries, for each query, the largest score m so far, l = sum exp(score - m) and
o = sum exp(score - m) v; a tile with a larger score scales what came before by exp(m_old - m_new). At the
end o / l is the output. The way back keeps the output and log(l) + m of each query, from which a tile's
shares come again in one step:

    p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - sum(do o)),  dq = ds k,  dk = ds^T q

So memory grows with T and not with T^2. It runs everywhere, and the fused forms are tested against it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # finite: a row that sees nothing must not become NaN
BLOCK = 256  # longest block of queries and of keys; not measured against others yet


class Plan(NamedTuple):
  """What is decided before tracing.

  Attributes:
    queries, keys: tokens of a block.
    reach: newest keys that a query sees, its own included. None: all before it.
    least, most: between which the place of the first query among the keys lies.
  """

  queries: int
  keys: int
  reach: int | None
  least: int
  most: int

  def tiles(self, T: int, S: int) -> np.ndarray:
    """The tiles in which a query may see a key: [n, 2], block of queries and block of keys, in order.

    >>> Plan(2, 2, None, 0, 0).tiles(4, 4).tolist()
    [[0, 0], [1, 0], [1, 1]]
    >>> Plan(2, 2, 2, 0, 0).tiles(6, 6).tolist()  # the query at 4 sees the keys at 3 and 4
    [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    """
    i, j = np.arange(-(-T // self.queries))[:, None], np.arange(-(-S // self.keys))[None, :]
    newest = self.most + np.minimum((i + 1) * self.queries, T) - 1
    seen = j * self.keys <= newest
    if self.reach is not None:
      oldest = self.least + i * self.queries - (self.reach - 1)
      seen &= np.minimum((j + 1) * self.keys, S) - 1 >= oldest
    return np.argwhere(seen).astype(np.int32)


def blocked(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  offset: int | jax.Array,
  reach: int | None = None,
  valid: jax.Array | None = None,
  block: int = BLOCK,
) -> jax.Array:
  """Causal softmax attention; see `forms.attend`, whose arguments these are.

  Args:
    offset: place of the first query among the keys. A traced one leaves only those tiles out that no offset
      needs.
    valid: [B, S] bool: one row of numbers a sequence, wherever its pads are.
    block: longest block.

  Returns:
    [B, T, num_heads, head_dim] in q's dtype; exactly 0 where a query sees nothing, and so are its gradients.
  """
  T, S = q.shape[1], k.shape[1]
  least, most = (offset, offset) if isinstance(offset, int) else (0, S - T)
  plan = Plan(_length(T, block), _length(S, block), reach, least, most)
  return _attend(plan, q, k, v, valid, jnp.asarray(offset, jnp.int32))


def _length(tokens: int, block: int) -> int:
  """Tokens of a block: as few blocks as may be, of equal length, so that little is padded."""
  return -(-tokens // -(-tokens // block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, valid, offset):
  return _forward(plan, q, k, v, valid, offset)[0]


def _keep(plan, q, k, v, valid, offset):
  out, lse = _forward(plan, q, k, v, valid, offset)
  return out, (q, k, v, valid, offset, out, lse)


def _pull(plan, kept, do):
  q, k, v, valid, offset, out, lse = kept
  return *_backward(plan, q, k, v, valid, offset, out, lse, do), None, None


_attend.defvjp(_keep, _pull)


class _Blocks(NamedTuple):
  """Operands cut into blocks. K: heads of keys, G: queries' heads for each of them, d: width."""

  plan: Plan
  q: jax.Array  # [n, B, K, G, queries, d]
  k: jax.Array  # [m, B, K, keys, d]
  v: jax.Array
  valid: jax.Array | None  # [m, B, keys]
  offset: jax.Array

  def scores(self, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores of a tile [B, K, G, queries, keys], and which of them count (broadcast)."""
    q, k = _at(self.q, i), _at(self.k, j)
    s = _product("bkgtd,bksd->bkgts", q, k) * q.shape[-1] ** -0.5
    queries_at = self.offset + i * self.plan.queries + jnp.arange(self.plan.queries)
    distance = queries_at[:, None] - (j * self.plan.keys + jnp.arange(self.plan.keys))
    seen = distance >= 0
    if self.plan.reach is not None:
      seen &= distance < self.plan.reach
    if self.valid is not None:
      seen = seen & _at(self.valid, j)[:, None, None, None, :]
    return jnp.where(seen, s, MASKED), seen


def _cut(plan: Plan, q, k, v, valid, offset) -> _Blocks:
  q, (k, v) = _queries(plan, q, k.shape[2]), (_split(x, plan.keys) for x in (k, v))
  if valid is not None:
    valid = jnp.pad(valid, ((0, 0), (0, -valid.shape[1] % plan.keys)))
    valid = jnp.moveaxis(valid.reshape(valid.shape[0], -1, plan.keys), 1, 0)
  return _Blocks(plan, q, k, v, valid, offset)


def _queries(plan: Plan, x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, num_heads, d] -> [n, B, K, G, queries, d]."""
  x = _split(x, plan.queries)
  return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _split(x: jax.Array, block: int) -> jax.Array:
  """[B, T, H, d] -> [n, B, H, block, d], padded with zeros at the end."""
  B, T, H, d = x.shape
  x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, 0)))
  return jnp.moveaxis(x.reshape(B, -1, block, H, d), (1, 3), (0, 2))


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
  """[n, B, ..., block, d] -> [B, T, H, d], in the shape and dtype of `like`."""
  B, T, H, d = like.shape
  x = jnp.moveaxis(x.reshape(x.shape[0], B, H, -1, d), (0, 2), (1, 3))
  return x.reshape(B, -1, H, d)[:, :T].astype(like.dtype)


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """A product of operands in their dtype, added up in float32 (float64 of float64)."""
  return jnp.einsum(spec, x, y, preferred_element_type=_wide(x.dtype))


def _wide(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)


def _forward(plan: Plan, q, k, v, valid, offset) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, num_heads, d], and log sum exp of each query's scores, [n, B, K, G, queries]."""
  x = _cut(plan, q, k, v, valid, offset)

  def step(carry, tile):
    o, m, l = carry
    i, j = tile
    s, seen = x.scores(i, j)
    m_old = _at(m, i)
    m_new = jnp.maximum(m_old, jnp.max(s, axis=-1))
    p = jnp.where(seen, jnp.exp(s - m_new[..., None]), 0)
    fade = jnp.exp(m_old - m_new)
    l_new = fade * _at(l, i) + jnp.sum(p, axis=-1)
    o_new = fade[..., None] * _at(o, i) + _product("bkgts,bksd->bkgtd", p.astype(v.dtype), _at(x.v, j))
    return (_put(o, o_new, i), _put(m, m_new, i), _put(l, l_new, i)), None

  wide, rows = _wide(q.dtype), x.q.shape[:-1]
  start = jnp.zeros(x.q.shape, wide), jnp.full(rows, MASKED, wide), jnp.zeros(rows, wide)
  (o, m, l), _ = jax.lax.scan(step, start, tuple(plan.tiles(q.shape[1], k.shape[1]).T))
  l = jnp.where(l > 0, l, 1)  # 0: the query sees nothing
  return _join(o / l[..., None], q), m + jnp.log(l)


def _backward(plan: Plan, q, k, v, valid, offset, out, lse, do) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of q, k and v."""
  x, kv_heads = _cut(plan, q, k, v, valid, offset), k.shape[2]
  wide, scale = _wide(q.dtype), q.shape[-1] ** -0.5
  own = jnp.sum(do.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
  do, own = _queries(plan, do, kv_heads), _queries(plan, own, kv_heads)

  def step(carry, tile):
    dq, dk, dv = carry
    i, j = tile
    s, seen = x.scores(i, j)
    p = jnp.where(seen, jnp.exp(s - _at(lse, i)[..., None]), 0)
    do_i, q_i = _at(do, i), _at(x.q, i)
    dp = _product("bkgtd,bksd->bkgts", do_i, _at(x.v, j))
    ds = (p * (dp - _at(own, i)) * scale).astype(q.dtype)
    dv_j = _at(dv, j) + _product("bkgts,bkgtd->bksd", p.astype(do.dtype), do_i)
    dq_i = _at(dq, i) + _product("bkgts,bksd->bkgtd", ds, _at(x.k, j))
    dk_j = _at(dk, j) + _product("bkgts,bkgtd->bksd", ds, q_i)
    return (_put(dq, dq_i, i), _put(dk, dk_j, j), _put(dv, dv_j, j)), None

  start = tuple(jnp.zeros(y.shape, wide) for y in (x.q, x.k, x.v))
  (dq, dk, dv), _ = jax.lax.scan(step, start, tuple(plan.tiles(q.shape[1], k.shape[1]).T))
  return _join(dq, q), _join(dk, k), _join(dv, v)
