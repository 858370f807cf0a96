"""The Hopper kernels through the real compiler, for a GPU that is not there (CUDA plugin needed)."""

import os
import re
from pathlib import Path

import jax
import nvidia
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels.gated_delta import pallas_gpu
from tests.kernels.test_pallas_gpu import make_inputs, new_enough

pytestmark = [pytest.mark.aot, new_enough]

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


def test_compiles_for_an_h200_without_spills(monkeypatch, tmp_path):
  """ptxas reports the registers and spills of both kernels; the two blocks' shared memory fits."""
  binaries = Path(next(iter(nvidia.__path__))) / "cu13" / "bin"
  monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
  place = SingleDeviceSharding(topology.devices[0])
  shapes = jax.eval_shape(lambda: make_inputs(1, 256, 2, 128, 128))
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
  traced = jax.jit(pallas_gpu.gated_delta).trace(*inputs)
  traced.lower(lowering_platforms=("cuda",)).compile({"xla_gpu_autotune_level": 0})
  reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
  assert len(reports) == 2
  for report in reports:
    assert "'sm_90a'" in report
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 255
