"""Reads a published checkpoint, or what a run made of one, checks it, and writes it in published format.

    python -m experiments.convert --config=experiments/configs/convert.py:memory \\
      --config.source=checkpoints/Ouro-1.4B --config.target=checkpoints/Ouro-1.4B-memory
    python -m experiments.convert --config=experiments/configs/convert.py:export \\
      --config.source=work/ouro/n4 --config.target=checkpoints/Ouro-1.4B-tuned

Every tensor is compared with what was read, to the bit. On a mistake nothing is written.
"""

import dataclasses
import pathlib
import shutil
import tempfile
from typing import Annotated, Any, Literal

import jax
import numpy as np

from sleep_jax import config, model, params, pretrained
from sleep_jax.config import ConfigError, FastConfig
from sleep_jax.config.model import MOST_BLOCKS
from sleep_jax.experiments import cli

CONFIG = cli.define_config_flag()


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """One conversion.

  Attributes:
    source: folder in published format, or the workdir of a run that began with one.
    target: folder to make; must not exist. None: only read and check.
    memory_layers: fast-weight layers to insert; 0 for none.
    fast: sizes of the inserted layers.
    seed: of the inserted layers' weights.
    dtype: of what is written. `published`, to which trained weights are rounded, or `float32`, which loses
      nothing. Inserted layers are float32 always.
    ignore: fields of `config.json` that are known to change nothing; a run says itself which.
  """

  source: str | None = None
  target: str | None = None
  memory_layers: Annotated[int, config.Bounds(least=0), config.Bounds(most=MOST_BLOCKS)] = 0
  fast: FastConfig = FastConfig(num_heads=16, key_dim=128, value_dim=128)
  seed: config.Seed = 0
  dtype: Literal["published", "float32"] = "published"
  ignore: tuple[str, ...] = ()

  def __post_init__(self):
    config.check_fields(self)
    config.check(bool(self.source), "source", "is required: the folder with config.json")


FIELDS = {"": ConvertConfig}


def convert(cfg: ConvertConfig) -> str:
  """Does it.

  Returns:
    A sentence about what was read and written.

  Raises:
    ConfigError: for whatever is wrong with the config or the checkpoint.
  """
  target = None if cfg.target is None else pathlib.Path(cfg.target)
  config.check(target is None or not target.exists(), "target", f"{cfg.target} exists already")
  if trained := pretrained.is_run(cfg.source):
    architecture, weights, source, step = pretrained.load_run(cfg.source)
    told = f"read step {step} of {cfg.source}, "
  else:
    architecture, weights, source = pretrained.load(cfg.source, ignore=cfg.ignore)
    told = "read "
  _check_finite(weights)
  before = params.count(model.declare(architecture))
  told += f"{source.config['architectures'][0]}: {before:,} parameters in {len(source.tensors.files)} tensors"
  if cfg.memory_layers:
    key = jax.random.key(cfg.seed)
    architecture, weights = pretrained.add_memory(
      architecture, weights, key, num_layers=cfg.memory_layers, fast=cfg.fast
    )
    added = params.count(model.declare(architecture)) - before
    told += f"; added {cfg.memory_layers} layers with {added:,} ({added / before:.1%})"
  if target is None:
    return told
  target.parent.mkdir(parents=True, exist_ok=True)
  made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
  try:
    pretrained.export(made / "checked", architecture, weights, source, dtype=cfg.dtype)
    written = pretrained.open_source(made / "checked", ignore=source.ignore)
    rounded = pretrained.differing(written, weights)
    if not trained and cfg.dtype == "published":
      _check_equal(source, written)
    (made / "checked").rename(target)
  finally:
    shutil.rmtree(made)
  equal = f"rounded in {len(rounded)} tensors" if rounded else "bit-equal to what was read"
  return f"{told}; wrote {target}, {equal}"


def _check_finite(weights: Any) -> None:
  paths, _ = jax.tree_util.tree_flatten_with_path(weights)
  wrong = [params.name_of(path) for path, x in paths if not bool(jax.numpy.all(jax.numpy.isfinite(x)))]
  if wrong:
    raise ConfigError(f"source: NaN or infinity in {', '.join(wrong[:12])}")


def _check_equal(source: pretrained.Source, written: pretrained.Source) -> None:
  """Compares the published tensors, one at a time."""
  if source.config != written.config or source.tensors.files != written.tensors.files:
    raise RuntimeError("the written checkpoint has another config or other tensors than the one read")
  for name in source.tensors.files:
    a, b = source.tensors.read(name), written.tensors.read(name)
    if a.dtype != b.dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
      raise RuntimeError(f"{name} was not written as it was read")


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  print(convert(config.from_dict(ConvertConfig, values)))
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
