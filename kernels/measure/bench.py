"""Times the implementations of the update rules and their peers side by side, in one process.

    python -m kernels.bench --rule=gated_delta,kda --shapes=R,D,E,J --rounds=9 --out=kernels/results/cpu

Every round runs each contestant once, in turn, so that all of them meet the same weather. `grad` is forward
and backward together: the gradients of all inputs, S among them, through outputs and final state. Peers take
part where `kernels.measure.peers` finds them. Those on a CPU flush subnormal numbers, as XLA does. On a GPU
that torch is to share, start with XLA_PYTHON_CLIENT_PREALLOCATE=false. Prints a table; --out also writes it
as OUT.md and OUT.csv and draws it in OUT.png.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.measure import chart, flags, peers, results
from sleep_jax.kernels.measure.shapes import RULES, SHAPES, make_inputs

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_gpu")
MODES = ("forward", "grad")


@dataclasses.dataclass(frozen=True)
class Contestant:
  name: str
  run: Callable[[], Sequence]  # to the end: what it returns is computed
  compile_s: float | None = None
  temp_mb: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table. Times are in milliseconds; CPU time is that of all threads of the process."""

  rule: str
  shape: str
  mode: str
  name: str
  rounds: int
  wall_median: float
  wall_min: float
  cpu_median: float
  cpu_min: float
  temp_mb: float | None
  compile_s: float | None
  error: float


def jax_program(rule: str, implementation: str, mode: str) -> Callable:
  """The function (inputs, cotangents) -> o and S, or the gradients of the inputs."""
  run = functools.partial(dispatch.call, RULES[rule], implementation=implementation)

  def forward(inputs, cotangents):
    del cotangents
    return run(*inputs)

  def grad(inputs, cotangents):
    _, pull = jax.vjp(run, *inputs)
    return pull(cotangents)

  return forward if mode == "forward" else grad


def jax_contestants(
  names: Sequence[str], rule: str, mode: str, inputs, cotangents, max_gb: float
) -> list[Contestant]:
  """Our implementations. One that cannot run here, or needs more than `max_gb`, is named and left out."""
  arguments = tuple(map(jnp.asarray, inputs)), tuple(map(jnp.asarray, cotangents))
  field = []
  for name in names:
    start = time.perf_counter()
    try:
      program = jax.jit(jax_program(rule, name, mode)).lower(*arguments).compile()
    except (NotImplementedError, ImportError) as reason:
      print(f"{rule}: without {name}: {reason}", file=sys.stderr)
      continue
    seconds = time.perf_counter() - start
    temp = results.temp_bytes(program) / 1e6
    if temp > 1e3 * max_gb:
      print(f"{rule}: without {name}: it needs {temp / 1e3:.0f} GB, --max-gb is {max_gb:g}", file=sys.stderr)
      continue
    run = lambda program=program: jax.block_until_ready(program(*arguments))  # noqa: E731
    field.append(Contestant(name, run, seconds, temp))
  return field


def measure(run: Callable) -> tuple[float, float]:
  """Wall and process CPU time of one call, in milliseconds."""
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def exact(rule: str, mode: str, inputs, cotangents) -> list[np.ndarray]:
  """The results in float64 of the chunked form, which the tests compare with the recurrence to 1e-12."""
  with jax.enable_x64(True):
    double = [[jnp.asarray(x, jnp.float64) for x in group] for group in (inputs, cotangents)]
    return [np.asarray(x) for x in jax.jit(jax_program(rule, "xla", mode))(double[0], tuple(double[1]))]


def distance(got: Sequence, want: Sequence[np.ndarray]) -> float:
  """Largest difference relative to the largest entry of its array; `got` may be torch's, on a GPU."""
  arrays = [np.asarray(x.float().cpu() if hasattr(x, "cpu") else x, np.float64) for x in got]
  apart = [np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in zip(arrays, want, strict=True)]
  return float(np.max(apart))  # NaN stays NaN, in whichever array it is


def race(
  rule: str,
  shape: str,
  mode: str,
  names: Sequence[str],
  *,
  rounds: int,
  seconds: float,
  decay: float = 1.0,
  dtype: str = "float32",
  max_gb: float = 16.0,
  tolerance: float | None = None,
) -> list[Row]:
  """One section of the table. A contestant that has used up `seconds` takes no part in later rounds.

  Raises:
    RuntimeError: before anything is timed, if an error is above `tolerance`.
  """
  named, cotangents = make_inputs(rule, SHAPES[shape], decay)
  named |= {name: named[name].astype(jnp.dtype(dtype)) for name in "qkv"}
  cotangents[0] = cotangents[0].astype(jnp.dtype(dtype))
  inputs = tuple(named.values())
  ours = [name for name in names if name in IMPLEMENTATIONS]
  field = jax_contestants(ours, rule, mode, inputs, cotangents, max_gb)
  theirs = [name for name in names if name in peers.NAMES]
  runs = peers.contestants(theirs, rule, mode, named, cotangents, lambda run: measure(run)[0])
  field += [Contestant(name, run) for name, run in runs.items()]
  want = exact(rule, mode, inputs, cotangents)
  errors = {c.name: distance(c.run(), want) for c in field}  # warms up as well
  wrong = {name: x for name, x in errors.items() if tolerance is not None and not x <= tolerance}
  if wrong:
    raise RuntimeError(f"{rule}, {shape}, {mode}: not equal to float64: {wrong}, tolerated is {tolerance}")
  times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in field}
  for _ in range(rounds):
    for c in field:
      if sum(wall for wall, _ in times[c.name]) < 1e3 * seconds:
        times[c.name].append(measure(c.run))
  rows = []
  for c in field:
    wall, cpu = zip(*times[c.name], strict=True)
    spread = (statistics.median(wall), min(wall), statistics.median(cpu), min(cpu))
    rows.append(Row(rule, shape, mode, c.name, len(wall), *spread, c.temp_mb, c.compile_s, errors[c.name]))
  return rows


