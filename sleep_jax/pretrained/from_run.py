"""A run that began with a checkpoint in published format, as something to start from and to write back."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from sleep_jax import config, model
from sleep_jax.config import ModelConfig
from sleep_jax.pretrained import loading, safetensors_io
from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.runtime import checkpoint

LONGEST = 16  # runs that began with each other's weights


@dataclasses.dataclass(frozen=True)
class Trained:
  """A workdir whose checkpoints are weights of a published model, opened without reading any.

  Attributes:
    folder: the workdir.
    model: the architecture, as it was run.
    published: folder of the checkpoint in published format with which it began, through whatever runs.
    ignore: fields of that checkpoint's `config.json` that are known to change nothing.
  """

  folder: pathlib.Path
  model: ModelConfig
  published: pathlib.Path
  ignore: tuple[str, ...]


def is_run(folder: str | os.PathLike) -> bool:
  """Whether a folder is a workdir, not a checkpoint in published format."""
  folder = pathlib.Path(folder)
  return (folder / "checkpoints").is_dir() and (folder / "env.json").is_file()


def open_run(folder: str | os.PathLike) -> Trained:
  """Reads a workdir's config.

  Raises:
    PretrainedError: if it is damaged, or the run did not begin with a published checkpoint.
    ConfigError: if its model cannot be built here.
  """
  folder = pathlib.Path(folder)
  found, train = _config_of(folder), None
  begun = folder
  for _ in range(LONGEST):
    train = _config_of(begun)["train"]
    if train.get("init_from") is None:
      raise PretrainedError(f"{begun}: this run began with weights that were drawn, not with a checkpoint")
    begun = pathlib.Path(train["init_from"])
    if not is_run(begun):
      break
  else:
    raise PretrainedError(f"{folder}: found no checkpoint in published format behind {LONGEST} runs")
  cfg = config.from_dict(ModelConfig, found["model"], f"{folder}/config.json: model.")
  return Trained(folder, cfg, begun, tuple(train.get("init_ignore", ())))


def load_run(folder: str | os.PathLike) -> tuple[ModelConfig, model.Params, loading.Source, int]:
  """The newest weights of a run, placed for the mesh that is set. Nothing is written; it may still train.

  Returns:
    The config, the weights (float32), the checkpoint with which it began, and the step.

  Raises:
    PretrainedError, ConfigError: as `open_run`, or if that checkpoint is gone or has changed.
    CheckpointError: if nothing was saved, or all of it is damaged.
  """
  run = open_run(folder)
  weights, step = run_weights(run)
  return run.model, weights, loading.open_source(run.published, ignore=run.ignore), step


def run_weights(run: Trained) -> tuple[model.Params, int]:
  """The newest weights of an opened run and their step, as `load_run`."""
  wanted = jax.eval_shape(lambda: model.init(run.model, jax.random.key(0)))
  with checkpoint.Checkpoints(run.folder / "checkpoints", read_only=True) as saved:
    restored = saved.restore({"params": wanted}, subset=True)
  if restored is None:
    raise PretrainedError(f"{run.folder}: this run has saved no step yet")
  return restored[1]["params"], restored[0]


def _config_of(folder: pathlib.Path) -> dict[str, Any]:
  """A workdir's config.json, as far as it is needed here."""
  values = safetensors_io.read_json(folder / "config.json")
  for name in ("model", "train"):
    if not isinstance(values.get(name), dict):
      raise PretrainedError(f"{folder / 'config.json'}: is not that of a run: {name} is missing")
  return values
