"""Prices the TPU kernels by the programs that the TPU's own compiler makes, on a machine without a TPU.

    python -m kernels.static_tpu --out=kernels/results/tpu_static

Needs libtpu (`make test-aot` installs it). For each kernel the compiler's dump is read: bundles (instruction
words, one a cycle), and how many registers they spill. Cycles per token-head = bundles / (tokens x heads of a
grid step). Stalls on memory are not in it, and what runs only in the first chunk is. The pure-JAX form beside
it is priced by XLA's own "estimated_cycles", loop bodies times their trip count: another yardstick, so that
ratios between the two are a hint. --write-budgets: what the tests hold later code to.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sleep_jax.kernels.measure import flags, processes, results

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPES = {"128/256": (128, 256), "128/128": (128, 128)}  # K/V
# "front": what the fused kernel has and the plain one leaves to XLA (`conv_and_gates`).
PROGRAMS = (
  *("forward", "grad", "fused forward", "fused grad"),
  *("xla forward", "xla grad", "xla front forward", "xla front grad"),
)
KERNELS = {  # row of the table -> program that has the kernel, the kernel's name
  "forward": ("forward", "gated_delta_forward"),
  "forward, residuals kept": ("grad", "gated_delta_forward"),
  "backward": ("grad", "gated_delta_backward"),
  "fused forward": ("fused forward", "conv_gated_delta_forward"),
  "fused forward, residuals kept": ("fused grad", "conv_gated_delta_forward"),
  "fused backward": ("fused grad", "conv_gated_delta_backward"),
}
MODULE = "sleep_jax.kernels.measure.static_tpu"
BUDGETS = Path(__file__).parents[1] / "results" / "tpu_budgets.json"
SLACK = 1.1  # what a budget forgives
TOKENS, HEADS, TAPS = 2048, 16, 4
NO_LIBTPU = "libtpu is not installed here, and without it nothing compiles for a TPU; `make test-aot` adds it"


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table."""

  device: str
  widths: str  # K/V
  program: str
  cycles: float  # a token-head
  bundles: int | None = None  # a grid step
  spill_stores: float | None = None  # share of the bundles
  spill_loads: float | None = None  # spilled registers loaded a bundle
  temp_mb: float | None = None  # memory outside the kernels

  @property
  def key(self) -> str:
    return f"{self.device} {self.widths} {self.program}"


def compiled(
  device: str,
  shape: Sequence[int],
  mode: str,
  rule: Callable,
  dtype: str = "bfloat16",
  op: str = "gated_delta",
):
  """Compiles `rule` ("forward") or its forward and backward pass ("grad") for an absent TPU.

  Args:
    device: a key of TOPOLOGIES.
    shape: B, T, H, K, V.
    rule: a function of the operands, with a tuple of arrays.
    dtype: of q, k and v, or of x and its context.
    op: the op whose arguments `rule` takes, S last.
  """
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import SingleDeviceSharding

  from sleep_jax.kernels.common.op import declared

  # Ask no metadata server, and let processes side by side load the library: there is no chip to fight over.
  quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  chip = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device]).devices[0]
  struct = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(chip))
  spec, sizes = declared()[op], dict(zip("BTHKV", shape, strict=True)) | {"c": TAPS}
  inputs = []
  for name in (*spec.operands, "S"):
    kind = "float32" if name in (*spec.float32, "S") else dtype
    inputs.append(struct(spec.shape(name, sizes), jnp.dtype(kind)))
  known = len(inputs)

  def grad(*x):
    outputs, pull = jax.vjp(rule, *x[:known])
    return outputs, pull(x[known:])

  if mode == "grad":
    of_output = lambda y: struct(y.shape, y.dtype)  # noqa: E731
    inputs += map(of_output, jax.eval_shape(rule, *inputs))
  program = jax.jit(rule if mode == "forward" else grad)
  return program.trace(*inputs).lower(lowering_platforms=("tpu",)).compile()


