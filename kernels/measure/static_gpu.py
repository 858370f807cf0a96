"""Measures the GPU programs without a GPU: the compilers' own figures, for an H200.

    python -m kernels.static_gpu --out=kernels/results/gpu_static    # needs requirements/aot.txt

Registers, spills and shared memory of the Mosaic GPU kernels from ptxas, and the temporary memory that XLA
plans for. Everything is compiled in a process of its own: dumps go to a folder that nobody else writes to,
and no compilation cache answers instead of the compiler. The committed table is the budget: `make test-aot`
fails on a spill and on more than a tenth more registers or shared memory. Exit code 2: a compiler is missing.
"""

import argparse
import csv
import dataclasses
import datetime
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from sleep_jax.kernels.gated_delta import pallas_gpu
from sleep_jax.kernels.measure import bench, flags, gpu_check, gpu_target, processes, results

TABLE = Path(__file__).parents[1] / "results" / "gpu_static"
MODULE = "sleep_jax.kernels.measure.static_gpu"
MARGIN = 1.1  # another ptxas may need a few registers more


class CompilerMissingError(Exception):
  """The CUDA plugin or ptxas is not installed."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One Mosaic GPU kernel at one key width. Registers of a thread; bytes of a block's shared memory."""

  name: str
  K: int
  target: str
  registers: int
  spills: int  # bytes stored and loaded
  shared: int


@dataclasses.dataclass(frozen=True)
class Memory:
  """Temporary memory that XLA plans for, beside inputs and outputs."""

  shape: str
  mode: str
  name: str
  temp_mb: float


def read_ptxas(text: str) -> tuple[str, int, int]:
  """Target, registers a thread and bytes of spills from the report of one kernel.

  Raises:
    ValueError: if a figure is not there.
  """
  try:
    target, registers = results.find(r"for '(\w+)'", text), int(results.find(r"Used (\d+) registers", text))
    spills = [int(results.find(rf"(\d+) bytes spill {what}", text)) for what in ("stores", "loads")]
  except ValueError as error:
    raise ValueError(f"not a report of ptxas: {text!r}") from error
  return target, registers, sum(spills)


def read_dumps(folder: Path, K: int) -> list[Kernel]:
  """The kernels dumped in a folder as NAME_i.ptxas and NAME_j.resources.txt; more of a name are copies."""
  found: dict[str, dict[str, str]] = {"ptxas": {}, "resources.txt": {}}
  for kind, texts in found.items():
    for path in folder.glob(f"*.{kind}"):
      name = re.sub(r"_\d+$", "", path.name.removesuffix(f".{kind}"))
      texts[name] = path.read_text(encoding="utf-8")
  kernels = []
  for name, report in sorted(found["ptxas"].items()):
    target, registers, spills = read_ptxas(report)
    shared = int(results.find(r"smem_scratch_bytes=(\d+)", found["resources.txt"][name]))
    kernels.append(Kernel(name, K, target, registers, spills, shared))
  return kernels


def measure(*, memory: bool = True) -> tuple[list[Kernel], list[Memory]]:
  """Compiles in a child process.

  Raises:
    CompilerMissingError: if there is no CUDA plugin or no ptxas.
    RuntimeError: if a program does not compile.
  """
  ptxas = gpu_target.ptxas()
  if ptxas is None or not gpu_target.available():
    raise CompilerMissingError("needs the CUDA plugin and ptxas: requirements/aot.txt (`make test-aot`)")
  with tempfile.TemporaryDirectory() as folder:
    environment = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {
      "PATH": f"{ptxas.parent}{os.pathsep}{os.environ.get('PATH', '')}",
      "JAX_PLATFORMS": "cpu",
      "MOSAIC_GPU_DUMP_TO": folder,
    }
    arguments = [f"--child={folder}", *["--memory"] * memory]
    done = processes.run_module(MODULE, *arguments, environment=environment)
    if done.returncode:
      raise RuntimeError(f"compiling for an H200 failed:\n{done.stderr}")
    found = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
  return [Kernel(**x) for x in found["kernels"]], [Memory(**x) for x in found["memory"]]


