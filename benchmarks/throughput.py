"""Training throughput of a looped model with memory, as in figure 6 of arXiv 2605.26099.

    python -m benchmarks.throughput                  # Ouro 1.4B + memory, T = 12,000; needs an accelerator
    python -m benchmarks.throughput --size=tiny      # seconds on a CPU; proves only that the parts fit

Weights and tokens are random, every position has a loss, and a step is the loss and its gradient: the
optimizer's time depends neither on T nor on N. `windowed` goes through the windows one after the other, N
passes each, and evicts all of a window (hard eviction). `sliding` does so with sliding eviction, N = 1.
`parallel` computes the same as `sliding` in one pass over all T tokens at once.

Each row is written to OUT/throughput.jsonl as soon as it is measured, and a second start measures only what
is missing. A row that does not fit the device says so, and the others are measured all the same.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import model, windows
from sleep_jax.benchmarks import command, tables
from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig, SleepConfig, check
from sleep_jax.cost import flops, footprint
from sleep_jax.kernels.measure import flags
from sleep_jax.launch import hardware
from sleep_jax.pretrained import memory, ouro

WINDOWED, SLIDING, PARALLEL = "windowed", "sliding", "parallel"
# Tokens/s on an H200, read from the axes of the paper's figure: nobody printed the numbers.
PAPER = {1: (20e3, 30e3), 4: (5e3, 7e3)}
KEYS = ("size", "form", "L", "N", "T", "batch", "remat", "device")  # of a row: what it measured
FOUND = ("loss", "tokens/s", "of peak", "roofline", "step ms", "compile s", "program GB", "peak GB", "note")
NAME = "throughput"
NOTES = (
  "Tokens count once, whatever N. `of peak` divides the FLOPs of a step by its time and by the chip's dense"
  " bfloat16 peak (launch/hardware.py). What `remat` recomputes does not count as work.",
  "`roofline` is the most tokens/s that the chip allows: it computes all FLOPs at its peak, or reads the"
  " weights once a window, pass and direction, whichever takes longer. Both columns are absent where the chip"
  " is not in the table.",
  "`program GB` is what the compiler sets aside for weights, batch, gradients and temporary memory together."
  " `peak GB` is the most that the device has held so far; absent where an earlier row held more. The"
  " optimizer is in neither.",
  "`parallel` attends to the newest L tokens, as `sliding` does; `windowed` to the tokens of its window,"
  " which are half as many on average.",
)


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    tokens: T.
    windows: values of L; each divides T.
    passes: values of N.
    rounds: steps that are timed.
  """

  tokens: int
  windows: tuple[int, ...]
  passes: tuple[int, ...]
  rounds: int


