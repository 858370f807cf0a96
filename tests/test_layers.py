"""Small layers against the NumPy oracle, and what they promise of dtypes, zeros and splits."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax import layers
from sleep_jax.config import RopeScaling
from tests import hybrids, oracle

TOLERANCE = 2e-6  # float32 sums of some ten terms: a few times 2^-24, relative to the largest entry


def normal(*shape, seed=0):
  return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


class NormTest(parameterized.TestCase):
  @parameterized.parameters(1e-6, 1e-5, 0.5)
  def test_rms_norm(self, eps):
    x, w = normal(2, 3, 8), normal(8)
    hybrids.assert_near(layers.rms_norm(x, w, eps), oracle.rms_norm(x.astype(float), w, eps), TOLERANCE)

  def test_rms_norm_multiplies_by_its_weight_before_it_rounds(self):
    x, w = jnp.asarray(normal(4, 8), jnp.bfloat16), normal(8)
    got = layers.rms_norm(x, w, 1e-6)
    self.assertEqual(got.dtype, jnp.bfloat16)
    exact = oracle.rms_norm(np.asarray(x, float), w, 1e-6)
    np.testing.assert_array_equal(got, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
    early = jnp.asarray(oracle.rms_norm(np.asarray(x, float), 1.0, 1e-6), jnp.bfloat16)
    self.assertTrue(np.any(np.asarray(got) != np.asarray((early * w).astype(jnp.bfloat16))))

  def test_l2_normalize(self):
    x = normal(2, 3, 8)
    exact = x / np.sqrt(np.sum(x.astype(float) ** 2, axis=-1, keepdims=True) + 1e-6)
    hybrids.assert_near(layers.l2_normalize(x), exact, TOLERANCE)
    self.assertEqual(layers.l2_normalize(x.astype(jnp.bfloat16)).dtype, jnp.bfloat16)

  @parameterized.parameters(layers.l2_normalize, lambda x: layers.rms_norm(x, 1.0, 1e-6))
  def test_zero_stays_zero_with_a_finite_gradient(self, norm):
    x = jnp.zeros((1, 4))
    np.testing.assert_array_equal(norm(x), 0)
    slope = jax.jacobian(lambda x: norm(x)[0])(x)
    np.testing.assert_allclose(slope[:, 0], 1e3 * np.eye(4), rtol=1e-5)  # 1 / sqrt(1e-6)

  @parameterized.parameters(1e15, 1e-30)
  def test_far_from_one_nothing_becomes_infinite(self, size):
    x = jnp.full((1, 4), size)
    self.assertTrue(np.all(np.isfinite(layers.rms_norm(x, 1.0, 1e-6))))
    self.assertTrue(np.all(np.isfinite(layers.l2_normalize(x))))


class RopeTest(parameterized.TestCase):
  def test_scaled_frequencies_by_hand(self):
    """Pairs that turn 8 to 1/2 times in 100 tokens: 4 leave an angle as it is, 1 divides it by 10."""
    turns = np.array([8.0, 4.0, 2.0, 1.0, 0.5])
    frequencies = jnp.asarray(turns * 2 * np.pi / 100, jnp.float32)
    linear = layers.scaled(frequencies, RopeScaling("linear", 10.0))
    np.testing.assert_allclose(linear, frequencies / 10, rtol=1e-6)
    llama = layers.scaled(frequencies, RopeScaling("llama3", 10.0, low=1.0, high=4.0, original=100))
    np.testing.assert_allclose(llama / frequencies, [1, 1, 1 / 3 + 2 / 3 / 10, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(layers.scaled(frequencies, RopeScaling()), frequencies)

  @parameterized.product(theta=(100.0, 10_000.0), start=(0, 7), known=(False, True))
  def test_equals_the_oracle(self, theta, start, known):
    x = normal(2, 5, 3, 8)
    got = layers.rope(x, start + (np if known else jnp).arange(5), theta)
    exact = np.stack(
      [
        np.stack([oracle.rope(x[:, t, j].astype(float), start + t, theta) for j in range(3)], axis=1)
        for t in range(5)
      ],
      axis=1,
    )
    hybrids.assert_near(got, exact, TOLERANCE)

  def test_known_places_leave_no_sine_to_the_program(self):
    x, many = normal(1, 5, 1, 8), layers.KNOWN_ANGLES // 4 + 1

    def text(length, places):
      turned = jax.jit(lambda x: layers.rope(x, places.arange(length), 1e4))
      return turned.lower(jax.ShapeDtypeStruct((1, length, 1, 8), np.float32)).as_text()

    self.assertNotIn("cosine", text(5, np))
    self.assertIn("cosine", text(5, jnp))
    self.assertIn("cosine", text(many, np))  # or the program would hold all of them
    scaling = RopeScaling("linear", 10.0)
    for said in (None, scaling):
      one, other = (layers.rope(x, places.arange(5), 1e4, said) for places in (np, jnp))
      hybrids.assert_near(one, np.asarray(other, float), TOLERANCE)

  def test_products_depend_on_the_distance_alone(self):
    q, k = normal(1, 1, 1, 8, seed=1), normal(1, 1, 1, 8, seed=2)

    def product(i, j):
      turned = [layers.rope(x, jnp.array([at]), 100.0) for x, at in ((q, i), (k, j))]
      return float(jnp.sum(turned[0] * turned[1]))

    self.assertAlmostEqual(product(5, 2), product(23, 20), places=4)
    self.assertGreater(abs(product(5, 2) - product(5, 3)), 1e-2)

  def test_keeps_bfloat16(self):
    self.assertEqual(
      layers.rope(jnp.ones((1, 2, 1, 4), jnp.bfloat16), jnp.arange(2), 1e4).dtype, jnp.bfloat16
    )


class ProductTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_silu_and_its_gradient(self, dtype):
    x = jnp.asarray(np.linspace(-30, 30, 121), dtype)
    y, pull = jax.vjp(layers.silu, x)
    exact = np.asarray(x, float)
    sigmoid = 1 / (1 + np.exp(-exact))
    tolerance = 2e-6 if dtype == jnp.float32 else 1e-2
    hybrids.assert_near(y, exact * sigmoid, tolerance)
    hybrids.assert_near(pull(jnp.ones_like(y))[0], sigmoid * (1 + exact * (1 - sigmoid)), tolerance)
    self.assertEqual((y.dtype, pull(y)[0].dtype), (dtype, dtype))
    self.assertEqual([leaf.shape for leaf in jax.tree.leaves(pull)], [x.shape])  # x is all that is held

  def test_swiglu(self):
    x = normal(2, 3, 4)
    p = {"gate": normal(4, 6, seed=1), "up": normal(4, 6, seed=2), "down": normal(6, 4)}
    hybrids.assert_near(layers.swiglu(p, x), oracle.mlp(oracle.as_float64(p), x.astype(float)), TOLERANCE)

  def test_swiglu_rounds_the_operands_of_all_its_products(self):
    x = normal(2, 3, 4)
    p = {"gate": normal(4, 6, seed=1), "up": normal(4, 6, seed=2), "down": normal(6, 4)}
    exact = layers.swiglu(p, x)
    got = layers.swiglu(p, x, rounded="bfloat16")
    self.assertGreater(hybrids.distance(got, exact), 1e-4)
    hybrids.assert_near(got, np.asarray(exact, float), 2e-2)


class ShortConvTest(parameterized.TestCase):
  @parameterized.product(taps=(1, 2, 4), length=(1, 2, 6))
  def test_equals_the_oracle(self, taps, length):
    x, w, context = normal(2, length, 3, 5), normal(taps, 3, 5), normal(2, taps - 1, 3, 5)
    y, left = layers.short_conv(x, w, context)
    exact, exact_left = oracle.short_convolution(x.astype(float), w, context)
    hybrids.assert_near(y, exact, TOLERANCE)
    np.testing.assert_array_equal(left, exact_left.astype(np.float32))

  @parameterized.parameters(1, 2, 5)
  def test_split_in_two_it_is_the_same(self, cut):
    x, w, context = normal(2, 6, 3, 5), normal(4, 3, 5), normal(2, 3, 3, 5)
    y, left = layers.short_conv(x, w, context)
    first, between = layers.short_conv(x[:, :cut], w, context)
    second, end = layers.short_conv(x[:, cut:], w, between)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), y)
    np.testing.assert_array_equal(end, left)

  def test_bfloat16_is_summed_in_float32(self):
    x, w, context = normal(2, 6, 3, 5), normal(4, 3, 5), np.zeros((2, 3, 3, 5), np.float32)
    x16, context16 = jnp.asarray(x, jnp.bfloat16), jnp.asarray(context, jnp.bfloat16)
    y, left = layers.short_conv(x16, w, context16)
    self.assertEqual((y.dtype, left.dtype), (jnp.bfloat16, jnp.bfloat16))
    wide, _ = layers.short_conv(x16.astype(jnp.float32), w, context)
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
