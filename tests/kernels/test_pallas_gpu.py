"""The Hopper kernels without a GPU: interpreted against the recurrence, and lowered for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from kernels.gated_delta import pallas_gpu, reference
from tests.kernels import cases

# The older interpreter lacks the context manager, its Mosaic GPU some of the calls.
new_enough = pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="needs jax 0.12")


def make_inputs(B, T, H, K, V):
  arrays = cases.random_inputs("gated_delta", B, T, H, K, V)
  return [jnp.asarray(x, jnp.bfloat16 if i < 3 else jnp.float32) for i, x in enumerate(arrays)]


@new_enough
@pytest.mark.parametrize("T,K", [(100, 64), (10, 96)])
def test_interpreted_kernels_equal_the_recurrence(T, K, monkeypatch):
  """Two chunks, the second one partly pads; and a K that is padded.

  bfloat16 keeps 8 bits: 4e-3 a rounding, some of them in a row.
  """

  def by_shared_memory(acc, a, b):
    if not isinstance(a, jax.Array):
      return plgpu.wgmma(acc, a, b)

    def multiply(copy):
      copy[...] = a
      plgpu.commit_smem()
      plgpu.wgmma(acc, copy, b)

    return pl.run_scoped(multiply, plgpu.SMEM(a.shape, a.dtype, transforms=pallas_gpu.SWIZZLED))

  monkeypatch.setattr(pallas_gpu, "_multiply", by_shared_memory)
  inputs = make_inputs(1, T, 1, K, 64)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    got = jax.jit(pallas_gpu.gated_delta)(*inputs)
  want = reference.gated_delta(*(x.astype(jnp.float32) for x in inputs))
  cases.assert_near(got, [np.asarray(x) for x in want], 1.5e-2)


def test_the_gradient_is_the_recurrences():
  """The rule that custom_vjp uses; plain XLA, so it runs here. Gradients of bfloat16 inputs are bfloat16."""
  inputs = make_inputs(1, 70, 1, 64, 64)
  cotangents = jnp.ones((1, 70, 1, 64), jnp.bfloat16), jnp.ones((1, 1, 64, 64))
  got = cases.quick(pallas_gpu._rule_bwd)(tuple(inputs), cotangents)
  exact = [x.astype(jnp.float32) for x in inputs]
  _, pull = jax.vjp(reference.gated_delta, *exact)
  want = pull((cotangents[0].astype(jnp.float32), cotangents[1]))
  assert [x.dtype for x in got] == [x.dtype for x in inputs]
  cases.assert_near(got, [np.asarray(x) for x in want], 5e-3)


@new_enough
@pytest.mark.parametrize("K,V", [(64, 64), (96, 256), (128, 256)])
def test_lowers_for_an_h200(K, V):
  device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  inputs = jax.eval_shape(lambda: make_inputs(2, 130, 2, K, V))
  with use_abstract_mesh(mesh):
    lowered = jax.jit(pallas_gpu.gated_delta).trace(*inputs).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("change", [{"K": 160}, {"V": 96}, {"dtype": jnp.float32}])
def test_refuses_what_it_has_no_tiles_for(change):
  sizes = {"K": 64, "V": 64, "dtype": jnp.bfloat16} | change
  q = jnp.zeros((1, 8, 1, sizes["K"]), sizes["dtype"])
  v, S = jnp.zeros((1, 8, 1, sizes["V"]), sizes["dtype"]), jnp.zeros((1, 1, sizes["K"], sizes["V"]))
  gate = jnp.zeros((1, 8, 1))
  with pytest.raises(NotImplementedError, match="pallas_gpu needs"):
    pallas_gpu.gated_delta(q, q, v, gate, gate, S)
