"""Convolution and gates in plain JAX, then the rule in chunks. Runs on whatever XLA compiles for."""

import jax
import jax.numpy as jnp

from sleep_jax.kernels.conv_gated_delta.conv_and_gates import conv_and_gates
from sleep_jax.kernels.gated_delta import xla


def conv_gated_delta(
  x: jax.Array,
  taps: jax.Array,
  context: jax.Array,
  a: jax.Array,
  b: jax.Array,
  A_log: jax.Array,
  dt_bias: jax.Array,
  S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.conv_gated_delta` does, up to rounding: q, k and v are rounded to x's dtype."""
  q, k, v, g, b = conv_and_gates(x, taps, context, a, b, A_log, dt_bias, S)
  q, k, v = (y.astype(jnp.promote_types(x.dtype, jnp.bfloat16)) for y in (q, k, v))
  return xla.gated_delta(q, k, v, g, b, S)
