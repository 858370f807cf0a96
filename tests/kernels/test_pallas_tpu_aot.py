"""The TPU kernels through the TPU's own compiler, for three generations, on a machine that has none."""

import importlib.metadata
import json

import pytest

from kernels import static_tpu
from kernels.gated_delta import pallas_tpu

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


def test_budgets():
  """On one generation; `python -m kernels.static_tpu` has all, and --write-budgets for a change meant."""
  version = importlib.metadata.version("libtpu")
  known = json.loads(static_tpu.BUDGETS.read_text(encoding="utf-8"))
  if version not in known:
    pytest.skip(
      f"tpu_budgets.json has none for libtpu {version}; kernels.static_tpu --write-budgets adds them"
    )
  rows = [row for program in ("forward", "grad") for row in static_tpu.price("v5e", "128/256", program)]
  assert static_tpu.over_budget(rows, known[version]) == []
