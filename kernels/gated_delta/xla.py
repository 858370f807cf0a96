"""The gated delta rule in chunks: solves for the errors. Runs on whatever XLA compiles for."""

import jax

from sleep_jax.kernels.common import chunked_head, tiling


def gated_delta(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.gated_delta` does, up to rounding. Gradient: `kernels.common.chunked_head`."""
  return chunked_head.chunked(q, k, v, g, b, S, tiling.make_plan(q, v, S, solve=True))
