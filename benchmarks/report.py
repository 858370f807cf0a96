"""One page with every ratio that the README speaks of, measured on this machine: `make bench-report`.

    python -m benchmarks.report                     # about an hour on one core, by estimate
    python -m benchmarks.report --size=tiny         # a minute; proves only that the parts fit

Training steps against the same model in PyTorch, kernels against transformers' functions, decoding against
transformers on SmolLM2-135M (`make smollm2`), and equal blocks under one loop against the same written out.
A rival that is not installed is said to be absent. In each case the contenders are shown to compute the same
before one of them is timed; a case where they do not is reported as failed, without a time, and the exit
code is then 1. No time changes the exit code. Everything runs on the CPU, also where there is an accelerator.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from sleep_jax.benchmarks import command, decoding, depth, measure, tables, training
from sleep_jax.kernels.measure import bench, flags, peers
from sleep_jax.runtime import files
from sleep_jax.runtime.files import RunFailedError

NAME = "report"
KERNEL_TOLERANCE = 1e-3  # of float32 against float64, relative to the largest entry: sums in another order
PEERS = ("torch", "transformers")
CHECKPOINT = pathlib.Path("checkpoints/SmolLM2-135M-Instruct")
NOTES = (
  "`ratio` is how many times longer the rival takes: above 1, sleep_jax is faster. It is of medians of one"
  " run, in CPU time, which other processes move less than wall time; kernels compare the least times. Where"
  " a kernel has several rivals, the fastest one is shown.",
  "`equality` is the largest relative difference that was found before anything was timed: of loss, gradients"
  " and optimizer steps between two models, of a kernel from float64; losses for depth, tokens for decoding.",
  "training: a step of the paper's model (`fig2b`) and of the demo's. kernels: forward, and forward with"
  " backward (`grad`), at the shapes of kernels/README.md. depth: compiled as one loop, against each block"
  " written out.",
)


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    presets: of Rule 110, with their batches.
    passes: values of N in training.
    rules, shapes: of kernels.
    depths: numbers of blocks.
    depth_passes: N of the deep model.
    rounds, turn_s: as of `measure.interleave`.
    product: size of the large matrix product.
  """

  presets: tuple[tuple[str, int], ...]
  passes: tuple[int, ...]
  rules: tuple[str, ...]
  shapes: tuple[str, ...]
  depths: tuple[int, ...]
  depth_passes: int
  rounds: int
  turn_s: float
  product: int


SIZES = {
  "full": Size(
    (("demo", 128), ("fig2b", 32), ("fig2b", 128)), (1, 2, 4), ("gated_delta", "kda"), ("R", "D", "E", "J"),
    (8, 16), 4, 9, measure.LEAST_S, training.PRODUCT_SIZE,
  ),
  "tiny": Size((("tiny", 4),), (1,), ("gated_delta",), ("A",), (2,), 1, 1, 0.0, 32),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Context:
  """What all sections are given: the size, the cores, the checkpoint, and whether the rivals are there."""

  size: Size
  threads: int
  checkpoint: pathlib.Path
  peers: bool


def row(
  what: str,
  case: str,
  rival: str,
  ours_ms: float | None = None,
  rival_ms: float | None = None,
  equality: str = "",
  state: str = "measured",
) -> dict[str, Any]:
  """A line of the page; `state` says `absent: ...` or `failed: ...` where there is no ratio."""
  both = ours_ms is not None and rival_ms is not None
  return {
    "what": what,
    "case": case,
    "rival": rival,
    "ours ms": ours_ms,
    "rival ms": rival_ms,
    "ratio": rival_ms / ours_ms if both else None,
    "equality": equality,
    "state": state,
  }


# A section yields its cases: name, and a call that checks and measures one.
Cases = Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]
ABSENT = "absent: torch and transformers are not both installed (make peers)"


def training_cases(given: Context) -> Cases:
  """Steps against the PyTorch twin: the tuned one, and the chunk that transformers ships."""

  def one(case: str, preset: str, batch: int, passes: int) -> list[dict[str, Any]]:
    cfg, task = measure.rule110_config(
      preset, sleep={"num_passes": passes, "loops": "unroll"}, train={"batch_size": batch}
    )
    product, work = measure.matrix_product(given.size.product)
    with training.contenders(cfg, task, peers=given.peers, scan=False) as (steps, found):
      times = measure.interleave(
        steps | {training.PRODUCT: product}, given.size.rounds, least_s=given.size.turn_s
      )
    found_rows = training.table(cfg, task, times, work)
    ours = next(r for r in found_rows if r["model"] == training.OURS)
    worst = f"{max(found.values()):.0e}" if found else ""
    rivals = [r for r in found_rows if r["model"] != training.OURS]
    made = [row("training", case, r["model"], ours["CPU ms"], r["CPU ms"], worst) for r in rivals]
    return made or [row("training", case, "PyTorch", ours["CPU ms"], state=ABSENT)]

  for (preset, batch), n in itertools.product(given.size.presets, given.size.passes):
    case = f"{preset}, batch {batch}, N = {n}"
    yield case, lambda a=(case, preset, batch, n): one(*a)


