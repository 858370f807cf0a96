"""A program takes the forms of the devices that it is for, not those of the machine that makes it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from sleep_jax.kernels.common import chunked_channel, target, tiling
from sleep_jax.kernels.gated_delta import gated_delta
from sleep_jax.kernels.kda import kda
from tests.kernels import cases

DEVICES = {
  "tpu": AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu"),
  "gpu": AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda"),
  "cpu": AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu"),
}


def mesh(platform: str, kind=AxisType.Auto, shape=(1, 1)) -> AbstractMesh:
  axes = ("data", "model")
  return AbstractMesh(shape, axes, axis_types=(kind,) * 2, abstract_device=DEVICES[platform])


def test_the_platform_is_the_meshs_or_else_the_default():
  assert target.platform() == "cpu"
  for platform in DEVICES:
    with use_abstract_mesh(mesh(platform)):
      assert target.platform() == platform
      inside = []
      jax.eval_shape(lambda x, inside=inside: inside.append(target.platform()), 1.0)
      assert inside == [platform]
  with use_abstract_mesh(AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))):  # of no known devices
    assert target.platform() == "cpu"
  with jax.set_mesh(jax.make_mesh((1,), ("data",))):
    assert target.platform() == "cpu"


def test_the_platform_of_arrays_on_a_mesh_that_is_not_set():
  place = NamedSharding(mesh("tpu", AxisType.Explicit), P("data", "model"))
  seen = []
  x = jax.ShapeDtypeStruct((2, 2), jnp.float32, sharding=place)
  jax.eval_shape(lambda x: seen.append(target.platform(x)), x)
  assert seen == ["tpu"]


def shapes(rule: str, B=512, T=256, H=2, K=64, V=64):
  op, sizes = cases.OPS[rule], {"B": B, "T": T, "H": H, "K": K, "V": V}
  return {name: jax.ShapeDtypeStruct(op.shape(name, sizes), jnp.float32) for name in (*op.operands, "S")}


@pytest.mark.parametrize(("rule", "chunk", "length"), [(gated_delta, 128, 64), (kda, 64, 32)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_lowered_for_a_tpu_on_a_cpu_it_is_the_tpus_form(rule, chunk, length, kind):
  """All rows at once and long chunks, prepared before the loop; on a CPU short ones, in blocks of rows."""
  inputs = shapes(rule.__name__)

  def text(platform: str) -> str:
    with use_abstract_mesh(mesh(platform, kind)):
      return jax.jit(rule).trace(*inputs.values()).lower(lowering_platforms=(platform,)).as_text()

  n = 256 // chunk
  assert f"tensor<{n}x512x2x{chunk}x64xf32>" in text("tpu")  # all chunks of all rows
  assert f"x2x{length}x64xf32>" in text("cpu") and f"tensor<{n}x512x2x{chunk}x64xf32>" not in text("cpu")


def test_a_plan_is_made_for_the_target():
  q, v, S = (shapes("gated_delta")[name] for name in ("q", "v", "S"))
  plans = {}
  for platform in DEVICES:
    with use_abstract_mesh(mesh(platform)):
      plans[platform] = tiling.make_plan(q, v, S, solve=True)
      assert plans[platform] == tiling.make_plan(q, v, S, solve=True, platform=platform)
      assert chunked_channel.make_plan(q, v, S).hoist == (platform != "cpu")
  assert plans["tpu"].max_chunk == 128 and plans["gpu"].max_chunk == 64
  assert plans["cpu"].block < 512 == plans["tpu"].block


def test_a_kernel_of_the_target_can_be_named_and_another_platforms_cannot():
  inputs = shapes("gated_delta", B=1, T=256, H=2, K=128, V=128)
  run = functools.partial(gated_delta, implementation="pallas_tpu")
  with use_abstract_mesh(mesh("tpu")):
    lowered = jax.jit(run).trace(*inputs.values()).lower(lowering_platforms=("tpu",))
  assert "tpu_custom_call" in lowered.as_text()
  with use_abstract_mesh(mesh("gpu")), pytest.raises(NotImplementedError) as refused:
    jax.eval_shape(run, *inputs.values())
  assert str(refused.value).startswith("gated_delta: 'pallas_tpu' runs on tpu, not on gpu; known here: xla")
  with pytest.raises(NotImplementedError, match="runs on tpu, not on cpu"):
    jax.eval_shape(run, *inputs.values())
