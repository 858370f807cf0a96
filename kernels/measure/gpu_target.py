"""GPUs as XLA's compiler knows them where there is none, and whether that compiler is here."""

import importlib.util
import sys
from pathlib import Path

# Autotuning would need the GPU.
OPTIONS: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}


def hopper(name: str, memory: int, bandwidth: int) -> str:
  """A GPU of compute capability 9.0, as `topologies.get_topology_desc(target_config=...)` takes it.

  Args:
    name: as `jax.Device.device_kind` says it.
    memory: bytes. bandwidth: of the memory, bytes a second.
  """
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""


H200 = hopper("NVIDIA H200", 150_000_000_000, 4_800_000_000_000)


def ptxas() -> Path | None:
  """The assembler among the installed packages, whose folder must be on PATH; None: there is none."""
  return next((path for root in sys.path for path in Path(root).glob("nvidia/cu*/bin/ptxas")), None)


def available() -> bool:
  """Whether this machine can compile for a GPU: the CUDA plugin and ptxas are installed."""
  return importlib.util.find_spec("jax_cuda13_plugin") is not None and ptxas() is not None
