"""What is planned: a config, the longest sequence that its steps see, and who makes the batches."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from sleep_jax import config, pretrained, train, windows
from sleep_jax.config import Config, MeshConfig, TrainConfig, check
from sleep_jax.data import batching
from sleep_jax.experiments import config_file, tasks
from sleep_jax.launch.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class Problem:
  """The step of a run, before it is compiled.

  Attributes:
    cfg: of the run.
    layout: [T] bool, where the loss may be, in its longest sequences.
    task: what makes batches on the device; None: the host does.
  """

  cfg: Config
  layout: np.ndarray
  task: train.DeviceTask | None

  @property
  def tokens(self) -> int:
    """T."""
    return len(self.layout)

  @functools.cached_property
  def segments(self) -> windows.Plan:
    return windows.plan(self.layout, self.cfg.model.window, self.cfg.sleep)

  @property
  def read(self) -> windows.Plan:
    """The windows as the program reads them: under one loop all are of one length (`sleep_jax/flat.py`)."""
    return windows.whole_windows(self.segments) if self.cfg.sleep.flat else self.segments

  def changed(self, **groups: Mapping[str, Any]) -> "Problem":
    """The same with other fields, by group.

    Raises:
      ConfigError: where they do not fit.
    """
    return dataclasses.replace(self, cfg=config.replace(self.cfg, **groups))


def read(path: str, values: Mapping[str, Any]) -> Problem:
  """The problem of a config file, with what the command line changed of it.

  A preset that starts from a checkpoint, and names none, is planned with the architecture that is published.

  Args:
    path: FILE.py:PRESET.
    values: what it says, changed; nested.

  Raises:
    ConfigError: for anything that is unknown, of the wrong type or does not fit.
  """
  module, preset = config_file.load(path)
  values = {name: dict(x) if isinstance(x, Mapping) else x for name, x in values.items()}
  if "pretrained" in values and not values["pretrained"].get("folder"):
    check(hasattr(module, "published"), "pretrained.folder", "is required: a checkpoint's folder, or a run's")
    start = config.from_dict(pretrained.StartConfig, values.pop("pretrained"), "pretrained.")
    model = pretrained.start_model(start, values.get("model", {}), architecture=module.published(preset))
    trained = pretrained.trained_weights(start, model)
    values |= {"model": model, "optim": {**values.get("optim", {}), "trained": trained}}
  built = tasks.experiment_of(values).build(values)
  if isinstance(built, tuple):
    cfg, task = built
    return Problem(cfg, task.layout, task)
  if not hasattr(built.data, "cut"):  # rows of one length, a loss everywhere
    return Problem(built, np.ones(built.data.length, bool), None)
  cut, window = built.data.cut, built.model.window
  prompts = range(
    max(cut.max_tokens - window, 1), cut.max_tokens
  )  # lengths: shorter ones need no more windows
  fitting = [batching.bucket_of(batching.Example(range(p), range(1), 0), cut, window) for p in prompts]
  longest = max(fitting, key=lambda bucket: bucket.windows * window + bucket.tail)
  return Problem(built, batching.layout(longest, cut, window), None)


def check_division(
  mesh: MeshConfig, training: TrainConfig, row: Hardware, slices: int = 1
) -> tuple[int, int]:
  """The sizes of the mesh, `data` and `model`, of a run on some hardware.

  Args:
    mesh, training: of the run.
    row: the hardware.
    slices: how many of it.

  Raises:
    ConfigError: where the devices, the hosts or the batch do not divide.
  """
  devices, hosts, data, model = row.devices * slices, row.hosts * slices, mesh.data, mesh.model
  name = row.name if slices == 1 else f"{slices} x {row.name}"
  where = f"the {devices} devices of {name}"
  check(devices % model == 0, "mesh.model", f"must divide {where}, got {model}")
  if data == -1:
    data = devices // model
  wanted = f"mesh.data = {devices // model}" if devices % model == 0 else "another mesh"
  check(data * model == devices, "mesh", f"must take {where}, got {data} x {model}; take {wanted}")
  check(
    data % hosts == 0,
    "mesh.data",
    f"must be a multiple of the {hosts} hosts of {name}, got {data}",
  )
  size, parts = training.batch_size, training.microbatches
  check(
    size % data == 0,
    "train.batch_size",
    f"must be a multiple of mesh.data = {data}, got {size}; try {max(round(size / data), 1) * data}",
  )
  check(
    size // parts % data == 0,
    "train.microbatches",
    f"must leave a part a multiple of mesh.data = {data} sequences, got parts of {size // parts}; at most"
    f" {size // data} would",
  )
  return data, model
