"""The N passes against plain Python loops over a toy block."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax.sleep import loop, read_and_sleep, sleep

FORMS = {"scan": False, "unroll": True}


def toy_blocks(w, h, S):
  """One pass that reads S, writes S and mixes h: every order of operations gives other numbers."""
  S = {"S": 0.9 * S["S"] + jnp.einsum("btk,btv->bkv", h, jnp.tanh(h @ w["write"])), "steps": S["steps"] + 1}
  return jnp.tanh(h + jnp.einsum("btk,bkv->btv", h @ w["read"], S["S"])), S


def passes(blocks, h, S, **how):
  """`sleep` with passes that have nothing to themselves: h and S."""
  h, S, per_pass = sleep(lambda h, S, private: (*blocks(h, S), private), h, S, **how)
  assert per_pass == {}
  return h, S


def plain_loop(w, h, S, num_passes):
  for _ in range(num_passes):
    h, S = toy_blocks(w, h, S)
  return h, S


class ToyTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
      return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    self.w = {"write": normal(4, 4, scale=0.5), "read": normal(4, 4, scale=0.5)}
    self.h, self.S = normal(2, 3, 4), {"S": normal(2, 4, 4), "steps": jnp.zeros(())}
    self.c_h, self.c_S = normal(2, 3, 4), normal(2, 4, 4)

  def total(self, h, S):
    """A scalar that every entry of h and S enters with a weight of its own."""
    return jnp.sum(self.c_h * h) + jnp.sum(self.c_S * S["S"])


class SleepTest(ToyTest):
  def gradients(self, run):
    """Of `total(run(w, h, S))` by w, h and S."""
    return jax.grad(lambda w, h, S: self.total(*run(w, h, S)), argnums=(0, 1, 2))(self.w, self.h, self.S)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.product(num_passes=(1, 2, 4), remat=(True, False), form=tuple(FORMS))
  def test_equals_a_plain_loop(self, num_passes, remat, form):
    def run(w, h, S):
      blocks = functools.partial(toy_blocks, w)
      return passes(blocks, h, S, num_passes=num_passes, remat=remat, unroll=FORMS[form])

    got, expected = self.variant(run)(self.w, self.h, self.S), plain_loop(self.w, self.h, self.S, num_passes)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, (self.h, self.S))
    self.assertEqual(float(got[1]["steps"]), num_passes)
    # The same float32 operations; a compiler may fuse them into others: some units in the last place.
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)

  @parameterized.product(num_passes=(3,), remat=(True, False), form=tuple(FORMS))
  def test_gradients_equal_those_of_a_plain_loop(self, num_passes, remat, form):
    def run(w, h, S):
      blocks = functools.partial(toy_blocks, w)
      return passes(blocks, h, S, num_passes=num_passes, remat=remat, unroll=FORMS[form])

    # In float64: in float32 an entry near 0 has the rounding of terms up to 17, by the order of a compiler.
    with jax.enable_x64(True):
      for name in ("w", "h", "S", "c_h", "c_S"):
        setattr(self, name, jax.tree.map(lambda x: x.astype(jnp.float64), getattr(self, name)))
      expected = self.gradients(functools.partial(plain_loop, num_passes=num_passes))
      chex.assert_trees_all_equal_dtypes(expected, (self.w, self.h, self.S))
      chex.assert_trees_all_close(self.gradients(run), expected, rtol=1e-10, atol=1e-10)

  @parameterized.product(backprop_passes=(1, 2, 3, 4), form=tuple(FORMS))
  def test_truncation_changes_no_bit_of_the_value(self, backprop_passes, form):
    run = functools.partial(
      passes, functools.partial(toy_blocks, self.w), self.h, self.S, num_passes=4, unroll=FORMS[form]
    )
    got, expected = run(backprop_passes=backprop_passes), run()
    if form == "scan" and backprop_passes in (1, 3):  # a single pass is not compiled as part of a scan
      chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    else:
      chex.assert_trees_all_equal(got, expected)

  def test_truncation_keeps_bits_that_a_sum_and_difference_would_lose(self):
    """1 + (1e8 - 1e8) and not (1 - 1e8) + 1e8, which is 0 in float32."""
    start = {"S": jnp.full((1,), 1e8, jnp.float32), "steps": jnp.zeros(())}

    def forget(h, S):
      return h, {"S": jnp.ones((1,)), "steps": S["steps"] + 1}

    _, S = passes(forget, jnp.zeros(()), start, num_passes=2, backprop_passes=1)
    self.assertEqual(float(S["S"][0]), 1.0)

  @parameterized.product(truncated=((2, 1), (4, 3)), remat=(True, False), form=tuple(FORMS))
  def test_truncated_gradients_equal_a_composition_by_hand(self, truncated, remat, form):
    """The first N - k passes ran somewhere else: what they wrote is an array, added to S on entry."""
    num_passes, k = truncated
    early_h, early_S = plain_loop(self.w, self.h, self.S, num_passes - k)
    written = early_S["S"] - self.S["S"]

    def by_hand(w, h, S):
      h = early_h + 0 * jax.lax.stop_gradient(h)
      return plain_loop(w, h, S | {"S": S["S"] + written}, k)

    def run(w, h, S):
      blocks = functools.partial(toy_blocks, w)
      return passes(blocks, h, S, num_passes=num_passes, backprop_passes=k, remat=remat, unroll=FORMS[form])

    got, expected = self.gradients(run), self.gradients(by_hand)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)  # `written` was rounded once more
    np.testing.assert_array_equal(got[1], 0)  # nothing flows through h past a pass that is a constant
    self.assertGreater(float(jnp.abs(got[2]["S"]).min()), 0)  # and everything through S

  @parameterized.parameters(*FORMS)
  def test_the_gradient_by_the_first_S_passes_constants_unchanged(self, form):
    """A last pass that keeps the share `add` of S: what comes in at the other end is scaled by it, once."""

    def overwrite(h, S):
      return jnp.tanh(h), {"S": jnp.einsum("btk,btv->bkv", h, h), "steps": S["steps"]}

    def by_S(num_passes, k, add):
      def blocks(h, S):
        h, new = overwrite(h, S)
        return h, new | {"S": new["S"] + add * S["S"]}

      def run(w, h, S):
        del w
        return passes(blocks, h, S, num_passes=num_passes, backprop_passes=k, unroll=FORMS[form])

      return self.gradients(run)[2]["S"]

    np.testing.assert_array_equal(by_S(3, 1, add=0.0), jnp.zeros_like(self.c_S))  # the last pass overwrites
    np.testing.assert_allclose(by_S(3, 3, add=0.5), self.c_S / 8, rtol=1e-6)
    np.testing.assert_allclose(by_S(3, 1, add=0.5), self.c_S / 2, rtol=1e-6)  # two passes are constants

  def test_all_passes_is_no_truncation(self):
    def run(k):
      return self.gradients(
        lambda w, h, S: passes(functools.partial(toy_blocks, w), h, S, num_passes=3, backprop_passes=k)
      )

    chex.assert_trees_all_equal(run(3), run(None))
    self.assertGreater(float(jnp.abs(run(3)[1]).max()), 0)

  @parameterized.product(form=tuple(FORMS), remat=(True, False))
  def test_bfloat16_hidden_states_beside_a_float32_state(self, form, remat):
    def blocks(h, S):
      h, S = toy_blocks(self.w, h.astype(jnp.float32), S)
      return h.astype(jnp.bfloat16), S

    h, S = passes(blocks, self.h.astype(jnp.bfloat16), self.S, num_passes=2, remat=remat, unroll=FORMS[form])
    self.assertEqual((h.dtype, S["S"].dtype), (jnp.bfloat16, jnp.float32))

  @parameterized.parameters(
    ({"num_passes": 0}, "num_passes must be at least 1, got 0"),
    ({"num_passes": -2}, "got -2"),
    ({"num_passes": 2, "backprop_passes": 0}, r"backprop_passes must lie in 1\.\.2, got 0"),
    ({"num_passes": 2, "backprop_passes": 3}, r"1\.\.2, got 3"),
  )
  def test_wrong_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      passes(functools.partial(toy_blocks, self.w), self.h, self.S, **arguments)

  @parameterized.product(
    num_passes=(1, 2),
    form=tuple(FORMS),
    remat=(True, False),
    change=("dtype of S", "shape of S", "dtype of h", "shape of h", "structure of S"),
  )
  def test_a_pass_that_changes_a_type_is_refused(self, num_passes, form, remat, change):
    def blocks(h, S):
      h, S = toy_blocks(self.w, h, S)
      if change == "dtype of S":
        S["S"] = S["S"].astype(jnp.bfloat16)
      elif change == "shape of S":
        S["S"] = S["S"][:, None]
      elif change == "dtype of h":
        h = h.astype(jnp.bfloat16)
      elif change == "shape of h":
        h = h[:1]
      else:
        del S["steps"]
      return h, S

    with self.assertRaises(TypeError):
      passes(blocks, self.h, self.S, num_passes=num_passes, remat=remat, unroll=FORMS[form])


class ReadAndSleepTest(ToyTest):
  """The first pass is also the reading; everything else is `sleep`."""

  def run_both(self, w, h, S, **how):
    """What is read (h after the first pass), h and S."""

    def read(h, S, private):
      h, S = toy_blocks(w, h, S)
      return (h, S, private), h

    blocks = functools.partial(toy_blocks, w)
    y, h, S, per_pass = read_and_sleep(read, lambda h, S, private: (*blocks(h, S), private), h, S, **how)
    assert per_pass == {}
    return y, h, S

  @parameterized.product(num_passes=(1, 2, 4), remat=(True, False), form=tuple(FORMS))
  def test_reads_once_and_sleeps_as_ever(self, num_passes, remat, form):
    how = {"num_passes": num_passes, "remat": remat, "unroll": FORMS[form]}
    y, h, S = self.run_both(self.w, self.h, self.S, **how)
    chex.assert_trees_all_close((h, S), plain_loop(self.w, self.h, self.S, num_passes), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(y, toy_blocks(self.w, self.h, self.S)[0], rtol=1e-5, atol=1e-6)
    self.assertEqual(float(S["steps"]), num_passes)  # N passes, not N + 1

  @parameterized.product(of=((4, 3), (4, 1), (1, 1)), form=tuple(FORMS), remat=(True,))
  def test_gradients_are_those_of_reading_and_of_sleeping(self, of, form, remat):
    """The reading's whole, the sleep's as truncated: the sum of the two, each computed by itself."""
    num_passes, k = of
    how = {"num_passes": num_passes, "backprop_passes": k, "remat": remat, "unroll": FORMS[form]}

    def together(w, h, S):
      y, h, S = self.run_both(w, h, S, **how)
      return jnp.sum(jnp.sin(y)) + self.total(h, S)

    def apart(w, h, S):
      blocks = functools.partial(toy_blocks, w)
      return jnp.sum(jnp.sin(blocks(h, S)[0])) + self.total(*passes(blocks, h, S, **how))

    got, expected = (jax.grad(f, argnums=(0, 1, 2))(self.w, self.h, self.S) for f in (together, apart))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)

  def test_each_pass_keeps_its_own(self):
    """`per_pass` in order, the first pass's in front."""

    def blocks(h, S, private):
      return h, S, private + h

    y, _, _, private = read_and_sleep(
      lambda *x: (blocks(*x), x[2]), blocks, jnp.ones(()), jnp.zeros(()), jnp.arange(3.0), num_passes=3
    )
    self.assertEqual(float(y), 0.0)
    np.testing.assert_array_equal(private, [1, 2, 3])


