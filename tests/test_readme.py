"""What the README shows is run here: its two examples, and that its commands and files exist."""

import pathlib
import re
import runpy
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import fast_weights, model, windows
from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig, SleepConfig
from sleep_jax.kernels.gated_hebbian import gated_hebbian

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LONGEST = 30


def example(word: str) -> str:
  """The one Python block that holds `word`."""
  (found,) = [block for block in EXAMPLES if word in block]
  return found


@pytest.fixture
def oja(monkeypatch, tmp_path):
  """The README's local rule, as a block that only this test sees."""
  monkeypatch.setattr(fast_weights, "RULES", dict(fast_weights.RULES))
  (tmp_path / "oja.py").write_text(example("def oja"))
  runpy.run_path(str(tmp_path / "oja.py"))
  return fast_weights.RULES["oja"]


def test_examples_are_short():
  for block in EXAMPLES:
    assert len(block.splitlines()) < LONGEST, block


def test_own_rule_is_the_recurrence_that_it_says(oja):
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 5, 1, 4)).astype(np.float32)
  g, b = -rng.uniform(size=(2, 5, 1)).astype(np.float32), rng.uniform(size=(2, 5, 1)).astype(np.float32)
  S = rng.normal(size=(2, 1, 4, 4)).astype(np.float32)
  mask = np.ones((2, 5), bool)
  mask[1, :2] = False
  o, after = oja(q, k, v, g, b, S, mask=mask)
  for row in range(2):
    state = S[row, 0].astype(float)
    for t in range(5):
      if mask[row, t]:
        value = v[row, t, 0] / np.sqrt(np.sum(v[row, t, 0] ** 2) + 1e-6)
        state = np.exp(g[row, t, 0]) * state
        state = state + b[row, t, 0] * np.outer(k[row, t, 0] - state @ value, value)
        np.testing.assert_allclose(o[row, t, 0], state.T @ q[row, t, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after[row, 0], state, rtol=1e-4, atol=1e-5)
  assert not np.allclose(after, gated_hebbian(q, k, v, g, b, S)[1])


def test_own_rule_is_a_block_that_learns(oja):
  del oja
  cfg = ModelConfig(
    vocab_size=5, embed_dim=8, blocks=("attn", "oja"), window=3,
    attention=AttentionConfig(num_heads=2), fast=FastConfig(num_heads=1, key_dim=4, value_dim=4),
  )  # fmt: skip
  weights = model.init(cfg, jax.random.key(0))
  segments = windows.plan([False] * 6 + [True], 3)
  tokens = jnp.arange(14).reshape(2, 7) % 5
  batch = windows.Batch(tokens, tokens, jnp.zeros((2, 7)).at[:, -1].set(1.0))
  grads = jax.grad(lambda w: model.loss(w, batch, segments, cfg, SleepConfig(num_passes=2))[0])(weights)
  chex.assert_tree_all_finite(grads)
  assert float(jnp.max(jnp.abs(grads["blocks"]["1"]["mixer"]["k"]))) > 0


def test_own_experiment_learns(tmp_path):
  (tmp_path / "recall.py").write_text(example("train.Task("))
  done = subprocess.run(
    [sys.executable, "recall.py"],
    cwd=tmp_path,
    env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr
  assert float(done.stdout.splitlines()[-1]) > 0.9
  assert (tmp_path / "work" / "recall" / "metrics.jsonl").is_file()


def test_commands_and_files_exist():
  commands = re.findall(r"python -m ([\w.]+)", README)
  assert commands
  for module in commands:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
  makefile = (ROOT / "Makefile").read_text()
  for target in re.findall(r"^ +make ([a-z-]+)", README, re.MULTILINE):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
  for file, preset in re.findall(r"--config=(\S+\.py):(\w+)", README):
    assert f'"{preset}"' in (ROOT / file).read_text(), f"{file}:{preset}"
  for link in re.findall(r"\]\(([^)#]+)\)", README):
    assert "://" in link or (ROOT / link).exists(), link
