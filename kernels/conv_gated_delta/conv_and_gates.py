"""The part of a Gated DeltaNet layer between its projections and the rule, in plain JAX."""

import jax
import jax.numpy as jnp

NORM_EPS = 1e-6  # under the root of the norm of q and k


def conv_and_gates(
  x: jax.Array,
  taps: jax.Array,
  context: jax.Array,
  a: jax.Array,
  b: jax.Array,
  A_log: jax.Array,
  dt_bias: jax.Array,
  S: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Short causal convolution, SiLU, l2 norm of q and k, gates (arXiv 2412.06464), all in S's dtype.

      z_t = sum_i taps_i x_{t - (c-1) + i};   [q, k, v] = silu(z)
      q <- q / |q| / sqrt(K);   k <- k / |k|
      g = -exp(A_log) softplus(a + dt_bias);   b <- sigmoid(b)

  Args:
    x, taps, context, a, b, A_log, dt_bias, S: as in `api.conv_gated_delta`; of S only shape and dtype count.

  Returns:
    q, k [B, T, H, K], v [B, T, H, V], g, b [B, T, H].
  """
  x, taps, context, a, b, A_log, dt_bias = (
    y.astype(S.dtype) for y in (x, taps, context, a, b, A_log, dt_bias)
  )
  T, K = x.shape[1], S.shape[2]
  padded = jnp.concatenate([context, x], 1)
  z = sum(taps[i] * padded[:, i : i + T] for i in range(taps.shape[0]))
  q, k, v = jnp.split(jax.nn.silu(z), [K, 2 * K], -1)
  g = -jnp.exp(A_log) * jax.nn.softplus(a + dt_bias)
  return _unit(q) * K**-0.5, _unit(k), v, g, jax.nn.sigmoid(b)


def _unit(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + NORM_EPS)
