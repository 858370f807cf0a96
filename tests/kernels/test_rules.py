"""What every rule promises with every implementation: one set of tests for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from tests.kernels import cases
from tests.kernels.cases import (
  every_implementation,
  every_rule,
  every_rule_but_kda,
  every_rule_slowly,
  function,
  jitted,
  quick,
)

# From S = [[1, 2], [3, 4]], q = (1, -1), k = (0.6, 0.8), v = (5, 6), decay 1/2, b = 1/2, on paper.
BY_HAND = {
  # decayed [[.5, 1], [1.5, 2]] answers (1.5, 2.2) to k; error (3.5, 3.8); write (1.75, 1.9)
  "gated_delta": ([[1.55, 2.14], [2.9, 3.52]], [-1.35, -1.38]),
  # write (2.5, 3)
  "gated_hebbian": ([[2.0, 2.8], [3.5, 4.4]], [-1.5, -1.6]),
  # no decay: S answers (3, 4.4); error (2, 1.6); write (1, .8)
  "delta": ([[1.6, 2.48], [3.8, 4.64]], [-2.2, -2.16]),
  # channels decay by (1/2, 1): [[.5, 1], [3, 4]] answers (2.7, 3.8); error (2.3, 2.2); write (1.15, 1.1)
  "kda": ([[1.19, 1.66], [3.92, 4.88]], [-2.73, -3.22]),
  # the same S answers (2.55, 3.5) to e k = (.3, .8); w v = (5, 3); write (2.45, -.5)
  "gdn2": ([[1.97, 0.7], [4.96, 3.6]], [-2.99, -2.9]),
}


@every_rule
@every_implementation
def test_one_token_by_hand(rule, implementation):
  q, k, v = (np.array(x, np.float32).reshape(1, 1, 1, 2) for x in ([1, -1], [0.6, 0.8], [5, 6]))
  g, b = (np.full((1, 1, 1), x, np.float32) for x in (np.log(0.5), 0.5))
  S = np.array([[1, 2], [3, 4]], np.float32)[None, None]
  channels = np.array([[np.log(0.5), 0], [0.5, 1], [1, 0.5]], np.float32).reshape(3, 1, 1, 1, 2)
  gates = {"delta": (b,), "kda": (channels[0], b), "gdn2": tuple(channels)}.get(rule, (g, b))
  o, S = jitted(rule, implementation)(q, k, v, *gates, S)
  want_S, want_o = BY_HAND[rule]
  np.testing.assert_allclose(S[0, 0], want_S, rtol=1e-6)
  np.testing.assert_allclose(o[0, 0, 0], want_o, rtol=1e-6)


@every_rule_slowly
@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.data())
def test_chunks_equal_the_recurrence(rule, data):
  """Outputs and all gradients, whatever the shape: no chunk fits, K differs from V, one row, one token."""
  B, H = data.draw(st.integers(1, 3), "B"), data.draw(st.integers(1, 3), "H")
  T = data.draw(st.sampled_from([1, 2, 9, 31, 64, 65, 97, 130]), "T")
  K, V = data.draw(st.integers(1, 9), "K"), data.draw(st.integers(1, 9), "V")
  inputs = cases.random_inputs(rule, B, T, H, K, V, seed=data.draw(st.integers(0, 99), "seed"))
  got = cases.outputs_and_gradients(function(rule, "xla"), inputs)
  cases.assert_near(got, cases.double(rule, inputs), 1e-5)


@every_rule_but_kda
@pytest.mark.parametrize("decay", [20.0, 200.0])
def test_strong_decay_keeps_its_digits(rule, decay):
  """Sums of g = -20 and stronger lose the digits of the weak decays between them; ours do not."""
  inputs = cases.random_inputs(rule, 1, 70, 2, 6, 5, decay=decay)
  if rule != "delta":
    inputs[3][:, ::3] = -1e-3
  got = cases.outputs_and_gradients(function(rule, "xla"), inputs)
  cases.assert_near(got, cases.double(rule, inputs), 5e-6)


@pytest.mark.parametrize(
  "rule", ["gated_delta", "gated_hebbian", "gdn2", pytest.param("kda", marks=pytest.mark.slow)]
)
@every_implementation
def test_infinite_decay_forgets_everything(rule, implementation):
  *tokens, S = cases.random_inputs(rule, 1, 9, 1, 4, 3)
  g = tokens[3]
  g[:, 5] = -np.inf
  o, S_after, *grads = cases.outputs_and_gradients(function(rule, implementation), [*tokens, S])
  g[:, 5] = 0
  o_new, S_new = jitted(rule, implementation)(*(x[:, 5:] for x in tokens), 0 * S)
  cases.assert_near([o[:, 5:], S_after], [np.asarray(o_new), np.asarray(S_new)], 2e-6)
  assert all(np.all(np.isfinite(x)) for x in grads)


@every_rule_but_kda
@every_implementation
def test_a_sequence_in_two_parts_is_the_sequence(rule, implementation):
  f = jitted(rule, implementation)
  *tokens, S = cases.random_inputs(rule, 2, 74, 2, 6, 5)
  whole = [np.asarray(x) for x in f(*tokens, S)]
  o1, S_half = f(*(x[:, :37] for x in tokens), S)
  o2, S_parts = f(*(x[:, 37:] for x in tokens), S_half)
  cases.assert_near([np.concatenate([o1, o2], 1), S_parts], whole, 2e-6)


@every_rule_but_kda
@every_implementation
def test_the_future_cannot_be_seen(rule, implementation):
  """The gradient of o_t with respect to later tokens is 0, exactly; with respect to v_t it is not."""
  *tokens, S = cases.random_inputs(rule, 1, 70, 1, 4, 3)
  for gate in tokens[4 if rule != "delta" else 3 :]:
    gate[:] = 0.5
  f = function(rule, implementation)
  grad = quick(jax.grad(lambda tokens, t: jnp.sum(f(*tokens, S)[0][:, t])))
  for t in (3, 66):
    grads = grad(tokens, t)
    for x in grads:
      np.testing.assert_array_equal(x[:, t + 1 :], 0)
    assert np.all(grads[2][:, t] != 0)


@every_rule_but_kda
@every_implementation
def test_pads_leave_no_trace(rule, implementation):
  """All pads: S keeps every bit. Pads on the left: the row is the row without them. No gradient at pads."""
  *tokens, S = cases.random_inputs(rule, 2, 70, 2, 6, 5)
  mask = np.ones((2, 70), bool)
  mask[0], mask[1, :33] = False, False

  @quick
  @functools.partial(jax.grad, argnums=tuple(range(len(tokens))), has_aux=True)
  def run(*x):
    o, S = function(rule, implementation)(*x, mask=mask)
    return jnp.sum(jnp.where(mask[..., None, None], o, 0)) + jnp.sum(S), (o, S)

  grads, (o, S_after) = run(*tokens, S)
  np.testing.assert_array_equal(S_after[0], S[0])
  alone = jitted(rule, implementation)(*(x[1:, 33:] for x in tokens), S[1:])
  cases.assert_near([o[1:, 33:], S_after[1:]], [np.asarray(x) for x in alone], 2e-6)
  for x in grads:
    np.testing.assert_array_equal(x[0], 0)
    np.testing.assert_array_equal(x[1, :33], 0)
    assert np.any(x[1, 33:] != 0)


@every_rule_but_kda
def test_b_of_zero_writes_nothing_and_has_a_gradient(rule):
  """d b is <what the write would have been, its gradient>: not 0 / 0."""
  inputs = cases.random_inputs(rule, 1, 10, 1, 4, 3)
  inputs[-2][:] = 0
  got = cases.outputs_and_gradients(function(rule, "xla"), inputs)
  want = cases.double(rule, inputs)
  cases.assert_near(got[:3] + got[-2:], want[:3] + want[-2:], 2e-6)
  assert np.all(got[-2] != 0)


@every_rule_but_kda
@every_implementation
def test_half_precision_in_and_out_state_in_float32(rule, implementation):
  """bfloat16 rounds what goes in and what comes out; in between nothing is rounded to it."""
  q, k, v, *gates, S = cases.random_inputs(rule, 1, 70, 2, 6, 5)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
  o, S_after, dq, dk, dv, *rest = cases.outputs_and_gradients(
    function(rule, implementation), [q, k, v, *gates, S]
  )
  assert o.dtype == dq.dtype == dk.dtype == dv.dtype == jnp.bfloat16
  assert S_after.dtype == np.float32 and all(x.dtype == np.float32 for x in rest)
  want = jitted(rule, "reference")(*(x.astype(jnp.float32) for x in (q, k, v)), *gates, S)
  cases.assert_near([S_after], [np.asarray(want[1])], 2e-6)
  cases.assert_near([o], [np.asarray(want[0])], 2.0**-8)


@every_rule_slowly
def test_transformations_change_nothing(rule):
  """vmap, remat, a loop and a scan over the rule give what plain calls give, gradients too."""
  f = function(rule, "xla")
  one, two = (cases.random_inputs(rule, 1, 12, 2, 6, 5, seed=seed) for seed in (0, 1))

  def loss(inputs, passes="none"):
    *tokens, S = inputs
    if passes == "loop":
      for _ in range(3):
        _, S = f(*tokens, S)
    elif passes == "scan":
      S, _ = jax.lax.scan(lambda S, _: (f(*tokens, S)[1], None), S, length=3)
    o, S = jax.checkpoint(f)(*tokens, S) if passes == "remat" else f(*tokens, S)
    return jnp.sum(jnp.sin(o)) + jnp.sum(S**2)

  def grad(inputs, passes="none"):
    return [np.asarray(x) for x in quick(jax.grad(functools.partial(loss, passes=passes)))(inputs)]

  plain = grad(one)
  cases.assert_near(grad(one, "remat"), plain, 2e-6)
  cases.assert_near(grad(one, "scan"), grad(one, "loop"), 2e-6)
  stacked = [np.stack(x) for x in zip(one, two, strict=True)]
  both = [np.stack(x) for x in zip(plain, grad(two), strict=True)]
  cases.assert_near(quick(jax.vmap(jax.grad(loss)))(stacked), both, 2e-6)


@every_rule_but_kda
@every_implementation
def test_gradients_equal_finite_differences(rule, implementation):
  with jax.enable_x64(True):
    inputs = cases.random_inputs(rule, 1, 5, 1, 3, 2, dtype=np.float64)
    check_grads(jax.jit(function(rule, implementation)), inputs, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@every_rule_slowly
def test_second_derivatives_and_where_forward_mode_ends(rule):
  """Reverse and forward mode over reverse mode agree with the reference's; forward mode alone says no."""
  inputs = cases.random_inputs(rule, 1, 5, 1, 3, 2)
  direction = cases.random_inputs(rule, 1, 5, 1, 3, 2, seed=7)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def along(implementation, mode):
    grad = jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in function(rule, implementation)(*x)))
    if mode == "forward":
      return jax.jvp(grad, (inputs,), (direction,))[1]
    return jax.grad(lambda x: sum(map(jnp.vdot, grad(x), direction)))(inputs)

  want = [np.asarray(x) for x in along("reference", "reverse")]
  for mode in ("reverse", "forward"):
    cases.assert_near(along("xla", mode), want, 1e-5)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(function(rule, "xla"), tuple(inputs), tuple(direction))