def price(device: str, widths: str, program: str) -> list[Row]:
  """Compiles one program in a process of its own, which alone writes dumps; they go again at once."""
  with tempfile.TemporaryDirectory() as folder:
    flags = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if not program.startswith("xla"):
      flags["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    task = ("--child", device, widths, program)
    run = processes.run_module(MODULE, *task, environment=os.environ | flags)
    if run.returncode:
      raise RuntimeError(f"{device} {widths} {program} does not compile:\n{run.stderr[-4000:]}")
    found = json.loads(run.stdout.splitlines()[-1])
    temp_mb = found["temp_bytes"] / 1e6
    if "cycles" in found:
      return [Row(device, widths, program, found["cycles"] / (TOKENS * HEADS), temp_mb=temp_mb)]
    rows = []
    for name, (home, kernel) in KERNELS.items():
      if home == program:
        bundles, stores, loads = read_dump(Path(folder), kernel)
        cycles = bundles / found["token_heads"]
        rows.append(Row(device, widths, name, cycles, bundles, stores / bundles, loads / bundles, temp_mb))
    return rows


def child(device: str, widths: str, program: str) -> dict[str, float]:
  """The compiler's figures for one program. The bundles are in the dump."""
  from sleep_jax.kernels.common import chunked_head
  from sleep_jax.kernels.conv_gated_delta import pallas_tpu_fused
  from sleep_jax.kernels.conv_gated_delta.conv_and_gates import conv_and_gates
  from sleep_jax.kernels.gated_delta import pallas_tpu, pallas_tpu_parts

  shape, mode = (1, TOKENS, HEADS, *SHAPES[widths]), program.split()[-1]

  def xla(q, k, v, g, b, S):
    plan = chunked_head.Plan(solve=True, hoist=True, block=1)  # an accelerator's, but for shorter chunks
    return chunked_head.chunked(q, k, v, g, b, S, plan)

  def xla_front(*x):
    q, k, v, *gates = conv_and_gates(*x)
    return *(y.astype(x[0].dtype) for y in (q, k, v)), *gates

  rules = {
    "": (pallas_tpu.gated_delta, "gated_delta"),
    "fused": (pallas_tpu_fused.conv_gated_delta, "conv_gated_delta"),
    "xla": (xla, "gated_delta"),
    "xla front": (xla_front, "conv_gated_delta"),
  }
  rule, op = rules[program.removesuffix(mode).strip()]
  done = compiled(device, shape, mode, rule, op=op)
  found: dict[str, float] = {"temp_bytes": results.temp_bytes(done)}
  if program.startswith("xla"):
    return found | {"cycles": estimated_cycles(done.as_text() or "")}
  return found | {"token_heads": pallas_tpu_parts.CHUNK * pallas_tpu_parts.HEADS}  # of a grid step


def read_dump(folder: Path, kernel: str) -> tuple[int, int, int]:
  """Bundles of a kernel, the registers that they spill, and those that they load again.

  Raises:
    RuntimeError: not exactly one such kernel in the dump.
  """
  texts = []
  for name in ("schedule-analysis_final_bundles", "final_hlo-static-per-bundle-utilization"):
    files = list(folder.glob(f"*-{kernel}*-{name}.txt"))
    if len(files) != 1:
      raise RuntimeError(f"the compiler's dump has {len(files)} files {name} of {kernel}, expected 1")
    texts.append(files[0].read_text(encoding="utf-8"))
  bundles = int(results.find(r"total scheduled bundles:\s*(\d+)", texts[0]))
  units = results.find(r"^(MXU,.*)$", texts[1], re.M).split(", ")
  used = re.findall(r"^[\d ]+$", texts[1].split("UTILIZATION:")[1], re.M)
  store, load = units.index("VSTORE:SPILL"), units.index("VLOAD:FILL")
  counts = [list(map(int, line.split())) for line in used]
  return bundles, sum(x[store] for x in counts), sum(x[load] for x in counts)


def estimated_cycles(hlo: str) -> int:
  """XLA's estimate for a whole program, loop bodies times their trip counts.

  Raises:
    RuntimeError: a loop whose trip count does not show.
  """
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in hlo.splitlines():
    if head := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line):
      name = head[2]
      bodies[name], entry = [], name if head[1] else entry
    elif name:
      bodies[name].append(line)

  @functools.cache
  def cycles(name: str) -> int:
    total = 0
    for line in bodies[name]:
      total += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
      if loop := re.search(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)", line):
        total += trips(loop[1]) * cycles(loop[2])
      elif call := re.search(r" call\(.*to_apply=(%[\w.-]+)", line):
        total += cycles(call[1])
    return total

  def trips(condition: str) -> int:
    text = "\n".join(bodies[condition])
    bounds = re.findall(r" constant\((\d+)\)", text)
    if len(bounds) != 1 or "direction=LT" not in text:
      raise RuntimeError(f"no trip count in the loop condition {condition}:\n{text[:1000]}")
    return int(bounds[0])

  return cycles(entry)