SIZES = {
  "full": Size(12_000, (2000, 1000, 4000), (1, 2, 4, 8), 3),
  "tiny": Size(16, (4,), (1, 2), 1),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One row, before it is measured.

  Attributes:
    size: a key of `SIZES`.
    form: `windowed`, `sliding` or `parallel`.
    window, passes, tokens, batch: L, N, T and B.
    remat: of `SleepConfig`.
  """

  size: str
  form: str
  window: int
  passes: int
  tokens: int
  batch: int
  remat: Any

  @property
  def model(self) -> ModelConfig:
    """Ouro with memory; of the size `tiny` two narrow blocks of it."""
    changes: dict[str, Any] = {"window": self.window, "dtype": "bfloat16"}
    inserted: dict[str, Any] = {}
    if self.size == "tiny":
      heads = AttentionConfig(num_heads=2, head_dim=8, qk_norm=False)
      changes |= {"vocab_size": 32, "embed_dim": 16, "mlp_dim": 24, "blocks": ("attn",) * 2}
      changes |= {"attention": heads, "dtype": "float32"}
      inserted = {"num_layers": 1, "fast": FastConfig(num_heads=2, key_dim=8, value_dim=8)}
    cfg = memory.memory_config(ouro.config_1_4b(**changes), **inserted)
    if self.form == SLIDING:
      return dataclasses.replace(cfg, eviction="sliding")
    if self.form == PARALLEL:
      near = dataclasses.replace(cfg.attention, swa_window=self.window)
      kinds = tuple("swa" if kind == "attn" else kind for kind in cfg.blocks)
      return dataclasses.replace(cfg, window=self.tokens, blocks=kinds, attention=near)
    return cfg

  @property
  def sleep(self) -> SleepConfig:
    """Every window is slept on, and read in the first pass."""
    return SleepConfig(when="always", num_passes=self.passes, remat=self.remat)

  @property
  def plan(self) -> windows.Plan:
    """Equal windows of equal cost, the last one too, under one loop."""
    length = self.model.window
    reads = tuple(range(length))
    return (windows.Segment(0, length, self.tokens // length, reads, asleep=self.passes > 1),)

  def key(self, device: str) -> dict[str, Any]:
    """The row's columns `KEYS`."""
    values = (self.size, self.form, self.window, self.passes, self.tokens, self.batch, self.remat, device)
    return dict(zip(KEYS, values, strict=True))


def cases(size: str, lengths: Sequence[int], passes: Sequence[int], batch: int, remat: str) -> list[Case]:
  """What is measured, the rows that the paper's figure has an axis for first.

  Raises:
    ConfigError: if a window does not divide T.
  """
  tokens = SIZES[size].tokens
  for length in lengths:
    check(tokens % length == 0, "--windows", f"must be numbers that divide T = {tokens}, got {length}")
  asked = [(WINDOWED, n) for n in passes if n in PAPER]
  if 1 in passes:
    asked += [(PARALLEL, 1)]
  asked += [(WINDOWED, n) for n in passes if n not in PAPER]
  if 1 in passes:
    asked += [(SLIDING, 1)]
  return [Case(size, form, length, n, tokens, batch, remat) for form, n in asked for length in lengths]


def program(case: Case) -> Callable[..., Any]:
  """The step: (weights, batch) -> loss and gradients."""
  cfg, sleep_cfg, plan = case.model, case.sleep, case.plan
  return jax.value_and_grad(lambda weights, batch: model.loss(weights, batch, plan, cfg, sleep_cfg)[0])


def batch_of(case: Case) -> windows.Batch:
  """Random tokens, each of which predicts the next one."""
  shape = (case.batch, case.tokens + 1)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, case.model.vocab_size)
  return windows.Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones(tokens[:, 1:].shape))


def measured(case: Case, draw: Callable[[], model.Params], rounds: int) -> dict[str, Any]:
  """A row: the step compiled, run once and then timed. One that does not fit the device, or fails, says so.

  Args:
    draw: gives the weights, which are the same for all cases of one size.
    rounds: steps that are timed.
  """
  device = jax.devices()[0]
  before = _peak_bytes(device)
  chip = hardware.of_device(device.device_kind)
  row: dict[str, Any] = case.key(device.device_kind) | dict.fromkeys(FOUND)
  row |= {"roofline": roofline(case, chip), "note": ""}
  try:
    weights, batch = draw(), batch_of(case)
    begun = time.perf_counter()
    step = jax.jit(program(case)).lower(weights, batch).compile()
    row["compile s"] = time.perf_counter() - begun
    row["program GB"] = program_bytes(step) / 1e9
    row["loss"] = float(step(weights, batch)[0])
    seconds = statistics.median(_seconds(lambda: step(weights, batch)) for _ in range(rounds))
  except Exception as e:  # what a compiler or device raises; a GPU at hand is too rare to end at one row
    traceback.print_exc()
    row["note"] = refusal(f"{type(e).__name__}: {e}")
    return row
  if (peak := _peak_bytes(device)) is not None and (before is None or peak > before):
    row["peak GB"] = peak / 1e9
  row |= {"step ms": 1e3 * seconds, "tokens/s": case.batch * case.tokens / seconds}
  if chip is not None:
    row["of peak"] = work(case) / seconds / (chip.peak / chip.devices)
  if not math.isfinite(row["loss"]):
    row["note"] = "failed: the loss is not finite"
  return row


def work(case: Case) -> float:
  """FLOPs of a step, without recomputation."""
  return case.batch * flops.per_sequence(case.plan, case.model, case.sleep).train


def roofline(case: Case, chip: hardware.Chip | None) -> float | None:
  """The most tokens/s that a chip allows; None if it is not known."""
  if chip is None:
    return None
  (segment,) = case.plan
  width = 2 if case.model.dtype == "bfloat16" else 4
  weights = width * footprint.size(footprint.weights(case.model)) / 4
  reads = 2 * segment.count * case.passes * weights  # forward and back
  seconds = max(work(case) / (chip.peak / chip.devices), reads / (chip.bandwidth / chip.devices))
  return case.batch * case.tokens / seconds


