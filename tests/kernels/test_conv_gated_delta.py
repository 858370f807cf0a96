"""The rule with its layer's front: every form against the front's equations and the recurrence in float64.

The fused TPU kernels are interpreted on a CPU here; test_pallas_tpu_aot.py gives them to the TPU's compiler.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.conv_gated_delta import conv_gated_delta, pallas_tpu_fused, reference, xla
from sleep_jax.kernels.conv_gated_delta.spec import SPEC
from tests.kernels import cases

fused = functools.partial(pallas_tpu_fused.conv_gated_delta, interpret=True)
NAMES = (*SPEC.operands, "S")


@pytest.fixture
def on_this_cpu(monkeypatch):
  """The fused kernel under its name, interpreted."""
  monkeypatch.setitem(dispatch.ORDER, "cpu", ("xla", "reference", "pallas_tpu_fused"))
  monkeypatch.setattr(pallas_tpu_fused, "conv_gated_delta", fused)


def random_inputs(B, T, H, K, V, *, c=4, seed=0, dtype=np.float32) -> list[np.ndarray]:
  """The arguments in order; decays of a token between 0.3 and 1."""
  rng = np.random.default_rng(seed)
  sizes = {"B": B, "T": T, "H": H, "K": K, "V": V, "c": c}
  inputs = {name: rng.normal(size=SPEC.shape(name, sizes)) for name in NAMES}
  inputs["dt_bias"] -= 2
  return [x.astype(dtype) for x in inputs.values()]


@functools.cache
def double(shape, c=4) -> list[np.ndarray]:
  """Outputs and gradients of the reference in float64."""
  with jax.enable_x64(True):
    inputs = [x.astype(np.float64) for x in random_inputs(*shape, c=c)]
    return cases.outputs_and_gradients(reference.conv_gated_delta, inputs)


def assert_near(got, want, tolerance: float, looser: float) -> None:
  """Of outputs, then gradients; `looser` for those of the decay: sums over tokens of terms of both signs."""
  first = len(got) - len(NAMES)
  for i, (x, y) in enumerate(zip(got, want, strict=True)):
    decay = i >= first and NAMES[i - first] in ("a", "A_log", "dt_bias")
    cases.assert_near([x], [y], looser if decay else tolerance)


def assert_equals_the_recurrence(f, shape, c=4):
  got = cases.outputs_and_gradients(f, random_inputs(*shape, c=c))
  assert all(x.dtype == np.float32 for x in got)
  assert_near(got, double(shape, c), 1e-5, 1e-4)


@pytest.mark.parametrize(
  ("shape", "c"),
  [
    ((1, 5, 2, 4, 3), 4),
    pytest.param((1, 1, 1, 2, 2), 2, marks=pytest.mark.slow),  # shorter than the context
    pytest.param((1, 150, 2, 6, 5), 4, marks=pytest.mark.slow),  # two chunks, the second not full
    pytest.param((5, 10, 1, 3, 400), 8, marks=pytest.mark.slow),  # 5 rows, 4 a step: padded to 8
    pytest.param((1, 20, 1, 130, 140), 3, marks=pytest.mark.slow),  # q, k and v of two blocks of lanes each
  ],
)
def test_fused_equals_the_recurrence(shape, c):
  assert_equals_the_recurrence(fused, shape, c)


def test_xla_equals_the_recurrence():
  assert_equals_the_recurrence(xla.conv_gated_delta, (1, 5, 2, 4, 3))


def test_front_by_hand():
  """One head, one channel each, two taps: the equations written out with numbers."""
  x = np.array([[[[0.5, -1.0, 2.0]], [[1.5, 0.25, -0.5]]]], np.float32)
  taps = np.array([[[0.5, 1.0, -1.0]], [[2.0, 0.5, 1.0]]], np.float32)
  context = np.array([[[[1.0, 2.0, 3.0]]]], np.float32)
  a, b, A_log, dt_bias = np.full((1, 2, 1), 0.3), np.full((1, 2, 1), -0.2), np.log([2.0]), np.array([0.1])
  S = np.zeros((1, 1, 1, 1), np.float32)
  gates = [y.astype(np.float32) for y in (a, b, A_log, dt_bias)]
  o, S, after = conv_gated_delta(x, taps, context, *gates, S)

  def silu(z):
    return z / (1 + np.exp(-z))

  want = 0.0
  for z in ([1.5, 1.5, -1.0], [3.25, -0.875, -2.5]):
    q, k, v = (silu(y) for y in z)
    q, k = q / np.sqrt(q * q + 1e-6), k / np.sqrt(k * k + 1e-6)
    want *= np.exp(-2.0 * np.log1p(np.exp(0.4)))
    want += k * (v - k * want) / (1 + np.exp(0.2))
  np.testing.assert_allclose(S[0, 0, 0, 0], want, rtol=1e-5)
  np.testing.assert_allclose(o[0, 1, 0, 0], want * q, rtol=1e-5)
  np.testing.assert_array_equal(after, x[:, 1:])


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu_fused"])
def test_pads_on_the_left_change_nothing(implementation, on_this_cpu):
  """Whatever x and the gates hold there; the context at the end is that of the real tokens alone."""
  x, taps, context, a, b, *rest = random_inputs(2, 9, 1, 4, 3)
  run = cases.quick(functools.partial(conv_gated_delta, implementation=implementation))
  context[:] = 0
  o, S, after = run(x[:, 4:], taps, context, a[:, 4:], b[:, 4:], *rest)
  mask = np.arange(9) >= 4
  got = run(x, taps, context, a, b, *rest, mask=np.stack([mask, mask]))
  cases.assert_near([got[0][:, 4:], *got[1:]], [o, S, after], 1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu_fused"])
def test_a_sequence_in_two_parts_is_one(implementation, on_this_cpu):
  """S and the context carry all that the second part needs; 2 tokens are fewer than the context holds."""
  x, taps, context, a, b, A_log, dt_bias, S = random_inputs(1, 11, 2, 4, 3)
  run = cases.quick(functools.partial(conv_gated_delta, implementation=implementation))
  want = run(x, taps, context, a, b, A_log, dt_bias, S)
  outputs = []
  for part in (slice(0, 2), slice(2, 11)):
    o, S, context = run(x[:, part], taps, context, a[:, part], b[:, part], A_log, dt_bias, S)
    outputs.append(o)
  cases.assert_near([np.concatenate(outputs, 1), S, context], want, 1e-6)


@pytest.mark.slow
def test_half_precision():
  x, taps, context, *rest = random_inputs(1, 150, 2, 16, 8)
  x, context = jnp.asarray(x, jnp.bfloat16), jnp.asarray(context, jnp.bfloat16)
  got = cases.outputs_and_gradients(fused, [x, taps, context, *rest])
  assert [y.dtype for y in got[:3]] == [jnp.bfloat16, np.float32, jnp.bfloat16]
  assert got[4].dtype == jnp.bfloat16
  whole = [np.asarray(x, np.float32), taps, np.asarray(context, np.float32), *rest]
  want = cases.outputs_and_gradients(reference.conv_gated_delta, whole)
  assert_near(got, want, 2.0**-5, 2.0**-4)  # a few roundings of 2^-9 in a row


@pytest.mark.slow
def test_no_races():
  """Every buffer that a kernel reads was written, and by nobody else meanwhile; NaN in fresh memory."""
  interpreter = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
  )
  f = functools.partial(pallas_tpu_fused.conv_gated_delta, interpret=interpreter)
  assert_equals_the_recurrence(f, (1, 150, 2, 6, 5))


@pytest.mark.parametrize("implementation", ["xla", pytest.param("pallas_tpu_fused", marks=pytest.mark.slow)])
def test_eight_devices_give_what_one_gives(implementation, on_this_cpu):
  """Rows over data, heads over model: outputs, state, context, and gradients, those of the taps summed."""
  inputs = random_inputs(4, 9, 2, 4, 3)
  mask = np.ones((4, 9), bool)
  mask[:2, :3] = False

  def loss(inputs, mask, implementation):
    o, S, context = conv_gated_delta(*inputs, mask=mask, implementation=implementation)
    o = jnp.where(mask[:, :, None, None], o, 0)
    return jnp.sum(jnp.sin(o)) + jnp.sum(S**2) + jnp.sum(context**3), (o, S, context)

  def grad(implementation):
    return cases.quick(
      jax.value_and_grad(functools.partial(loss, implementation=implementation), has_aux=True)
    )

  want = [np.asarray(x) for x in jax.tree.leaves(grad("xla")(tuple(inputs), mask))]
  mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices()[:8])
  where = {"B": "data", "H": "model"}
  with jax.set_mesh(mesh):
    specs = [P(*map(where.get, SPEC.axes(name))) for name in NAMES]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs, strict=True)]
    got = grad(implementation)(tuple(placed), jax.device_put(mask, P("data", None)))
    assert [x.sharding.spec for x in got[1]] == specs
  assert_near(jax.tree.leaves(got), want, 1e-5, 1e-4)


@pytest.mark.parametrize(
  ("name", "change", "error", "line"),
  [
    ("x", lambda x: x[..., 1:], ValueError, "taps has shape (4, 3, 11), needs [c, H, X] = (4, 3, 10)"),
    ("S", lambda x: x[:, :, :3], ValueError, "x has shape (2, 5, 3, 11), needs K + K + V = 9 as its X"),
    ("context", lambda x: x[:, 1:], ValueError, "context has shape (2, 2, 3, 11), needs taps - 1 = 3 as its"),
    ("context", lambda x: x.astype(jnp.bfloat16), TypeError, "context has dtype bfloat16, needs x's, float"),
    ("a", lambda x: x.astype(jnp.bfloat16), TypeError, "a has dtype bfloat16, needs float32"),
    ("x", lambda x: x.astype(np.int32), TypeError, "x has dtype int32, needs a floating point dtype"),
    ("dt_bias", lambda x: x[None], ValueError, "dt_bias has shape (1, 3), needs [H]"),
    ("S", lambda x: x.astype(jnp.bfloat16), TypeError, "S has dtype bfloat16, needs float32"),
    ("mask", lambda _: np.ones((2, 4), bool), ValueError, "mask has shape (2, 4), needs [B, T] = (2, 5)"),
    ("implementation", lambda _: "refrence", ValueError, "did you mean 'reference'?"),
    ("implementation", lambda _: "pallas_tpu_fused", NotImplementedError, "runs on tpu, not on cpu"),
  ],
)  # fmt: skip
def test_a_mistake_is_answered_with_one_line(name, change, error, line):
  arguments = dict(zip(NAMES, random_inputs(2, 5, 3, 4, 3), strict=True))
  arguments[name] = change(arguments.get(name))
  with pytest.raises(error) as caught:
    conv_gated_delta(**arguments)
  assert str(caught.value).startswith("conv_gated_delta: ") and line in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("shape", "c", "dtype", "line"),
  [
    ((1, 3, 1, 2, 2), 4, jnp.float16, "x has dtype float16, takes bfloat16 and float32"),
    ((1, 3, 1, 2, 600), 4, jnp.float32, "V is 600, takes up to 512"),
    ((1, 3, 1, 2, 2), 9, jnp.float32, "taps has 9 taps, takes up to 8"),
  ],
)
def test_what_it_does_not_take(shape, c, dtype, line):
  x, taps, context, *rest = map(jnp.asarray, random_inputs(*shape, c=c))
  with pytest.raises(NotImplementedError, match=line):
    jax.eval_shape(fused, x.astype(dtype), taps, context.astype(dtype), *rest)
