"""The Hopper kernels without a GPU: interpreted against the recurrence, and lowered for an H200."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from sleep_jax.kernels.gated_delta import pallas_gpu, reference
from sleep_jax.kernels.measure import gpu_check
from tests.kernels import cases

# The older interpreter lacks the context manager, its Mosaic GPU some of the calls.
new_enough = pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="needs jax 0.12")


def make_inputs(B, T, H, K, V, decay=1.0):
  arrays = cases.random_inputs("gated_delta", B, T, H, K, V, decay=decay)
  return [jnp.asarray(x, jnp.bfloat16 if i < 3 else jnp.float32) for i, x in enumerate(arrays)]


@pytest.fixture
def interpreted(monkeypatch):
  """The interpreter with its race detector; it takes the left operands of wgmma from shared memory only."""

  def by_shared_memory(acc, a, b):
    if not isinstance(a, jax.Array):
      return plgpu.wgmma(acc, a, b)

    def multiply(copy):
      copy[...] = a
      plgpu.commit_smem()
      plgpu.wgmma(acc, copy, b)

    return pl.run_scoped(multiply, plgpu.SMEM(a.shape, a.dtype, transforms=pallas_gpu.SWIZZLED))

  monkeypatch.setattr(pallas_gpu, "_multiply", by_shared_memory)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield


@new_enough
@pytest.mark.parametrize("T,K", [(100, 64), (10, 96)])
def test_interpreted_kernels_equal_the_recurrence(T, K, interpreted):
  """Two chunks, the second one partly pads; and a K that is padded.

  bfloat16 keeps 8 bits: 4e-3 a rounding, some of them in a row.
  """
  inputs = make_inputs(1, T, 1, K, 64)
  got = jax.jit(pallas_gpu.gated_delta)(*inputs)
  want = reference.gated_delta(*(x.astype(jnp.float32) for x in inputs))
  cases.assert_near(got, [np.asarray(x) for x in want], 1.5e-2)


@new_enough
@pytest.mark.parametrize(
  "T,K,decay",  # long ones go with `make test-aot`, which runs on the newest Python and so has jax 0.12
  [(100, 64, 1.0), (100, 64, 20.0), pytest.param(10, 96, 1.0, marks=pytest.mark.aot)],
)
def test_interpreted_gradients_equal_the_recurrences(T, K, decay, interpreted):
  """Through o and S, of all six inputs, in the dtypes of the inputs."""
  inputs = make_inputs(1, T, 1, K, 64, decay=decay)
  rng = np.random.default_rng(1)
  do, dS = rng.normal(size=(1, T, 1, 64)), rng.normal(size=(1, 1, K, 64))
  cotangents = jnp.asarray(do, jnp.bfloat16), jnp.asarray(dS, jnp.float32)
  got = jax.jit(pallas_gpu._rule_bwd)(tuple(inputs), cotangents)
  assert [x.dtype for x in got] == [x.dtype for x in inputs]
  _, pull = jax.vjp(reference.gated_delta, *(x.astype(jnp.float32) for x in inputs))
  want = pull(tuple(x.astype(jnp.float32) for x in cotangents))
  cases.assert_near(got, [np.asarray(x) for x in want], 2e-2)


@new_enough
@pytest.mark.aot
def test_second_derivatives_are_the_recurrences(interpreted):
  """Forward over reverse; no kernel has a rule for it, so they come from XLA."""
  inputs = make_inputs(1, 10, 1, 64, 64)
  tangents = make_inputs(1, 10, 1, 64, 64, decay=0.5)
  cotangents = jnp.ones((1, 10, 1, 64), jnp.bfloat16), jnp.ones((1, 1, 64, 64))

  def derivative(f, x, t, cotangents):
    return jax.jvp(lambda *x: jax.vjp(f, *x)[1](cotangents), x, t)[1]

  got = jax.jit(functools.partial(derivative, pallas_gpu.gated_delta))(
    tuple(inputs), tuple(tangents), cotangents
  )
  x, t, c = (tuple(y.astype(jnp.float32) for y in group) for group in (inputs, tangents, cotangents))
  want = derivative(reference.gated_delta, x, t, c)
  cases.assert_near(got, [np.asarray(x) for x in want], 5e-3)


@new_enough
@pytest.mark.parametrize("K,V", [(64, 64), (96, 256), (128, 256)])
def test_lowers_for_an_h200(K, V):
  device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  inputs = jax.eval_shape(lambda: make_inputs(2, 130, 2, K, V))
  step = gpu_check.program("pallas_gpu", "grad")
  with use_abstract_mesh(mesh):
    lowered = jax.jit(step).trace(inputs, (inputs[2], inputs[5])).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("change", [{"K": 160}, {"V": 96}, {"dtype": jnp.float32}])
def test_refuses_what_it_has_no_tiles_for(change):
  sizes = {"K": 64, "V": 64, "dtype": jnp.bfloat16} | change
  q = jnp.zeros((1, 8, 1, sizes["K"]), sizes["dtype"])
  v, S = jnp.zeros((1, 8, 1, sizes["V"]), sizes["dtype"]), jnp.zeros((1, 1, sizes["K"], sizes["V"]))
  gate = jnp.zeros((1, 8, 1))
  with pytest.raises(NotImplementedError, match="pallas_gpu needs"):
    pallas_gpu.gated_delta(q, q, v, gate, gate, S)
