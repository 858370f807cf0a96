"""What a deep model costs to compile and to run: equal blocks under one loop against each block written out.

    python -m benchmarks.depth --out=benchmarks/results

A training step of a toy (pattern gdn, attn; T = 64, L = 16; a prelude, a repeated half, a coda; passes and
windows under loops in both) and, with --preset, one of the presets of Rule 110.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np

from sleep_jax import blocks, config, train, windows
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig, OptimConfig, SleepConfig, TrainConfig
from sleep_jax.kernels.measure import flags

FORMS = ("written out", "one loop")
NOTES = (
  "`written out` traces every block of the stack; `one loop` is what `sleep.loops=scan` does: weights of"
  " equal blocks are stacked inside the step and a loop runs over them.",
  "Lines are those of the StableHLO that the compiler is given; temporary memory is what XLA's CPU compiler"
  " sets aside.",
  "Times of both forms of one model are taken in turns, within one process.",
)


def toy(depth: int, passes: int) -> tuple[config.Config, train.DeviceTask]:
  """A model of `depth` blocks whose middle half is repeated, and random data."""
  length, vocab = 64, 32
  fast = FastConfig(num_heads=2, key_dim=32, value_dim=32, decay_init=(1 / 16, 1.0))
  cfg = config.Config(
    data=None,
    model=ModelConfig(
      vocab_size=vocab,
      embed_dim=64,
      blocks=("gdn", "attn") * (depth // 2),
      window=16,
      attention=AttentionConfig(num_heads=2, head_dim=32),
      fast=fast,
    ),
    sleep=SleepConfig(
      num_passes=passes, first_block=depth // 4, last_block=depth - depth // 4, remat="window"
    ),
    optim=OptimConfig(newton_schulz_dtype="float32"),
    train=TrainConfig(steps_per_dispatch=1, batch_size=8, eval_sequences=8, eval_batch_size=8),
  )

  def batch(key: jax.Array, index: jax.Array, size: int) -> windows.Batch:
    tokens = jax.random.randint(jax.random.fold_in(key, index), (size, length), 0, vocab)
    mask = jax.numpy.zeros((size, length)).at[:, -1].set(1.0)
    return windows.Batch(tokens, tokens, mask)

  return cfg, train.DeviceTask(np.arange(length) == length - 1, batch, held_out_seed=1)


@contextlib.contextmanager
def form(name: str):
  """Traces in it arrange blocks as one of `FORMS`."""
  if name == "one loop":
    yield
    return
  with mock.patch.object(blocks, "repeats", lambda kinds: tuple((i, 1, 1) for i in range(len(kinds)))):
    yield


def compiled(
  cfg: config.Config, task: train.DeviceTask, name: str
) -> tuple[dict[str, Any], Callable[[], Any]]:
  """What a training step takes to trace and to compile, and the step."""
  _, tx, one_step = train.optimization(cfg)
  start = functools.partial(train.init_state, cfg, tx)
  with form(name):
    begun = time.process_time()
    segments = windows.plan(task.layout, cfg.model.window, cfg.sleep)
    dispatch = train.make_dispatch(cfg, task, one_step, segments)
    lowered = dispatch.lower(jax.eval_shape(start))
    traced = time.process_time()
    step = lowered.compile()
    ended = time.process_time()
  held = [measure.quick(start)()]

  def run():
    held[0], measured = step(held[0])
    return jax.device_get(measured)

  row = {
    "blocks": len(cfg.model.blocks),
    "form": name,
    "StableHLO lines": len(lowered.as_text().splitlines()),
    "trace CPU s": traced - begun,
    "compile CPU s": ended - traced,
    "temporary MB": step.memory_analysis().temp_size_in_bytes / 1e6,
  }
  return row, run


def compare(
  name: str, cfg: config.Config, task: train.DeviceTask, rounds: int, least_s: float
) -> list[dict[str, Any]]:
  """A row for each form of one model; both losses after the same steps must agree."""
  rows, steps = zip(*(compiled(cfg, task, f) for f in FORMS), strict=True)
  losses = [[float(step()["loss"][0]) for _ in range(3)] for step in steps]
  np.testing.assert_allclose(*losses, rtol=1e-3)
  times = measure.interleave(dict(zip(FORMS, steps, strict=True)), rounds, least_s=least_s) if rounds else {}
  base = times[FORMS[0]].median("cpu") if times else None
  for row in rows:
    row |= {"model": name}
    if times:
      cpu = times[row["form"]].median("cpu")
      row |= {"step wall ms": times[row["form"]].median("wall") * 1e3, "step CPU ms": cpu * 1e3}
      row |= {"× written out": cpu / base}
  return [{"model": row.pop("model")} | row for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
  args = _arguments(argv)
  measure.pin(args.threads)
  facts, rows = tables.machine(), []
  for depth in args.blocks:
    rows += compare("toy", *toy(depth, args.passes), args.rounds, args.turn)
  for preset in args.presets:
    for passes in (1, args.passes):
      sleep = {"num_passes": passes, "loops": "scan"}
      cfg, task = measure.rule110_config(preset, sleep=sleep, train={"steps_per_dispatch": 1})
      cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=args.batch))
      rows += compare(f"{preset}, N = {passes}", cfg, task, args.rounds, args.turn)
  title = f"Equal blocks under one loop, N = {args.passes}"
  tables.save(args.out, "depth", title, {"steps": rows}, tables.finish(facts), NOTES)
  return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.depth", __doc__)
  parser.add_argument("--blocks", type=flags.counts, default=(8, 16, 28), help="depths of the toy")
  parser.add_argument(
    "--presets", type=lambda text: text.split(",") if text else [], default=["demo", "fig2b"], help="or ''"
  )
  parser.add_argument("--passes", type=flags.count, default=4, help="N")
  parser.add_argument("--batch", type=flags.count, default=32, help="sequences of a preset's batch")
  parser.add_argument("--rounds", type=flags.natural, default=7, help="0: no step is timed")
  parser.add_argument(
    "--turn", type=flags.from_zero, default=measure.LEAST_S, help="seconds of work in a turn, at least"
  )
  parser.add_argument("--threads", type=flags.count, default=1, help="cores to use")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(command.run(main, None))
