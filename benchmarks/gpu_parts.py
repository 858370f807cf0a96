"""The parts of `benchmarks.gpu_once` that no other command answers; each is a process of its own.

    python -m benchmarks.gpu_parts --part=kernel_errors --out=work/gpu/kernel_errors.jsonl
    python -m benchmarks.gpu_parts --part=generate --size=tiny --out=work/generate.jsonl

Each row goes to OUT as a line of JSON as soon as it is known; rows of an earlier start are replaced. Exit
code 1: something is wrong that was measured (an error above its tolerance, a number that is not finite).
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import generate, model
from sleep_jax.attention import forms
from sleep_jax.benchmarks import command, tables, throughput
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.kernels.common import target
from sleep_jax.kernels.measure import bench, flags, gpu_check
from sleep_jax.launch import hardware

Rows = Iterator[dict[str, Any]]
WRONG = "wrong"  # a column: what is wrong with the row, or nothing
# Shapes of kernels/measure/shapes.py, those of long windows first.
SHAPES = {"full": ("L", "J", "R", "D"), "tiny": ("A",)}
ROUNDS = {"full": 9, "tiny": 1}


def machine(size: str) -> Rows:
  """What the numbers of all parts depend on."""
  del size
  device, fla = jax.devices()[0], importlib.util.find_spec("fla")
  memory = (device.memory_stats() or {}).get("bytes_limit")
  yield {
    **tables.machine(("jax", "jaxlib", "torch", "triton", "fla-core", "flash-linear-attention")),
    "platform": device.platform,
    "memory GB": None if memory is None else memory / 1e9,
    "fla": "importable" if fla else "not importable",
  }


def kernel_errors(size: str) -> Rows:
  """Outputs and gradients of the gated delta rule in bfloat16 against float64 on the CPU."""
  names: Sequence[str] = gpu_check.OURS
  if reason := gpu_check.missing():
    names = ("xla",)
    yield {"name": "pallas_gpu", "note": f"not measured: {reason}"}
  for shape in SHAPES[size]:
    for error in gpu_check.errors([shape], names):
      worst = error.worst()
      row = dataclasses.asdict(error) | {"worst": worst}
      if not worst <= gpu_check.TOLERANCE:
        row[WRONG] = f"an error is above {gpu_check.TOLERANCE}"
      yield row


def kernels_fla(size: str) -> Rows:
  """Times of the same rule in bfloat16, ours and flash-linear-attention's in turn."""
  ours = ("xla",) if gpu_check.missing() else gpu_check.OURS
  there = importlib.util.find_spec("fla") is not None
  if not there:
    yield {"name": gpu_check.PEER, "note": "not measured: fla is not importable"}
  for shape in SHAPES[size]:
    inputs, cotangents = gpu_check.make_inputs(gpu_check.size(shape), gpu_check.DECAYS["weak"])
    for mode in bench.MODES:
      field = [gpu_check.jax_contestant(name, mode, inputs, cotangents) for name in ours]
      peers = gpu_check.fla_contestants(mode, inputs, cotangents) if there else []
      times = gpu_check.race(shape, mode, field + peers, ROUNDS[size])
      best = min((t.median_ms for t in times if t.name.startswith("fla")), default=None)
      for t in times:
        yield dataclasses.asdict(t) | {"times fla's speed": None if best is None else best / t.median_ms}


def attention_forms(size: str) -> Rows:
  """Each form of attention at the windows of figure 6: times, temporary memory and errors from float32."""
  names = forms.FORMS.get(target.platform(), forms.FORMS["cpu"])
  for (length, reach), mode in itertools.product(ATTENDED[size], bench.MODES):
    inputs = _attended(length, size)
    with jax.default_matmul_precision("highest"):
      exact = jax.jit(_attend("blocked", reach, mode))(*(x.astype(jnp.float32) for x in inputs))
    for name in names:
      row = {"L": length, "reach": reach, "mode": mode, "form": name}
      try:
        yield row | _attention(jax.jit(_attend(name, reach, mode)), inputs, exact, ROUNDS[size])
      except Exception as e:  # one form that the device refuses must not hide the others
        traceback.print_exc()
        yield row | {"note": throughput.refusal(f"{type(e).__name__}: {e}")}


ATTENDED = {  # L and the keys that a query sees
  "full": ((1000, None), (2000, None), (4000, None), (12_000, 2000)),
  "tiny": ((16, None), (16, 5)),
}


def _attended(length: int, size: str) -> list[jax.Array]:
  """q, k, v and the cotangent of the output: [1, L, heads, width], those of Ouro 1.4B."""
  heads, width, dtype = (16, 128, "bfloat16") if size == "full" else (2, 8, "float32")
  return [jax.random.normal(jax.random.key(i), (1, length, heads, width), dtype) for i in range(4)]


