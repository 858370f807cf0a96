"""What README and docs show is run here: Python, the worked example, the tour; commands and files exist."""

import json
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import model, rules, train, windows
from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig, SleepConfig
from sleep_jax.data import rule110
from sleep_jax.experiments import config_file
from sleep_jax.kernels.gated_delta import gated_delta
from sleep_jax.kernels.gated_hebbian import gated_hebbian
from sleep_jax.layers import l2_normalize
from sleep_jax.report import diagram
from tests import compiling

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, EXTENDING = (path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "extending.md"))
# What tests run: those below, and tests/experiments/test_evaluate.py the one that loads a run.
RUN = ("def unit_delta", "def oja", "train.train(cfg", "train.DeviceTask(layout", "load_run(")
LONGEST = 35


def blocks(text: str) -> list[str]:
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def example(text: str, word: str) -> str:
  """The one Python block of a page that holds `word`."""
  (block,) = [block for block in blocks(text) if word in block]
  return block


@pytest.fixture
def registered(tmp_path, monkeypatch):
  """Loads a block of Python as a config file; what it registers is gone after the test."""
  before = dict(rules.RULES)

  def load(block: str, name: str):
    (tmp_path / f"{name}.py").write_text(block)
    module, _ = config_file.load(str(tmp_path / f"{name}.py"))
    return module

  yield load
  for name in set(rules.RULES) - set(before):
    del rules.RULES[name]


def test_the_readme_fits_on_three_screens():
  assert len(README.splitlines()) <= 140


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_is_short_and_run(page):
  for block in blocks(page.read_text()):
    assert len(block.splitlines()) < LONGEST, block
    assert any(word in block for word in RUN), f"no test runs this block:\n{block}"


# ---- the worked example --------------------------------------------------------------------------


def evolve(cells: list[int], steps: int) -> list[list[int]]:
  """Rule 110 by its number: bit 4 l + 2 c + r of 110."""
  rows, n = [cells], len(cells)
  for _ in range(steps):
    s = rows[-1]
    rows.append([110 >> (4 * s[i - 1] + 2 * s[i] + s[(i + 1) % n]) & 1 for i in range(n)])
  return rows


def test_the_worked_example_is_rule_110():
  def cells(text):
    return list(map(int, text.split()))

  strings = [cells(m) for m in re.findall(r"^    string \d   ([01 ]+?)   slept on", README, re.MULTILINE)]
  (answer,) = re.findall(r"^    answer     ([01 ]+)$", README, re.MULTILINE)
  shown = [cells(m) for m in re.findall(r"^    t = \d   ([01 ]{23})", README, re.MULTILINE)]
  assert len(strings) == 2 and len(shown) == 7
  assert shown == evolve(strings[0], 6)
  assert cells(answer) == [evolve(s, 6)[-1][0] for s in strings]
  packed = jnp.asarray([[sum(c << i for i, c in enumerate(s)) for s in strings]], jnp.uint32)
  batch = rule110.sequences(rule110.Rule110Config(num_strings=2, num_cells=12, rollout_steps=6), packed)
  assert batch.inputs[0, :24].tolist() == [*strings[0], *strings[1]]  # what the model reads, and is to answer
  assert batch.targets[0, 24:].tolist() == cells(answer)


def test_the_picture_of_sleep_is_the_page_s():
  assert (ROOT / "docs" / "sleep.svg").read_text() == diagram.standalone()


def test_the_demo_s_block_is_what_its_files_say():
  begin, end = "<!-- demo: written by `python -m experiments.publish`, do not edit -->", "<!-- demo: end -->"
  assert README.count(begin) == README.count(end) == 1
  folder = ROOT / "results" / "rule110" / "demo"
  written = README[README.index(begin) : README.index(end)]
  if not list(folder.glob("*.jsonl")):
    assert "three seeds" in written and "older code" in written  # typed in, and says so
    return
  assert (folder / "table.md").read_text() in written


# ---- own rule, own experiment --------------------------------------------------------------------


