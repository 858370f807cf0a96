"""Compiles the training step for a TPU slice or GPUs that are not here, in a process of its own.

libtpu has the TPU's compiler and runs it on a CPU; JAX's CUDA plugin and ptxas have the GPU's
(`requirements/aot.txt`, `make test-aot`). A compiler cannot be interrupted, a process can: that is how
`compile_step` keeps to its time.
"""

import functools
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

import sleep_jax
from sleep_jax import sharding, train, windows
from sleep_jax.kernels.measure import gpu_target
from sleep_jax.launch import hlo, problem
from sleep_jax.launch.hardware import GIB, HOPPER, Hardware, find

MODULE = "sleep_jax.launch.aot"
NO_COMPILER = (
  "no compiler for TPUs is here, so bytes and time are counted from shapes; for the compiler's own:"
  " pip install 'jax[tpu]' (in a clone: make test-aot VENV=.venv-aot), which needs no TPU"
)
# Ask no metadata server, and let processes side by side load the library: there is no chip to fight over.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class CompileError(Exception):
  """The step was not compiled: the compiler refused it, or took too long."""


def available(platform: str = "tpu") -> bool:
  """Whether this machine can compile for TPUs or, on platform `gpu`, for those GPUs that have an `aot`."""
  return importlib.util.find_spec("libtpu") is not None if platform == "tpu" else gpu_target.available()


def devices(row: Hardware) -> Sequence[Any]:
  """The devices of some hardware, for a mesh to compile on; none of them can run anything."""
  for name, value in QUIET.items():
    os.environ.setdefault(name, value)
  if row.chip.platform == "gpu":
    chip = gpu_target.hopper(HOPPER[row.chip.name], int(row.chip.memory), int(row.chip.bandwidth))
    return topologies.get_topology_desc(platform="cuda", target_config=chip, topology=row.aot).devices
  return topologies.get_topology_desc(platform="tpu", topology_name=row.name).devices


def compile_step(path: str, values: Mapping[str, Any], row: Hardware, *, minutes: float) -> dict[str, Any]:
  """Compiles the step of a run for hardware that has an `aot`, in a process of its own.

  Args:
    path, values: as of `problem.read`; JSON can hold the values.
    row: the hardware.
    minutes: after which the compiler is stopped.

  Returns:
    What `measure` gives.

  Raises:
    CompileError: one line that says why there is no program.
  """
  quiet = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
  root = str(Path(sleep_jax.__file__).parents[1])  # from where `sleep_jax` is found, wherever we were called
  search = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
  if row.chip.platform == "gpu" and (ptxas := gpu_target.ptxas()) is not None:
    quiet["PATH"] = f"{ptxas.parent}{os.pathsep}{os.environ.get('PATH', '')}"
  request = json.dumps({"path": path, "values": values, "hardware": row.name})
  try:
    done = subprocess.run(
      [sys.executable, "-m", MODULE],
      input=request,
      env=os.environ | QUIET | quiet | {"PYTHONPATH": search},
      capture_output=True,
      text=True,
      timeout=60 * minutes,
      check=False,
    )
  except subprocess.TimeoutExpired:
    raise CompileError(f"the compiler was stopped after {minutes:g} minutes (--compile_minutes)") from None
  if done.returncode:
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise CompileError(f"the compiler failed: {last[:300]}")
  return json.loads(done.stdout.splitlines()[-1])


