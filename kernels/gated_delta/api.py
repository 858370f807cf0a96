"""The public face of the gated delta rule: the only file that callers see."""

import jax

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.gated_delta.spec import SPEC


def gated_delta(
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
  """The gated delta rule: S forgets, then each token corrects what S answers to its key.

      S <- exp(g) S;  S <- S + k (b (v - S^T k))^T;  o = S^T q          (arXiv 2412.06464)

  What it shares with the other rules stands in `sleep_jax.kernels`: dtypes, mask, gradients, meshes, errors.

  >>> import jax.numpy as jnp
  >>> x, gate = jnp.ones((1, 5, 2, 4)), jnp.ones((1, 5, 2))
  >>> o, S = gated_delta(x, x, x, -gate, gate, jnp.zeros((1, 2, 4, 4)))
  >>> o.shape, S.shape
  ((1, 5, 2, 4), (1, 2, 4, 4))

  Args:
    q, k: [B, T, H, K], floating point.
    v: [B, T, H, V], floating point.
    g: [B, T, H] log of the decay, at most 0, float32. -inf forgets everything.
    b: [B, T, H] write strength, 0 to 1, float32.
    S: [B, H, K, V] fast weights before the first token, float32.
    mask: [B, T] bool, False for pads. None: no pads.
    implementation: "xla", "reference", "pallas_tpu" or "pallas_gpu". None: the platform's default.

  Returns:
    o [B, T, H, V] in v's dtype, and S after the last token.

  Raises:
    ValueError, TypeError, NotImplementedError: as `sleep_jax.kernels` says.
  """
  return dispatch.call(SPEC, q, k, v, g, b, S, mask=mask, implementation=implementation)


def gated_delta_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  b: jax.Array,
  S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`gated_delta` of one token, for awake decoding. S is donated (see `sleep_jax.kernels`).

  >>> import jax.numpy as jnp
  >>> x, gate = jnp.ones((1, 2, 4)), jnp.ones((1, 2))
  >>> o, S = gated_delta_step(x, x, x, -gate, gate, jnp.zeros((1, 2, 4, 4)))
  >>> o.shape, S.shape
  ((1, 2, 4), (1, 2, 4, 4))

  Args:
    q, k: [B, H, K], floating point.
    v: [B, H, V], floating point.
    g, b: [B, H], float32.
    S: [B, H, K, V] fast weights before the token, float32.

  Returns:
    o [B, H, V] in v's dtype, and S after the token.

  Raises:
    ValueError, TypeError: as `sleep_jax.kernels` says.
  """
  return dispatch.step(SPEC, q, k, v, g, b, S)
