"""Our own format, for models that belong to no published family: what a run from scratch trained.

`config.json` has `model_type: sleep_jax` and, in `model`, the fields of `ModelConfig`. `model.safetensors`
has the weights in float32, each under its name in the tree with dots for slashes (`blocks.0.mixer.q`), in the
layout that it has here.
"""

from typing import Any

from sleep_jax import config, rules
from sleep_jax.config import ATTENTION, ModelConfig
from sleep_jax.pretrained.fields import (
  LAYERS,
  LONGEST_WINDOW,
  PASSES,
  Fields,
  PretrainedError,
  listing,
  shown,
)

MODEL_TYPE, ARCHITECTURE = "sleep_jax", "SleepingHybrid"
FORMAT = 1


def is_own(values: dict[str, Any]) -> bool:
  """Whether a `config.json` is in our own format."""
  return values.get("model_type") == MODEL_TYPE


def config_json(cfg: ModelConfig, step: int | None = None) -> dict[str, Any]:
  """The content of `config.json`.

  Args:
    cfg: the model; its `fast.kernel` and `attention.implementation` are left out, which belong to a machine.
    step: of the run whose weights these are; None if there is none.
  """
  model = config.to_dict(config.replace(cfg, fast={"kernel": None}, attention={"implementation": None}))
  return {
    "architectures": [ARCHITECTURE],
    "model_type": MODEL_TYPE,
    "format": FORMAT,
    "torch_dtype": "float32",
    "step": step,
    "model": model,
  }


def read_config(values: dict[str, Any]) -> ModelConfig:
  """The model that a `config.json` of this format says.

  Raises:
    PretrainedError: if it is of another version of this format, or has a value of a size that no model has.
    ConfigError: for an unknown field, one of the wrong type, or fields that do not fit each other.
  """
  fields = Fields(values, "config.json")
  version = fields.size("format")
  if version != FORMAT:
    raise fields.error("format", f"is {version}, this program reads {FORMAT}")
  fields.skip("step")
  group = fields.group("model")
  fields.finish()
  _check_sizes(group.values, "config.json: model")
  cfg = config.from_dict(ModelConfig, group.values, "config.json: model.")
  unknown = sorted(set(cfg.blocks) - {*ATTENTION, *rules.RULES})
  config.check(not unknown, "config.json: model.blocks", f"unknown kind {listing(unknown)}")
  for name, value, most in (
    ("blocks", len(cfg.blocks), LAYERS),
    ("window", cfg.window, LONGEST_WINDOW),
    ("predict_passes", cfg.predict_passes, PASSES),
  ):
    config.check(value <= most, f"config.json: model.{name}", f"must be at most {most}, got {value}")
  for name, value in (
    ("fast.kernel", cfg.fast.kernel),
    ("attention.implementation", cfg.attention.implementation),
  ):
    config.check(value is None, f"config.json: model.{name}", f"must be null, got {config.shown(value)}")
  return cfg


def _check_sizes(values: Any, where: str) -> None:
  """Refuses numbers that are not finite, or larger than any size or base of a model."""
  if isinstance(values, dict):
    for name, value in values.items():
      _check_sizes(value, f"{where}.{listing([name])}")
  elif isinstance(values, list):
    for value in values:
      _check_sizes(value, where)
  elif isinstance(values, (int, float)) and not abs(values) <= 1 << 40:
    raise PretrainedError(f"{where} must be a finite number of at most {1 << 40}, got {shown(values)}")
