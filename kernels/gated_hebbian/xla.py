"""The gated hebbian rule in chunks: writes b v as it comes. Runs on whatever XLA compiles for."""

import jax

from sleep_jax.kernels.common import chunked_head, tiling


def gated_hebbian(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.gated_hebbian` does, up to rounding. Gradient: `kernels.common.chunked_head`."""
  return chunked_head.chunked(q, k, v, g, b, S, tiling.make_plan(q, v, S, solve=False))
