"""The TPU kernels, interpreted on a CPU: outputs and gradients against the recurrence in float64, no races.

Whether the TPU's own compiler takes them is asked in test_pallas_tpu_aot.py.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sleep_jax.kernels.gated_delta import pallas_tpu, pallas_tpu_parts
from tests.kernels import cases
from tests.kernels.test_golden import GOLDEN, arrays, l2_normalised

interpreted = functools.partial(pallas_tpu.gated_delta, interpret=True)


@pytest.mark.parametrize(
  "shape",
  [
    (2, 5, 3, 4, 3),
    (1, 20, 2, 6, 5),
    pytest.param((1, 1, 1, 2, 2), marks=pytest.mark.slow),
    pytest.param((1, 300, 2, 16, 24), marks=pytest.mark.slow),
    pytest.param((11, 40, 1, 8, 17), marks=pytest.mark.slow),  # 11 rows: padded to 16
  ],
)
def test_equals_the_recurrence(shape):
  """Outputs and all gradients; no chunk fits, K differs from V, a tenth of b is exactly 0."""
  inputs = cases.random_inputs("gated_delta", *shape)
  cases.assert_near(
    cases.outputs_and_gradients(interpreted, inputs), cases.double("gated_delta", inputs), 1e-5
  )


def test_b_of_zero_writes_nothing_and_has_a_gradient():
  inputs = cases.random_inputs("gated_delta", 1, 10, 1, 4, 3)
  inputs[4][:] = 0
  got, want = cases.outputs_and_gradients(interpreted, inputs), cases.double("gated_delta", inputs)
  cases.assert_near(got[:3] + got[-2:], want[:3] + want[-2:], 2e-6)
  assert np.all(got[-2] != 0)


def test_strong_decay_keeps_its_digits():
  inputs = cases.random_inputs("gated_delta", 1, 40, 1, 6, 5, decay=200.0)
  inputs[3][:, ::3] = -1e-3
  inputs[3][:, 7] = -np.inf
  finite = [np.where(np.isinf(x), -1e4, x).astype(x.dtype) for x in inputs]
  cases.assert_near(
    cases.outputs_and_gradients(interpreted, inputs), cases.double("gated_delta", finite), 5e-6
  )


def inverse(A, dtype):
  found = []

  def task():
    found.append((yield from pallas_tpu_parts.unit_lower_inverse(A, dtype)))

  pallas_tpu_parts.in_step([task()])
  return found[0]


@pytest.mark.parametrize("C", [16, 32, 128])
def test_inverse(C):
  A = np.tril(np.random.default_rng(C).normal(size=(C, C)) * 0.3, -1).astype(np.float32)
  got = cases.quick(lambda A: inverse(A, jnp.float32))(A)
  cases.assert_near([got], [np.linalg.inv(np.eye(C) + A.astype(np.float64))], 1e-5)


def test_inverse_of_repeated_keys_in_half_precision():
  """Equal keys without decay: powers of A would reach millions; the inverse is a difference of neighbours."""
  A = np.tril(np.ones((128, 128), np.float32), -1)
  got = cases.quick(lambda A: inverse(A, jnp.bfloat16))(A)
  np.testing.assert_allclose(got, np.linalg.inv(np.eye(128) + A), atol=2.0**-6)


@pytest.mark.slow
def test_half_precision():
  q, k, v, *gates, S = cases.random_inputs("gated_delta", 1, 150, 2, 16, 8)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  got = cases.outputs_and_gradients(interpreted, [*half, *gates, S])
  assert [x.dtype for x in got[:5]] == [jnp.bfloat16, np.float32, *[jnp.bfloat16] * 3]
  want = cases.outputs_and_gradients(
    cases.function("gated_delta", "reference"), [*(np.asarray(x, np.float32) for x in half), *gates, S]
  )
  cases.assert_near(got, want, 2.0**-5)  # a few roundings of 2^-9 in a row


@pytest.mark.slow
def test_no_races():
  """Every buffer that a kernel reads was written, and by nobody else meanwhile; NaN in fresh memory."""
  params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
  inputs = cases.random_inputs("gated_delta", 1, 150, 2, 4, 3)
  f = functools.partial(pallas_tpu.gated_delta, interpret=params)
  cases.assert_near(cases.outputs_and_gradients(f, inputs), cases.double("gated_delta", inputs), 1e-5)


def golden() -> list:
  with open(GOLDEN / "gated_delta_rule" / "cases.json", encoding="utf-8") as file:
    return [pytest.param(name, case, id=name) for name, case in json.load(file)["cases"].items()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), golden())
def test_golden(name, case):
  """Published code's results, at the tolerances of their README."""
  stored = arrays("gated_delta_rule")

  def run(*inputs):
    x = dict(zip(case["inputs"], inputs, strict=True))
    q, k, v = x["q"], x["k"], x["v"]
    if case["l2norm_inside"]:
      q, k = l2_normalised(q), l2_normalised(k)
    S = x.get("initial_state", jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), jnp.float32))
    return interpreted(q * case["scale"], k, v, x["g"], x["beta"], S)

  inputs = tuple(jnp.asarray(stored[f"{name}.in.{key}"], jnp.float32) for key in case["inputs"])
  cotangents = tuple(jnp.asarray(stored[f"{name}.cot.{key}"], jnp.float32) for key in ("o", "final_state"))
  got = cases.pulled(run)(inputs, cotangents)
  keys = ["out.o", "out.final_state", *(f"grad.{key}" for key in case["inputs"])]
  tolerance = 1e-4 if name.endswith("strong_decay") else 2e-5
  cases.assert_near(got, [stored[f"{name}.{key}"] for key in keys], tolerance)


@pytest.mark.parametrize(
  ("name", "change", "line"),
  [
    ("q", lambda x: x.astype(jnp.float16), "q has dtype float16, takes bfloat16 and float32"),
    ("v", lambda x: jnp.zeros((1, 3, 1, 600)), "V is 600, takes up to 512"),
  ],
)
def test_what_it_does_not_take(name, change, line):
  x = dict(zip("qkvgbS", map(jnp.asarray, cases.random_inputs("gated_delta", 1, 3, 1, 2, 2)), strict=True))
  x[name] = change(x[name])
  with pytest.raises(NotImplementedError, match=line):
    jax.eval_shape(pallas_tpu.gated_delta, *x.values())
