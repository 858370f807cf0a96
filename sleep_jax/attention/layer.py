"""The attention mixer: projections and rotary angles, the cache of an open window, what eviction keeps."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import layers, params, products, sharding
from sleep_jax.attention.blocked import MASKED
from sleep_jax.attention.forms import allowed, attend
from sleep_jax.config import ModelConfig
from sleep_jax.kernels.common import pads


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens in the window, for decoding awake.

  Under sliding eviction the rows before the window's own are the tokens that were kept, oldest first.

  Attributes:
    k, v: [B, L, num_kv_heads, head_dim], under sliding eviction [B, 2 L - 1, ...], or with more rows where
      there is room behind the window; keys after RoPE; rows from `length` on are not set yet.
    valid: [B, L] (or as many as there are rows) bool, False for pads and for rows that are not set yet.
    length: int32 scalar, tokens in the cache.
  """

  k: jax.Array
  v: jax.Array
  valid: jax.Array
  length: jax.Array


@flax.struct.dataclass
class Kept:
  """What sliding eviction leaves to the next window: the newest L - 1 tokens, oldest first.

  Attributes:
    k, v: [B, L - 1, num_kv_heads, head_dim], in the activation dtype. Keys *before* RoPE: positions are
      counted from the oldest token kept, so that they never grow with what was read.
    valid: [B, L - 1] bool, False for pads and before the sequence began.
  """

  k: jax.Array
  v: jax.Array
  valid: jax.Array


def declare(cfg: ModelConfig) -> dict[str, params.Weight]:
  """The weights of one attention mixer."""
  d, hd, heads, kv_heads = cfg.embed_dim, cfg.head_dim, cfg.attention.num_heads, cfg.num_kv_heads
  latent, shared, value = cfg.attention.latent_dim, cfg.attention.shared_dim, cfg.value_dim
  into = ("w_embed", "heads", "head_dim")
  queries = hd * (2 if cfg.attention.gate else 1)  # each head's gate behind its query
  weights = {
    "q": params.matrix(d, heads, queries, axes=into),
    "o": params.matrix(heads, value, d, axes=("heads", "head_dim", "w_embed"), num_in=2),
  }
  if latent is None:
    weights |= {name: params.matrix(d, kv_heads, hd, axes=into) for name in "kv"}
  else:  # to the latent and the channels of keys that all heads share; from the latent to keys and values
    weights |= {
      "kv_down": params.matrix(d, latent + shared, axes=("w_embed", None)),
      "latent_norm": params.scale(latent, zero=cfg.norm_zero_centered),
      "kv_up": params.matrix(latent, heads, hd - shared + value, axes=(None, "heads", "head_dim")),
    }
  if cfg.attention.qk_norm:
    for name, count in (("q", heads), ("k", kv_heads)):
      zero, axes = cfg.norm_zero_centered, ("heads", "head_dim")
      every = params.scale(count, hd, axes=axes, zero=zero)
      weights[f"{name}_norm"] = every if cfg.attention.qk_norm_over == "all" else params.scale(hd, zero=zero)
  if cfg.attention.bias:
    for name, count, width in (("q", heads, queries), ("k", kv_heads, hd), ("v", kv_heads, hd)):
      weights[f"{name}_bias"] = params.bias(count, width, axes=("heads", "head_dim"))
  if cfg.attention.out_bias:
    weights["o_bias"] = params.bias(d, axes=(None,))
  return weights


def init_cache(
  cfg: ModelConfig,
  batch: int,
  kept: Kept | None = None,
  *,
  rotated: bool = True,
  room: int = 0,
  pads: jax.Array | None = None,
) -> KVCache:
  """The cache of a window of which nothing is read yet; behind what was kept, under sliding eviction.

  Args:
    rotated: as for `read_window`.
    room: rows for tokens behind the window, which are read while it is slept on (`sleep.spread`).
    pads: [B] int32, how many pads stand in front of the window's tokens. What was kept lies over their
      places, next to the first token. None: none.
  """
  before = cfg.window - 1 if cfg.eviction == "sliding" else 0
  k, valid = _zeros(cfg, batch, before + cfg.window + room)
  cache = KVCache(k=k, v=k, valid=valid, length=jnp.asarray(before, jnp.int32))
  if kept is None:
    return cache
  at = np.arange(before)
  if pads is None:
    k = _rotate(kept.k, at, cfg) if rotated else kept.k
    return _append(dataclasses.replace(cache, length=jnp.zeros((), jnp.int32)), k, kept.v, kept.valid)
  k = _rotate(kept.k, at + pads[:, None], cfg) if rotated else kept.k
  there = np.arange(cache.k.shape[1]) - pads[:, None]  # the row of `kept` that goes to each place
  inside, there = (there >= 0) & (there < before), jnp.clip(there, 0, before - 1)
  k, v = (jnp.take_along_axis(x, there[..., None, None], axis=1) for x in (k, kept.v))
  valid = inside & jnp.take_along_axis(kept.valid, there, axis=1)
  return dataclasses.replace(cache, k=k.astype(cache.k.dtype), v=v.astype(cache.v.dtype), valid=valid)


