"""Which experiment a config is of: from plain values to the checked config and its task.

Training knows its experiment by its command; commands that take any run or config file ask here.
"""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from sleep_jax import config, train

EXPERIMENTS = ("rule110", "depo", "gsm_infinite", "text", "memory")


def experiment_of(values: Mapping[str, Any], where: str = "config") -> ModuleType:
  """The experiment whose data config has the fields of `values["data"]`.

  Args:
    values: a config as nested plain data, such as a run's config.json.
    where: what the values are, for the message.

  Raises:
    ConfigError: if no experiment of this package has such data.
  """
  data = values.get("data")
  for name in EXPERIMENTS:
    module = importlib.import_module(f"sleep_jax.experiments.{name}")
    fields = {field.name for field in dataclasses.fields(module.FIELDS["data"])}
    if isinstance(data, Mapping) and set(data) <= fields:
      return module
  raise config.ConfigError(
    f"{where}: data is of no experiment of this package ({', '.join(EXPERIMENTS)}); train and test a task of"
    " your own with `train.train`"
  )


def open_task(values: Mapping[str, Any], folder: str | os.PathLike) -> tuple[config.Config, train.Task]:
  """The checked config of a nested mapping, and its task.

  Args:
    values: as in a config file or a run's config.json.
    folder: where a task that needs files, such as a tokenizer, keeps them: a workdir.

  Raises:
    ConfigError: for anything that is unknown, of the wrong type or does not fit.
  """
  return experiment_of(values).open_task(dict(values), str(folder))