@every_rule_slowly
def test_forward_mode_of_the_reference_and_the_hessian_of_the_default(rule):
  """jvp, linearize and jacfwd are the adjoint of the default; a hessian is forward over reverse."""
  inputs = jax.device_put(tuple(cases.random_inputs(rule, 1, 3, 1, 2, 3)))
  direction = jax.device_put(tuple(cases.random_inputs(rule, 1, 3, 1, 2, 3, seed=7)))
  slow, fast = (function(rule, name) for name in ("reference", "xla"))
  out, moved = quick(lambda x, d: jax.jvp(slow, x, d))(inputs, direction)
  _, pull = jax.vjp(jax.jit(fast), *inputs)
  pairs = zip(pull(out), direction, strict=True)
  forward, reverse = sum(map(jnp.vdot, out, moved)), sum(jnp.vdot(x, d) for x, d in pairs)
  np.testing.assert_allclose(forward, reverse, rtol=1e-5)
  cases.assert_near(jax.linearize(slow, *inputs)[1](*direction), [np.asarray(x) for x in moved], 1e-6)

  def loss(f, k):
    o, S = f(inputs[0], k, *inputs[2:])
    return jnp.sum(jnp.sin(o)) + jnp.sum(S**2)

  k = inputs[1]
  slope = quick(jax.jacfwd(functools.partial(loss, slow)))(k)
  cases.assert_near([slope], [np.asarray(quick(jax.jacrev(functools.partial(loss, fast)))(k))], 1e-5)
  hessians = [quick(jax.hessian(functools.partial(loss, f)))(k) for f in (fast, slow)]
  cases.assert_near(hessians[:1], [np.asarray(hessians[1])], 1e-5)
