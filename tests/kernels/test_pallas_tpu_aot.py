"""The TPU kernels through the TPU's own compiler, for three generations, on a machine that has none."""

import importlib.metadata
import json

import pytest

from sleep_jax.kernels.conv_gated_delta import pallas_tpu_fused
from sleep_jax.kernels.gated_delta import pallas_tpu
from sleep_jax.kernels.measure import static_tpu

pytestmark = pytest.mark.aot
every_device = pytest.mark.parametrize("device", static_tpu.TOPOLOGIES)


@pytest.fixture(autouse=True)
def compiler():
  pytest.importorskip("libtpu")


@every_device
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 256, 2, 128, 256), "bfloat16"),  # whole chunks, two rows a step, S carried over a chunk
    ((3, 75, 1, 40, 72), "float32"),  # T, K and V fit nothing
  ],
)
def test_forward_and_backward_compile(device, shape, dtype):
  program = static_tpu.compiled(device, shape, "grad", pallas_tpu.gated_delta, dtype)
  text = program.as_text()
  assert "gated_delta_forward" in text and "gated_delta_backward" in text


@every_device
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 256, 2, 128, 256), "bfloat16"),  # nothing padded, the convolution carried over a chunk
    ((3, 75, 1, 40, 72), "float32"),  # T, K and V fit nothing
  ],
)
def test_fused_forward_and_backward_compile(device, shape, dtype):
  """One kernel a direction, and what is left outside moves no activation but to turn and pad it."""
  rule = pallas_tpu_fused.conv_gated_delta
  text = static_tpu.compiled(device, shape, "grad", rule, dtype, "conv_gated_delta").as_text()
  assert text.count("tpu_custom_call") >= 2
  assert "conv_gated_delta_forward" in text and "conv_gated_delta_backward" in text
  assert "convolution" not in text and "tanh" not in text


def test_budgets():
  """On one generation; `python -m kernels.static_tpu` has all, and --write-budgets for a change meant."""
  version = importlib.metadata.version("libtpu")
  known = json.loads(static_tpu.BUDGETS.read_text(encoding="utf-8"))
  assert version in known, f"no budgets for libtpu {version}; kernels.static_tpu --write-budgets adds them"
  programs = {program for program, _ in static_tpu.KERNELS.values()}
  rows = [row for program in sorted(programs) for row in static_tpu.price("v5e", "128/256", program)]
  assert static_tpu.over_budget(rows, known[version]) == []
