"""Reads a checkpoint, or what a run has trained, checks it, and writes it as safetensors and `config.json`.

    python -m experiments.convert --config=experiments/configs/convert.py:memory \\
      --config.source=checkpoints/Ouro-1.4B --config.target=checkpoints/Ouro-1.4B-memory
    python -m experiments.convert --config=experiments/configs/convert.py:export \\
      --config.source=work/ouro/n4 --config.target=checkpoints/Ouro-1.4B-tuned
    python -m experiments.convert --config=experiments/configs/convert.py:gguf \\
      --config.source=SmolLM2.gguf --config.target=checkpoints/SmolLM2

A run that began with a published checkpoint is written in the format of that checkpoint, any other run in our
own. Every tensor is compared with what was read, to the bit. On a mistake nothing is written.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np

from sleep_jax import config, model, params, pretrained
from sleep_jax.config import ConfigError, FastConfig, ModelConfig
from sleep_jax.config.model import MOST_BLOCKS
from sleep_jax.cost import need
from sleep_jax.experiments import cli
from sleep_jax.runtime import files

CONFIG = cli.define_config_flag()


class ConversionError(RuntimeError):
  """What was written is not what was read, or cannot be written; one line."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """One conversion.

  Attributes:
    source: a checkpoint, or the workdir of a run; with `gguf` a file.
    gguf: the source is a GGUF file, which becomes a checkpoint of the Llama kind.
    target: folder to make; must not exist. None: only read and check.
    step: of a run, which saved step. None: the newest good one.
    origin: of a run, where the checkpoint lies with which it began, if it was moved since.
    memory_layers: fast-weight layers to insert; 0 for none.
    fast: sizes of the inserted layers.
    seed: of the inserted layers' weights.
    dtype: of what is written. `published`, to which trained weights are rounded, or `float32`, which loses
      nothing. Inserted layers and our own format are float32 always.
    ignore: dotted names of unknown fields of `config.json` that change nothing; a run says itself which.
  """

  source: str | None = None
  gguf: bool = False
  target: str | None = None
  step: Annotated[int | None, config.Bounds(least=0)] = None
  origin: str | None = None
  memory_layers: Annotated[int, config.Bounds(least=0), config.Bounds(most=MOST_BLOCKS)] = 0
  fast: FastConfig = FastConfig(num_heads=16, key_dim=128, value_dim=128)
  seed: config.Seed = 0
  dtype: Literal["published", "float32"] = "published"
  ignore: tuple[str, ...] = ()

  def __post_init__(self):
    config.check_fields(self)
    what = "the GGUF file" if self.gguf else "the folder with config.json"
    config.check(bool(self.source), "source", f"is required: {what}")
    if not self.gguf:
      named = str(self.source).endswith(".gguf")
      config.check(not named, "source", f"{self.source} is a GGUF file: use the preset `gguf`")
      return
    for name in ("step", "origin"):
      config.check(getattr(self, name) is None, name, "is of a run, and the source is a GGUF file")
    config.check(not self.memory_layers, "memory_layers", "must be 0: add a memory to what is written")


FIELDS = {"": ConvertConfig}


@dataclasses.dataclass(frozen=True)
class Opened:
  """What is to be converted.

  Attributes:
    model, weights: the model.
    source: the checkpoint in whose format it is written; None for our own format.
    step: of the run; None for a checkpoint.
    tokenizer: of a run that is written in our own format.
    what: it is, in words.
  """

  model: ModelConfig
  weights: model.Params
  source: pretrained.Source | None
  step: int | None
  tokenizer: pathlib.Path | None
  what: str


def convert(cfg: ConvertConfig) -> str:
  """Does it.

  Returns:
    A sentence about what was read and written.

  Raises:
    ConfigError: for whatever is wrong with the config or the checkpoint.
    ConversionError: if the target cannot be written.
  """
  target = None if cfg.target is None else pathlib.Path(cfg.target)
  config.check(target is None or not target.exists(), "target", f"{cfg.target} exists already")
  if cfg.gguf:
    return _convert_gguf(cfg, target)
  opened = _open(cfg)
  architecture, weights = opened.model, opened.weights
  _check_finite(weights)
  before = params.count(model.declare(architecture))
  summary = f"read {opened.what}: {before:,} parameters in {len(jax.tree.leaves(weights))} tensors"
  if cfg.memory_layers:
    check_memory(cfg, architecture)
    key = jax.random.key(cfg.seed)
    architecture, weights = pretrained.add_memory(
      architecture, weights, key, num_layers=cfg.memory_layers, fast=cfg.fast
    )
    added = params.count(model.declare(architecture)) - before
    summary += f"; added {cfg.memory_layers} layers with {added:,} ({added / before:.1%})"
  if target is None:
    return summary
  skipped: list[str] = []
  rounded: list[str] = []

  def write(made: pathlib.Path) -> None:
    if opened.source is None:
      pretrained.write_own(made, architecture, weights, step=opened.step, tokenizer=opened.tokenizer)
    else:
      pretrained.write_like(
        made, architecture, weights, opened.source, dtype=cfg.dtype, report=skipped.append
      )
    written = pretrained.open_source(made, ignore=() if opened.source is None else opened.source.ignore)
    rounded.extend(pretrained.differing(written, weights))
    unchanged = opened.step is None and cfg.dtype == "published" and not written.own
    if unchanged and opened.source is not None:
      _check_equal(opened.source, written)

  _appear(target, write)
  equal = f"rounded in {len(rounded)} tensors" if rounded else "bit-equal to what was read"
  return "\n".join([f"{summary}; wrote {target}, {equal}", *skipped])


def _convert_gguf(cfg: ConvertConfig, target: pathlib.Path | None) -> str:
  """`convert` of a GGUF file."""
  from sleep_jax.pretrained import (
    gguf_header,
    gguf_model,
    safetensors_io,
  )  # an extra that nothing else here needs

  header = gguf_header.read(cfg.source or "")
  checkpoint = gguf_model.Checkpoint(header, float32=cfg.dtype == "float32", ignore=cfg.ignore)
  summary = f"read {cfg.source}: {checkpoint.parameters:,} parameters in {len(checkpoint.tensors)} tensors"
  if target is None:
    for name in checkpoint.tensors:
      checkpoint.read(name)
    return summary

  def write(made: pathlib.Path) -> None:
    checkpoint.write(made)
    written = pretrained.open_source(made)
    for name, (dtype, _) in checkpoint.tensors.items():
      wanted = checkpoint.read(name).astype(safetensors_io.DTYPES[dtype])
      if written.tensors.read(name).tobytes() != wanted.tobytes():
        raise ConversionError(f"{name} was not written as it was read")

  _appear(target, write)
  return f"{summary}; wrote {target}, equal to the bit"


def _appear(target: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
  """Makes the target, complete or not at all."""
  try:
    pretrained.appear(target, write)
  except OSError as e:
    if files.is_mistake(e):  # the path is at fault, not the machine
      raise ConfigError(f"target: {target} cannot be written: {e.strerror}") from e
    raise ConversionError(f"{target} cannot be written: {e.strerror}") from e


def check_memory(cfg: ConvertConfig, there: ModelConfig) -> None:
  """Refuses a memory that cannot be inserted, before anything of it is made.

  Args:
    there: the model that it is inserted into.

  Raises:
    ConfigError: if there are too many layers, or they are too large, or the model has fast weights.
  """
  count = len(there.blocks)
  known = f"{count}, the blocks of {cfg.source}"
  config.check(
    cfg.memory_layers <= count, "memory_layers", f"must be at most {known}, got {cfg.memory_layers}"
  )
  grown = pretrained.memory_config(there, num_layers=cfg.memory_layers, fast=cfg.fast)
  sizes = {f"fast.{name}": getattr(cfg.fast, name) for name in ("num_heads", "key_dim", "value_dim")}
  need.check_weights(grown, sizes)


def _open(cfg: ConvertConfig) -> Opened:
  """Reads the source."""
  if not pretrained.is_run(cfg.source):
    for name in ("step", "origin"):
      config.check(getattr(cfg, name) is None, name, f"is of a run, and {cfg.source} is a checkpoint")
    architecture, weights, source = pretrained.load(cfg.source, ignore=cfg.ignore)
    return Opened(architecture, weights, source, None, None, source.config["architectures"][0])
  run = pretrained.open_run(cfg.source, origin=cfg.origin)
  source = pretrained.run_source(run)
  weights, step = pretrained.run_weights(run, step=cfg.step)
  where = f"step {step} of {cfg.source}"
  if source is None or source.own:
    return Opened(run.model, weights, None, step, run.tokenizer_file, where)
  return Opened(run.model, weights, source, step, None, f"{where}, {source.config['architectures'][0]}")


def _check_finite(weights: Any) -> None:
  paths, _ = jax.tree_util.tree_flatten_with_path(weights)
  wrong = [params.name_of(path) for path, x in paths if not np.isfinite(np.asarray(x)).all()]
  if wrong:
    raise ConfigError(f"source: NaN or infinity in {', '.join(wrong[:12])}")


def _check_equal(source: pretrained.Source, written: pretrained.Source) -> None:
  """Compares the published tensors, one at a time."""
  if source.config != written.config or source.tensors.files != written.tensors.files:
    raise ConversionError("the written checkpoint has another config or other tensors than the one read")
  for name in source.tensors.files:
    a, b = source.tensors.read(name), written.tensors.read(name)
    if a.dtype != b.dtype or a.tobytes() != b.tobytes():
      raise ConversionError(f"{name} was not written as it was read")


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  try:
    print(convert(config.from_dict(ConvertConfig, values)))
  except ConversionError as e:
    print(f"failed: {e}", file=sys.stderr)
    return cli.FAILED
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
