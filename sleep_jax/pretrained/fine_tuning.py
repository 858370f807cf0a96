"""Where a fine-tuning starts: a checkpoint, or a run."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax

from sleep_jax import config, model
from sleep_jax.config import ATTENTION, FastConfig, ModelConfig
from sleep_jax.config.model import MOST_BLOCKS
from sleep_jax.pretrained import files, from_run, identity, loading, memory
from sleep_jax.pretrained.fields import PretrainedError

# How a model is run, which a checkpoint does not say.
_FREE = (
  "window", "eviction", "embed_std", "dtype", "matmul_dtype", "predict_passes", "pass_cache", "exit_threshold"
)  # fmt: skip
_FREE_FAST = ("conv_context", "decay_init", "kernel")
_FREE_ATTENTION = ("implementation",)


@dataclasses.dataclass(frozen=True)
class StartConfig:
  """A checkpoint, and what a run makes of it.

  Attributes:
    folder: a checkpoint with its `tokenizer.json`, or the workdir of a run.
    memory_layers: fast-weight layers to insert; a checkpoint with inserted ones must have as many. 0: none.
    fast: sizes of inserted layers.
    trained: `all` weights, or the inserted `memory` alone.
    ignore: dotted names of unknown fields of the checkpoint's `config.json` that change nothing.
  """

  PATH: ClassVar[str] = "pretrained"

  folder: str | None = None
  memory_layers: Annotated[int, config.Bounds(least=0), config.Bounds(most=MOST_BLOCKS)] = 0
  fast: FastConfig = memory.MEMORY
  trained: Literal["all", "memory"] = "all"
  ignore: tuple[str, ...] = ()

  def __post_init__(self):
    config.check_fields(self)


def start_model(
  start: StartConfig, how: Mapping[str, Any], architecture: ModelConfig | None = None
) -> ModelConfig:
  """The model of a run: the architecture is the checkpoint's, the rest is said by `how`.

  Args:
    start: the checkpoint; only headers are read.
    how: fields of `ModelConfig` that a checkpoint does not say, nested: `window`, `eviction`, `dtype`,
      `fast.kernel`, `attention.implementation` and the like.
    architecture: the checkpoint's, where it is known and there is no checkpoint yet. None: it is read.

  Raises:
    PretrainedError: if the checkpoint cannot be read.
    ConfigError: if `how` has a field that the checkpoint says, or the fields do not fit each other.
  """
  folder = start.folder
  if not folder and architecture is None:
    raise config.ConfigError("pretrained.folder: is required: a checkpoint's folder, or a run's")
  groups = {"fast": _FREE_FAST, "attention": _FREE_ATTENTION}
  for group, known in (("", (*groups, *_FREE)), *groups.items()):
    given, name = (how.get(group, {}), f"model.{group}") if group else (how, "model")
    config.check(isinstance(given, Mapping), name, f"must be a group of fields, got {config.shown(given)}")
    twice = [f"{name}.{field}" for field in given if field not in known]
    config.check(not twice, ", ".join(twice), f"is said by the checkpoint, {folder}")
  there = _architecture(str(folder), start.ignore) if architecture is None else architecture
  if there.without_mlp and start.memory_layers:
    _check_same_memory(start, there)
  elif start.memory_layers:
    there = memory.memory_config(there, num_layers=start.memory_layers, fast=start.fast)
  config.check(
    _has_memory(there),
    "pretrained.folder",
    f"{folder} has no fast weights, nothing that sleep could write; start from one that has, or set"
    " pretrained.memory_layers",
  )
  values = config.to_dict(there)
  changed = {group: values[group] | dict(how.get(group, {})) for group in groups}
  return config.from_dict(ModelConfig, values | dict(how) | changed, "model.")


def trained_weights(start: StartConfig, cfg: ModelConfig) -> tuple[str, ...]:
  """Patterns for `optim.trained`.

  Raises:
    ConfigError: if only an inserted memory is to be trained and there is none.
  """
  if start.trained == "all":
    return ("*",)
  config.check(
    bool(cfg.without_mlp),
    "pretrained.trained",
    f"must be `all`: the fast weights of {start.folder} are its own, none were inserted",
  )
  return memory.memory_weights(cfg)


def tokenizer_file(folder: str | os.PathLike) -> pathlib.Path:
  """The `tokenizer.json` of a checkpoint or run.

  Raises:
    PretrainedError: if it has none.
  """
  path = pathlib.Path(folder) / "tokenizer.json"
  if from_run.is_run(folder):
    path = from_run.open_run(folder).tokenizer_file or path
  if not path.is_file():
    raise PretrainedError(f"{path}: there is no such file")
  return path


def start_digest(folder: str | os.PathLike) -> str:
  """Which checkpoint or run it is, wherever it lies: see `identity`."""
  if from_run.is_run(folder):
    return identity.run_digest(files.read_json(pathlib.Path(folder) / "config.json"))
  return identity.digest(folder)


def check_start(cfg: ModelConfig, folder: str | os.PathLike, *, ignore: Sequence[str] = ()) -> None:
  """Compares a config with that of a checkpoint or run, of which no weights are read.

  Raises:
    PretrainedError: if the checkpoint cannot be read.
    ConfigError: naming the fields in which the checkpoint is another model.
  """
  there = _architecture(folder, ignore, **_changes(cfg))
  if _lacks_memory(cfg, there):
    there = memory.memory_config(there, **_memory_of(cfg))
  fast = {name: getattr(cfg.fast, name) for name in _FREE_FAST}
  attention = {name: getattr(cfg.attention, name) for name in _FREE_ATTENTION}
  there = config.replace(there, **_changes(cfg), fast=fast, attention=attention)
  differences = []
  for field in dataclasses.fields(cfg):
    ours, theirs = getattr(cfg, field.name), getattr(there, field.name)
    if ours != theirs:
      differences.append(f"model.{field.name} is {ours}, that of the checkpoint {theirs}")
  config.check(not differences, "train.init_from", f"{folder} is another model: {'; '.join(differences)}")


def start_weights(
  cfg: ModelConfig, folder: str | os.PathLike, key: jax.Array, *, ignore: Sequence[str] = ()
) -> model.Params:
  """The slow weights of a checkpoint or run, float32, placed for the mesh that is set.

  Layers that `cfg` inserts into a checkpoint without any are drawn, as `add_memory` draws them.

  Args:
    cfg: of the model to be trained.
    folder: a checkpoint, or the workdir of a run.
    key: typed PRNG key for layers to be inserted.
    ignore: dotted names of unknown fields of the checkpoint's `config.json` that change nothing.

  Raises:
    PretrainedError, ConfigError: as `check_start`.
    CheckpointError: if a run has saved nothing, or all of it is damaged.
  """
  check_start(cfg, folder, ignore=ignore)
  if from_run.is_run(folder):
    run = from_run.open_run(folder)
    there, (weights, _) = run.model, from_run.run_weights(run)
  else:
    there, weights, _ = loading.load(folder, ignore=ignore, **_changes(cfg))
  if _lacks_memory(cfg, there):
    _, weights = memory.add_memory(there, weights, key, **_memory_of(cfg))
  return weights


def _architecture(folder: str | os.PathLike, ignore: Sequence[str], **changes: Any) -> ModelConfig:
  if from_run.is_run(folder):
    return from_run.open_run(folder).model
  return loading.open_source(folder, ignore=ignore, **changes).model


def _check_same_memory(start: StartConfig, there: ModelConfig) -> None:
  """Refuses to insert layers of one kind where there are some of another."""
  inserted = len(there.without_mlp)
  config.check(
    inserted == start.memory_layers,
    "pretrained.memory_layers",
    f"is {start.memory_layers}, but {start.folder} has {inserted} inserted layers already",
  )
  for field in dataclasses.fields(FastConfig):
    ours, theirs = getattr(start.fast, field.name), getattr(there.fast, field.name)
    config.check(
      ours == theirs or field.name in _FREE_FAST,
      f"pretrained.fast.{field.name}",
      f"is {ours}, that of the layers in {start.folder} {theirs}",
    )


def _has_memory(cfg: ModelConfig) -> bool:
  return not set(cfg.blocks) <= set(ATTENTION)


def _lacks_memory(cfg: ModelConfig, there: ModelConfig) -> bool:
  """Whether `cfg` is a model with inserted layers, and `there` one into which they can be inserted."""
  return bool(cfg.without_mlp) and not _has_memory(there) and len(there.blocks) >= len(cfg.without_mlp)


def _memory_of(cfg: ModelConfig) -> dict[str, Any]:
  """What `memory_config` is to insert."""
  return {"num_layers": len(cfg.without_mlp), "kind": cfg.blocks[cfg.without_mlp[0]], "fast": cfg.fast}


def _changes(cfg: ModelConfig) -> dict[str, Any]:
  return {name: getattr(cfg, name) for name in _FREE}
