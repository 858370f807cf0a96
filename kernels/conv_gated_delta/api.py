"""The public face of the gated delta rule behind a convolution and gates: the only file that callers see."""

import jax
import jax.numpy as jnp

from sleep_jax.kernels.common import dispatch, pads
from sleep_jax.kernels.conv_gated_delta.spec import SPEC


def conv_gated_delta(
  x: jax.Array,
  taps: jax.Array,
  context: jax.Array,
  a: jax.Array,
  b: jax.Array,
  A_log: jax.Array,
  dt_bias: jax.Array,
  S: jax.Array,
  *,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Short convolution, SiLU, l2 norm of q and k, gates and the gated delta rule, from raw projections.

      z_t = sum_i taps_i x_{t - (c-1) + i};   [q, k, v] = silu(z)          (arXiv 2412.06464)
      q <- q / |q| / sqrt(K);   k <- k / |k|;   |q| = sqrt(sum(q^2) + 1e-6)
      g = -exp(A_log) softplus(a + dt_bias);   b <- sigmoid(b)
      S <- exp(g) S;  S <- S + k (b (v - S^T k))^T;  o = S^T q

  "pallas_tpu_fused" does all of it in one kernel a direction. What it shares with the other rules stands in
  `sleep_jax.kernels`: dtypes, mask, gradients, meshes, errors. At a pad behind a token x counts as 0.

  >>> import jax.numpy as jnp
  >>> x, taps, gate = jnp.ones((1, 5, 2, 12)), jnp.ones((4, 2, 12)), jnp.ones((1, 5, 2))
  >>> context, head, S = jnp.zeros((1, 3, 2, 12)), jnp.ones(2), jnp.zeros((1, 2, 4, 4))
  >>> o, S, context = conv_gated_delta(x, taps, context, gate, gate, head, head, S)
  >>> o.shape, S.shape, context.shape
  ((1, 5, 2, 4), (1, 2, 4, 4), (1, 3, 2, 12))

  Args:
    x: [B, T, H, K + K + V], the projections of q, k and v side by side, floating point.
    taps: [c, H, K + K + V], taps of the convolution, float32, c >= 2. The last one meets the current token.
    context: [B, c-1, H, K + K + V], the inputs before x, in x's dtype.
    a, b: [B, T, H], the projections of the gates, float32.
    A_log, dt_bias: [H], float32.
    S: [B, H, K, V] fast weights before the first token, float32.
    mask: [B, T] bool, False for pads. None: no pads.
    implementation: "xla", "reference" or "pallas_tpu_fused". None: the platform's default.

  Returns:
    o [B, T, H, V] in x's dtype, S after the last token, and the context of what comes next.

  Raises:
    ValueError, TypeError, NotImplementedError: as `sleep_jax.kernels` says.
  """
  arrays = (x, taps, context, a, b, A_log, dt_bias, S)
  o, S = dispatch.call(SPEC, *arrays, mask=mask, implementation=implementation)
  if mask is not None:
    context, x = pads.next_to(context, jnp.where(mask[..., None, None], x, 0), mask)
  return o, S, jnp.concatenate([context, x], 1)[:, x.shape[1] :]
