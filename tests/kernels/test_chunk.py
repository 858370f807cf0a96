"""The chunked form's own parts: the inverse, the plans that must not change a result, what remat may keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.kernels.common import chunked_channel, chunked_head, tiling
from sleep_jax.kernels.gated_delta import gated_delta
from tests.kernels import cases


@pytest.mark.parametrize("C", [1, 2, 7, 8, 9, 24, 38, 63, 64])
def test_inverse(C):
  """Against NumPy in float64, on triangles whose inverses have entries up to about 20."""
  A = np.tril(np.random.default_rng(C).normal(size=(3, 2, C, C)) * 0.3, -1).astype(np.float32)
  got = cases.quick(tiling.unit_lower_inverse)(A)
  want = np.linalg.inv(np.eye(C) + A.astype(np.float64))
  np.testing.assert_array_equal(np.triu(got, 1), 0)
  cases.assert_near([got], [want], 2e-6)


@pytest.mark.parametrize(
  ("solve", "T"), [(False, 12), (True, 75), pytest.param(False, 75, marks=pytest.mark.slow)]
)
def test_the_plan_changes_no_result(solve, T):
  """In one piece or in blocks of rows, chunk by chunk or prepared together: the same sums."""
  inputs = cases.random_inputs("gated_delta", 6, T, 2, 5, 4)

  def run(plan):
    return cases.outputs_and_gradients(functools.partial(chunked_head.chunked, plan=plan), inputs)

  want = run(chunked_head.Plan(solve, hoist=False, block=6))
  for plan in (
    chunked_head.Plan(solve, hoist=False, block=2),
    chunked_head.Plan(solve, hoist=False, block=4),
    chunked_head.Plan(solve, hoist=True, block=6),
  ):
    cases.assert_near(run(plan), want, 2e-6)


@pytest.mark.parametrize(
  "other",
  [
    pytest.param({"hoist": True}, id="hoist"),
    pytest.param({"block": 2, "max_chunk": 5}, marks=pytest.mark.slow, id="blocks"),
  ],
)
def test_the_plan_changes_no_result_with_a_decay_per_channel(other):
  """As above; 17 tokens in two chunks of 9, in pieces of 5, against chunks of 5, in one piece each."""
  inputs = cases.random_inputs("gdn2", 3, 17, 2, 5, 4)
  q, k, v, g, e, w, S = inputs

  def run(plan):
    return cases.outputs_and_gradients(
      functools.partial(chunked_channel.chunked, plan=plan), [q, k, w * v, g, e * k, S]
    )

  plan = chunked_channel.Plan(solve=True, hoist=False, block=3, max_chunk=9)
  cases.assert_near(run(plan._replace(**other)), run(plan), 2e-6)


def test_blocks_divide_the_batch_and_fit_the_cache():
  def block(B, T, H, K, V):
    q, v, S = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((B, T, H, K), (B, T, H, V), (B, H, K, V)))
    return tiling.make_plan(q, v, S, solve=True).block

  assert block(128, 12, 1, 64, 64) == 128  # a few caches' worth stays in one piece
  assert block(1, 2000, 12, 96, 256) == 1
  for B in (512, 96, 500):
    m = block(B, 24, 4, 64, 64)
    assert B % m == 0 and 1 < m < B
  m = block(509, 24, 4, 64, 64)  # a prime: less than a row a block is padded
  assert 1 < m < 509 and -509 % m < -(-509 // m)


def test_remat_can_keep_the_outputs_by_name():
  """With the two names saved the rule's forward pass is not run again: one loop over chunks less."""
  inputs = [jnp.asarray(x) for x in cases.random_inputs("gated_delta", 1, 130, 1, 4, 4)]

  def layer(x):
    q, k, v, g, b, S = inputs
    o, S = gated_delta(q * x, k, v, g, b, S)
    return jnp.sum(jnp.sin(o)) + jnp.sum(S**2)  # sin needs o on the way back

  def loops(policy) -> int:
    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(1.0))
    return text.count("name=_forward")

  names = jax.checkpoint_policies.save_only_these_names("fast_weight_o", "fast_weight_S")
  assert (loops(None), loops(names)) == (2, 1)