def measure(asked: problem.Problem, row: Hardware) -> dict[str, Any]:
  """Compiles the step here, and reads its program.

  Returns:
    `seconds` that tracing and compiling took, `cpu_seconds` of this process and `host_bytes`, the most memory
    that it had; `level`, how much the compiler was told to optimize (`JAX_OPTIMIZATION_LEVEL`), None:
    nothing; and if the program fits, bytes a device of `weights`, `optimizer`, `batch and counters`,
    `temporary` and, where the compiler says it, `program`; `on_host`, bytes a device that it keeps in the
    host's memory; and `collectives` a step, kind -> [count, bytes a device]. Otherwise `needed` and `had`,
    bytes a device, as far as the compiler says them.
  """
  begun, cfg = time.monotonic(), asked.cfg
  count = cfg.train.steps_per_dispatch
  with jax.set_mesh(sharding.make_mesh(cfg.mesh, list(devices(row)))):
    lowered, state = lower(asked)
    try:
      compiled = lowered.compile(gpu_target.OPTIONS if row.chip.platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as e:
      found = read_exhausted(str(e))
      if found is None:
        raise
      return _spent(begun) | found
  memory = compiled.memory_analysis()
  parts = {"weights": state.params, "optimizer": (state.opt_state, state.average)}
  sizes = {name: shard_bytes(tree) for name, tree in parts.items()}
  others = memory.argument_size_in_bytes - sum(sizes.values())
  kept = memory.output_size_in_bytes - memory.alias_size_in_bytes  # results beside the donated state
  sizes["batch and counters"] = max(others, 0) + max(kept, 0)
  sizes["temporary"] = memory.temp_size_in_bytes
  if memory.generated_code_size_in_bytes:  # a GPU's compiler does not say
    sizes["program"] = memory.generated_code_size_in_bytes
  moved = {kind: [n / count, size / count] for kind, (n, size) in hlo.collectives(compiled.as_text()).items()}
  found = {"bytes": sizes, "on_host": memory.host_temp_size_in_bytes, "collectives": moved}
  return _spent(begun) | found


def _spent(begun: float) -> dict[str, Any]:
  """What compiling took; `begun`: when it began, by `time.monotonic`."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return {
    "seconds": time.monotonic() - begun,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "host_bytes": 1024 * usage.ru_maxrss,
    "level": _level(),
  }


def _level() -> str | None:
  level = jax.config.jax_optimization_level
  return None if level == "UNKNOWN" else level


def lower(asked: problem.Problem) -> tuple[Any, train.TrainState]:
  """Lowers the step for the mesh that is set, and the state that it takes, as shapes."""
  cfg = asked.cfg
  _, tx, one_step = train.optimization(cfg)
  state = jax.eval_shape(functools.partial(train.init_state, cfg, tx))
  if asked.task is not None:
    return train.make_dispatch(cfg, asked.task, one_step, asked.segments).lower(state), state
  layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), P(sharding.RULES["batch"]))
  shape = (cfg.train.batch_size, asked.tokens)
  ids, share, real = (
    jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=layout) for kind in ("int32", "float32", "bool")
  )
  step = jax.jit(lambda s, b: one_step(s, b, segments=asked.segments), donate_argnums=0)
  return step.lower(state, windows.Batch(ids, ids, share, real)), state


def shard_bytes(tree: Any) -> int:
  """Bytes a device of a tree of shapes with shardings."""
  total = 0
  for x in jax.tree.leaves(tree):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    total += jax.ShapeDtypeStruct(shape, x.dtype).size * x.dtype.itemsize
  return total


def read_exhausted(message: str) -> dict[str, int] | None:
  """Bytes that a program `needed` and `had`, from the compiler's refusal; None: it refused something else."""
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  number = r"\(?([\d.]+)([KMGT]?)\)?"
  said = re.search(rf"{number} (?:exceeds available HBM|of) {number}", message)
  if said is None:
    return {}
  power = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
  size = lambda text, unit: round(float(text) * GIB ** (power[unit] / 3))  # noqa: E731
  return {"needed": size(said[1], said[2]), "had": size(said[3], said[4])}


def main() -> int:
  """The child process: a request on stdin, one line of JSON on stdout."""
  asked = json.load(sys.stdin)
  row = find(asked["hardware"])
  print(json.dumps(measure(problem.read(asked["path"], asked["values"]), row)))
  return 0


if __name__ == "__main__":
  sys.exit(main())
