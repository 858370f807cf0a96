"""Times the implementations of the gated delta rule and their peers side by side, in one process.

    python -m kernels.bench --shapes=R,D,E,J --mode=forward,grad --rounds=9 --out=kernels/results/cpu

Every round runs each contestant once, in turn, so that all of them meet the same weather. `grad` is forward
and backward together: the gradients of q, k, v, g, b and S, through outputs and final state. Peers from
PyTorch take part where torch and transformers are installed, with subnormal numbers flushed, as XLA does.
Prints a table; --out also writes it as OUT.md and OUT.csv.
"""

import argparse
import csv
import dataclasses
import datetime
import io
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

from kernels.gated_delta import gated_delta

SHAPES = {  # B, T, H, K, V
  "R": (512, 24, 4, 64, 64),  # Rule 110
  "D": (32, 75, 8, 64, 64),  # Depo
  "J": (1, 2000, 12, 96, 256),  # the JetBlock of Jet-Nemotron 2B, one window of 2000
  "E": (128, 12, 1, 64, 64),  # the demo
  "A": (128, 1, 1, 64, 64),  # one token of the demo's answer
}
IMPLEMENTATIONS = ("xla", "reference")
PEERS = ("torch_chunk_64", "torch_chunk_tuned", "torch_recurrent")
MODES = ("forward", "grad")


@dataclasses.dataclass(frozen=True)
class Contestant:
  name: str
  run: Callable[[], Sequence]  # to the end: what it returns is computed
  compile_s: float | None = None
  temp_mb: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table; times in milliseconds, cpu of all threads of the process."""

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


def make_inputs(shape: Sequence[int], decay: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Inputs as a layer makes them (unit keys, mean log decay -`decay`) and cotangents of o and S."""
  B, T, H, K, V = shape
  rng = np.random.default_rng(0)
  normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
  q, k = normal(B, T, H, K), normal(B, T, H, K)
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  g = (-decay * rng.exponential(size=(B, T, H))).astype(np.float32)
  b = rng.uniform(size=(B, T, H)).astype(np.float32)
  inputs = [q * np.float32(K**-0.5), k, normal(B, T, H, V), g, b, normal(B, H, K, V)]
  return inputs, [normal(B, T, H, V), normal(B, H, K, V)]


def jax_program(implementation: str, mode: str) -> Callable:
  def forward(inputs, cotangents):
    del cotangents
    return gated_delta(*inputs, implementation=implementation)

  def grad(inputs, cotangents):
    _, pull = jax.vjp(lambda *x: gated_delta(*x, implementation=implementation), *inputs)
    return pull(cotangents)

  return forward if mode == "forward" else grad


def jax_contestant(implementation: str, mode: str, inputs, cotangents) -> Contestant:
  arguments = tuple(map(jnp.asarray, inputs)), tuple(map(jnp.asarray, cotangents))
  start = time.perf_counter()
  program = jax.jit(jax_program(implementation, mode)).lower(*arguments).compile()
  seconds = time.perf_counter() - start
  temp = program.memory_analysis().temp_size_in_bytes / 1e6
  return Contestant(implementation, lambda: jax.block_until_ready(program(*arguments)), seconds, temp)


