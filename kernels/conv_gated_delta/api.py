"""The public face of the gated delta rule with the front of its layer: the only file that callers see."""

import jax
import jax.numpy as jnp

from sleep_jax.kernels.common import dispatch


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

  Gradients reach every array, through o, S and the context. Differentiation, checkpoint names and explicit
  meshes are as in `kernels.gated_delta.gated_delta`. "pallas_tpu_fused" does it in one kernel a direction.

  Args:
    x: [B, T, H, K + K + V], the projections of q, k and v side by side, floating point; T >= 1.
    taps: [c, H, K + K + V], of the convolution, float32, c >= 2; the last one meets the current token.
    context: [B, c-1, H, K + K + V], what came before x, in x's dtype.
    a, b: [B, T, H], the projections of the gates, float32.
    A_log, dt_bias: [H], float32.
    S: [B, H, K, V] fast weights on entry, float32. (If any of the others is float64, S must be.)
    mask: [B, T] bool, False = pad: x counts as 0 there and S stays exactly as it was. What o holds there
      means nothing.
    implementation: "xla", "reference", on a TPU "pallas_tpu_fused", which runs or raises. None for the
      platform's default.

  Returns:
    o [B, T, H, V] in x's dtype, S after the last token, and the context of what comes next.

  Raises:
    ValueError: a shape that does not fit, an axis other than B and H split over a mesh, an unknown
      implementation.
    TypeError: a dtype that does not fit.
    NotImplementedError: a named implementation that cannot run these arrays.
  """
  arrays = (x, taps, context, a, b, A_log, dt_bias, S)
  o, S = dispatch.call("conv_gated_delta", *arrays, mask=mask, implementation=implementation)
  kept = context.shape[1]
  last = x[:, -kept:]
  if mask is not None:
    last = jnp.where(mask[:, -kept:, None, None], last, 0)
  return o, S, jnp.concatenate([context, last], 1)[:, -kept:]
