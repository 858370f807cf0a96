"""The public face of the delta rule: the only file that callers see."""

import jax

from sleep_jax.kernels.common import dispatch


def delta(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  b: jax.Array,
  S: jax.Array,
  *,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The delta rule (DeltaNet): each token corrects what S answers to its key; nothing else is forgotten.

      S <- S + k (b (v - S^T k))^T;  o = S^T q                          (arXiv 2406.06484)

  Scaling and normalising q and k is the caller's. Gradients reach every array, through o and through S.
  Reverse mode, and reverse or forward mode over it, work with every implementation; forward mode alone
  (`jax.jvp`) only with "reference", elsewhere it is a TypeError. Under `jax.checkpoint` the outputs of "xla"
  are named "fast_weight_o" and "fast_weight_S". On an explicit mesh B and H may be split, nothing else.

  Args:
    q, k: [B, T, H, K], floating point; T >= 1.
    v: [B, T, H, V], floating point.
    b: [B, T, H] write strength, 0 to 1, float32.
    S: [B, H, K, V] fast weights on entry, float32. (If any of the others is float64, all is, and S must be.)
    mask: [B, T] bool, False = pad: leaves S exactly as it was. What o holds there means nothing.
    implementation: "xla", "reference", on its platform "pallas_tpu" or "pallas_gpu", which runs or raises.
      None for the platform's default.

  Returns:
    o [B, T, H, V] in v's dtype, and S after the last token.

  Raises:
    ValueError: a shape that does not fit, an axis other than B and H split over a mesh, an unknown
      implementation.
    TypeError: a dtype that does not fit, above all an S that is not float32.
    NotImplementedError: a named implementation that cannot run these arrays.
  """
  return dispatch.call("delta", q, k, v, b, S, mask=mask, implementation=implementation)


def delta_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  b: jax.Array,
  S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`delta` of one token, without the axis T, for awake decoding: S is donated and updated in place.

  Args:
    q, k: [B, H, K]. v: [B, H, V]. b [B, H], float32.
    S: [B, H, K, V] fast weights on entry, float32. Called outside `jax.jit`, the array passed is gone
      afterwards; inside, donate S to the program that calls.

  Returns:
    o [B, H, V] in v's dtype, and S.

  Raises:
    ValueError, TypeError: as `delta`.
  """
  return dispatch.step("delta", q, k, v, b, S)
