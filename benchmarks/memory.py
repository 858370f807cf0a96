"""Memory of a training step's gradient as N grows, for every kind of recomputation.

    python -m benchmarks.memory --preset=fig2b --batch=64

Sizes are the compiler's own: what it sets aside beside weights, batch and gradients. Nothing has to run
for them, so they do not depend on what else the machine does.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sleep_jax import config, model, train, windows
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.kernels.measure import flags

REMAT = ("none", "block", "pass", "window")


def main(argv: Sequence[str] | None = None) -> int:
  args = _arguments(argv)
  threads = measure.pin(args.threads)
  facts = tables.machine()
  sizes, times = [], []
  for loops, passes in (("scan", args.passes), ("unroll", args.unrolled)):
    timed = {}
    for remat in args.remat if passes else ():
      row: dict[str, Any] = {"loops": loops, "remat": remat}
      for n in passes:
        cfg, task = measure.rule110_config(
          args.preset,
          sleep={"num_passes": n, "loops": loops, "remat": remat},
          train={"batch_size": args.batch},
        )
        print(f"loops={loops} remat={remat} N = {n}", file=sys.stderr, flush=True)
        row[f"N = {n}, MB"] = temporary_bytes(cfg, task) / 1e6
        if n == args.timed and args.rounds:
          timed[remat] = gradient(cfg, task)
      if len(passes) > 1:
        row |= {
          "MB a pass": (row[f"N = {passes[-1]}, MB"] - row[f"N = {passes[-2]}, MB"])
          / (passes[-1] - passes[-2])
        }
      sizes.append(row)
    times += time_table(loops, timed, args.rounds, args.turn)
  facts = tables.finish(facts) | {
    "batch": f"{args.batch} sequences of {len(task.layout)} tokens; {threads} core(s)"
  }
  made = {"Memory: temporary bytes of the gradient": _same_keys(sizes)}
  if times:
    made[f"Time: one gradient at N = {args.timed}"] = times
  name = f"memory_{args.preset}"
  tables.save(args.out, name, f"Memory of a gradient, Rule 110 preset `{args.preset}`", made, facts, NOTES)
  return 0


NOTES = (
  "Each kind of recomputation includes the ones before it: `block` keeps the input of each block,"
  " `pass` of each pass, `window` S at each window (`sleep.remat`).",
  "`MB a pass` is the growth from the last N but one to the last.",
  "The sizes are those of XLA's CPU compiler; other platforms assign buffers in their own way. The"
  " optimizer is not in them.",
  "`× none` compares medians of CPU time of one run.",
)


def temporary_bytes(cfg: config.Config, task: train.DeviceTask) -> int:
  """What the compiler sets aside for the gradient of the loss, beside arguments and results."""
  lowered = measure.quick(_grad(cfg, task)).lower(*jax.eval_shape(lambda: _arguments_of(cfg, task)))
  return lowered.compile().memory_analysis().temp_size_in_bytes


def gradient(cfg: config.Config, task: train.DeviceTask) -> Callable[[], Any]:
  """A call that computes the gradient of the loss, compiled and called once."""
  args = measure.quick(lambda: _arguments_of(cfg, task))()
  grad = jax.jit(_grad(cfg, task))

  def run():
    return jax.block_until_ready(grad(*args))

  run()
  return run


def _grad(cfg: config.Config, task: train.DeviceTask) -> Callable[..., Any]:
  segments = windows.plan(task.layout, cfg.model.window, cfg.sleep)
  return jax.grad(lambda weights, batch: model.loss(weights, batch, segments, cfg.model, cfg.sleep)[0])


def _arguments_of(cfg: config.Config, task: train.DeviceTask) -> tuple[model.Params, windows.Batch]:
  weights = model.init(cfg.model, jax.random.key(cfg.seed))
  return weights, task.batch(jax.random.key(cfg.seed + 1), 0, cfg.train.batch_size)


def time_table(
  loops: str, timed: dict[str, Callable[[], Any]], rounds: int, least_s: float
) -> list[dict[str, Any]]:
  """Milliseconds a gradient for each kind of recomputation, in turns."""
  if not timed:
    return []
  times = measure.interleave(timed, rounds, least_s=least_s)
  plain = times["none"].median("cpu")
  return [
    {
      "loops": loops,
      "remat": remat,
      "wall ms": t.median("wall") * 1e3,
      "CPU ms": t.median("cpu") * 1e3,
      "× none": t.median("cpu") / plain,
    }
    for remat, t in times.items()
  ]


def _same_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows with all columns of all rows, None where one has no value; growth last."""
  names = dict.fromkeys(name for row in rows for name in row if name != "MB a pass")
  return [{name: row.get(name) for name in (*names, "MB a pass")} for row in rows]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.memory", __doc__)
  numbers = flags.counts
  parser.add_argument("--preset", choices=("tiny", "demo", "fig2b"), default="fig2b")
  parser.add_argument("--passes", type=numbers, default=(1, 2, 4, 8, 16), help="values of N under loops=scan")
  parser.add_argument(
    "--unrolled",
    type=lambda text: numbers(text) if text else (),
    default=(1, 2, 4),
    help="values of N under loops=unroll; '' for none",
  )
  parser.add_argument("--remat", type=lambda text: text.split(","), default=REMAT, help="kinds, none first")
  parser.add_argument("--timed", type=flags.count, default=4, help="the N at which a gradient is timed too")
  parser.add_argument("--batch", type=flags.count, default=64, help="sequences")
  parser.add_argument("--rounds", type=flags.natural, default=7, help="0: sizes only")
  parser.add_argument(
    "--turn", type=flags.from_zero, default=measure.LEAST_S, help="seconds of work in a turn, at least"
  )
  parser.add_argument("--threads", type=flags.count, default=1, help="cores to use")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(command.run(main, None))
