"""Products with weights and their gradients, against NumPy."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax import products
from tests import hybrids

TOLERANCE = 2e-6  # float32 sums of some ten terms: a few times 2^-24, relative to the largest entry


def normal(*shape, seed=0):
  return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


# Shapes of x and w, inputs, whether w is turned, y and dx as einsum says them.
FORMS = (
  ((2, 3, 4), (4, 5), 1, False, "abi,io->abo", "abo,io->abi"),
  ((2, 3, 4), (4, 5, 6), 1, False, "abi,iop->abop", "abop,iop->abi"),
  ((2, 3, 4, 5), (4, 5, 6), 2, False, "abij,ijo->abo", "abo,ijo->abij"),
  ((2, 3, 4), (5, 4), 1, True, "abi,oi->abo", "abo,oi->abi"),
  ((2, 3, 6), (4, 6), 1, True, "abi,oi->abo", "abo,oi->abi"),
  # An odd width, for which a CPU has the general form of the gradient of a w that is rounded.
  ((2, 3, 5), (5, 4), 1, False, "abi,io->abo", "abo,io->abi"),
)


class DenseTest(parameterized.TestCase):
  def test_dense_contracts_the_named_number_of_axes(self):
    x, w = normal(2, 3, 4, 5), normal(5, 6, 7)
    out = products.dense(x, w, ("batch", "seq", None, None, None))
    hybrids.assert_near(out, np.einsum("abci,ijk->abcjk", x.astype(float), w), TOLERANCE)
    w = normal(4, 5, 6)
    out = products.dense(x, w, ("batch", "seq", "embed"), num_in=2)
    hybrids.assert_near(out, np.einsum("abij,ijk->abk", x.astype(float), w), TOLERANCE)

  def test_dense_computes_in_the_dtype_of_its_input(self):
    x, w = jnp.asarray(normal(2, 3, 4), jnp.bfloat16), normal(4, 5)
    self.assertEqual(products.dense(x, w, ("batch", "seq", "embed")).dtype, jnp.bfloat16)

  @parameterized.parameters(*FORMS)
  def test_values_and_gradients(self, x_shape, w_shape, num_in, turned, forward, backward):
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    axes = ("batch", "seq") + (None,) * (len(w_shape) - num_in)
    y, pull = jax.vjp(lambda x, w: products.dense(x, w, axes, num_in, turned=turned), x, w)
    dy = normal(*y.shape, seed=2)
    dx, dw = pull(dy)
    exact = [z.astype(float) for z in (x, w, dy)]
    hybrids.assert_near(y, np.einsum(forward, exact[0], exact[1]), TOLERANCE)
    hybrids.assert_near(dx, np.einsum(backward, exact[2], exact[1]), TOLERANCE)
    x_axes, w_axes, y_axes = forward.replace("->", ",").split(",")
    hybrids.assert_near(dw, np.einsum(f"{x_axes},{y_axes}->{w_axes}", exact[0], exact[2]), TOLERANCE)

  @parameterized.parameters(None, "bfloat16")
  def test_nothing_is_held_for_the_gradient_of_a_frozen_weight(self, rounded):
    x, w = normal(2, 3, 4), normal(4, 5)
    held = {
      trained: [leaf.shape for leaf in jax.tree.leaves(_pull(x, w, trained, rounded))]
      for trained in (False, True)
    }
    self.assertNotIn(x.shape, held[False])
    self.assertIn(x.shape, held[True])


class RoundedProductTest(parameterized.TestCase):
  """`dense(rounded=...)` against NumPy products of operands that were rounded first."""

  @parameterized.parameters(*FORMS)
  def test_values_and_gradients(self, x_shape, w_shape, num_in, turned, forward, backward):
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    axes = ("batch", "seq") + (None,) * (len(w_shape) - num_in)

    def product(x, w):
      return products.dense(x, w, axes, num_in, turned=turned, rounded="bfloat16")

    y, pull = jax.vjp(product, x, w)
    dy = normal(*y.shape, seed=2)
    dx, dw = pull(dy)

    def near(z):
      return np.asarray(jnp.asarray(z, jnp.bfloat16), float)

    hybrids.assert_near(y, np.einsum(forward, near(x), near(w)), TOLERANCE)
    hybrids.assert_near(dx, np.einsum(backward, near(dy), near(w)), TOLERANCE)
    x_axes, w_axes, y_axes = forward.replace("->", ",").split(",")
    hybrids.assert_near(dw, np.einsum(f"{x_axes},{y_axes}->{w_axes}", near(x), near(dy)), TOLERANCE)
    self.assertGreater(hybrids.distance(y, np.einsum(forward, x.astype(float), w)), 1e-4)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_dtypes_stay_those_of_input_and_weight(self, dtype):
    x, w = jnp.asarray(normal(2, 3, 4), dtype), jnp.asarray(normal(4, 5))
    y, pull = jax.vjp(lambda x, w: products.dense(x, w, ("batch", "seq", None), rounded="bfloat16"), x, w)
    dx, dw = pull(y)
    self.assertEqual((y.dtype, dx.dtype, dw.dtype), (dtype, dtype, jnp.float32))


class DenseEachTest(parameterized.TestCase):
  """`dense_each` against `dense`, in the forms of a CPU and of the other platforms."""

  axes = ("batch", "seq", "heads", "head_dim")
  ws = (normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2), normal(4, 2, 5, seed=3))

  def both(self, platform, ws, **how):
    """y and the gradients of x and ws: of several products, and of one after the other."""

    def run(several):
      def loss(x, ws):
        ys = several(x, ws)
        return sum(jnp.sum(y * y * (i + 1)) for i, y in enumerate(ys)), ys

      with mock.patch.object(jax.lax, "platform_dependent", chosen(platform)):
        (_, ys), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(normal(2, 3, 4), ws)
      return ys, grads

    axes = self.axes[: ws[0].ndim + 1]
    return (
      run(lambda x, ws: products.dense_each(x, ws, axes, **how)),
      run(lambda x, ws: [products.dense(x, w, axes, rounded=how.get("rounded")) for w in ws]),
    )

  @parameterized.product(
    platform=("cpu", "default"), rounded=(None, "bfloat16"), apart=(False, True), count=(1, 2, 3)
  )
  def test_equals_one_product_after_the_other(self, platform, rounded, apart, count):
    got, exact = self.both(platform, self.ws[:count], rounded=rounded, apart=apart)
    # The gradient of x is one sum over all products, or rounded before it is added up.
    tolerance = TOLERANCE if rounded is None else 1e-2
    jax.tree.map(lambda a, b: hybrids.assert_near(a, np.asarray(b, float), tolerance), got, exact)

  @parameterized.parameters("cpu", "default")
  def test_stacked(self, platform):
    got, exact = self.both(platform, [normal(4, 6, seed=i) for i in range(2)], stacked=True)
    jax.tree.map(lambda a, b: hybrids.assert_near(a, np.asarray(b, float), TOLERANCE), got, exact)

  def test_a_result_that_nobody_reads(self):
    x, (one, other, _) = normal(2, 3, 4), self.ws

    def loss(x, one, other):
      return jnp.sum(products.dense_each(x, [one, other], self.axes)[0])

    dx, d_one, d_other = jax.grad(loss, (0, 1, 2))(x, one, other)
    hybrids.assert_near(dx, np.broadcast_to(one.sum((1, 2), dtype=float), x.shape), TOLERANCE)
    hybrids.assert_near(
      d_one, np.broadcast_to(x.sum((0, 1), dtype=float)[:, None, None], one.shape), TOLERANCE
    )
    np.testing.assert_array_equal(d_other, np.zeros_like(other))

  def test_the_form_is_chosen_for_the_platform_that_it_is_compiled_for(self):
    def several(x, ws):
      return products.dense_each(x, ws, self.axes)

    traced = jax.jit(several).trace(normal(2, 3, 4), self.ws[:2])
    count = {p: traced.lower(lowering_platforms=(p,)).as_text().count("dot_general") for p in ("cpu", "tpu")}
    self.assertEqual(count, {"cpu": 2, "tpu": 1})

  def test_nothing_is_held_for_the_gradients_of_frozen_weights(self):
    x = normal(2, 3, 4)

    def held(frozen):
      def several(x, ws):
        return products.dense_each(x, jax.lax.stop_gradient(ws) if frozen else ws, self.axes)

      return [leaf.shape for leaf in jax.tree.leaves(jax.vjp(several, x, self.ws)[1])]

    self.assertNotIn(x.shape, held(True))
    self.assertIn(x.shape, held(False))


def chosen(platform):
  """`jax.lax.platform_dependent` that takes the form of `platform` on whatever it runs."""

  def choose(*args, default, **others):
    return others.get(platform, default)(*args)

  return choose


def _pull(x, w, trained, rounded):
  """The gradient's function of a product, whose leaves are what it holds."""

  def product(x, w):
    w = w if trained else jax.lax.stop_gradient(w)
    return products.dense(x, w, ("batch", "seq", None), rounded=rounded)

  return jax.vjp(product, x, w)[1]
