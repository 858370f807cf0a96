"""Splash attention on TPUs, the Pallas kernel that comes with JAX.

Its window counts the keys before a query's own, so a reach of r is a window of r - 1. Pads are another
segment than all queries: a pad among the queries sees only tokens, as anyone does, and its row is dropped.
Lengths are padded here to whole blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128
BLOCK = 512  # longest block; not measured against others


def splash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  reach: int | None = None,
  valid: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Causal softmax attention of queries at the last T of S keys; see `forms.attend`.

  Args:
    interpret: run the kernel in JAX's interpreter, on any machine.

  Returns:
    [B, T, num_heads, d] in q's dtype; 0 at pads.
  """
  T, S, heads = q.shape[1], k.shape[1], q.shape[2]
  block = min(BLOCK, -(-T // LANES) * LANES)
  queries = -(-T // block) * block
  keys = -(-(S - T + queries) // block) * block  # so that each query, padded ones too, sees a key
  run = kernel.make_splash_mha_single_device(
    masks.MultiHeadMask([_mask(queries, keys, S - T, reach)] * heads),
    block_sizes=_sizes(block),
    interpret=interpret,
  )
  scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
  q, k, v = _heads_first(scaled, queries), _heads_first(k, keys), _heads_first(v, keys)
  out: Any
  if valid is None:
    out = jax.vmap(run)(q, k, v)
  else:
    tokens = jnp.ones(queries, jnp.int32)
    real = jnp.pad(valid, ((0, 0), (0, keys - S))).astype(jnp.int32)
    out = jax.vmap(lambda q, k, v, real: run(q, k, v, kernel.SegmentIds(tokens, real)))(q, k, v, real)
  out = jnp.swapaxes(out, 1, 2)[:, :T]
  return out if valid is None else jnp.where(valid[:, S - T :, None, None], out, 0)


def _mask(queries: int, keys: int, offset: int, reach: int | None) -> masks.Mask:
  """Computed inside the kernel; nothing of [T, S] exists."""
  if reach is None:
    return masks.CausalMask((queries, keys), offset)
  return masks.LocalMask((queries, keys), (reach - 1, 0), offset)


def _sizes(block: int) -> kernel.BlockSizes:
  return kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )


def _heads_first(x: jax.Array, length: int) -> jax.Array:
  """[B, T, H, d] -> [B, H, length, d], padded with zeros."""
  return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))), 1, 2)
