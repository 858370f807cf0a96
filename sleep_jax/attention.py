"""Causal attention inside a window, with grouped queries, and the cache that eviction drops."""

import flax.struct
import jax
import jax.numpy as jnp

from sleep_jax import layers, params, sharding
from sleep_jax.config import ModelConfig

MASKED = -1e30  # finite: the row of a pad, which attends to nothing, must not become NaN


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens in the window, for decoding awake.

  Attributes:
    k, v: [B, L, num_kv_heads, head_dim], keys after RoPE; rows from `length` on are not set yet.
    valid: [B, L] bool, False for pads and for rows that are not set yet.
    length: int32 scalar, tokens in the cache.
  """

  k: jax.Array
  v: jax.Array
  valid: jax.Array
  length: jax.Array


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
  return weights


def init_cache(cfg: ModelConfig, batch: int) -> KVCache:
  """An empty cache of L tokens."""
  axes = ("batch", "seq", "heads", "head_dim")
  shape = (batch, cfg.window, cfg.num_kv_heads, cfg.head_dim)
  empty = sharding.constrain(jnp.zeros(shape, cfg.dtype), axes)
  valid = sharding.constrain(jnp.zeros(shape[:2], bool), axes[:2])
  return KVCache(k=empty, v=empty, valid=valid, length=jnp.zeros((), jnp.int32))


def attention(
  weights: dict[str, jax.Array],
  x: jax.Array,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  cache: KVCache | None = None,
  near: int | None = None,
) -> tuple[jax.Array, KVCache | None]:
  """Causal softmax attention: o_t = V_t^T softmax(K_t q_t / sqrt(d)).

  Args:
    weights: as declared.
    x: [B, T, D]; the whole window, or with a cache the tokens that follow it.
    valid: [B, T] bool, False for pads, which nobody attends to. None: all valid.
    cache: tokens of the same window that came before; T more must fit.
    near: keys that a query sees, its own included (`swa`). None: all up to its own.

  Returns:
    [B, T, D] in x's dtype, and the cache with the T tokens appended (None without one).
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
  start = 0 if cache is None else cache.length
  positions = start + jnp.arange(length)
  q = layers.rope(q, positions, cfg.attention.rope_theta)
  k = layers.rope(k, positions, cfg.attention.rope_theta)

  if cache is None:
    keys_seen = positions
  else:
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    cache = _append(cache, k, v, valid)
    k, v, valid, keys_seen = cache.k, cache.v, cache.valid, jnp.arange(cache.k.shape[1])
  distance = positions[:, None] - keys_seen[None, :]
  allowed = distance >= 0 if near is None else (distance >= 0) & (distance < near)
  allowed = allowed[None, None]  # [1, 1, T, keys]
  if valid is not None:
    allowed = allowed & valid[:, None, None, :]

  groups = q.shape[2] // k.shape[2]
  if groups > 1:
    k, v = (_repeated(x, groups) for x in (k, v))
  scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * cfg.head_dim**-0.5
  shares = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1).astype(x.dtype)
  out = jnp.einsum("bhts,bshd->bthd", shares, v)
  return layers.dense(out, weights["o"], ("batch", "seq", "embed"), num_in=2), cache


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
