"""Frozen configs that check themselves when built; the one place for every default.

`ml_collections` lives at the command line only. One line later `from_dict` turns what it holds
into these dataclasses, which are hashable (so they can be static arguments of `jax.jit`) and
are all that the library ever sees. `run` has a run's config and its parts, `model` the model's, `fields` what
a field may hold, `schema` the way from plain data and back, `baselines` what sleep is compared with.
"""

from sleep_jax.config.checks import ConfigError, above, at_least, check, nearest, one_of, shown
from sleep_jax.config.fields import (
  Bounds,
  Count,
  FreeText,
  Natural,
  NotNegative,
  Positive,
  Seed,
  annotations,
  check_fields,
  check_seed,
  documentation,
)
from sleep_jax.config.model import (
  ATTENTION,
  ATTENTION_FORMS,
  AttentionConfig,
  FastConfig,
  ModelConfig,
  RopeScaling,
  block_names,
  register_block,
)
from sleep_jax.config.run import (
  Config,
  MeshConfig,
  OptimConfig,
  SleepConfig,
  TrainConfig,
  check_sleep,
  check_spread,
)
from sleep_jax.config.schema import defaults_of, from_dict, replace, run_from_dict, to_dict

__all__ = [
  "ATTENTION", "ATTENTION_FORMS", "AttentionConfig", "Bounds", "Config", "ConfigError", "Count",
  "FastConfig", "FreeText",
  "MeshConfig", "ModelConfig", "Natural", "NotNegative", "OptimConfig", "Positive", "RopeScaling", "Seed",
  "SleepConfig", "TrainConfig", "above", "annotations", "at_least", "block_names", "check",
  "check_fields", "check_seed", "check_sleep", "check_spread", "defaults_of", "documentation", "from_dict",
  "nearest", "one_of", "register_block", "replace", "run_from_dict", "shown", "to_dict"
]  # fmt: skip
