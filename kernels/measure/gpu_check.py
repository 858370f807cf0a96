"""Is `pallas_gpu` right, and how fast is it? Everything that has to be known on a Hopper GPU, in one call.

    python -m kernels.gpu_check --out=kernels/results/gpu

First the outputs and all six gradients, with weak and with strong decay, against float64 on the CPU; then the
times in bfloat16, all contestants of a row in turn, beside flash-linear-attention where `fla` is installed.
Prints two tables and the goals. Exit code 0: right; 1: some error above TOLERANCE, and nothing is timed;
2: no Hopper GPU, or no jax that can use it.
"""

import dataclasses
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.kernels.measure import bench, flags, results
from sleep_jax.kernels.measure import shapes as known

SHAPES = {name: known.SHAPES[name] for name in "RDJL"}
DECAYS = {"weak": 1.0, "strong": 20.0}  # means of -g
OURS = ("pallas_gpu", "xla")
PEER = "fla chunk"
TOLERANCE = 2e-2  # of the largest entry of an array: some roundings to bfloat16 (4e-3) in a row
SPAN = 20.0  # milliseconds: calls are queued back to back for so long, then waited for


@dataclasses.dataclass(frozen=True)
class Error:
  """Largest differences from float64, relative to the largest entry of the array: o, S, then gradients."""

  shape: str
  decay: str
  name: str
  o: float
  S: float
  dq: float
  dk: float
  dv: float
  dg: float
  db: float
  dS: float

  def worst(self) -> float:
    return float(np.max(dataclasses.astuple(self)[3:]))  # NaN stays NaN


@dataclasses.dataclass(frozen=True)
class Time:
  """Time of one call: wall time in milliseconds, and the median for one token of one head in nanoseconds."""

  shape: str
  mode: str
  name: str
  rounds: int
  calls: int  # in each round
  median_ms: float
  min_ms: float
  ns: float


@dataclasses.dataclass(frozen=True)
class Contestant:
  name: str
  start: Callable[[], object]  # queues one call
  finish: Callable[[object], object]  # waits for what `start` returned


def missing() -> str | None:
  """The reason why nothing can be measured on this machine, or None."""
  if jax.__version_info__ < (0, 12):
    return f"pallas_gpu needs jax 0.12 or newer, this is {jax.__version__}"
  device = jax.devices()[0]
  if device.platform != "gpu":
    return f"needs a Hopper GPU, JAX sees {device.platform}"
  capability = str(getattr(device, "compute_capability", "unknown"))
  if capability != "9.0":  # wgmma exists on Hopper alone
    return f"needs a Hopper GPU (compute capability 9.0), {device.device_kind} has {capability}"
  return None


def size(shape: str) -> tuple[int, int, int, int, int]:
  """B, T, H, K, V of a name; of those in `kernels.measure.shapes` that are not measured by default, too."""
  return SHAPES.get(shape) or known.SHAPES[shape]


def make_inputs(shape: Sequence[int], decay: float):
  """`shapes.make_inputs`, in the rule's order, with q, k, v and the cotangent of o in bfloat16."""
  named, (do, dS) = known.make_inputs("gated_delta", shape, decay)
  inputs = list(named.values())
  half = lambda x: np.asarray(x, jnp.bfloat16)  # noqa: E731
  return [*map(half, inputs[:3]), *inputs[3:]], (half(do), dS)


def program(name: str, mode: str) -> Callable:
  """(inputs, cotangents) -> o and S; "grad" gives the six gradients as well.

  A backward pass that recomputes needs no outputs; as results they are not dead code.
  """
  rule = importlib.import_module(f"sleep_jax.kernels.gated_delta.{name}").gated_delta

  def run(inputs, cotangents):
    if mode == "forward":
      return rule(*inputs)
    outputs, pull = jax.vjp(rule, *inputs)
    return *outputs, *pull(cotangents)

  return run


def exact(inputs, cotangents) -> list[np.ndarray]:
  """Outputs and gradients of the chunked form in float64, on the CPU: another compiler, other arithmetic.

  The tests hold that form against the recurrence to 1e-12.
  """
  with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
    double = [tuple(jnp.asarray(x, jnp.float64) for x in group) for group in (inputs, cotangents)]
    return [np.asarray(x) for x in jax.jit(program("xla", "grad"))(*double)]