def random_operands():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 5, 1, 4)).astype(np.float32)
  g, b = -rng.uniform(size=(2, 5, 1)).astype(np.float32), rng.uniform(size=(2, 5, 1)).astype(np.float32)
  S = rng.normal(size=(2, 1, 4, 4)).astype(np.float32)
  mask = np.ones((2, 5), bool)
  mask[1, :2] = False
  return q, k, v, g, b, S, mask


def test_the_short_rule_is_the_gated_delta_rule_for_values_of_length_one(registered):
  registered(example(README, "def unit_delta"), "unit_delta")
  *operands, mask = random_operands()
  got = rules.RULES["unit_delta"].update(*operands, mask=mask)
  q, k, v, *rest = operands
  chex.assert_trees_all_close(got, gated_delta(q, k, l2_normalize(v), *rest, mask=mask))


def test_own_rule_is_the_recurrence_that_it_says(registered):
  registered(example(EXTENDING, "def oja"), "oja")
  q, k, v, g, b, S, mask = random_operands()
  o, after = rules.RULES["oja"].update(q, k, v, g, b, S, mask=mask)
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


@pytest.mark.slow
def test_own_rule_is_a_block_of_a_config_file_that_learns(registered):
  module = registered(example(EXTENDING, "def oja"), "my_study")
  assert module.get_config("tiny").train.steps > 0
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


def test_the_readme_s_task_is_the_one_that_the_docs_train(registered):
  task = registered(example(README, "train.DeviceTask(layout"), "task").task
  assert isinstance(task, train.DeviceTask)
  batch = task.batch(jax.random.key(0), 0, 4)
  assert batch.inputs.shape == (4, 13) and (batch.inputs[:, 12] == 8).all()
  assert (batch.targets[:, 12] == batch.inputs[:, 0]).all()
  assert (np.asarray(batch.loss_mask) == task.layout).all()
  shared = [line for line in example(README, "train.DeviceTask(layout").splitlines() if "tokens" in line]
  assert all(line.split("#")[0].strip() in EXTENDING for line in shared)


def test_own_experiment_learns(tmp_path):
  (tmp_path / "recall.py").write_text(example(EXTENDING, "train.train(cfg"))
  done = subprocess.run(
    [sys.executable, "recall.py"],
    cwd=tmp_path,
    env=compiling.environment() | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
    capture_output=True,
    text=True,
    timeout=290,
  )
  assert done.returncode == 0, done.stderr
  assert float(done.stdout.splitlines()[-1]) > 0.9
  assert (tmp_path / "work" / "recall" / "metrics.jsonl").is_file()


# ---- commands, files, links ----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_files_exist(page):
  text = page.read_text()
  makefile = (ROOT / "Makefile").read_text()
  for module in re.findall(r"-m ((?:experiments|kernels|launch|benchmarks)[\w.]*)", text):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
  for target in re.findall(r"^ +make ([a-z0-9-]+)", text, re.MULTILINE):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
  for file, preset in re.findall(r"--config=(experiments/\S+\.py):(\w+)", text):
    assert f'"{preset}"' in (ROOT / file).read_text(), f"{file}:{preset}"
  for link in re.findall(r"\]\(([^)#]+)\)", text):
    assert "://" in link or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_flags_exist(page):
  """Every --flag behind `python -m` is defined in its module, or in what all mains share."""
  text = page.read_text().replace("\\\n", " ")
  shared = "".join((ROOT / "experiments" / f"{name}.py").read_text() for name in ("cli", "config_file"))
  for module, rest in re.findall(r"python -m ((?:experiments|launch)[\w.]*)([^\n`]*)", text):
    path = ROOT / module.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text() + shared
    for flag in re.findall(r"(?<=\s)--(\w+)", rest.split("#")[0].split(" -- ")[0]):
      assert f'"{flag}"' in source or f"--{flag}" in source, f"{module} has no --{flag}"


NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def test_the_tour_runs_and_holds_no_outputs():
  """The notebook's cells in order, as one program: what they assert about sleep holds."""
  notebook = json.loads(NOTEBOOK.read_text())
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
  names: dict = {}
  for cell in cells:
    code = compile("".join(cell["source"]), str(NOTEBOOK), "exec")
    exec(code, names)  # noqa: S102  # the repository's own notebook
  assert names["session"].windows == 2