def markdown(rows: Sequence[Row], facts: dict[str, str]) -> str:
  """The table, below the facts that one needs to read it."""
  names = [
    "TPU",
    "K/V",
    "program",
    "cycles a token-head",
    "bundles a grid step",
    "spill stores",
    "spill loads",
  ]
  lines = [f"* {name}: {value}" for name, value in facts.items()]
  lines += ["", "| " + " | ".join([*names, "temp MB"]) + " |", "|" + "---|" * (len(names) + 1)]
  share = lambda x: "" if x is None else f"{100 * x:.0f} %"  # noqa: E731
  for r in rows:
    cells = [r.device, r.widths, r.program, f"{r.cycles:.1f}", "" if r.bundles is None else r.bundles]
    cells += [share(r.spill_stores), share(r.spill_loads), f"{r.temp_mb:.1f}"]
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines) + "\n"


def facts(command: str) -> dict[str, str]:
  """The facts that the numbers depend on: versions, command, date, shape."""
  jax, libtpu = (importlib.metadata.version(name) for name in ("jax", "libtpu"))
  return {
    "versions": f"jax {jax}, libtpu {libtpu}",
    "command": f"`{command}`",
    "date": datetime.date.today().isoformat(),
    "shape": f"B = 1, T = {TOKENS}, H = {HEADS}, bfloat16; compiled for a TPU, run on none",
    "cycles": "kernels: bundles over the tokens times heads of a grid step; xla: XLA's own estimate",
    "spills": "registers stored (loaded again) a bundle; temp MB: of the whole program, outside the kernels",
  }


def over_budget(rows: Sequence[Row], budgets: dict[str, dict[str, float]]) -> list[str]:
  """One line for each number that is more than a tenth above its budget."""
  lines = []
  for row in rows:
    for name, most in budgets[row.key].items():
      got = getattr(row, name)
      if got > SLACK * most:
        lines.append(f"{row.key}: {name} is {got:.4g}, budget {most:.4g}")
  return lines


def write(out: Path, rows: Sequence[Row], text: str) -> None:
  """Writes OUT.md and OUT.csv."""
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".md").write_text(text, encoding="utf-8")
  results.write_csv(out.with_suffix(".csv"), rows)


def write_budgets(rows: Sequence[Row]) -> None:
  """Adds or replaces the budgets of the rows, under the compiler's version."""
  known = json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}
  version = known.setdefault(importlib.metadata.version("libtpu"), {})
  for row in rows:
    if row.spill_stores is not None:
      version[row.key] = {"cycles": round(row.cycles, 2), "spill_stores": round(row.spill_stores, 3)}
  BUDGETS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
  """0, or 2 if this machine cannot compile for a TPU."""
  parser = flags.Parser("kernels.static_tpu", __doc__)
  listed = lambda known: lambda text: [check(x, known) for x in text.split(",")]  # noqa: E731

  def check(name: str, known: Sequence[str]) -> str:
    if name not in known:
      raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return name

  for flag, known in (("devices", TOPOLOGIES), ("widths", SHAPES), ("programs", PROGRAMS)):
    parser.add_argument(f"--{flag}", type=listed(known), default=list(known), help=", ".join(known))
  parser.add_argument("--jobs", type=flags.count, default=1, help="compile so many at a time")
  parser.add_argument("--out", type=flags.stem, help="path without suffix: writes .md and .csv")
  parser.add_argument("--write-budgets", action="store_true", help=f"into {BUDGETS.name}")
  parser.add_argument("--child", nargs=3, metavar=("DEVICE", "WIDTHS", "PROGRAM"), help=argparse.SUPPRESS)
  options = parser.parse_args(arguments)
  if importlib.util.find_spec("libtpu") is None:
    print(f"static_tpu: {NO_LIBTPU}", file=sys.stderr)
    return 2
  if options.child:
    print(json.dumps(child(*options.child)))
    return 0

  command = "python -m kernels.static_tpu " + shlex.join(sys.argv[1:] if arguments is None else arguments)
  rows: list[Row] = []
  todo = list(itertools.product(options.devices, options.widths, options.programs))
  with ThreadPoolExecutor(options.jobs) as pool:
    for job, found in zip(todo, pool.map(lambda job: price(*job), todo), strict=True):
      rows += found
      print(f"done: {' '.join(job)}", file=sys.stderr)
      if options.out:
        write(options.out, rows, markdown(rows, facts(command)))
  if options.write_budgets:
    write_budgets(rows)
  print(markdown(rows, facts(command)))
  return 0


if __name__ == "__main__":
  sys.exit(main())
