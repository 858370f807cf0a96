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
    ((1, 256, 8, 128, 256), "bfloat16"),
    ((2, 300, 3, 96, 192), "bfloat16"),  # T and K fit nothing
    ((2, 75, 8, 64, 64), "float32"),
    ((3, 1, 2, 8, 12), "float32"),
  ],
)
def test_forward_and_backward_compile(device, shape, dtype):
  program = aot.compiled(device, shape, "grad", pallas_tpu.gated_delta, dtype)
  text = program.as_text()
  assert "gated_delta_forward" in text and "gated_delta_backward" in text
