"""Does training wait for data? The share of step time without a batch, and what making batches costs alone.

    python -m benchmarks.data_wait --steps=40

Runs the presets of GSM-Infinite that a CPU can train for some steps, data made in a thread beside them, and
makes the batches of every preset without training.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from sleep_jax import config, train
from sleep_jax.benchmarks import command, tables
from sleep_jax.data import batching
from sleep_jax.experiments import gsm_infinite
from sleep_jax.experiments.configs import gsm_infinite as presets
from sleep_jax.kernels.measure import flags
from sleep_jax.runtime import metrics, workdir

TRAINED = ("tiny",)  # small and scratch need an accelerator
SCRATCH = [
  preset for preset in presets.PRESETS if preset not in presets.PRETRAINED
]  # those need a checkpoint
NOTES = (
  "`data_wait`: time for which the loop stood still for a batch over all the steps' time, without compiling;"
  " an upper bound of what the device missed. The first step, which fills the pipeline, is not counted.",
  "`padding`: share of positions without a token. `tokens / s`: without pads, by the clock.",
  "Data alone: one process, CPU time, generator, tokens and placing in buckets.",
  "On a CPU, making data and training share the cores: what is made in a thread is paid for by the step.",
)


def trained(preset: str, num_passes: int, steps: int) -> dict[str, Any]:
  """One run of a preset in a workdir of its own: its rows after the first step, as one."""
  values = presets.get_config(preset)
  values.sleep.num_passes = num_passes
  values.train.update(steps=steps, log_every=1, eval_every=steps, save_every=steps)
  cfg = gsm_infinite.build(values.to_dict())
  with tempfile.TemporaryDirectory() as folder:
    with workdir.prepare(folder, config.to_dict(cfg)) as run:
      train.train(cfg, gsm_infinite.make_task(cfg, folder), run, report=lambda line: None)
    rows = [row for row in metrics.read(run.metrics) if row["kind"] == "train"]
  took = [after["wall_s"] - before["wall_s"] for before, after in zip(rows, rows[1:], strict=False)]
  return {
    "preset": preset,
    "N": num_passes,
    "batch": cfg.train.batch_size,
    "data_wait": sum(row["data_wait"] * t for row, t in zip(rows[1:], took, strict=True)) / sum(took),
    "padding": sum(row["padding"] for row in rows) / len(rows),
    "tokens / s": (rows[-1]["tokens"] - rows[0]["tokens"]) / sum(took),
    "ms a step": 1e3 * sum(took) / len(took),
  }


def alone(preset: str, batches: int) -> dict[str, Any]:
  """What it costs to make the batches of a preset."""
  cfg = gsm_infinite.build(presets.get_config(preset).to_dict())
  with tempfile.TemporaryDirectory() as folder:
    task = gsm_infinite.make_task(
      config.replace(cfg, train={"eval_sequences": 8 * 3, "eval_batch_size": 1}), folder
    )
    plan = batching.BatchPlan(
      task.source,
      task.cut,
      window=cfg.model.window,
      batch_size=cfg.train.batch_size,
      steps=cfg.train.steps,
      seed=cfg.seed,
    )
    begin, made = time.process_time(), []
    while len(made) < batches:
      made += plan[len(made) // task.cut.bucket_batches]
    cpu = time.process_time() - begin
  examples = len(made) * cfg.train.batch_size
  return {
    "preset": preset,
    "examples": examples,
    "examples / CPU s": examples / cpu,
    "CPU ms a batch": 1e3 * cpu / len(made),
    "padding": sum(p.padding for p in made) / len(made),
    "shapes": len({p.bucket for p in made}),
  }


def main(argv: Sequence[str] | None = None) -> int:
  parser = flags.Parser("benchmarks.data_wait", __doc__)
  parser.add_argument("--steps", type=flags.count, default=40, help="of each run")
  parser.add_argument("--passes", type=flags.counts, default=(1, 2, 4), help="N, as 1,2,4")
  parser.add_argument("--batches", type=flags.count, default=4, help="of each preset, without training")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  args = parser.parse_args(argv)
  facts = tables.machine(("jax", "jaxlib", "numpy", "tokenizers", "grain"))
  sections = {
    "Training": [trained(preset, n, args.steps) for preset in TRAINED for n in args.passes],
    "Making: data alone": [alone(preset, args.batches) for preset in SCRATCH],
  }
  tables.save(args.out, "data_wait", "Waiting for data", sections, tables.finish(facts), NOTES)
  return 0


if __name__ == "__main__":
  sys.exit(command.run(main, None))
