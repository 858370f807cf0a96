"""Trains and tests one model on a test of memory: needles, recall, overwriting, tracking, counting, bAbI.

    python -m experiments.memory --config=experiments/configs/memory.py:tiny_recall --workdir=work/recall
    python -m experiments.memory --config=experiments/configs/memory.py:text --checkpoint=work/text/n2 \\
      --config.data.task=needle --workdir=work/memory/needle

One run is one (task, N, seed). Reports the loss and the right answers for each of `data.depths` (keys, pairs,
hops, facts) at each of `data.lengths`, beside what a guess gets. Rerunning the same command resumes; a
finished run is left alone.

With --checkpoint nothing is trained: a run on text, or a checkpoint with a tokenizer, takes the same test as
text of `data.lengths` tokens, with full attention, with the window alone, and asleep with N = 1, 2 and 4, all
on the same prompts; see docs/memory.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from sleep_jax import config, model, windows
from sleep_jax import train as training
from sleep_jax.data import memory
from sleep_jax.experiments import cli
from sleep_jax.scoring import by_group

CONFIG = cli.define_config_flag()
FIELDS = {"": config.Config, "data": memory.MemoryConfig}
CHECKPOINT = cli.define_checkpoint_flag()
FILLER = flags.DEFINE_string(
  "filler", None, "with --checkpoint: a text whose sentences are the filler. Default: five short sentences"
)
cli.define_workdir_flag()
cli.define_process_flags()


def build(values: dict[str, Any]) -> tuple[config.Config, training.DeviceTask]:
  """The checked config and the task of a nested mapping.

  Raises:
    ConfigError: for anything that is unknown, of the wrong type or does not fit.
  """
  cfg = config.run_from_dict(memory.MemoryConfig, values)
  data = cfg.data
  memory.check_window(data, cfg.model.window)
  config.check(
    cfg.model.vocab_size == data.vocab_size,
    "model.vocab_size",
    f"must be {data.vocab_size} (marks, filler and words of this data), got {cfg.model.vocab_size}",
  )
  task = training.DeviceTask(
    layout=memory.layout(data),
    batch=functools.partial(memory.batch, data),
    held_out_seed=data.held_out_seed,
    test=make_test,
    describe=functools.partial(describe, data),
  )
  return cfg, task


def describe(data: memory.MemoryConfig, row: dict[str, Any]) -> str:
  """The right answers of each held-out set beside those of a guess, on one line."""
  by_set = ", ".join(
    f"{depth} {data.test.depth} at {length} tokens {100 * row[f'{name}_exact']:.1f} %"
    f" (a guess {100 * data.chance(depth, length):.1f} %)"
    for name, (depth, length) in zip(memory.set_names(data), data.sets, strict=True)
  )
  return f"{data.task}: right at {by_set}"


def make_test(cfg: config.Config) -> Callable[[model.Params], dict[str, Any]]:
  """weights -> row: one held-out set of `train.eval_sequences` for each depth and length."""
  data, size = cfg.data, cfg.train.eval_batch_size
  key, names = jax.random.key(data.held_out_seed), memory.set_names(data)
  segments = windows.plan(memory.layout(data), cfg.model.window, cfg.sleep)
  evaluate = by_group.make_evaluate(
    lambda g, i: training.shard(memory.batch(data, key, i, size, of=g)),
    names,
    cfg.train.eval_sequences // size,
    functools.partial(memory.answer_of, data),
    data.queries,
    segments,
    lambda weights, batch: model.forward(weights, batch, segments, cfg.model, cfg.sleep.forward_only)[0],
  )
  chances = {f"{name}_chance": data.chance(*of) for name, of in zip(names, data.sets, strict=True)}
  return lambda weights: evaluate(weights) | chances


def table(row: dict[str, Any], data: memory.MemoryConfig) -> str:
  """What a row says of each held-out set, as text."""
  title = data.test.depth
  width = max(len(title), 5)
  lines = [
    f"{title:>{width}} {'tokens':>6} {'loss':>7} {'right':>7} {'95 %':>15} {'a guess':>8}"
    f" {'commonest answer':>17}"
  ]
  for name, (depth, length) in zip(memory.set_names(data), data.sets, strict=True):
    exact, low, high, chance, majority = (
      row[f"{name}_{x}"] for x in ("exact", "low", "high", "chance", "majority")
    )
    lines.append(
      f"{depth:>{width}} {length:>6} {row[f'{name}_answer_loss']:>7.3f} {exact:>7.1%}"
      f" {f'{low:.1%} - {high:.1%}':>15} {chance:>8.1%} {majority:>17.1%}"
    )
  return "\n".join(lines)


def open_task(values: dict[str, Any], folder: str) -> tuple[config.Config, training.DeviceTask]:
  """See `tasks.open_task`; nothing is kept in the folder."""
  del folder
  return build(values)


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  if CHECKPOINT.value is not None:
    from sleep_jax.experiments import memory_checkpoint  # needs tokenizers and matplotlib

    folder = cli.required("workdir", cli.define_folder_flag().value)
    return memory_checkpoint.test(values, CHECKPOINT.value, FILLER.value, folder)
  config.check(FILLER.value is None, "--filler", "says nothing without --checkpoint")
  cfg, task = build(values)
  row = cli.train_in_workdir(cfg, lambda run: task, task.check)
  if row is None:
    return cli.DONE
  print(table(row, cfg.data))
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
