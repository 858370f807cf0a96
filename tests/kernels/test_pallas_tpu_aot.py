"""The TPU kernels through the TPU's own compiler, for three generations, on a machine that has none."""

import pytest

from kernels.gated_delta import pallas_tpu
from tests.kernels import aot

pytestmark = pytest.mark.aot
every_device = pytest.mark.parametrize("device", aot.TOPOLOGIES)


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
  program = aot.compiled(device, shape, "grad", pallas_tpu.gated_delta, dtype)
  text = program.as_text()
  assert "gated_delta_forward" in text and "gated_delta_backward" in text
