"""Small layers: pure functions of arrays. Norms and convolutions compute in float32 and cast back."""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import sharding
from sleep_jax.config import ModelConfig, RopeScaling


def dense(
  x: jax.Array,
  w: jax.Array,
  axes: tuple[str | None, ...],
  num_in: int = 1,
  *,
  turned: bool = False,
  rounded: str | None = None,
) -> jax.Array:
  """Contracts the last `num_in` dimensions of x with the first `num_in` of w.

  Args:
    x: [..., *ins].
    w: [*ins, *outs], cast to x's dtype.
    axes: logical names of the result; JAX cannot infer its layout where w is split (FSDP).
    num_in: number of contracted dimensions.
    turned: w is [*outs, *ins], its last `num_in` dimensions are contracted. A transposed w would be copied.
    rounded: a dtype to which both operands are rounded, while products are summed in float32
      (`ModelConfig.matmul_dtype`). The two products that give the gradients are rounded in the same way.
      None: nothing is rounded.

  Returns:
    [..., *outs], in x's dtype.
  """
  kept, outs = x.ndim - num_in, w.ndim - num_in
  ins, out_shape = (range(outs, w.ndim), w.shape[:outs]) if turned else (range(num_in), w.shape[num_in:])
  dimensions = ((tuple(range(kept, x.ndim)), tuple(ins)), ((), ()))
  out_sharding = sharding.spec(axes, x.shape[:kept] + out_shape)
  if rounded is not None:
    return _rounded_product(x, w, dimensions, out_sharding, rounded)
  return jax.lax.dot_general(x, w.astype(x.dtype), dimensions, out_sharding=out_sharding)


_Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rounded_product(
  x: jax.Array, w: jax.Array, dimensions: _Dimensions, out_sharding: Any, dtype: str
) -> jax.Array:
  """x times w, both rounded to `dtype` and summed in float32; in x's dtype.

  The gradient is written by hand: that of `dot_general` would multiply a float32 cotangent with rounded
  weights, and a processor that is fast at products of bfloat16 is not fast at those.
  """
  y = jax.lax.dot_general(
    x.astype(dtype),
    w.astype(dtype),
    dimensions,
    preferred_element_type=jnp.float32,
    out_sharding=out_sharding,
  )
  return y.astype(x.dtype)


def _rounded_forward(
  x: jax.Array, w: jax.Array, dimensions: _Dimensions, out_sharding: Any, dtype: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _rounded_product(x, w, dimensions, out_sharding, dtype), (x, w)


def _rounded_backward(
  dimensions: _Dimensions, out_sharding: Any, dtype: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  del out_sharding
  x, w = kept
  (x_ins, w_ins), _ = dimensions
  rows = x.ndim - len(x_ins)
  w_outs = tuple(i for i in range(w.ndim) if i not in w_ins)
  y_outs = tuple(range(rows, dy.ndim))
  dx = jax.lax.dot_general(
    dy.astype(dtype),
    w.astype(dtype),
    ((y_outs, w_outs), ((), ())),
    preferred_element_type=jnp.float32,
    out_sharding=sharding.of(x),
  )
  left, right = (dy, x) if w_outs[0] == 0 else (x, dy)  # in the order of w's dimensions
  dw = _summed_over_rows(left.astype(dtype), right.astype(dtype), rows, w)
  return dx.astype(x.dtype), dw.astype(w.dtype)


def _summed_over_rows(a: jax.Array, b: jax.Array, rows: int, like: jax.Array) -> jax.Array:
  """The product of a [*rows, *n] and b [*rows, *m] over all rows: [*n, *m] float32, laid out as `like`.

  XLA has fast products of bfloat16 on a CPU where the rows of a are its last dimension, and none where they
  are its first. It folds a transposition of a into the product, whose form it then does not know; one that
  is written as a turn of three dimensions stays.
  """

  def general(a: jax.Array, b: jax.Array) -> jax.Array:
    over = tuple(range(rows))
    how: Any = {"preferred_element_type": jnp.float32, "out_sharding": sharding.of(like)}
    return jax.lax.dot_general(a, b, ((over, over), ((), ())), **how)

  def on_a_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
    count, width = math.prod(a.shape[:rows]), math.prod(a.shape[rows:])
    turned = a.reshape(count, width // 2, 2).transpose(1, 2, 0).reshape(width, count)
    product = jnp.matmul(turned, b.reshape(count, -1), preferred_element_type=jnp.float32)
    return product.reshape(like.shape)

  if sharding.of(like) is not None or math.prod(a.shape[rows:]) % 2:
    return general(a, b)
  return jax.lax.platform_dependent(a, b, cpu=on_a_cpu, default=general)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)


def without_pads(x: jax.Array, valid: jax.Array | None) -> jax.Array:
  """x [B, T, ...] with 0 at pads, whatever it holds there: NaN times 0 would be NaN, here and in gradients.

  Args:
    valid: [B, T] bool, False for pads. None: all valid, and x is returned as it is.
  """
  return x if valid is None else jnp.where(jnp.expand_dims(valid, tuple(range(2, x.ndim))), x, 0)


def norm(x: jax.Array, w: jax.Array, cfg: ModelConfig, eps: float | None = None) -> jax.Array:
  """The RMSNorm of a model, on the residual stream, on queries and keys and on latents; see `rms_norm`.

  Args:
    eps: None: the model's.
  """
  w = 1 + w.astype(jnp.float32) if cfg.norm_zero_centered else w
  return rms_norm(x, w, cfg.norm_eps if eps is None else eps, cfg.norm_cast)


def rms_norm(x: jax.Array, w: jax.Array, eps: float, cast: str = "last") -> jax.Array:
  """w * x / sqrt(mean(x^2) + eps) over the axes of w, the last ones of x, in x's dtype.

  Computed in float32 and rounded once, the product with w included; or with cast = "first" rounded before
  that product and again after it. In bfloat16 the two differ in the last bit, and published models in which
  they use.
  """
  x32 = x.astype(jnp.float32)
  axes = tuple(range(-max(jnp.ndim(w), 1), 0))
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)
  if cast == "first":
    return w.astype(x.dtype) * (x32 * scale).astype(x.dtype)
  return (w * x32 * scale).astype(x.dtype)


def repeated(
  x: jax.Array, groups: int, axes: tuple[str | None, ...] = ("batch", "seq", "heads", "head_dim")
) -> jax.Array:
  """x with each head `groups` times, one behind the other, split over the mesh as `axes` says."""
  at = axes.index("heads")
  shape = tuple(n * groups if i == at else n for i, n in enumerate(x.shape))
  return jnp.repeat(x, groups, axis=at, out_sharding=sharding.spec(axes, shape))


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(sum(x^2) + eps) over the last axis, float32 inside; zero stays zero."""
  x32 = x.astype(jnp.float32)
  return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
  """Rotary position embedding, rotate-half: channel i turns with channel i + d/2.

  Args:
    x: [B, T, H, d], d even.
    positions: [T], whole numbers.
    theta: base; the angle of pair i is position * theta^(-2 i / d).
    scaling: of the angles. None: as they are.

  Returns:
    [B, T, H, d], in x's dtype; angles and rotation in float32.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is not None:
    frequencies = scaled(frequencies, scaling)
  angles = positions.astype(jnp.float32)[:, None] * frequencies
  cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]  # [T, 1, d/2]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def scaled(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
  """Frequencies of rotary angles, in radians a token, as `scaling` stretches them."""
  if scaling.kind == "none":
    return frequencies
  slow = frequencies / scaling.factor
  if scaling.kind == "linear":
    return slow
  turns = scaling.original * frequencies / (2 * jnp.pi)
  kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
  return kept * frequencies + (1 - kept) * slow


