"""Where a fine-tuning starts: the weights of a checkpoint, for a model that is configured already."""

import dataclasses
import os

from sleep_jax import config, model
from sleep_jax.config import ModelConfig
from sleep_jax.pretrained import loading

# How a model is run, which a checkpoint does not say.
_FREE = ("window", "eviction", "embed_std", "dtype", "predict_passes", "pass_cache", "exit_threshold")
_FREE_FAST = ("conv_context", "decay_init", "kernel")


def check_start(cfg: ModelConfig, folder: str | os.PathLike) -> None:
  """Compares a config with that of a checkpoint, of which only headers are read.

  Raises:
    PretrainedError: if the checkpoint cannot be read.
    ConfigError: naming the fields in which the checkpoint is another model.
  """
  there = loading.open_source(folder, **_changes(cfg)).model
  fast = {name: getattr(cfg.fast, name) for name in _FREE_FAST}
  there = dataclasses.replace(there, fast=dataclasses.replace(there.fast, **fast))
  told = []
  for field in dataclasses.fields(cfg):
    ours, theirs = getattr(cfg, field.name), getattr(there, field.name)
    if ours != theirs:
      told.append(f"model.{field.name} is {ours}, that of the checkpoint {theirs}")
  config.check(not told, "train.init_from", f"{folder} is another model: {'; '.join(told)}")


def start_weights(cfg: ModelConfig, folder: str | os.PathLike) -> model.Params:
  """The slow weights of a checkpoint, float32, placed for the mesh that is set.

  Raises:
    PretrainedError, ConfigError: as `check_start`.
  """
  check_start(cfg, folder)
  return loading.load(folder, **_changes(cfg))[1]


def _changes(cfg: ModelConfig) -> dict[str, object]:
  return {name: getattr(cfg, name) for name in _FREE}