def torch_contestants(names: Sequence[str], mode: str, inputs, cotangents) -> list[Contestant]:
  """The plain PyTorch functions of transformers, which scale q themselves."""
  try:
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as peer
  except ImportError as reason:
    print(f"without {', '.join(names)}: {reason}", file=sys.stderr)
    return []
  torch.set_flush_denormal(True)
  if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  K, T = inputs[0].shape[3], inputs[0].shape[1]
  leaves = [torch.tensor(x, requires_grad=mode == "grad") for x in (inputs[0] * K**0.5, *inputs[1:])]
  given = [torch.tensor(x) for x in cotangents]

  def contestant(name: str, f: Callable, **options) -> Contestant:
    def run():
      q, k, v, g, b, S = leaves
      with torch.set_grad_enabled(mode == "grad"):
        outputs = f(q, k, v, g=g, beta=b, initial_state=S, output_final_state=True, **options)
        if mode == "forward":
          return [x.numpy() for x in outputs]
        grads = torch.autograd.grad(outputs, leaves, given)
      return [grads[0].numpy() * K**0.5, *(x.numpy() for x in grads[1:])]

    return Contestant(name, run)

  found = []
  if "torch_chunk_64" in names:
    found.append(contestant("torch_chunk_64", peer.torch_chunk_gated_delta_rule, chunk_size=64))
  if "torch_chunk_tuned" in names:
    lengths = {C for C in (16, 32, T, -(-T // 2), -(-T // 3)) if 8 <= C <= 64} or {T}
    tried = {
      C: contestant(f"torch_chunk_{C}", peer.torch_chunk_gated_delta_rule, chunk_size=C) for C in lengths
    }
    best = min(tried, key=lambda C: min(measure(tried[C].run)[0] for _ in range(2)))
    found.append(dataclasses.replace(tried[best], name=f"torch_chunk_tuned ({best})"))
  if "torch_recurrent" in names:
    found.append(contestant("torch_recurrent", peer.torch_recurrent_gated_delta_rule))
  return found


def measure(run: Callable) -> tuple[float, float]:
  """Wall and process CPU time of one call, in milliseconds."""
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def exact(mode: str, inputs, cotangents) -> list[np.ndarray]:
  """The chunked form in float64, which the tests hold against the recurrence to 1e-12."""
  with jax.enable_x64(True):
    double = [[jnp.asarray(x, jnp.float64) for x in group] for group in (inputs, cotangents)]
    return [np.asarray(x) for x in jax.jit(jax_program("xla", mode))(double[0], tuple(double[1]))]


def distance(got: Sequence, want: Sequence[np.ndarray]) -> float:
  """Largest difference relative to the largest entry of its array."""
  return max(
    float(np.max(np.abs(np.asarray(x, np.float64) - y)) / np.max(np.abs(y)))
    for x, y in zip(got, want, strict=True)
  )


def race(
  shape: str, mode: str, names: Sequence[str], *, rounds: int, seconds: float, decay: float
) -> list[Row]:
  """One table section. Who has used up `seconds` sits the remaining rounds out."""
  inputs, cotangents = make_inputs(SHAPES[shape], decay)
  field = [jax_contestant(name, mode, inputs, cotangents) for name in names if name in IMPLEMENTATIONS]
  if peers := [name for name in names if name in PEERS]:
    field += torch_contestants(peers, mode, inputs, cotangents)
  want = exact(mode, inputs, cotangents)
  errors = {c.name: distance(c.run(), want) for c in field}  # warms up as well
  times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in field}
  for _ in range(rounds):
    for c in field:
      if sum(wall for wall, _ in times[c.name]) < 1e3 * seconds:
        times[c.name].append(measure(c.run))
  rows = []
  for c in field:
    wall, cpu = zip(*times[c.name], strict=True)
    spread = (statistics.median(wall), min(wall), statistics.median(cpu), min(cpu))
    rows.append(Row(shape, mode, c.name, len(wall), *spread, c.temp_mb, c.compile_s, errors[c.name]))
  return rows


def markdown(rows: Sequence[Row], facts: dict[str, str]) -> str:
  """The table, with what is needed to read it."""
  columns = ["shape", "mode", "contestant", "wall ms, median", "min", "cpu ms, median", "min"]
  columns += ["XLA temp MB", "compile s", "max error", "rounds"]
  lines = [f"* {name}: {value}" for name, value in facts.items()]
  lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  show = lambda x, digits: "" if x is None else f"{x:.{digits}f}"  # noqa: E731
  for r in rows:
    times = [show(x, 2 if x < 10 else 0) for x in (r.wall_median, r.wall_min, r.cpu_median, r.cpu_min)]
    cells = [
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
  """What the numbers depend on."""
  model = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    names = [
      x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x
    ]
    model = names[0] if names else model
  versions = [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
  versions += [
    f"{name} {sys.modules[name].__version__}" for name in ("torch", "transformers") if name in sys.modules
  ]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  load = f"; load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
  return {
    "machine": f"{jax.devices()[0].platform}, {model}, {cores} of {os.cpu_count()} cores{load}",
    "versions": ", ".join(versions),
    "command": f"`{command}`",
    "date": datetime.date.today().isoformat(),
    "shapes (B, T, H, K, V)": "; ".join(f"{name} {shape}" for name, shape in SHAPES.items()),
    "max error": "against float64, relative to the largest entry of its array: o and S, or the six gradients",
  }


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
  listed = lambda known: lambda text: [check(x, known) for x in text.split(",")]  # noqa: E731

  def check(name: str, known: Sequence[str]) -> str:
    if name not in known:
      raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return name

  everyone = (*IMPLEMENTATIONS, *PEERS)
  parser.add_argument("--shapes", type=listed(SHAPES), default=list(SHAPES), help=", ".join(SHAPES))
  parser.add_argument("--impl", type=listed(everyone), default=list(everyone), help=", ".join(everyone))
  parser.add_argument("--mode", type=listed(MODES), default=list(MODES), help=", ".join(MODES))
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--seconds", type=float, default=20.0, help="a contestant's time per shape and mode")
  parser.add_argument("--decay", type=float, default=1.0, help="mean of -g; 20 is strong")
  parser.add_argument(
    "--cores", type=int, help="use so many; 1 compares best where others use the machine too"
  )
  parser.add_argument("--out", type=Path, help="path without suffix: writes .md and .csv")
  options = parser.parse_args(arguments)

  if options.cores:  # before JAX and torch count them
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
  command = "python -m kernels.bench " + " ".join(sys.argv[1:] if arguments is None else arguments)
  rows: list[Row] = []
  for shape in options.shapes:
    for mode in options.mode:
      limits = {"rounds": options.rounds, "seconds": options.seconds, "decay": options.decay}
      rows += race(shape, mode, options.impl, **limits)
      print(f"done: {shape} {mode}", file=sys.stderr)
      if options.out:
        write(options.out, rows, markdown(rows, machine(command)))
  print(markdown(rows, machine(command)))


def write(out: Path, rows: Sequence[Row], text: str) -> None:
  """OUT.md and OUT.csv, again after every section, so that a race that is stopped leaves what it had."""
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".md").write_text(text, encoding="utf-8")
  write_csv(out.with_suffix(".csv"), rows)


def write_csv(path: Path, rows: Sequence) -> None:
  """Dataclasses of one kind (at least one of them), a line each, under the names of their fields."""
  table = io.StringIO()
  names = [field.name for field in dataclasses.fields(rows[0])]
  writer = csv.DictWriter(table, names, lineterminator="\n")
  writer.writeheader()
  writer.writerows(map(dataclasses.asdict, rows))
  path.write_text(table.getvalue(), encoding="utf-8")


if __name__ == "__main__":
  main()
