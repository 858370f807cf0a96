"""Causal attention inside a window, with grouped queries, and what eviction drops or keeps of it."""

import flax.struct
import jax
import jax.numpy as jnp

from sleep_jax import layers, params, sharding
from sleep_jax.config import ModelConfig

MASKED = -1e30  # finite: the row of a pad, which attends to nothing, must not become NaN


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens in the window, for decoding awake.

  Under sliding eviction the rows before the window's own are the tokens that were kept, oldest first.

  Attributes:
    k, v: [B, L, num_kv_heads, head_dim], under sliding eviction [B, 2 L - 1, ...]; keys after RoPE; rows from
      `length` on are not set yet.
    valid: [B, L] (or 2 L - 1) bool, False for pads and for rows that are not set yet.
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
  into = ("w_embed", "heads", "head_dim")
  weights = {
    "q": params.matrix(d, heads, hd, axes=into),
    "k": params.matrix(d, kv_heads, hd, axes=into),
    "v": params.matrix(d, kv_heads, hd, axes=into),
    "o": params.matrix(heads, hd, d, axes=("heads", "head_dim", "w_embed"), num_in=2),
  }
  if cfg.attention.qk_norm:
    weights |= {"q_norm": params.scale(hd), "k_norm": params.scale(hd)}
  if cfg.attention.bias:
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
      weights[f"{name}_bias"] = params.bias(count, hd, axes=("heads", "head_dim"))
  if cfg.attention.out_bias:
    weights["o_bias"] = params.bias(d, axes=(None,))
  return weights


def init_cache(cfg: ModelConfig, batch: int, kept: Kept | None = None) -> KVCache:
  """The cache of a window of which nothing is read yet; behind what was kept, under sliding eviction."""
  rows, before = cfg.window, 0
  if cfg.eviction == "sliding":
    rows, before = 2 * cfg.window - 1, cfg.window - 1
  k, valid = _zeros(cfg, batch, rows)
  cache = KVCache(k=k, v=k, valid=valid, length=jnp.asarray(before, jnp.int32))
  if kept is None:
    return cache
  k = layers.rope(kept.k, jnp.arange(before), cfg.attention.rope_theta, cfg.attention.rope_scaling)
  return _append(cache.replace(length=jnp.zeros((), jnp.int32)), k, kept.v, kept.valid)


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


def attention(
  weights: dict[str, jax.Array],
  x: jax.Array,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  cache: KVCache | Kept | None = None,
  near: int | None = None,
) -> tuple[jax.Array, KVCache | Kept | None]:
  """Causal softmax attention: o_t = V_t^T softmax(K_t q_t / sqrt(d)).

  Under sliding eviction a token sees the newest L keys, its own included, whichever window they are of.

  Args:
    weights: as declared.
    x: [B, T, D]; the whole window, or with a `KVCache` the tokens that follow it.
    valid: [B, T] bool, False for pads, which nobody attends to. None: all valid.
    cache: `KVCache`: tokens of the same window that came before; T more must fit. `Kept`: what the windows
      before left, and x is the whole window. None: x is the whole window, and nothing was left.
    near: keys that a query sees, its own included (`swa`). None: all that are there.

  Returns:
    [B, T, D] in x's dtype, and: the cache with the T tokens appended; what is kept after them; None.
  """
  batch, length, _ = x.shape
  heads_axes = ("batch", "seq", "heads", "head_dim")
  q = layers.dense(x, weights["q"], heads_axes)
  kv = layers.dense(x, jnp.concatenate([weights["k"], weights["v"]], axis=-1), heads_axes)
  k, v = jnp.split(kv, 2, axis=-1)
  if cfg.attention.bias:
    q, k, v = (x + weights[f"{name}_bias"].astype(x.dtype) for name, x in (("q", q), ("k", k), ("v", v)))
  if cfg.attention.qk_norm:
    q = layers.rms_norm(q, weights["q_norm"], cfg.norm_eps)
    k = layers.rms_norm(k, weights["k_norm"], cfg.norm_eps)
  if cache is not None and valid is None:
    valid = jnp.ones((batch, length), bool)
  if isinstance(cache, Kept):
    k, v, valid = (jnp.concatenate(x, axis=1) for x in ((cache.k, k), (cache.v, v), (cache.valid, valid)))
    cache = Kept(k=k[:, length:], v=v[:, length:], valid=valid[:, length:])
    start, keys_at = cfg.window - 1, jnp.arange(k.shape[1])
  else:
    start = cache.length if cache is not None else 0
    keys_at = start + jnp.arange(length)
  positions = start + jnp.arange(length)
  q = layers.rope(q, positions, cfg.attention.rope_theta, cfg.attention.rope_scaling)
  k = layers.rope(k, keys_at, cfg.attention.rope_theta, cfg.attention.rope_scaling)

  if isinstance(cache, KVCache):
    cache = _append(cache, k, v, valid)
    k, v, valid, keys_at = cache.k, cache.v, cache.valid, jnp.arange(cache.k.shape[1])
  distance = positions[:, None] - keys_at[None, :]
  allowed = distance >= 0
  reach = min((n for n in (near, cfg.window if cfg.eviction == "sliding" else None) if n), default=None)
  if reach is not None:
    allowed &= distance < reach
  allowed = allowed[None, None]  # [1, 1, T, keys]
  if valid is not None:
    allowed = allowed & valid[:, None, None, :]

  groups = q.shape[2] // k.shape[2]
  if groups > 1:
    k, v = (_repeated(x, groups) for x in (k, v))
  scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * cfg.head_dim**-0.5
  shares = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1).astype(x.dtype)
  out = jnp.einsum("bhts,bshd->bthd", shares, v)
  out = layers.dense(out, weights["o"], ("batch", "seq", "embed"), num_in=2)
  if cfg.attention.out_bias:
    out = out + weights["o_bias"].astype(out.dtype)
  return out, cache


def _repeated(x: jax.Array, groups: int) -> jax.Array:
  """[B, T, num_kv_heads, head_dim] with each head `groups` times, split over the mesh as queries are."""
  batch, length, heads, width = x.shape
  layout = sharding.spec(("batch", "seq", "heads", "head_dim"), (batch, length, heads * groups, width))
  return jnp.repeat(x, groups, axis=2, out_sharding=layout)


def _append(cache: KVCache, k: jax.Array, v: jax.Array, valid: jax.Array) -> KVCache:
  """The cache with T more tokens at its end."""

  def put(old: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, axis=1)

  return KVCache(
    k=put(cache.k, k), v=put(cache.v, v), valid=put(cache.valid, valid), length=cache.length + k.shape[1]
  )