def _attend(name: str, reach: int | None, mode: str) -> Callable[..., Any]:
  """(q, k, v, cotangent) -> the output, in mode `grad` with the three gradients."""

  def run(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
    out, pull = jax.vjp(functools.partial(forms.attend, reach=reach, implementation=name), q, k, v)
    return (out,) if mode == "forward" else (out, *pull(cotangent))

  return run


def _attention(program: Any, inputs: list[jax.Array], exact: Any, rounds: int) -> dict[str, Any]:
  """The columns of a form that runs."""
  compiled = program.lower(*inputs).compile()
  error = bench.distance(compiled(*inputs), [jax.device_get(x) for x in exact])
  field = gpu_check.Contestant("", lambda: compiled(*inputs), jax.block_until_ready)
  calls = max(1, round(gpu_check.SPAN / gpu_check.span(field, 2)))
  times = [gpu_check.span(field, calls) for _ in range(rounds)]
  row = {"ms": statistics.median(times), "MB": compiled.memory_analysis().temp_size_in_bytes / 1e6}
  row |= {"error": error}
  return row if error <= gpu_check.TOLERANCE else row | {WRONG: f"its error is above {gpu_check.TOLERANCE}"}


def generation(size: str) -> Rows:
  """Tokens a second of `generate` on the model of figure 6, a token at a time, by sequences side by side.

  The least time of a token is that of reading weights, attention cache and state once.
  """
  case = throughput.Case(size, throughput.WINDOWED, *_GENERATED[size], batch=1, remat="none")
  cfg, sleep_cfg = case.model, SleepConfig(num_passes=case.passes)
  weights = jax.jit(lambda: _halved(model.init(cfg, jax.random.key(0)), cfg.dtype))()
  chip, count = hardware.of_device(jax.devices()[0].device_kind), {"full": 64, "tiny": 4}[size]
  for rows in {"full": (1, 16), "tiny": (1,)}[size]:
    prompt = jax.random.randint(jax.random.key(2), (rows, 8), 0, cfg.vocab_size)
    begin = generate.start(cfg, sleep_cfg, rows)
    session = generate.read(weights, jax.device_get(prompt), begin, cfg, sleep_cfg)
    needed = sum(x.nbytes for x in jax.tree.leaves((weights, session.fast, session.cache)))
    # The first two tokens compile: `reuse` adds to the cache in place from the second one on.
    seconds, begun = [], time.perf_counter()
    made = generate.generate(
      weights, session, cfg, sleep_cfg, count=count + 2, key=jax.random.key(3), reuse=True
    )
    for _ in made:
      seconds.append(time.perf_counter() - begun)
      begun = time.perf_counter()
    median = statistics.median(seconds[2:])
    yield {
      "sequences": rows,
      "L": cfg.window,
      "ms a token": 1e3 * median,
      "tokens/s": rows / median,
      "GB read a token": needed / 1e9,
      "least ms a token": None if chip is None else 1e3 * needed / (chip.bandwidth / chip.devices),
    }


_GENERATED = {"full": (2000, 4, 12_000), "tiny": (16, 2, 16)}  # L, N and T; T is not read here


def _halved(weights: model.Params, dtype: str) -> model.Params:
  """Matrices in the dtype of the activations; norms, biases and decays stay float32, as in a checkpoint."""
  return jax.tree.map(lambda w: w.astype(jnp.dtype(dtype)) if w.ndim > 1 else w, weights)


PARTS = {
  "machine": machine,
  "kernel_errors": kernel_errors,
  "kernels_fla": kernels_fla,
  "attention": attention_forms,
  "generate": generation,
}


def main(argv: Sequence[str] | None = None) -> int:
  return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
  parser = flags.Parser("benchmarks.gpu_parts", __doc__)
  parser.add_argument("--part", type=command.choice(tuple(PARTS)), required=True, help=", ".join(PARTS))
  parser.add_argument("--size", type=command.choice(("full", "tiny")), default="full", help="full or tiny")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="file of JSON lines")
  args = parser.parse_args(argv)
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory
  if args.out.is_dir():
    raise ConfigError(f"--out: {args.out} is a folder, the rows need a file")
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.unlink(missing_ok=True)
  journal, code = command.Journal(args.out, ()), 0
  for row in PARTS[args.part](args.size):
    journal.add(row)
    print(row, flush=True)
    wrong = WRONG in row or any(isinstance(x, float) and not math.isfinite(x) for x in row.values())
    code = 1 if wrong else code
  return code


if __name__ == "__main__":
  sys.exit(main())