def program_bytes(step: Any) -> int:
  """Bytes that a compiled step holds: arguments, results and temporary memory."""
  sizes = step.memory_analysis()
  return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


def refusal(message: str) -> str:
  """The note of a row that the device refused: `out of memory`, or else the first line of the message."""
  first = " ".join(message.strip().partition("\n")[0].split())[:200].replace("|", "/")
  exhausted = "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()
  return f"out of memory: {first}" if exhausted else f"failed: {first}"


def _seconds(call: Callable[[], Any]) -> float:
  begun = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - begun


def _peak_bytes(device: Any) -> int | None:
  return (device.memory_stats() or {}).get("peak_bytes_in_use")


def main(argv: Sequence[str] | None = None) -> int:
  return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
  args = _arguments(argv)
  size = SIZES[args.size]
  wanted = cases(args.size, args.windows or size.windows, args.passes or size.passes, args.batch, args.remat)
  out = command.folder(args.out)
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU, which nobody else uses now
  device = jax.devices()[0]
  check(
    args.size == "tiny" or device.platform != "cpu",
    "--size",
    "full needs an accelerator, JAX sees none; --size=tiny goes through the same parts on a CPU",
  )
  facts, journal = tables.machine(), command.Journal(out / f"{NAME}.jsonl", (*KEYS, *FOUND))
  rows = {_key(row): row for row in journal.rows if not str(row["note"]).startswith("failed")}
  draw = functools.cache(jax.jit(lambda: model.init(wanted[0].model, jax.random.key(0))))
  for case in wanted:
    key = _key(case.key(device.device_kind))
    if key in rows:
      continue
    command.say(f"{case.form}, L = {case.window}, N = {case.passes}")
    row = measured(case, draw, args.rounds or size.rounds)
    journal.add(row)
    rows[key] = journal.rows[-1]
    gc.collect()  # the arrays of a step that failed
  shown = [rows[_key(case.key(device.device_kind))] for case in wanted]
  _save(out, args, shown, facts)
  return int(any(row["note"].startswith("failed") for row in shown))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
  return tuple(row[name] for name in KEYS)


def _save(out: Any, args: argparse.Namespace, rows: list[dict[str, Any]], facts: dict[str, str]) -> None:
  same = ("size", "T", "batch", "remat", "device")
  facts = tables.finish(facts) | {name: str(rows[0][name]) for name in same}
  columns = [{name: x for name, x in row.items() if name not in same} for row in rows]
  what = "Ouro 1.4B with memory" if args.size == "full" else "a tiny model with memory"
  title = f"Training throughput of {what}"
  notes = list(NOTES)
  if args.size == "full":
    notes.append("The paper's axes, on an H200: 20,000 to 30,000 tokens/s at N = 1, 5,000 to 7,000 at N = 4.")
  if importlib.util.find_spec("matplotlib") is None:
    notes.append("No figure: matplotlib is not installed (extra `figures`).")
  elif any(row["tokens/s"] for row in rows):
    from sleep_jax.report import throughput as figure

    figure.draw(rows, title, PAPER if args.size == "full" else {}).save(out)
    notes.append(f"Figure: {NAME}_figure.png and .svg; its rows: {NAME}_figure.csv.")
  tables.save(out, NAME, title, {"Steps": columns}, facts, notes)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.throughput", __doc__)
  parser.add_argument("--size", type=command.choice(tuple(SIZES)), default="full", help="full or tiny")
  parser.add_argument("--windows", type=flags.counts, help="values of L, as 1000,2000; none: all")
  parser.add_argument("--passes", type=flags.counts, help="values of N, as 1,4; none: all")
  parser.add_argument("--batch", type=flags.count, default=1, help="sequences of T tokens")
  parser.add_argument(
    "--remat",
    type=command.choice(footprint.REMAT),
    default="window",
    help="what is recomputed; the paper's figure has `window`",
  )
  parser.add_argument("--rounds", type=flags.count, help="steps that are timed; none: those of the size")
  parser.add_argument("--out", default="benchmarks/results", help="folder of the results")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main())
