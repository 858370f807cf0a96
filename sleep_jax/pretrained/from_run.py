"""A run's workdir, drawn or fine-tuned, as a model to use, to start from and to write out."""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax
from absl import logging

from sleep_jax import attention, config, fast_weights, model
from sleep_jax.config import Config, ModelConfig
from sleep_jax.pretrained import files, identity, loading
from sleep_jax.pretrained.fields import PretrainedError, shown
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime.run_config import RunConfig

if TYPE_CHECKING:  # a run without a tokenizer needs no library for it
  from sleep_jax.pretrained.tokenizer import Tokenizer

LONGEST = 16  # runs that began with each other's weights


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run has trained.

  Attributes:
    config: of the run; `data` is the task's part of it as plain nested data, as in `config.json`.
    weights: float32, placed for the mesh that is set.
    tokenizer: None if the task has none (Rule 110, Depo).
    step: optimizer steps done.
  """

  config: Config
  weights: model.Params
  tokenizer: "Tokenizer | None"
  step: int


@dataclasses.dataclass(frozen=True)
class OpenedRun:
  """A workdir that was opened, of which no weights are read yet.

  Attributes:
    folder: the workdir.
    config: of the run, as in `Run`.
    origin: folder of the checkpoint with which it began, through whatever runs; None if its weights, or those
      of the run behind it, were drawn.
    ignore: dotted names of fields of that checkpoint's `config.json` that change nothing.
  """

  folder: pathlib.Path
  config: Config
  origin: pathlib.Path | None
  ignore: tuple[str, ...]

  @property
  def model(self) -> ModelConfig:
    """The architecture, as it was run."""
    return self.config.model

  @property
  def tokenizer_file(self) -> pathlib.Path | None:
    """The run's `tokenizer.json`; None if its task has none.

    It is the one that the config names, or lies in the workdir or in the checkpoint with which the run began.

    Raises:
      PretrainedError: if the config names one and it is in none of these places.
    """
    data = self.config.data if isinstance(self.config.data, dict) else {}
    named = data.get("tokenizer")
    places = [pathlib.Path(named)] if isinstance(named, str) and named else []
    places += [folder / "tokenizer.json" for folder in (self.folder, self.origin) if folder is not None]
    found = next((path for path in places if path.is_file()), None)
    if found is None and isinstance(named, str) and named:
      raise PretrainedError(
        f"{self.folder}: its tokenizer is gone: {named}; it may also lie in the workdir as tokenizer.json"
      )
    return found


def is_run(folder: str | os.PathLike) -> bool:
  """Whether a folder is a workdir, not a checkpoint."""
  folder = pathlib.Path(folder)
  return files.is_folder(folder / "checkpoints") and files.is_there(folder / "env.json")


def open_run(folder: str | os.PathLike, *, origin: str | os.PathLike | None = None) -> OpenedRun:
  """Reads a workdir's config.

  A kernel or a form of attention that is named in it, and that this platform does not have, is left to
  the default with a warning: a run of a TPU is read on a CPU.

  Args:
    folder: the workdir.
    origin: where the checkpoint lies with which the run began, if it was moved since.

  Raises:
    PretrainedError: if the config is damaged, or `origin` is another checkpoint than the run began with.
    ConfigError: if its model cannot be built here.
  """
  folder = pathlib.Path(folder)
  values = _config_of(folder)
  cfg = config.from_dict(Config, values, f"{folder}/config.json: ")
  cfg = dataclasses.replace(cfg, model=_for_this_platform(cfg.model, folder))
  begun, ignore = folder, cfg.train.init_ignore
  for _ in range(LONGEST):
    train = _config_of(begun)["train"]
    said = train.get("init_from")
    if said is None:
      config.check(
        origin is None, "origin", f"{begun} began with weights that were drawn, not with a checkpoint"
      )
      return OpenedRun(folder, cfg, None, ())
    if not isinstance(said, str):
      raise PretrainedError(f"{begun}/config.json: train.init_from must be a path, got {shown(said)}")
    if origin is not None:
      _check_origin(begun, pathlib.Path(origin), train.get("init_digest"))
      return OpenedRun(folder, cfg, pathlib.Path(origin), ignore)
    begun = pathlib.Path(said)
    ignore = tuple(train.get("init_ignore") or ())
    if not is_run(begun):
      return OpenedRun(folder, cfg, begun, ignore)
  raise PretrainedError(f"{folder}: found no checkpoint behind {LONGEST} runs")


def _for_this_platform(cfg: ModelConfig, folder: pathlib.Path) -> ModelConfig:
  for group, name, known in (
    ("fast", "kernel", fast_weights.check_kernel), ("attention", "implementation", attention.check_form)
  ):  # fmt: skip
    part = getattr(cfg, group)
    try:
      known(part)
    except config.ConfigError as problem:
      logging.warning("%s: the default is taken: %s", folder, problem)
      cfg = dataclasses.replace(cfg, **{group: dataclasses.replace(part, **{name: None})})
  return cfg


def load_run(
  folder: str | os.PathLike, *, step: int | None = None, origin: str | os.PathLike | None = None
) -> Run:
  """The weights of a run with its config and tokenizer. Nothing is written; the run may still train.

  Args:
    folder: the workdir.
    step: which saved step. None: the newest that is not damaged.
    origin: where the checkpoint lies with which the run began, if it was moved since.

  Raises:
    PretrainedError, ConfigError: as `open_run`, or if the run has saved nothing or its tokenizer is gone.
    CheckpointError: if that step was not saved or is damaged, or all of them are, or one is of another run.
  """
  run = open_run(folder, origin=origin)
  path, tokenizer = run.tokenizer_file, None
  if path is not None:
    from sleep_jax.pretrained.tokenizer import Tokenizer

    tokenizer = Tokenizer(path.parent, run.model)
  weights, step = run_weights(run, step=step)
  return Run(run.config, weights, tokenizer, step)


def run_source(run: OpenedRun) -> loading.Source | None:
  """The checkpoint with which a run began, opened; None if its weights were drawn.

  Raises:
    PretrainedError, ConfigError: if it is gone or has changed.
  """
  if run.origin is None:
    return None
  if not files.is_folder(run.origin):
    raise PretrainedError(
      f"{run.origin}: there is no such folder; {run.folder} began with it. If it was moved, say where with"
      " `origin`"
    )
  return loading.open_source(run.origin, ignore=run.ignore)


def run_weights(run: OpenedRun, *, step: int | None = None) -> tuple[model.Params, int]:
  """The weights of an opened run and their step, as `load_run`; their average, if the run has one."""
  wanted = jax.eval_shape(lambda: model.init(run.model, jax.random.key(0)))
  name = "average" if run.config.optim.average else "params"
  folder, same = run.folder / "checkpoints", _run_config(run.folder)
  with checkpoint.Checkpoints(folder, read_only=True, config=same) as saved:
    restored = saved.restore({name: wanted}, subset=True, step=step)
  if restored is None:
    raise PretrainedError(f"{run.folder}: this run has saved no step yet")
  return restored[1][name], restored[0]


def _run_config(folder: pathlib.Path) -> RunConfig:
  """What the checkpoints of a workdir must name to be this run's: its config.json, as far as that stays.

  A run may have been made longer since a step was saved, or what it began with moved. A run that it began
  with may have gone on, and has another digest then. Which fields a task had when the step was saved, only
  the task knows; what they are in config.json counts.
  """
  values = _config_of(folder)
  start, defaults = values["train"].get("init_from"), config.defaults_of(config.Config(None, ModelConfig(1)))
  moved = ("train.init_from", "data.tokenizer") if start else ()
  again = ("train.init_digest",) if isinstance(start, str) and is_run(start) else ()
  return RunConfig(
    values,
    may_change=moved + again,
    may_grow=("train.steps",),
    defaults=defaults | {"data": values.get("data")},
  )


def _check_origin(begun: pathlib.Path, origin: pathlib.Path, digest: Any) -> None:
  """Refuses a checkpoint that is not the one with which a run began. Runs of older versions do not know."""
  if is_run(origin):
    raise PretrainedError(f"{origin}: is a run; `origin` is the checkpoint with which {begun} began")
  if digest is not None and (there := identity.digest(origin)) != digest:
    raise PretrainedError(
      f"{origin}: is not the checkpoint with which {begun} began (its digest is {there}, not {shown(digest)})"
    )


def _config_of(folder: pathlib.Path) -> dict[str, Any]:
  """A workdir's config.json, as far as it is needed here."""
  values = files.read_json(folder / "config.json")
  for name in ("model", "train"):
    if not isinstance(values.get(name), dict):
      raise PretrainedError(f"{folder / 'config.json'}: is not that of a run: {name} is missing")
  return values
