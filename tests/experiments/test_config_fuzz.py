"""Any value in any field of any preset: one line that names a field, or a run that can be built.

The values stand where a config file of one's own, or a run's config.json, could have them; the texts where a
command line has them. What is accepted is built as far as that costs no memory: shapes and layouts.
"""

import importlib
import random
import sys

import jax
import numpy as np
import pytest

from sleep_jax import config, model, train, windows
from sleep_jax.config import ConfigError
from sleep_jax.experiments import config_file, convert, generate_model, gsm_infinite, gsm_infinite_data, text
from sleep_jax.train import host_steps, row_steps
from tests import damage
from tests.pretrained import tiny

QUICK = 6  # cases of a preset
SECONDS = 60  # for one case, on a busy machine
MOST = 600e6  # bytes more than before that a case may ask for; a text is read into a buffer of 256 MB
FILES = {path.stem: path for path in config_file.CONFIGS.glob("[a-z]*.py")}
VALUES = [
  *(x for x in damage.POOL if x is not damage.REMOVED),
  *(damage.DEEP, 2**32, 2**40, -(2**63), 10**5000, -(10**400), 1e30, 1.5, 2, 7, 24, 100, 4096),
  *("\0", "x" * 5000, "attn", "none", "None", "xla", "*", b"x", object(), ("attn", "gdn"), (0,), (1, 2)),
  *((8, 2), (2**31,), (1.0,), (float("nan"), 1.0), (1e-30, 1e30), ("a\nb",), ("",), ({},), ((),), [["attn"]]),
  ("attn",) * 20_000,
]  # fmt: skip
TEXTS = (
  *("", "None", "none", "nan", "inf", "-inf", "-1", "0", "1e400", "1" + "0" * 400, "9" * 5000, "0x10", "1.5"),
  *("true", "(", "()", "(1,)", "[[1]]", "{}", "{'a':1}", "a,b", "('a'", "\0", "a\nb", "\ud800", "[" * 300),
  *("1,2", "٣", "2147483648", "9223372036854775808", "1e308", "attn,", "(" + "1," * 20_000 + ")"),
)  # fmt: skip


def presets():
  """(file, preset) of every config file."""
  return [
    (name, preset)
    for name, path in sorted(FILES.items())
    for preset in config_file.load(str(path))[0].PRESETS
  ]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def make_checkpoints(root):
  """What presets begin with: checkpoints and texts, by name."""
  made = {name: str(tiny.checkpoint(root / name, name)) for name in ("jet", "ouro")}
  for name in ("files", "held_out"):
    made[name] = str(root / f"{name}.txt")
    (root / f"{name}.txt").write_text(f"two plus two is {name}. " * 2000)
  return made


def start(name, preset, checkpoints):
  """The values of a preset, as a `ConfigDict` that can be built here."""
  c = config_file.read(f"{FILES[name]}:{preset}")
  which = checkpoints["jet" if "jet" in preset else "ouro"]
  if name == "generate":
    c.checkpoint = which
    c.sleep.update(first_block=0, last_block=None)
  elif name == "convert":
    c.source = which if preset != "memory" else checkpoints["ouro"]
    c.memory_layers = min(c.memory_layers, 1)
  elif "pretrained" in c:
    c.pretrained.folder = which
    c.sleep.update(first_block=0, last_block=None)
    c.pretrained.memory_layers = 0 if "jet" in preset else 1
  if name == "text":
    c.data.update(files=checkpoints["files"], held_out=checkpoints["held_out"])
  if "train" in c:  # so that what is small enough for a test is small enough for its memory
    c.train.update(batch_size=8, microbatches=1, eval_batch_size=8)  # of the eight devices of the tests
    if name == "gsm_infinite":
      c.data.operations = (2, 3)
      c.train.eval_sequences = 16
  return c


def build(name, values):
  """What the command does before it writes or makes anything large; then the shapes of what it would make."""
  experiment = getattr(config_file.load(str(FILES[name]))[0], "EXPERIMENT", None)
  if experiment is not None:
    build_task(importlib.import_module(experiment), values)
  elif name == "gsm_infinite_data":
    settings = config.from_dict(gsm_infinite_data.Settings, values)
    gsm_infinite_data.problem(settings.data, settings.seed, 0)
  elif name == "generate":
    generate_model.Checkpoint(config.from_dict(generate_model.GenerateConfig, values))
  else:
    cfg = config.from_dict(convert.ConvertConfig, values)
    there = convert._open(cfg).model
    if cfg.memory_layers:
      convert.check_memory(cfg, there)


def build_task(module, values):
  built = module.build(values)
  cfg, task = built if isinstance(built, tuple) else (built, None)
  train.check_fits(cfg, task)
  if module is gsm_infinite:
    host_steps.check_size(cfg, cfg.data.cut)
  elif module is text:
    row_steps.check_size(cfg, cfg.data.length)
  _, tx, _ = train.optimization(cfg)
  if task is not None:
    windows.plan(task.layout, cfg.model.window)
    jax.eval_shape(lambda key: task.batch(key, 0, cfg.train.batch_size), jax.random.key(0))
  jax.eval_shape(lambda: tx.init(model.init(cfg.model, jax.random.key(cfg.seed))))


def changed(values, rng):
  """The dotted name of a field, and the values with another one there."""
  path = rng.choice([p for p in damage.paths_of(values) if all(isinstance(key, str) for key in p)])
  value = rng.choice([*VALUES, damage.REMOVED])
  return f"{'.'.join(path)} = {damage.named(value)}", damage.with_value(values, path, value)


def typed(c, rng):
  """The same by the command line."""
  path = rng.choice([p for p in damage.paths_of(c.to_dict()) if all(isinstance(key, str) for key in p)])
  text = rng.choice(TEXTS)
  config_file.change(c, {".".join(path): text})
  return f"--config.{'.'.join(path)}={text!r:.20}", c.to_dict()


def known_names(values):
  """Every word that a message may begin with."""
  return {key for path in damage.paths_of(values) for key in path if isinstance(key, str)}


def tried(name, begin, rng):
  """Whether one case was refused, in one line."""
  what = name
  values = begin.to_dict()
  try:
    with damage.limited(SECONDS):
      if rng.random() < 0.3:
        what, values = typed(begin.copy_and_resolve_references(), rng)
      else:
        what, values = changed(values, rng)
      build(name, values)
    return False
  except ConfigError as e:
    line = damage.one_line(e)
    names = (*known_names(begin.to_dict()), "config.json", "there is no such folder")
    assert any(word in line for word in names), (what, line)
    return True
  except Exception as e:
    raise AssertionError(f"{name}: {what}: {type(e).__name__}: {e}"[:2000]) from e


@pytest.mark.parametrize(("name", "preset"), presets())
@pytest.mark.parametrize("cases", [QUICK, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.long])])
def test_any_value_in_any_field(name, preset, cases, checkpoints):
  begin = start(name, preset, checkpoints)
  build(name, begin.to_dict())  # so that what is refused is the change
  rng = random.Random(f"{name} {preset} {cases}")
  with damage.bounded(MOST):
    refused = sum(tried(name, begin, rng) for _ in range(cases))
  assert refused > cases / 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere tracemalloc counts")
def test_a_size_that_is_taken_as_it_is_claimed_is_found():
  with damage.bounded(MOST):
    np.zeros(int(MOST / 2), np.int8)
    with pytest.raises(MemoryError):
      np.zeros(int(1.1 * MOST), np.int8)