def swiglu(
  params: dict[str, jax.Array], x: jax.Array, *, apart: bool = False, rounded: str | None = None
) -> jax.Array:
  """(silu(x W_gate) * (x W_up)) W_down, each product with its bias if there is one; x [B, T, D].

  Args:
    apart: multiply with gate and up apart, so that no weight is copied: for a few tokens, whose products take
      no longer than reading the weights. Otherwise one large product takes both.
    rounded: as for `dense`.
  """
  if apart:
    gate, up = (dense(x, params[name], ("batch", "seq", "mlp"), rounded=rounded) for name in ("gate", "up"))
  else:
    both = jnp.stack([params["gate"], params["up"]], axis=1)  # [D, 2, F]
    gate, up = jnp.moveaxis(dense(x, both, ("batch", "seq", None, "mlp"), rounded=rounded), 2, 0)
  if "up_bias" in params:
    gate, up = (y + params[f"{name}_bias"].astype(y.dtype) for name, y in (("gate", gate), ("up", up)))
  out = dense(jax.nn.silu(gate) * up, params["down"], ("batch", "seq", "embed"), rounded=rounded)
  return out + params["down_bias"].astype(out.dtype) if "down_bias" in params else out


def short_conv(x: jax.Array, w: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Causal depthwise convolution over time: y_t = sum_i w_i x_{t - (c-1) + i}.

  Args:
    x: inputs, [B, T, H, K].
    w: c taps a channel, [c, H, K]; the last one meets the current token.
    context: the c - 1 inputs before x, [B, c-1, H, K].

  Returns:
    y [B, T, H, K] in x's dtype (float32 inside), and the last c - 1 inputs, which are the context
    of what comes next.
  """
  length, taps = x.shape[1], w.shape[0]
  padded = jnp.concatenate([context, x], axis=1)
  products = (w[i] * padded[:, i : i + length].astype(jnp.float32) for i in range(taps))
  return functools.reduce(operator.add, products).astype(x.dtype), padded[:, length:]


def dynamic_conv(x: jax.Array, kernels: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Causal depthwise convolution with taps of each token's own: y_t = sum_i w_{t,i} x_{t - (c-1) + i}.

  Args:
    x: inputs, [B, T, H, V].
    kernels: c taps a token and channel, [B, T, H, V, c]; the last one meets the current token.
    context: the c - 1 inputs before x, [B, c-1, H, V].

  Returns:
    y [B, T, H, V] in x's dtype (float32 inside), and the last c - 1 inputs, which are the context
    of what comes next.
  """
  length, taps = x.shape[1], kernels.shape[-1]
  padded = jnp.concatenate([context, x], axis=1)
  products = (
    kernels[..., i].astype(jnp.float32) * padded[:, i : i + length].astype(jnp.float32) for i in range(taps)
  )
  return functools.reduce(operator.add, products).astype(x.dtype), padded[:, length:]
