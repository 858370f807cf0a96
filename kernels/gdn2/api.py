"""The public face of Gated DeltaNet-2: the only file that callers see."""

import jax

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.gdn2.spec import SPEC


def gdn2(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  e: jax.Array,
  w: jax.Array,
  S: jax.Array,
  *,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Gated DeltaNet-2: forgetting, erasing and writing each have a gate per channel.

      S <- Diag(exp(g)) S;  S <- S + k (w v - S^T (e k))^T;  o = S^T q  (arXiv 2605.22791)

  What it shares with the other rules stands in `sleep_jax.kernels`: dtypes, mask, gradients, meshes, errors.

  >>> import jax.numpy as jnp
  >>> x = jnp.ones((1, 5, 2, 4))
  >>> o, S = gdn2(x, x, x, -x, x, x, jnp.zeros((1, 2, 4, 4)))
  >>> o.shape, S.shape
  ((1, 5, 2, 4), (1, 2, 4, 4))

  Args:
    q, k: [B, T, H, K], floating point.
    v: [B, T, H, V], floating point.
    g: [B, T, H, K] log of the decay, at most 0, float32. -inf forgets everything.
    e: [B, T, H, K] how much of the key is erased, 0 to 1, float32.
    w: [B, T, H, V] how much of the value is written, 0 to 1, float32.
    S: [B, H, K, V] fast weights before the first token, float32.
    mask: [B, T] bool, False for pads. None: no pads.
    implementation: "xla" or "reference". None: the platform's default.

  Returns:
    o [B, T, H, V] in v's dtype, and S after the last token.

  Raises:
    ValueError, TypeError, NotImplementedError: as `sleep_jax.kernels` says.
  """
  return dispatch.call(SPEC, q, k, v, g, e, w, S, mask=mask, implementation=implementation)


def gdn2_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  e: jax.Array,
  w: jax.Array,
  S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`gdn2` of one token, for awake decoding. S is donated (see `sleep_jax.kernels`).

  >>> import jax.numpy as jnp
  >>> x = jnp.ones((1, 2, 4))
  >>> o, S = gdn2_step(x, x, x, -x, x, x, jnp.zeros((1, 2, 4, 4)))
  >>> o.shape, S.shape
  ((1, 2, 4), (1, 2, 4, 4))

  Args:
    q, k: [B, H, K], floating point.
    v: [B, H, V], floating point.
    g, e: [B, H, K], w: [B, H, V], float32.
    S: [B, H, K, V] fast weights before the token, float32.

  Returns:
    o [B, H, V] in v's dtype, and S after the token.

  Raises:
    ValueError, TypeError: as `sleep_jax.kernels` says.
  """
  return dispatch.step(SPEC, q, k, v, g, e, w, S)
