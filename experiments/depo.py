"""Trains and evaluates one model on Depo: one run is one (N, seed).

    python -m experiments.depo --config=experiments/configs/depo.py:tiny --workdir=work/depo/n2

Reports, for each k of `data.test_hops`, the held-out loss with and without the trivial ANS token, the
accuracy of whole names, and both by the place of the question. Rerunning the same command resumes; a
finished run is left alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from sleep_jax import config, model, windows
from sleep_jax import train as training
from sleep_jax.data import depo
from sleep_jax.experiments import cli
from sleep_jax.scoring import by_group

CONFIG = cli.define_config_flag()
FIELDS = {"": config.Config, "data": depo.DepoConfig}
cli.define_workdir_flag()
cli.define_process_flags()


def build(values: dict[str, Any]) -> tuple[config.Config, training.DeviceTask]:
  """The checked config and the task of a nested mapping.

  Raises:
    ConfigError: for anything that is unknown, of the wrong type or does not fit.
  """
  cfg = config.run_from_dict(depo.DepoConfig, values)
  data = cfg.data
  depo.check_window(data, cfg.model.window)
  config.check(
    cfg.model.vocab_size == data.vocab_size,
    "model.vocab_size",
    f"must be {data.vocab_size} (names, hops and marks of this data), got {cfg.model.vocab_size}",
  )
  task = training.DeviceTask(
    layout=depo.layout(data),
    batch=functools.partial(depo.batch, data),
    held_out_seed=data.held_out_seed,
    test=make_test,
    describe=functools.partial(describe, data),
  )
  return cfg, task


def describe(data: depo.DepoConfig, row: dict[str, Any]) -> str:
  """The accuracy of whole names by k, on one line."""
  by_hops = ", ".join(f"k={k} {100 * row[f'k{k}_exact']:.1f} %" for k in data.test_hops)
  return f"right at {by_hops} (a guess {100 / data.max_nodes:.1f} %)"


def make_test(cfg: config.Config) -> Callable[[model.Params], dict[str, Any]]:
  """weights -> row: one held-out set of `train.eval_sequences` for each k, on the same graphs."""
  data, size = cfg.data, cfg.train.eval_batch_size
  key = jax.random.key(data.held_out_seed)
  segments = windows.plan(depo.layout(data), cfg.model.window, cfg.sleep)
  return by_group.make_evaluate(
    lambda g, i: training.shard(depo.batch(data, key, i, size, hops=data.test_hops[g])),
    [f"k{k}" for k in data.test_hops],
    cfg.train.eval_sequences // size,
    functools.partial(depo.answer_of, data),
    data.pairs,
    segments,
    lambda weights, batch: model.forward(weights, batch, segments, cfg.model, cfg.sleep.forward_only)[0],
  )


def table(row: dict[str, Any], hops: tuple[int, ...], nodes: int) -> str:
  """What a row says by k, as text."""
  lines = [
    f"{'k':>3} {'loss':>7} {'loss without ANS':>17} {'right':>7} {'95 %':>15}   (a guess: {1 / nodes:.1%})"
  ]
  for k in hops:
    exact, low, high = (row[f"k{k}_{name}"] for name in ("exact", "low", "high"))
    lines.append(
      f"{k:>3} {row[f'k{k}_loss']:>7.3f} {row[f'k{k}_answer_loss']:>17.3f} {exact:>7.1%}"
      f" {f'{low:.1%} - {high:.1%}':>15}"
    )
  return "\n".join(lines)


def open_task(values: dict[str, Any], folder: str) -> tuple[config.Config, training.DeviceTask]:
  """See `tasks.open_task`; nothing is kept in the folder."""
  del folder
  return build(values)


def main() -> int:
  cfg, task = build(cli.required("config", CONFIG.value).to_dict())
  row = cli.train_in_workdir(cfg, lambda run: task, task.check)
  if row is None:
    return cli.DONE
  print(table(row, cfg.data.test_hops, cfg.data.max_nodes))
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
