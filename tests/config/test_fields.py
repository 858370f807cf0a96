"""What a field may hold: every field of every config against values that do not fit; its documentation."""

import dataclasses
import math
import typing

import pytest

from sleep_jax import config
from sleep_jax.config import ConfigError, fields
from sleep_jax.data.batching import CutConfig
from sleep_jax.data.depo import DepoConfig
from sleep_jax.data.gsm_infinite.task import TaskConfig
from sleep_jax.data.memory import MemoryConfig
from sleep_jax.data.rule110 import Rule110Config
from sleep_jax.generate import SamplingConfig
from sleep_jax.pretrained import StartConfig

CONFIGS = (
  config.AttentionConfig, config.Config, CutConfig, DepoConfig, config.FastConfig, config.MeshConfig,
  MemoryConfig, config.ModelConfig, config.OptimConfig, config.RopeScaling, Rule110Config, SamplingConfig,
  config.SleepConfig, StartConfig, TaskConfig, config.TrainConfig
)  # fmt: skip
NEEDED = {config.ModelConfig: {"vocab_size": 3}, CutConfig: {"max_tokens": 100}}
VALUES = (
  -1, 0, 2**31, 2**63, 10**400, 10**5000, math.nan, math.inf, -math.inf, 1e-320, 1e300, "", "\0", "\n",
  "None", "\ud800", None, True, b"x", [],
  [None], [[1]], (1, "a", None), {}, {"a": {"b": 1}}, object(), lambda: 3
)  # fmt: skip
CASES = [(kind, name) for kind in CONFIGS for name in fields.annotations(kind)]


def fits(hint, value) -> bool:
  """Whether a value that was accepted is what a device, or JSON, can hold."""
  if isinstance(value, float):
    return math.isfinite(value) and (value == 0 or abs(value) >= 2.0**-126)
  if isinstance(value, int):
    return abs(value) < 2**32
  if isinstance(value, tuple):
    return all(fits(hint, x) for x in value)
  return typing.get_origin(hint) is None or value is None or isinstance(value, str)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_any_value_in_any_field_is_held_or_one_line(kind, name):
  if (kind, name) == (config.Config, "data"):
    return  # a task's own
  needed = {config.Config: {"data": None, "model": config.ModelConfig(vocab_size=3)}} | NEEDED
  for value in VALUES:
    try:
      made = config.from_dict(kind, needed.get(kind, {}) | {name: value})
    except ConfigError as e:
      assert "\n" not in str(e) and len(str(e)) < 600, e
      assert f"{fields.home(kind)}" in str(e), e
    else:
      held = getattr(made, name)
      assert dataclasses.is_dataclass(held) or fits(fields.annotations(kind)[name], held), (value, held)
      assert held != "None" or fields.annotations(kind)[name] is str  # a text that cannot be left out
      hash(made)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda x: x.__name__)
def test_every_field_has_a_line_of_documentation(kind):
  said = config.documentation(kind)
  assert {name for name in fields.annotations(kind) if not said.get(name)} == set()


def test_messages_name_the_place_that_a_group_has_here():
  with pytest.raises(ConfigError, match=r"^pretrained\.fast\.decay_init: needs 0 < low <= high"):
    config.from_dict(StartConfig, {"fast": {"decay_init": (2.0, 1.0)}})
  with pytest.raises(ConfigError, match=r"^model\.fast\.decay_init"):
    config.FastConfig(decay_init=(2.0, 1.0))


def test_an_unknown_block_is_refused_and_a_registered_one_is_not():
  with pytest.raises(ConfigError, match=r'^model\.blocks\[1\]: unknown block \'gnd\'; did you mean "gdn"\?$'):
    config.ModelConfig(vocab_size=3, blocks=("attn", "gnd"))
  with pytest.raises(ConfigError, match="unknown block 'of_this_test'"):
    config.ModelConfig(vocab_size=3, blocks=("of_this_test",))
  config.register_block("of_this_test")
  assert config.ModelConfig(vocab_size=3, blocks=("of_this_test",)).blocks == ("of_this_test",)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 10**400, 1.0, True, "0"])
def test_what_is_no_seed_is_refused(seed):
  with pytest.raises(ConfigError, match="^seed: must be"):
    config.check_seed(seed, "seed")