def errors(shapes: Sequence[str], names: Sequence[str] = OURS) -> list[Error]:
  rows = []
  for shape in shapes:
    for decay, mean in DECAYS.items():
      inputs, cotangents = make_inputs(size(shape), mean)
      want = exact(inputs, cotangents)
      given = tuple(map(jnp.asarray, inputs)), tuple(map(jnp.asarray, cotangents))
      for name in names:
        got = jax.jit(program(name, "grad"))(*given)
        rows.append(
          Error(shape, decay, name, *(bench.distance([x], [y]) for x, y in zip(got, want, strict=True)))
        )
  return rows


def jax_contestant(name: str, mode: str, inputs, cotangents) -> Contestant:
  given = tuple(map(jnp.asarray, inputs)), tuple(map(jnp.asarray, cotangents))
  compiled = jax.jit(program(name, mode)).lower(*given).compile()
  return Contestant(name, lambda: compiled(*given), jax.block_until_ready)


def fla_contestants(mode: str, inputs, cotangents) -> list[Contestant]:
  """The Triton forms of flash-linear-attention; the recurrent one has no gradient. [] without `fla`."""
  try:
    import torch  # pyright: ignore[reportMissingImports]
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
      chunk_gated_delta_rule,
      fused_recurrent_gated_delta_rule,
    )
  except ImportError as reason:
    print(f"without flash-linear-attention: {reason}", file=sys.stderr)
    return []

  def tensor(x):
    half = x.dtype == jnp.bfloat16
    x = torch.tensor(np.asarray(x, np.float32), device="cuda")
    return x.to(torch.bfloat16) if half else x

  leaves = [tensor(x).requires_grad_(mode == "grad") for x in inputs]
  given = [tensor(x) for x in cotangents]

  def contestant(name: str, f: Callable) -> Contestant:
    def start():
      q, k, v, g, b, S = leaves
      with torch.set_grad_enabled(mode == "grad"):
        outputs = f(q, k, v, g=g, beta=b, scale=1.0, initial_state=S, output_final_state=True)
        return outputs if mode == "forward" else torch.autograd.grad(outputs, leaves, given)

    def finish(results):
      torch.cuda.synchronize()
      return results

    return Contestant(name, start, finish)

  found = [contestant(PEER, chunk_gated_delta_rule)]
  if mode == "forward":
    found.append(contestant("fla recurrent", fused_recurrent_gated_delta_rule))
  return found


def span(c: Contestant, calls: int) -> float:
  """Milliseconds a call, of `calls` calls in a row: the GPU's queue hides what the host does meanwhile."""
  start = time.perf_counter()
  last = c.start()
  for _ in range(calls - 1):
    last = c.start()
  c.finish(last)
  return 1e3 * (time.perf_counter() - start) / calls


def race(shape: str, mode: str, field: Sequence[Contestant], rounds: int) -> list[Time]:
  """Every round runs each contestant once, in turn."""
  B, T, H, _, _ = size(shape)
  calls = {}
  for c in field:
    span(c, 2)  # compiles, tunes
    calls[c.name] = max(1, round(SPAN / span(c, 2)))
  times: dict[str, list[float]] = {c.name: [] for c in field}
  for _ in range(rounds):
    for c in field:
      times[c.name].append(span(c, calls[c.name]))
  rows = []
  for name, ms in times.items():
    median = statistics.median(ms)
    rows.append(Time(shape, mode, name, rounds, calls[name], median, min(ms), 1e6 * median / (B * T * H)))
  return rows


