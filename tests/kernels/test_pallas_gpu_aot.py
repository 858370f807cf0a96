"""The Hopper kernels through the real compiler, for a GPU that is not there (CUDA plugin needed)."""

import pytest

from sleep_jax.kernels.measure import static_gpu
from tests.kernels.test_pallas_gpu import new_enough

pytestmark = [pytest.mark.aot, new_enough]


def test_compiles_for_an_h200_within_the_budget():
  """No spills, and registers and shared memory as in kernels/results/gpu_static.csv."""
  kernels, _ = static_gpu.measure(memory=False)
  assert {k.target for k in kernels} == {"sm_90a"}
  assert not static_gpu.regressions(kernels, static_gpu.budget())
