"""Trains and evaluates one model on Rule 110: one run is one (t, N, seed).

    python -m experiments.rule110 --config=experiments/configs/rule110.py:tiny --workdir=work/tiny

Rerunning the same command resumes; a finished run is left alone.
"""

import functools
from typing import Any

from sleep_jax import config
from sleep_jax import train as training
from sleep_jax.data import rule110
from sleep_jax.experiments import cli

CONFIG = cli.define_config_flag()
FIELDS = {"": config.Config, "data": rule110.Rule110Config}
cli.define_workdir_flag()
cli.define_process_flags()


def build(values: dict[str, Any]) -> tuple[config.Config, training.DeviceTask]:
  """The checked config and the task of a nested mapping.

  Raises:
    ConfigError: for anything that is unknown, of the wrong type or does not fit.
  """
  cfg = config.run_from_dict(rule110.Rule110Config, values)
  data = cfg.data
  rule110.check_window(data, cfg.model.window)
  vocab = rule110.VOCAB_SIZE
  config.check(
    cfg.model.vocab_size == vocab,
    "model.vocab_size",
    f"must be {vocab} ('0', '1', ASK), got {cfg.model.vocab_size}",
  )
  task = training.DeviceTask(
    layout=rule110.layout(data),
    batch=functools.partial(rule110.lessons, data),
    held_out=functools.partial(rule110.batch, data),
    held_out_seed=data.held_out_seed,
  )
  return cfg, task


def open_task(values: dict[str, Any], folder: str) -> tuple[config.Config, training.DeviceTask]:
  """See `tasks.open_task`; nothing is kept in the folder."""
  del folder
  return build(values)


def main() -> int:
  cfg, task = build(cli.required("config", CONFIG.value).to_dict())
  row = cli.train_in_workdir(cfg, lambda run: task, task.check)
  if row is None:
    return cli.DONE
  print(
    f"exact {row['exact']:.1%} (best constant {row['const_exact']:.1%}),"
    f" per bit {row['bit']:.1%} (best constant {row['const_bit']:.1%})"
  )
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
