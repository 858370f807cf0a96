"""The public face of Kimi Delta Attention: the only file that callers see."""

import jax

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.kda.spec import SPEC


def kda(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  b: jax.Array,
  S: jax.Array,
  *,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Kimi Delta Attention: each key channel of S forgets at its own rate; then the delta rule.

      S <- Diag(exp(g)) S;  S <- S + k (b (v - S^T k))^T;  o = S^T q    (arXiv 2510.26692)

  What it shares with the other rules stands in `sleep_jax.kernels`: dtypes, mask, gradients, meshes, errors.

  >>> import jax.numpy as jnp
  >>> x, gate = jnp.ones((1, 5, 2, 4)), jnp.ones((1, 5, 2))
  >>> o, S = kda(x, x, x, -x, gate, jnp.zeros((1, 2, 4, 4)))
  >>> o.shape, S.shape
  ((1, 5, 2, 4), (1, 2, 4, 4))

  Args:
    q, k: [B, T, H, K], floating point.
    v: [B, T, H, V], floating point.
    g: [B, T, H, K] log of the decay, at most 0, float32. -inf forgets everything.
    b: [B, T, H] write strength, 0 to 1, float32.
    S: [B, H, K, V] fast weights before the first token, float32.
    mask: [B, T] bool, False for pads. None: no pads.
    implementation: "xla" or "reference". None: the platform's default.

  Returns:
    o [B, T, H, V] in v's dtype, and S after the last token.

  Raises:
    ValueError, TypeError, NotImplementedError: as `sleep_jax.kernels` says.
  """
  return dispatch.call(SPEC, q, k, v, g, b, S, mask=mask, implementation=implementation)


def kda_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  b: jax.Array,
  S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`kda` of one token, for awake decoding. S is donated (see `sleep_jax.kernels`).

  >>> import jax.numpy as jnp
  >>> x, gate = jnp.ones((1, 2, 4)), jnp.ones((1, 2))
  >>> o, S = kda_step(x, x, x, -x, gate, jnp.zeros((1, 2, 4, 4)))
  >>> o.shape, S.shape
  ((1, 2, 4), (1, 2, 4, 4))

  Args:
    q, k: [B, H, K], floating point.
    v: [B, H, V], floating point.
    g: [B, H, K], b: [B, H], float32.
    S: [B, H, K, V] fast weights before the token, float32.

  Returns:
    o [B, H, V] in v's dtype, and S after the token.

  Raises:
    ValueError, TypeError: as `sleep_jax.kernels` says.
  """
  return dispatch.step(SPEC, q, k, v, g, b, S)
