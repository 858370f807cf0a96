"""Frozen configs that check themselves when built; the one place for every default.

`ml_collections` lives at the command line only. One line later `from_dict` turns what it holds
into these dataclasses, which are hashable (so they can be static arguments of `jax.jit`) and
are all that the library ever sees. `run` has a run's config and its parts, `model` the model's, `schema`
checks and conversion, `baselines` what sleep is compared with.
"""

from sleep_jax.config.model import (
  ATTENTION,
  AttentionConfig,
  FastConfig,
  ModelConfig,
  RopeScaling,
  block_names,
  register_block,
)
from sleep_jax.config.run import Config, MeshConfig, OptimConfig, SleepConfig, TrainConfig, check_sleep
from sleep_jax.config.schema import (
  ConfigError,
  above,
  at_least,
  check,
  defaults_of,
  from_dict,
  nearest,
  one_of,
  replace,
  to_dict,
)

__all__ = [
  "ATTENTION", "AttentionConfig", "Config", "ConfigError", "FastConfig", "MeshConfig", "ModelConfig",
  "OptimConfig", "RopeScaling", "SleepConfig", "TrainConfig", "above", "at_least", "block_names", "check",
  "check_sleep", "defaults_of", "from_dict", "nearest", "one_of", "register_block", "replace", "to_dict"
]  # fmt: skip
