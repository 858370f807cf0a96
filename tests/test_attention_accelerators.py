"""cuDNN and splash attention on a machine without them: interpreted, lowered and, with `aot`, compiled."""

import functools
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sleep_jax import attention
from sleep_jax.attention import cudnn, splash
from sleep_jax.kernels.measure import gpu_target, static_tpu
from sleep_jax.launch import aot
from tests import test_attention_forms as forms
from tests.kernels import test_target

SHAPES = (  # B, T, S, query heads, key heads, width; reach
  ((2, 1000, 1000, 12, 2, 64), None),
  ((2, 600, 1199, 3, 1, 96), 600),
  ((1, 1024, 1024, 4, 4, 128), 100),
  ((1, 2048, 2048, 4, 2, 256), None),  # wide heads: only a long window has more scores than operands
)


def program(form, *, reach, padded):
  """(q, k, v, do, valid) -> output and gradients."""

  def run(q, k, v, do, valid):
    run = functools.partial(form, reach=reach, valid=valid if padded else None)
    out, pull = jax.vjp(run, q, k, v)
    return out, pull(do)

  return run


def structs(shape, *, sharding=None):
  """What `program` takes."""
  arrays = jax.eval_shape(lambda: forms.operands(*shape, dtype="bfloat16"))
  valid = jax.ShapeDtypeStruct((shape[0], shape[2]), jnp.bool_)
  return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in (*arrays, valid)]


@pytest.mark.parametrize(
  "case",
  [
    "left pads, sliding",
    *(
      pytest.param(x, marks=pytest.mark.slow)
      for x in ("causal", "sliding", "behind what was kept", "pads between", "as many heads")
    ),
  ],
)
def test_splash_equals_dense(case):
  shape, reach, valid = forms.CASES[case]
  forms.assert_equal(functools.partial(splash.splash, interpret=True), shape, reach, valid)


@pytest.mark.slow
def test_splash_equals_dense_over_several_blocks(monkeypatch):
  monkeypatch.setattr(splash, "BLOCK", 128)
  valid = forms.left_pads(399, 0, 150)
  run = functools.partial(splash.splash, interpret=True)
  forms.assert_equal(run, (2, 200, 399, 2, 1, 64), 150, valid)


def test_splash_gives_0_to_pads():
  q, k, v, _ = forms.operands(2, 6, 6, 2, 1, 64)
  valid = forms.left_pads(6, 6, 2)
  out = splash.splash(q, k, v, valid=valid, interpret=True)
  np.testing.assert_array_equal(np.asarray(out)[~valid], 0)
  assert np.all(np.isfinite(out))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_for_a_tpu_a_long_window_is_lowered_to_splash(kind):
  """On a machine that has none; on an explicit mesh each device has its own rows and heads."""
  mesh = test_target.mesh("tpu", kind, (2, 2) if kind is AxisType.Explicit else (1, 1))
  q, k, v, _, valid = structs((2, 1024, 1024, 4, 2, 64))
  if kind is AxisType.Explicit:
    place = lambda x, *spec: jax.ShapeDtypeStruct(  # noqa: E731
      x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    q, k, v = (place(x, "data", None, "model", None) for x in (q, k, v))
    valid = place(valid, "data", None)
  with jax.sharding.use_abstract_mesh(mesh):
    run = jax.jit(lambda q, k, v, valid: attention.attend(q, k, v, valid=valid))
    text = run.trace(q, k, v, valid).lower(lowering_platforms=("tpu",)).as_text()
  assert "splash_mha_fwd" in text and "tpu_custom_call" in text


@pytest.mark.aot
@pytest.mark.parametrize(
  ("device", "shape", "reach"),
  [("v5e", *case) for case in SHAPES] + [(d, *SHAPES[1]) for d in static_tpu.TOPOLOGIES if d != "v5e"],
)
def test_splash_is_compiled_for_tpus(device, shape, reach, monkeypatch):
  """Forward and backward, with pads; no array of [T, S] is left."""
  pytest.importorskip("libtpu")
  for name, value in aot.QUIET.items():
    monkeypatch.setenv(name, value)
  chip = topologies.get_topology_desc(platform="tpu", topology_name=static_tpu.TOPOLOGIES[device]).devices[0]
  arrays = structs(shape, sharding=SingleDeviceSharding(chip))
  run = jax.jit(program(splash.splash, reach=reach, padded=True))
  compiled = run.trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
  text = compiled.as_text()
  assert all(f"splash_mha_{phase}" in text for phase in ("fwd", "dq", "dkv"))
  B, T, S, heads, _, _ = shape
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * B * heads * T * S


@pytest.fixture
def with_cudnn(monkeypatch):
  """A cuDNN that is there as far as tracing and lowering ask."""
  module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  versions = types.SimpleNamespace(cudnn_get_version=lambda: 91500)
  monkeypatch.setattr(module, "cuda_versions", versions)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("reach", [None, 100])
def test_for_cuda_a_long_window_is_lowered_to_cudnn(with_cudnn, padded, reach):
  """Forward and backward, causal whatever else is asked for."""
  arrays = structs((2, 600, 600, 4, 2, 64))
  with jax.sharding.use_abstract_mesh(test_target.mesh("gpu")):
    run = jax.jit(program(attention.attend, reach=reach, padded=padded))
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
  assert ("PADDING_CAUSAL" if padded else "CAUSAL") in text and "NO_MASK" not in text
  assert "ScaleBias" not in text  # no mask of [T, S]


@pytest.mark.aot
@pytest.mark.parametrize("padded", [False, True])
def test_cudnn_is_compiled_for_an_h200(with_cudnn, padded, monkeypatch):
  """XLA's part: cuDNN makes its own plan on the device. No array of [T, S] is left."""
  pytest.importorskip("jax_cuda13_plugin")
  (ptxas, *_) = (path for root in sys.path for path in Path(root).glob("nvidia/cu*/bin/ptxas"))
  monkeypatch.setenv("PATH", f"{ptxas.parent}{os.pathsep}{os.environ['PATH']}")
  topology = topologies.get_topology_desc(platform="cuda", target_config=gpu_target.H200, topology="1x1x1")
  arrays = structs((2, 1024, 1024, 4, 2, 64), sharding=SingleDeviceSharding(topology.devices[0]))
  run = jax.jit(program(cudnn.cudnn, reach=None, padded=padded))
  lowered = run.trace(*arrays).lower(lowering_platforms=("cuda",))
  compiled = lowered.compile({"xla_gpu_autotune_level": "0"})  # autotuning would need the GPU
  assert "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2 * 4 * 1024**2