def kernel_cases(given: Context) -> Cases:
  """Update rules against the functions of transformers."""

  def one(case: str, rule: str, shape: str, mode: str) -> list[dict[str, Any]]:
    names = ("xla", *(peers.TRANSFORMERS_NAMES if given.peers else ()))
    limits = {"rounds": given.size.rounds, "seconds": 20.0, "tolerance": KERNEL_TOLERANCE}
    times = bench.race(rule, shape, mode, names, **limits)
    ours, *others = times
    worst = f"{max(t.error for t in times):.0e}"
    if not others:
      return [row("kernels", case, "transformers", ours.cpu_min, equality=worst, state=ABSENT)]
    best = min(others, key=lambda t: t.cpu_min)
    return [row("kernels", case, best.name, ours.cpu_min, best.cpu_min, worst)]

  for rule, shape, mode in itertools.product(given.size.rules, given.size.shapes, bench.MODES):
    case = f"{rule}, {shape}, {mode}"
    yield case, lambda a=(case, rule, shape, mode): one(*a)


def decoding_cases(given: Context) -> Cases:
  """A token of SmolLM2-135M against transformers."""
  case = "SmolLM2-135M, batch 1"

  def one() -> list[dict[str, Any]]:
    if not given.peers:
      return [row("decoding", case, "transformers", state=ABSENT)]
    if not (given.checkpoint / "config.json").is_file():
      missing = f"absent: no checkpoint {files.shown(given.checkpoint)} (make smollm2)"
      return [row("decoding", case, "transformers", state=missing)]
    try:
      speeds = decoding.speeds(given.checkpoint, given.threads, given.size.rounds)
    except SystemExit as e:  # its tokens are compared before it is timed
      raise RunFailedError(str(e.code).removeprefix("failed: ")) from e
    ms = {r[""]: r["CPU ms a token"] for r in speeds}
    ours, rival = ms["sleep_jax"], ms["transformers"]
    return [row("decoding", case, "transformers", ours, rival, "same tokens")]

  yield case, one


def depth_cases(given: Context) -> Cases:
  """Equal blocks under one loop against the same model, each block written out: time to compile, and a
  step.
  """

  def one(case: str, blocks: int) -> list[dict[str, Any]]:
    cfg, task = depth.toy(blocks, given.size.depth_passes)
    written, looped = depth.compare("toy", cfg, task, given.size.rounds, given.size.turn_s)
    same = "losses within 1e-3"
    compiled = [1e3 * r["compile CPU s"] for r in (looped, written)]
    return [
      row("depth", f"{case}, compiling", "written out", *compiled, same),
      row("depth", f"{case}, a step", "written out", looped["step CPU ms"], written["step CPU ms"], same),
    ]

  for blocks in given.size.depths:
    case = f"{blocks} blocks, N = {given.size.depth_passes}"
    yield case, lambda a=(case, blocks): one(*a)


SECTIONS: Mapping[str, Callable[[Context], Cases]] = {
  "training": training_cases,
  "kernels": kernel_cases,
  "decoding": decoding_cases,
  "depth": depth_cases,
}


def collect(sections: Sequence[str], given: Context) -> list[dict[str, Any]]:
  """The rows of some sections. A case that fails is a row without times, and the others are measured."""
  rows = []
  for name in sections:
    for case, measured in SECTIONS[name](given):
      command.say(f"{name}: {case}")
      try:
        rows += measured()
      except (RuntimeError, AssertionError) as e:
        reason = " ".join(str(e).split())[:300]
        rows.append(row(name, case, "", state=f"failed: {reason}"))
  return rows


def main(argv: Sequence[str] | None = None) -> int:
  return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
  args = _arguments(argv)
  jax.config.update("jax_platforms", "cpu")
  out, threads = command.folder(args.out), measure.pin(args.threads)
  there = all(importlib.util.find_spec(name) is not None for name in PEERS)
  if there and "training" in args.sections:
    from sleep_jax.benchmarks import torch_model

    torch_model.set_up(threads)
  facts = tables.machine(("jax", "jaxlib", *PEERS)) | {"cores": str(threads), "size": args.size}
  rows = collect(args.sections, Context(SIZES[args.size], threads, args.checkpoint, there))
  facts = tables.finish(facts)
  values = {"facts": facts, "rows": rows, "notes": list(NOTES)}
  files.write_file(out / f"{NAME}.json", json.dumps(values, indent=2) + "\n")
  tables.save(out, NAME, "sleep_jax beside others, on this machine", {"Ratios": rows}, facts, NOTES)
  failed = [r for r in rows if r["state"].startswith("failed")]
  for r in failed:
    command.say(f"{r['what']}, {r['case']}: {r['state']}")
  return int(bool(failed))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.report", __doc__)
  parser.add_argument("--size", type=command.choice(tuple(SIZES)), default="full", help="full or tiny")
  known = tuple(SECTIONS)
  parser.add_argument(
    "--sections", type=command.choices(known), default=known, help=f"some of {', '.join(known)}; none: all"
  )
  parser.add_argument("--threads", type=flags.count, default=1, help="cores to use")
  parser.add_argument("--checkpoint", type=pathlib.Path, default=CHECKPOINT, help="SmolLM2-135M")
  parser.add_argument("--out", default="work/report", help="folder of report.md, report.csv, report.json")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main())
