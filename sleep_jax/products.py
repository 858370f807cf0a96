"""Products with weights: in which form they are fast, and their gradients.

What is computed is the same on every platform; which of several products becomes one is not. The gradients
are written by hand: there is reverse mode, also of itself, and no forward mode (`jax.jvp` is a TypeError).
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from sleep_jax import sharding


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
  w = w if rounded is not None else w.astype(x.dtype)
  return _product(x, w, dimensions, out_sharding, rounded)


def dense_each(
  x: jax.Array,
  ws: Sequence[jax.Array],
  axes: tuple[str | None, ...],
  *,
  stacked: bool = False,
  apart: bool = False,
  rounded: str | None = None,
) -> list[jax.Array]:
  """`dense` of one x with several weights.

  As one product with all of them side by side, but on a CPU, where products of this size are no faster for
  being one, and taking its result and its gradient apart costs a tenth of a training step.

  Args:
    x: [..., D].
    ws: each [D, *outs], which differ in no dimension but the last.
    axes: logical names of each result.
    stacked: join them in a dimension of their own, as must be where the last one is split over devices.
    apart: one product each on every platform, so that no weight is copied: for a few tokens, whose products
      take no longer than reading the weights.
    rounded: as for `dense`.

  Returns:
    [..., *outs] each, in x's dtype.
  """
  if apart:
    return [dense(x, w, axes, rounded=rounded) for w in ws]
  if rounded is None and sharding.spec(axes, (*x.shape[:-1], *ws[0].shape[1:])) is None:
    return list(_products(x, tuple(w.astype(x.dtype) for w in ws)))
  if stacked:
    both = dense(x, jnp.stack(ws, axis=1), (*axes[:-1], None, axes[-1]), rounded=rounded)
    return list(jnp.moveaxis(both, -2, 0))
  return _split(dense(x, jnp.concatenate(ws, axis=-1), axes, rounded=rounded), ws)


def _split(joined: jax.Array, ws: Sequence[jax.Array]) -> list[jax.Array]:
  """`joined` cut along its last axis into the widths of `ws`."""
  ends = [*itertools.accumulate(w.shape[-1] for w in ws)]
  return jnp.split(joined, ends[:-1], axis=-1)


@jax.custom_vjp
def _products(x: jax.Array, ws: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """x [..., D] times each of ws [D, *outs]. The platform, which says how, is known when this is compiled."""

  def apart(x, ws):
    return tuple(jnp.tensordot(x, w, 1) for w in ws)

  def joined(x, ws):
    return tuple(_split(jnp.tensordot(x, jnp.concatenate(ws, axis=-1), 1), ws))

  return jax.lax.platform_dependent(x, ws, cpu=apart, default=joined)


def _products_forward(x: Any, ws: tuple[Any, ...]) -> tuple[Any, tuple]:
  values = tuple(w.value for w in ws)
  trained = any(w.perturbed for w in ws)  # nothing is held for the gradients of frozen weights
  return _products(x.value, values), (x.value if trained else None, values)


def _products_backward(kept: tuple, dys: tuple[Any, ...]) -> tuple[jax.Array, tuple]:
  x, ws = kept
  dys = tuple(_filled(dy) for dy in dys)
  rows = dys[0].ndim - ws[0].ndim + 1

  def over_outs(dy, w):
    return jax.lax.dot_general(dy, w, ((tuple(range(rows, dy.ndim)), tuple(range(1, w.ndim))), ((), ())))

  def apart(ws, dys):
    return functools.reduce(operator.add, map(over_outs, dys, ws))

  def joined(ws, dys):
    return over_outs(jnp.concatenate(dys, axis=-1), jnp.concatenate(ws, axis=-1))

  dx = jax.lax.platform_dependent(ws, dys, cpu=apart, default=joined)
  if x is None:
    return dx, (None,) * len(ws)

  def gradients_apart(x, ws, dys):
    return tuple(_summed_over_rows(x, dy, rows, w, None) for w, dy in zip(ws, dys, strict=True))

  def gradients_joined(x, ws, dys):
    both = jnp.concatenate(ws, axis=-1)
    return tuple(_split(_summed_over_rows(x, jnp.concatenate(dys, axis=-1), rows, both, None), ws))

  return dx, jax.lax.platform_dependent(x, ws, dys, cpu=gradients_apart, default=gradients_joined)


_products.defvjp(_products_forward, _products_backward, symbolic_zeros=True)


def _filled(cotangent: Any) -> jax.Array:
  """A cotangent as an array, also where nothing depends on what it belongs to."""
  if isinstance(cotangent, SymbolicZero):
    aval: Any = cotangent.aval
    return jnp.zeros(aval.shape, aval.dtype)
  return cotangent


_Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(
  x: jax.Array, w: jax.Array, dimensions: _Dimensions, out_sharding: Any, dtype: str | None
) -> jax.Array:
  """x times w, both rounded to `dtype`, if there is one, and then summed in float32; in x's dtype.

  The gradient is written by hand. That of `dot_general` would multiply a float32 cotangent with rounded
  weights, and a processor that is fast at products of bfloat16 is not fast at those; and it would always turn
  the cotangent to sum over rows, which a CPU has to copy for that, where turning x copies less.
  """
  y = jax.lax.dot_general(
    _rounded(x, dtype),
    _rounded(w, dtype),
    dimensions,
    preferred_element_type=jnp.float32 if dtype else None,
    out_sharding=out_sharding,
  )
  return y.astype(x.dtype)


def _rounded(x: jax.Array, dtype: str | None) -> jax.Array:
  return x if dtype is None else x.astype(dtype)


def _product_forward(
  x: Any, w: Any, dimensions: _Dimensions, out_sharding: Any, dtype: str | None
) -> tuple[Any, tuple]:
  y = _product(x.value, w.value, dimensions, out_sharding, dtype)
  # A frozen weight needs no x; where x is not held, its layout is.
  return y, (x.value if w.perturbed else None, w.value, _Layout(sharding.of(x.value), x.value.dtype))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Layout:
  """What the gradient of an array must be like."""

  sharding: Any
  dtype: Any


def _product_backward(
  dimensions: _Dimensions, out_sharding: Any, dtype: str | None, kept: tuple, dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  del out_sharding
  x, w, layout = kept
  (x_ins, w_ins), _ = dimensions
  rows = x_ins[0]
  w_outs = tuple(i for i in range(w.ndim) if i not in w_ins)
  y_outs = tuple(range(rows, dy.ndim))
  dx = jax.lax.dot_general(
    _rounded(dy, dtype),
    _rounded(w, dtype),
    ((y_outs, w_outs), ((), ())),
    preferred_element_type=jnp.float32 if dtype else None,
    out_sharding=layout.sharding,
  ).astype(layout.dtype)
  if x is None:
    return dx, None
  left, right = (dy, x) if w_outs[0] == 0 else (x, dy)  # in the order of w's dimensions
  dw = _summed_over_rows(_rounded(left, dtype), _rounded(right, dtype), rows, w, dtype)
  return dx, dw.astype(w.dtype)


def _summed_over_rows(a: jax.Array, b: jax.Array, rows: int, like: jax.Array, dtype: str | None) -> jax.Array:
  """The product of a [*rows, *n] and b [*rows, *m] over all rows: [*n, *m], laid out as `like`.

  A CPU copies the operand whose rows must become its last dimension, so that is the narrower one. Rounded to
  bfloat16, XLA has fast products on a CPU where the rows of a are its last dimension, and none where they
  are its first. It folds a transposition of a into the product, whose form it then does not know; one that
  is written as a turn of three dimensions stays.
  """
  count, width = math.prod(a.shape[:rows]), math.prod(a.shape[rows:])

  def general(a: jax.Array, b: jax.Array) -> jax.Array:
    over = tuple(range(rows))
    how: Any = {"preferred_element_type": jnp.float32 if dtype else None, "out_sharding": sharding.of(like)}
    return jax.lax.dot_general(a, b, ((over, over), ((), ())), **how)

  def on_a_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
    turned = a.reshape(count, width // 2, 2).transpose(1, 2, 0).reshape(width, count)
    product = jnp.matmul(turned, b.reshape(count, -1), preferred_element_type=jnp.float32)
    return product.reshape(like.shape)

  if sharding.of(like) is not None:
    return general(a, b)
  if dtype is None:
    a, b = a.reshape(count, -1), b.reshape(count, -1)
    first, second = (a, b) if width <= b.shape[1] else (b, a)
    product = jax.lax.dot_general(first, second, (((0,), (0,)), ((), ())))
    return (product if first is a else product.T).reshape(like.shape)
  if width % 2:
    return general(a, b)
  return jax.lax.platform_dependent(a, b, cpu=on_a_cpu, default=general)


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