def markdown(rows: Sequence[Row], facts: dict[str, str]) -> str:
  """The table, below the facts that one needs to read it."""
  columns = ["rule", "shape", "mode", "contestant", "wall ms, median", "min", "cpu ms, median", "min"]
  columns += ["XLA temp MB", "compile s", "max error", "rounds"]
  lines = [f"* {name}: {value}" for name, value in facts.items()]
  lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  show = lambda x, digits: "" if x is None else f"{x:.{digits}f}"  # noqa: E731
  for r in rows:
    times = [show(x, 2 if x < 10 else 0) for x in (r.wall_median, r.wall_min, r.cpu_median, r.cpu_min)]
    cells = [
      r.rule,
      r.shape,
      r.mode,
      r.name,
      *times,
      show(r.temp_mb, 1),
      show(r.compile_s, 1),
      f"{r.error:.0e}",
      r.rounds,
    ]
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines) + "\n"


def machine(command: str) -> dict[str, str]:
  """The facts that the numbers depend on: machine, versions, command, date."""
  model = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    names = [
      x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x
    ]
    model = names[0] if names else model
  versions = [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
  versions += [
    f"{name} {sys.modules[name].__version__}"
    for name in ("torch", "transformers", "fla")
    if name in sys.modules
  ]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  load = f"; load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
  return {
    "machine": f"{jax.devices()[0].platform}, {model}, {cores} of {os.cpu_count()} cores{load}",
    "versions": ", ".join(versions),
    "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "not set"),
    "command": f"`{command}`",
    "date": datetime.date.today().isoformat(),
    "shapes (B, T, H, K, V)": "; ".join(f"{name} {shape}" for name, shape in SHAPES.items()),
    "max error": "against float64, relative to the largest entry of its array: o and S, or all gradients",
  }


def main(arguments: Sequence[str] | None = None) -> None:
  parser = flags.Parser("kernels.bench", __doc__)
  listed = lambda known: lambda text: [check(x, known) for x in text.split(",")]  # noqa: E731

  def check(name: str, known: Sequence[str]) -> str:
    if name not in known:
      raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return name

  everyone = (*IMPLEMENTATIONS, *peers.NAMES)
  rules = tuple(RULES)
  parser.add_argument("--rule", type=listed(rules), default=["gated_delta"], help=", ".join(rules))
  parser.add_argument(
    "--shapes", type=listed(SHAPES), help=f"{', '.join(SHAPES)}; left out: all, L not on a CPU"
  )
  parser.add_argument("--impl", type=listed(everyone), default=list(everyone), help=", ".join(everyone))
  parser.add_argument("--mode", type=listed(MODES), default=list(MODES), help=", ".join(MODES))
  parser.add_argument("--rounds", type=flags.count, default=9)
  parser.add_argument(
    "--seconds", type=flags.above_zero, default=20.0, help="a contestant's time per shape and mode"
  )
  parser.add_argument("--decay", type=flags.above_zero, default=1.0, help="mean of -g; 20 is strong")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of q, k and v")
  parser.add_argument(
    "--max-gb", type=flags.above_zero, default=16.0, help="leaves out those of ours that need more memory"
  )
  parser.add_argument(
    "--cores", type=flags.count, help="use so many; 1 compares best where others use the machine too"
  )
  parser.add_argument("--out", type=flags.stem, help="path without suffix: writes .md, .csv and .png")
  options = parser.parse_args(arguments)

  if options.cores:  # before JAX and torch count them
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
  command = "python -m kernels.bench " + " ".join(sys.argv[1:] if arguments is None else arguments)
  on_cpu = parser.backend() == "cpu"
  shapes = options.shapes or [name for name in SHAPES if name != "L" or not on_cpu]
  limits = {name: getattr(options, name) for name in ("rounds", "seconds", "decay", "dtype", "max_gb")}
  rows: list[Row] = []
  for rule, shape, mode in itertools.product(options.rule, shapes, options.mode):
    rows += race(rule, shape, mode, options.impl, **limits)
    print(f"done: {rule} {shape} {mode}", file=sys.stderr)
    if options.out:
      write(options.out, rows, markdown(rows, machine(command)))
  if options.out:
    chart.draw(options.out.with_suffix(".csv"), "cpu_min" if on_cpu else "wall_min")
  print(markdown(rows, machine(command)))


def write(out: Path, rows: Sequence[Row], text: str) -> None:
  """Writes OUT.md and OUT.csv, after every section, so that a race that is stopped leaves its results."""
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".md").write_text(text, encoding="utf-8")
  results.write_csv(out.with_suffix(".csv"), rows)


if __name__ == "__main__":
  main()