def goals(times: Sequence[Time]) -> list[str]:
  """One line for each goal: the speed wanted, the speed measured, and whether the goal is met."""
  ns = {(t.shape, t.mode, t.name): t.ns for t in times}
  lines = []

  def line(what: str, value: float | None, unit: str, met: bool) -> None:
    said = "not measured" if value is None else f"{value:.2f}{unit}, {'met' if met else 'missed'}"
    lines.append(f"* {what}: {said}")

  for mode, most in (("forward", 1.0), ("grad", 4.0)):
    value = ns.get(("L", mode, "pallas_gpu"))
    line(f"L {mode}, at most {most} ns a token-head", value, " ns", value is not None and value <= most)
  for name, wanted in (
    ("pallas_gpu", {"L": 1.8, "R": 2.0, "D": 2.0}),
    ("xla", {"L": 0.5, "R": 0.5, "D": 0.5}),
  ):
    for shape, least in wanted.items():
      for mode in bench.MODES:
        mine, peer = ns.get((shape, mode, name)), ns.get((shape, mode, PEER))
        ratio = peer / mine if mine and peer else None
        what = f"{shape} {mode}, {name} at least {least} times as fast as {PEER}"
        line(what, ratio, " times", ratio is not None and ratio >= least)
  return lines


def markdown(found: Sequence[Error], times: Sequence[Time], facts: dict[str, str]) -> str:
  lines = [f"* {name}: {value}" for name, value in facts.items()]
  head = [field.name for field in dataclasses.fields(Error)]
  lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for e in found:
    cells = dataclasses.astuple(e)
    lines.append("| " + " | ".join([*cells[:3], *(f"{x:.0e}" for x in cells[3:])]) + " |")
  if times:
    head = ["shape", "mode", "contestant", "ms, median", "min", "ns a token-head", "rounds", "calls"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for t in times:
      cells = [
        t.shape,
        t.mode,
        t.name,
        f"{t.median_ms:.3f}",
        f"{t.min_ms:.3f}",
        f"{t.ns:.2f}",
        t.rounds,
        t.calls,
      ]
      lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *goals(times)]
  return "\n".join(lines) + "\n"


def facts(command: str) -> dict[str, str]:
  found = bench.machine(command)
  found["device"] = jax.devices()[0].device_kind
  found["shapes (B, T, H, K, V)"] = "; ".join(f"{name} {shape}" for name, shape in SHAPES.items())
  found["errors"] = "against float64, relative to the largest entry of its array; q, k, v, o in bfloat16"
  found["times"] = f"wall time of calls queued for {SPAN:.0f} ms; grad is forward and backward together"
  return found


def main(arguments: Sequence[str] | None = None) -> int:
  parser = flags.Parser("kernels.gpu_check", __doc__)
  parser.add_argument("--shapes", default=",".join(SHAPES), help=", ".join(SHAPES))
  parser.add_argument("--rounds", type=flags.count, default=15)
  parser.add_argument("--out", type=flags.stem, help="path without suffix: .md, _errors.csv and _times.csv")
  options = parser.parse_args(arguments)
  shapes = options.shapes.split(",")
  if unknown := [name for name in shapes if name not in SHAPES]:
    parser.error(f"argument --shapes: {unknown[0]!r} is none of {', '.join(SHAPES)}")

  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory
  parser.backend()
  if reason := missing():
    print(f"gpu_check: {reason}", file=sys.stderr)
    return 2
  command = "python -m kernels.gpu_check " + " ".join(sys.argv[1:] if arguments is None else arguments)
  found, times = errors(shapes), []
  right = all(e.worst() <= TOLERANCE for e in found)
  for shape in shapes if right else ():
    inputs, cotangents = make_inputs(SHAPES[shape], DECAYS["weak"])
    for mode in bench.MODES:
      field = [jax_contestant(name, mode, inputs, cotangents) for name in OURS]
      times += race(shape, mode, field + fla_contestants(mode, inputs, cotangents), options.rounds)
  text = markdown(found, times, facts(command))
  print(text)
  if options.out:
    write(options.out, found, times, text)
  if not right:
    print(f"gpu_check: an error is above {TOLERANCE}; nothing was timed", file=sys.stderr)
  return 0 if right else 1


def write(out: Path, found: Sequence[Error], times: Sequence[Time], text: str) -> None:
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".md").write_text(text, encoding="utf-8")
  for name, rows in (("errors", found), ("times", times)):
    if rows:
      results.write_csv(out.with_name(f"{out.name}_{name}.csv"), rows)


if __name__ == "__main__":
  sys.exit(main())
