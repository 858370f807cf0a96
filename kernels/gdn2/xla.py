"""Gated DeltaNet-2 in chunks: erases at e k, writes w v. Runs on whatever XLA compiles for."""

import jax

from sleep_jax.kernels.common import chunked_channel


def gdn2(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, e: jax.Array, w: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.gdn2` does, up to rounding. Gradient: `kernels.common.chunked_channel`."""
  z, e = w.astype(S.dtype) * v, e.astype(S.dtype) * k
  o, S = chunked_channel.chunked(q, k, z, g, e, S, chunked_channel.make_plan(q, v, S))
  return o.astype(v.dtype), S
