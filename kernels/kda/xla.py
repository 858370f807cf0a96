"""Kimi Delta Attention in chunks: erases at b k, writes b v. Runs on whatever XLA compiles for."""

import functools

import jax

from sleep_jax.kernels.common import chunked_channel, tiling


def kda(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.kda` does, up to rounding. Gradient: `kernels.common.chunked_channel`."""
  times = functools.partial(tiling.dot, "bth,bthk->bthk", b.astype(S.dtype))
  o, S = chunked_channel.chunked(q, k, times(v), g, times(k), S, chunked_channel.make_plan(q, v, S))
  return o.astype(v.dtype), S
