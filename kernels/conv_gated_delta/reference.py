"""Convolution and gates, then the recurrence as printed: slow, obvious, the judge."""

import jax

from sleep_jax.kernels.conv_gated_delta.conv_and_gates import conv_and_gates
from sleep_jax.kernels.gated_delta import reference


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
  """Arguments as in `api.conv_gated_delta`. Everything is computed in the dtype of S.

  Returns:
    o [B, T, H, V] in x's dtype, and S after the last token.
  """
  o, S = reference.gated_delta(*conv_and_gates(x, taps, context, a, b, A_log, dt_bias, S), S)
  return o.astype(x.dtype), S