def compile_here(folder: Path, memory: bool) -> None:
  """The child process: compiles, reads the dumps and writes report.json into `folder`."""
  topology = topologies.get_topology_desc(platform="cuda", target_config=gpu_target.H200, topology="1x1x1")
  place = SingleDeviceSharding(topology.devices[0])
  jax.default_backend = lambda: "gpu"  # the XLA form plans for the backend that it believes to run on

  def compiled(name: str, mode: str, shape: Sequence[int]):
    B, T, H, K, V = shape
    array = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=place)  # noqa: E731
    key, value = array(jnp.bfloat16, B, T, H, K), array(jnp.bfloat16, B, T, H, V)
    gate, S = array(jnp.float32, B, T, H), array(jnp.float32, B, H, K, V)
    traced = jax.jit(gpu_check.program(name, mode)).trace((key, key, value, gate, gate, S), (value, S))
    lowered = traced.lower(lowering_platforms=("cuda",))
    return lowered.compile(gpu_target.OPTIONS)

  kernels = []
  for K in pallas_gpu.WIDTHS:
    dump = folder / str(K)
    dump.mkdir()
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)
    compiled("pallas_gpu", "grad", (1, 256, 2, K, 128))
    kernels += read_dumps(dump, K)
  temporary = []
  for shape, sizes in gpu_check.SHAPES.items() if memory else ():
    for mode in bench.MODES:
      for name in gpu_check.OURS:
        temp = results.temp_bytes(compiled(name, mode, sizes))
        temporary.append(Memory(shape, mode, name, round(temp / 1e6, 3)))
  found = {
    "kernels": [dataclasses.asdict(x) for x in kernels],
    "memory": [dataclasses.asdict(x) for x in temporary],
  }
  (folder / "report.json").write_text(json.dumps(found), encoding="utf-8")


def budget(table: Path = TABLE) -> list[Kernel]:
  """The figures of the committed table."""
  with open(table.with_suffix(".csv"), newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  figures = ("registers", "spills", "shared")
  return [Kernel(r["name"], int(r["K"]), r["target"], *(int(r[name]) for name in figures)) for r in rows]


def regressions(now: Sequence[Kernel], before: Sequence[Kernel]) -> list[str]:
  """One line for each figure that got worse, and for each kernel that only one of the two tables has."""
  known = {(k.name, k.K): k for k in before}
  lines = [
    f"{name} K={K}: in the table, but not compiled" for name, K in known.keys() - {(k.name, k.K) for k in now}
  ]
  for k in now:
    if k.spills:
      lines.append(f"{k.name} K={k.K}: spills {k.spills} bytes")
    if (old := known.get((k.name, k.K))) is None:
      lines.append(f"{k.name} K={k.K}: not in the table; run python -m kernels.static_gpu --out")
      continue
    for what in ("registers", "shared"):
      if getattr(k, what) > MARGIN * getattr(old, what):
        lines.append(f"{k.name} K={k.K}: {what} {getattr(old, what)} -> {getattr(k, what)}")
  return lines


def markdown(kernels: Sequence[Kernel], memory: Sequence[Memory], facts: dict[str, str]) -> str:
  lines = [f"* {name}: {value}" for name, value in facts.items()]
  lines += ["", "| kernel | K | target | registers a thread | spilled bytes | shared bytes a block |"]
  lines += ["|---|---|---|---|---|---|"]
  lines += ["| " + " | ".join(map(str, dataclasses.astuple(k))) + " |" for k in kernels]
  lines += ["", "| shape | mode | form | XLA temp MB |", "|---|---|---|---|"]
  lines += [f"| {m.shape} | {m.mode} | {m.name} | {m.temp_mb:.1f} |" for m in memory]
  return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
  parser = flags.Parser("kernels.static_gpu", __doc__)
  parser.add_argument("--out", type=flags.stem, help="path without suffix: writes .md, .csv and _memory.csv")
  parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
  parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
  options = parser.parse_args(arguments)
  if options.child:
    compile_here(options.child, options.memory)
    return 0
  try:
    kernels, memory = measure()
  except CompilerMissingError as reason:
    print(f"static_gpu: {reason}", file=sys.stderr)
    return 2
  facts = {
    "compiled for": "H200 (sm_90a), bfloat16, nothing was run; XLA without autotuning",
    "versions": f"jax {jax.__version__}",
    "command": "`python -m kernels.static_gpu "
    + " ".join(sys.argv[1:] if arguments is None else arguments)
    + "`",
    "date": datetime.date.today().isoformat(),
    "shapes (B, T, H, K, V)": "; ".join(f"{name} {shape}" for name, shape in gpu_check.SHAPES.items()),
    "XLA temp": "beside inputs and results; grad gives outputs and gradients",
  }
  text = markdown(kernels, memory, facts)
  print(text)
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    results.write_csv(options.out.with_suffix(".csv"), kernels)
    results.write_csv(options.out.with_name(f"{options.out.name}_memory.csv"), memory)
  return 0


if __name__ == "__main__":
  sys.exit(main())