class LoopTest(parameterized.TestCase):
  @parameterized.product(length=(1, 2, 5), form=tuple(FORMS))
  def test_is_scan(self, length, form):
    def body(carry, x):
      return 0.5 * carry + x["a"], {"seen": carry, "double": 2 * x["a"]}

    xs = {"a": jnp.arange(1.0, length + 1), "none": None}
    got = loop(body, jnp.ones(()), xs, length=length, unroll=FORMS[form])
    carry, seen = 1.0, []
    for x in range(1, length + 1):
      seen.append(carry)
      carry = 0.5 * carry + x
    self.assertEqual(float(got[0]), carry)
    np.testing.assert_array_equal(got[1]["seen"], seen)
    np.testing.assert_array_equal(got[1]["double"], 2 * np.arange(1, length + 1))

  @parameterized.product(length=(1, 2), form=tuple(FORMS))
  def test_a_number_of_no_fixed_type_may_start_it(self, length, form):
    """A scan makes weak types, as those of `jnp.full(shape, 1.0)`, strong; so may a loop written out."""
    carry, _ = loop(
      lambda x, _: (x * jnp.ones((2,), jnp.float32), None),
      jnp.full((2,), 3.0),
      length=length,
      unroll=FORMS[form],
    )
    np.testing.assert_array_equal(carry, [3, 3])