def init_kept(cfg: ModelConfig, batch: int) -> Kept:
  """What is kept before the first window: nothing."""
  k, valid = _zeros(cfg, batch, cfg.window - 1)
  return Kept(k=k, v=k, valid=valid)


def _zeros(cfg: ModelConfig, batch: int, rows: int) -> tuple[jax.Array, jax.Array]:
  """Keys (or values) [B, rows, num_kv_heads, head_dim] and the validity of rows that are not set."""
  axes = ("batch", "seq", "heads", "head_dim")
  shape = (batch, rows, cfg.num_kv_heads, cfg.head_dim)
  return (
    sharding.constrain(jnp.zeros(shape, cfg.dtype), axes),
    sharding.constrain(jnp.zeros(shape[:2], bool), axes[:2]),
  )


def read_window(
  weights: dict[str, jax.Array],
  x: jax.Array,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  reach: int | None = None,
  rotated: bool = True,
) -> jax.Array:
  """Causal softmax attention inside one window: o_t = V_t^T softmax(K_t q_t / sqrt(d)).

  Args:
    weights: as declared.
    x: the whole window, [B, T, D].
    valid: [B, T] bool, False for pads, which nobody attends to. None: all valid.
    reach: keys that a query sees, its own included (`swa`). None: all that came before.
    rotated: whether queries and keys are turned by their places (RoPE); `nope` blocks know no places.

  Returns:
    [B, T, D] in x's dtype.
  """
  q, k, v, gate = _project(weights, layers.without_pads(x, valid), cfg)
  at = np.arange(x.shape[1])
  if rotated:
    q, k = _rotate(q, at, cfg), _rotate(k, at, cfg)
  out = attend(q, k, v, reach=reach, valid=valid, implementation=cfg.attention.implementation)
  return _out(weights, out, gate, cfg)


def read_behind(
  weights: dict[str, jax.Array],
  x: jax.Array,
  kept: Kept,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  reach: int | None = None,
  rotated: bool = True,
) -> tuple[jax.Array, Kept]:
  """`read_window` under sliding eviction: a token sees the newest L keys, whichever window they are of.

  Args:
    kept: what the windows before left.
    reach: as for `read_window`; at most L in any case.
    rotated: as for `read_window`.

  Returns:
    [B, T, D] in x's dtype, and what is kept after the window. Pads in front of the tokens do not part them
    from what was kept: they count neither as places nor as keys.
  """
  batch, length, _ = x.shape
  q, k, v, gate = _project(weights, layers.without_pads(x, valid), cfg)
  order = None if valid is None else _pads_first(pads.in_front(valid), cfg.window - 1, length)
  if valid is None:
    valid = sharding.constrain(jnp.ones((batch, length), bool), ("batch", "seq"))
  rows = [jnp.concatenate(both, axis=1) for both in ((kept.k, k), (kept.v, v), (kept.valid, valid))]
  k, v, seen = rows if order is None else [_reordered(x, *order) for x in rows]
  kept = Kept(k=k[:, length:], v=v[:, length:], valid=seen[:, length:])
  at, keys_at = cfg.window - 1 + np.arange(length), np.arange(k.shape[1])
  if rotated:
    q, k = _rotate(q, at, cfg), _rotate(k, keys_at, cfg)
  reach = min(reach or cfg.window, cfg.window)
  out = attend(q, k, v, reach=reach, valid=seen, implementation=cfg.attention.implementation)
  return _out(weights, out, gate, cfg), kept


def _pads_first(count: jax.Array, kept: int, length: int) -> tuple[jax.Array, jax.Array]:
  """How rows of keys, kept ones and then a window's, are put with the window's first pads in front of all.

  Args:
    count: of those pads, [B] int32.
    kept, length: rows that were kept, and of the window.

  Returns:
    The row that goes to each place, and the place that each row goes to: [B, kept + length] int32.
  """
  at, count = jnp.arange(kept + length), count[:, None]
  moved = at < kept + count
  return (
    jnp.where(moved, jnp.where(at < count, at + kept, at - count), at),
    jnp.where(moved, jnp.where(at < kept, at + count, at - kept), at),
  )


