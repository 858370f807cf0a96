"""The public face of Gated DeltaNet-2: the only file that callers see."""

import jax

from sleep_jax.kernels.common import dispatch


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
  """Gated DeltaNet-2: decay, erasing and writing, each with a gate per channel.

      S <- Diag(exp(g)) S;  S <- S + k (w v - S^T (e k))^T;  o = S^T q  (arXiv 2605.22791)

  Scaling and normalising q and k is the caller's. Gradients reach every array, through o and through S.
  Reverse mode, and reverse or forward mode over it, work with every implementation; forward mode alone
  (`jax.jvp`) only with "reference", elsewhere it is a TypeError. Under `jax.checkpoint` the outputs of "xla"
  are named "fast_weight_o" and "fast_weight_S". On an explicit mesh B and H may be split, nothing else.

  Args:
    q, k: [B, T, H, K], floating point; T >= 1.
    v: [B, T, H, V], floating point.
    g: [B, T, H, K] log of the decay, <= 0 (-inf forgets all), float32. Checked where its values are at hand;
      under `jax.jit` and other transformations they are not, and a positive one gives senseless numbers.
    e: [B, T, H, K] what of the key is erased, 0 to 1, float32.
    w: [B, T, H, V] what of the value is written, 0 to 1, float32.
    S: [B, H, K, V] fast weights on entry, float32. (If any of the others is float64, all is, and S must be.)
    mask: [B, T] bool, False = pad: leaves S exactly as it was. What o holds there means nothing.
    implementation: "xla" or "reference"; None for the platform's default.

  Returns:
    o [B, T, H, V] in v's dtype, and S after the last token.

  Raises:
    ValueError: a shape that does not fit, an axis other than B and H split over a mesh, an unknown
      implementation, a positive g.
    TypeError: a dtype that does not fit, above all an S that is not float32.
    NotImplementedError: a named implementation that cannot run these arrays.
  """
  return dispatch.call("gdn2", q, k, v, g, e, w, S, mask=mask, implementation=implementation)


def gdn2_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  e: jax.Array,
  w: jax.Array,
  S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`gdn2` of one token, without the axis T, for awake decoding: S is donated and updated in place.

  Args:
    q, k: [B, H, K]. v: [B, H, V]. g [B, H, K], e [B, H, K], w [B, H, V], float32.
    S: [B, H, K, V] fast weights on entry, float32. Called outside `jax.jit`, the array passed is gone
      afterwards; inside, donate S to the program that calls.

  Returns:
    o [B, H, V] in v's dtype, and S.

  Raises:
    ValueError, TypeError: as `gdn2`.
  """
  return dispatch.step("gdn2", q, k, v, g, e, w, S)
