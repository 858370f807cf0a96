"""The examples in docstrings of pure functions give what they show."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Modules whose docstrings have examples; each must have one, so that a doctest cannot vanish unseen.
MODULES = (
  "sleep_jax.sleep",
  "sleep_jax.windows",
  "sleep_jax.looped",
  "sleep_jax.blocks",
  "sleep_jax.attention.blocked",
  "sleep_jax.attention.forms",
  "sleep_jax.data.memory.counting",
  "sleep_jax.data.memory.prompts",
  "sleep_jax.data.memory.sequences",
  "sleep_jax.data.memory.story",
  "sleep_jax.data.memory.wording",
  "sleep_jax.session",
  "sleep_jax.data.text.rows",
  "sleep_jax.scoring.by_context",
  "sleep_jax.scoring.intervals",
  "sleep_jax.report.intervals",
  "sleep_jax.report.memory",
  "sleep_jax.runtime.progress",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
  module = importlib.import_module(name)
  ended = doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp, "np": np})
  assert ended.attempted > 0, f"{name} has no example"
  assert ended.failed == 0, f"run: python -m doctest {module.__file__}"