@jax.custom_vjp
def _reordered(x: jax.Array, rows: jax.Array, places: jax.Array) -> jax.Array:
  """x [B, S, ...] with row rows[b, s] at s. Its gradient takes rows too, where that of a gather adds."""
  del places
  return jnp.take_along_axis(x, jnp.expand_dims(rows, tuple(range(2, x.ndim))), axis=1)


def _reordered_fwd(
  x: jax.Array, rows: jax.Array, places: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _reordered(x, rows, places), (places, rows)


def _reordered_bwd(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, None, None]:
  return _reordered(g, *kept), None, None


_reordered.defvjp(_reordered_fwd, _reordered_bwd)


def decode(
  weights: dict[str, jax.Array],
  x: jax.Array,
  cache: KVCache,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  reach: int | None = None,
  rotated: bool = True,
) -> tuple[jax.Array, KVCache]:
  """`read_window`, or under sliding eviction `read_behind`, for the next tokens of a window that is open.

  Args:
    x: [B, T, D]; the cache must have room for T more tokens.
    cache: tokens that came before, of the same window or kept.

  Returns:
    [B, T, D] in x's dtype, and the cache with the T tokens appended.
  """
  batch, length, _ = x.shape
  q, k, v, gate = _project(weights, layers.without_pads(x, valid), cfg, apart=True)
  at = cache.length + jnp.arange(length)
  if rotated:
    q, k = _rotate(q, at, cfg), _rotate(k, at, cfg)
  valid = jnp.ones((batch, length), bool) if valid is None else valid
  before, cache = cache, _append(cache, k, v, valid)
  if cfg.eviction == "sliding":
    reach = min(reach or cfg.window, cfg.window)
  if length == 1 and jax.sharding.get_abstract_mesh().empty:
    rows = jnp.arange(cache.k.shape[1])
    seen = allowed(at, rows, reach, cache.valid) & (rows != before.length)
    out = attend_one(q, before, k, v, seen, valid)
  else:
    out = attend(
      q,
      cache.k,
      cache.v,
      offset=before.length,
      reach=reach,
      valid=cache.valid,
      implementation=cfg.attention.implementation,
    )
  return _out(weights, out, gate, cfg, apart=True), cache


def attend_one(
  q: jax.Array, cache: KVCache, k: jax.Array, v: jax.Array, seen: jax.Array, valid: jax.Array
) -> jax.Array:
  """`attend` of one token to a cache and to itself, which reads the cache where it lies.

  As products of each head its keys and values would be put in another order first, copied whole for every
  token. Here a query is as wide as the keys of all heads, zero but at its own: num_kv_heads times the
  products, no copy.

  Args:
    q: [B, 1, num_heads, head_dim].
    cache: of the tokens before.
    k, v: its own, [B, 1, num_kv_heads, head_dim].
    seen: [B, 1, 1, rows of the cache] bool.
    valid: [B, 1] bool, False for a pad, which does not see itself.

  Returns:
    [B, 1, num_heads, head_dim] in q's dtype.
  """
  batch, _, heads, width = q.shape
  kv_heads = k.shape[2]
  own = jnp.arange(heads)[:, None] // (heads // kv_heads) == jnp.arange(kv_heads)  # [heads, kv_heads]
  wide = jnp.where(own[None, :, :, None], q[:, 0, :, None], 0).reshape(batch, heads, -1)
  flat = [x.reshape(batch, x.shape[1], -1) for x in (cache.k, k, cache.v, v)]

  def scores(keys, seen):
    found = jnp.einsum("bhc,bsc->bhs", wide, keys, preferred_element_type=jnp.float32) * width**-0.5
    return jnp.where(seen, found, MASKED)

  both = jnp.concatenate([scores(flat[0], seen[:, 0]), scores(flat[1], valid[:, None])], axis=-1)
  shares = jax.nn.softmax(both, axis=-1).astype(q.dtype)
  out = jnp.einsum("bhs,bsc->bhc", shares[..., :-1], flat[2]) + shares[..., -1:] * flat[3]
  out = out.reshape(batch, heads, kv_heads, width)
  return jnp.sum(jnp.where(own[None, :, :, None], out, 0), axis=2)[:, None]


def _project(
  weights: dict[str, jax.Array], x: jax.Array, cfg: ModelConfig, *, apart: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """Queries [B, T, num_heads, head_dim], keys and values [B, T, num_kv_heads, head_dim], before RoPE; and the
  gate on what the heads give, like queries, before its sigmoid.

  Args:
    apart: as for `products.dense_each`.
  """
  axes, rounded = ("batch", "seq", "heads", "head_dim"), None if apart else cfg.rounded
  q = products.dense(x, weights["q"], axes, rounded=rounded)
  if cfg.attention.latent_dim is not None:
    return q, *_from_latent(weights, x, cfg, rounded), None
  k, v = products.dense_each(x, [weights[name] for name in "kv"], axes, apart=apart, rounded=rounded)
  if cfg.attention.bias:
    q, k, v = (y + weights[f"{name}_bias"].astype(y.dtype) for name, y in (("q", q), ("k", k), ("v", v)))
  gate = None
  if cfg.attention.gate:
    q, gate = jnp.split(q, 2, axis=-1)
  if cfg.attention.qk_norm:
    q, k = layers.norm(q, weights["q_norm"], cfg), layers.norm(k, weights["k_norm"], cfg)
  return q, k, v, gate


def _from_latent(
  weights: dict[str, jax.Array], x: jax.Array, cfg: ModelConfig, rounded: str | None
) -> tuple[jax.Array, jax.Array]:
  """Keys and values [B, T, num_heads, head_dim] of multi-head latent attention (arXiv 2405.04434, equations 9
  to 13, without rotary angles): c = norm(x W_down), (k, v) = c W_up, and behind each k what all heads share.

  Values that are narrower than keys are filled up with zeros, so that every form of attention and every cache
  takes both as they are; `_out` leaves the zeros away.
  """
  said = cfg.attention
  down = products.dense(x, weights["kv_down"], ("batch", "seq", None), rounded=rounded)
  latent, shared = jnp.split(down, [len(weights["latent_norm"])], axis=-1)
  latent = layers.norm(latent, weights["latent_norm"], cfg, said.latent_norm_eps)
  kv = products.dense(latent, weights["kv_up"], ("batch", "seq", "heads", "head_dim"), rounded=rounded)
  k, v = jnp.split(kv, [cfg.head_dim - said.shared_dim], axis=-1)
  if said.shared_dim:
    k = jnp.concatenate([k, layers.repeated(shared[:, :, None], said.num_heads)], axis=-1)
  return k, jnp.pad(v, ((0, 0),) * 3 + ((0, cfg.head_dim - cfg.value_dim),))


def _rotate(x: jax.Array, at: jax.Array | np.ndarray, cfg: ModelConfig) -> jax.Array:
  width = cfg.attention.rotary_dim
  turned = layers.rope(x[..., :width], at, cfg.attention.rope_theta, cfg.attention.rope_scaling)
  return turned if width is None else jnp.concatenate([turned, x[..., width:]], axis=-1)


def _out(
  weights: dict[str, jax.Array],
  out: jax.Array,
  gate: jax.Array | None,
  cfg: ModelConfig,
  *,
  apart: bool = False,
) -> jax.Array:
  """The output projection: [B, T, num_heads, head_dim], of which `value_dim` channels are values ->
  [B, T, D].

  Args:
    apart: as for `products.dense_each`.
  """
  out = out[..., : cfg.value_dim]
  if gate is not None:
    out = out * jax.nn.sigmoid(gate)
  rounded = None if apart else cfg.rounded
  out = products.dense(out, weights["o"], ("batch", "seq", "embed"), num_in=2, rounded=rounded)
  return out + weights["o_bias"].astype(out.dtype) if cfg.attention.out_bias else out


def _append(cache: KVCache, k: jax.Array, v: jax.Array, valid: jax.Array) -> KVCache:
  """The cache with T more tokens at its end; at pads it has what it had, which may be something kept."""

  def put(old: jax.Array, new: jax.Array) -> jax.Array:
    before = jax.lax.dynamic_slice_in_dim(old, cache.length, new.shape[1], axis=1)
    new = jnp.where(jnp.expand_dims(valid, tuple(range(2, new.ndim))), new.astype(old.dtype), before)
    return jax.lax.dynamic_update_slice_in_dim(old, new, cache.length, axis=1)

  return KVCache(
    k=put(cache.k, k), v=put(cache.v, v), valid=put(cache.valid, valid), length=cache.length + k.shape[1]
  )
