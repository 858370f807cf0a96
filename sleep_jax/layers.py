"""Small layers: pure functions of arrays. Norms and convolutions compute in float32 and cast back."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import products, sharding
from sleep_jax.config import ModelConfig, RopeScaling


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


def rope(
  x: jax.Array, positions: jax.Array | np.ndarray, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
  """Rotary position embedding, rotate-half: channel i turns with channel i + d/2.

  Args:
    x: [B, T, H, d], d even.
    positions: [T], or a row's own [B, T], whole numbers. Where they are known (NumPy), [T], so are the
      sines, up to `KNOWN_ANGLES` of them: on a CPU XLA would put their computation into the loop over all of
      x, which then takes eight times as long.
    theta: base; the angle of pair i is position * theta^(-2 i / d).
    scaling: of the angles. None: as they are.

  Returns:
    [B, T, H, d], in x's dtype; angles and rotation in float32.
  """
  half = x.shape[-1] // 2
  if isinstance(positions, np.ndarray) and positions.size * half <= KNOWN_ANGLES:
    cos, sin = _known_angles(tuple(positions.tolist()), half, theta, scaling)
  else:
    angles = jnp.asarray(positions).astype(jnp.float32)[..., None] * _frequencies(half, theta, scaling)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
  cos, sin = cos[..., None, :], sin[..., None, :]  # [T, 1, d/2] or [B, T, 1, d/2]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


KNOWN_ANGLES = 2**16  # 256 KiB: of more the program would grow


def _frequencies(half: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
  """[d/2] float32, radians a token."""
  plain = (float(theta) ** (-np.arange(half) / half)).astype(np.float32)
  return plain if scaling is None else scaled(plain, scaling)


@functools.lru_cache(maxsize=64)
def _known_angles(
  positions: tuple[int, ...], half: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines [T, d/2] float32; the angles are rounded as where the program computes them."""
  angles = np.asarray(positions, np.float32)[:, None] * _frequencies(half, theta, scaling)
  wide = angles.astype(np.float64)
  return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def scaled(frequencies: Any, scaling: RopeScaling) -> Any:
  """Frequencies of rotary angles, in radians a token, as `scaling` stretches them; of JAX or of NumPy."""
  if scaling.kind == "none":
    return frequencies
  slow = frequencies / scaling.factor
  if scaling.kind == "linear":
    return slow
  turns = scaling.original * frequencies / (2 * np.pi)
  kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clip(0.0, 1.0)
  return kept * frequencies + (1 - kept) * slow


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
  """x sigmoid(x), in x's dtype. The gradient holds x alone and computes the sigmoid again, in float32.

  It takes that of -x: otherwise XLA would see that the forward pass has computed it, and would have written
  it to memory.
  """
  return jax.nn.silu(x)


def _silu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jax.nn.silu(x), x


def _silu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
  wide = x.astype(jnp.float32)
  rest = jax.nn.sigmoid(-wide)
  return ((dy.astype(jnp.float32) * (1 - rest) * (1 + wide * rest)).astype(x.dtype),)


silu.defvjp(_silu_forward, _silu_backward)


def swiglu(
  params: dict[str, jax.Array], x: jax.Array, *, apart: bool = False, rounded: str | None = None
) -> jax.Array:
  """(silu(x W_gate) * (x W_up)) W_down, each product with its bias if there is one; x [B, T, D].

  Args:
    apart: as for `products.dense_each`.
    rounded: as for `products.dense`.
  """
  both = (params["gate"], params["up"])
  gate, up = products.dense_each(x, both, ("batch", "seq", "mlp"), stacked=True, apart=apart, rounded=rounded)
  if "up_bias" in params:
    gate, up = (y + params[f"{name}_bias"].astype(y.dtype) for name, y in (("gate", gate), ("up", up)))
  out = products.dense(silu(gate) * up, params["down"], ("batch", "seq", "embed"), rounded=rounded)
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
