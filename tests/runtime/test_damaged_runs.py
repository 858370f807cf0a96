"""A run's files with wrong values, also re-hashed ones: whoever opens the run says so in a line, or is right.

What is resumed or loaded is, to the bit, what was saved. Nothing is written outside of the run's folder, and
a reader writes nothing at all.
"""

import functools
import hashlib
import json
import os
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config, pretrained
from sleep_jax.config import ConfigError
from sleep_jax.data import rule110
from sleep_jax.experiments import runner
from sleep_jax.runtime import metrics, workdir
from sleep_jax.runtime.checkpoint import CheckpointError, Checkpoints
from sleep_jax.runtime.files import RunFailedError
from sleep_jax.runtime.metrics import MetricsError
from sleep_jax.runtime.workdir import WorkdirError
from tests import damage, hybrids
from tests.pretrained import tiny

QUICK = 40  # cases of the sample
SECONDS = 60  # for one case, on a busy machine
MISTAKES = (ConfigError, CheckpointError, MetricsError, WorkdirError)
CONFIG = config.Config(data=rule110.Rule110Config(), model=hybrids.model_config(("attn", "gdn")))
STEPS = (1, 2)
CHECKPOINT = "checkpoints/2/manifest.json"
FILES = ("config.json", "env.json", "metrics.jsonl", "checkpoints/in_flight.json", CHECKPOINT)
NO_FILES = ("a pipe", "a folder", "a link to a device", "a link outside", "nothing")
SECRET = "not to be touched"


@functools.cache
def weights_of(step):
  return jax.tree.map(lambda x: jnp.asarray(x * step), tiny.weights(CONFIG.model))


def make(root):
  """A run of two steps, and a file beside it that nobody may write to."""
  (root / "outside").write_text(SECRET)
  with workdir.prepare(root / "run", config.to_dict(CONFIG)) as run:
    with (
      metrics.Writer(run.path, tensorboard=False) as writer,
      Checkpoints(run.checkpoints, config=run.config) as saved,
    ):
      for step in STEPS:
        writer.write({"kind": "train", "step": step, "loss": 0.5, "tokens": 10 * step, "wall_s": 1.0 * step})
        saved.save(step, {"params": weights_of(step)}, block=True)
      writer.write({"kind": "done", "step": 2, "wall_s": 2.0})
  (root / "run/checkpoints/in_flight.json").write_text('{"step": 3}')
  return root / "run"


def rehashed(content):
  """A manifest whose digest fits: what only a person can make."""
  try:
    values = json.loads(content)
    values.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return damage.encoded(json.dumps(values | {"sha256": digest}))
  except (ValueError, AttributeError, TypeError, RecursionError):
    return content


def rows_cases(text):
  """Every field of every row with every value, and damage to the whole."""
  lines = text.splitlines(keepends=True)
  for number, line in enumerate(lines):
    before, after = "".join(lines[:number]).encode(), "".join(lines[number + 1 :]).encode()
    for what, content in damage.json_cases(line.strip()):
      made = lambda a=before, b=after, c=content: a + c() + b"\n" + b  # noqa: E731
      yield f"line {number + 1}: {what}", made


def cases_of(folder):
  """(file, what is wrong, its content, or what stands in its place)."""
  made = []
  for name in FILES:
    text = (folder / name).read_text()
    of_file = list(rows_cases(text) if name.endswith("jsonl") else damage.json_cases(text))
    made += [(name, what, content) for what, content in of_file]
    if name == CHECKPOINT:
      made += [(name, f"{what}, re-hashed", lambda c=content: rehashed(c())) for what, content in of_file]
    made += [(name, what, what) for what in NO_FILES]
  return made + [
    (CHECKPOINT, f"{field} names {value}", content) for field, value, content in names_of(folder)
  ]


def names_of(folder):
  """Re-hashed manifests in which a name has a line end: (field, its value, content)."""
  made, values = [], json.loads((folder / CHECKPOINT).read_text())
  for field in ("tree", "files", "config"):
    for value in ("float32[1]", 3, [1, "0" * 64]):
      changed = json.dumps(values | {field: values[field] | {"a\nb": value}})
      made.append((field, value, lambda c=changed: rehashed(c)))
  return made


def put(path, content):
  """Damages a file."""
  if callable(content):
    path.write_bytes(content())
    return
  path.unlink()
  if content == "a pipe":
    os.mkfifo(path)
  elif content == "a folder":
    path.mkdir()
  elif content != "nothing":
    outside = next(p for p in path.parents if p.name == "run").parent / "outside"
    path.symlink_to("/dev/zero" if content == "a link to a device" else outside)


def resume(folder):
  """What training does with the folder before its first step; the step it goes on from."""
  with workdir.prepare(folder, config.to_dict(CONFIG), defaults=config.defaults_of(CONFIG)) as run:
    _ = run.done_step
    with (
      Checkpoints(run.checkpoints, config=run.config, report=lambda line: None) as saved,
      metrics.Writer(run.path, tensorboard=False, report=lambda line: None) as writer,
    ):
      restored = saved.restore({"params": jax.eval_shape(lambda: weights_of(1))})
      writer.truncate_after(restored[0] if restored else 0)
      writer.last()
  return restored and (restored[0], restored[1]["params"])


def load(folder):
  """What export, evaluation, generation and a run that begins with it do."""
  run = pretrained.load_run(folder)
  return run.step, run.weights


def status(folder):
  """What a sweep does."""
  runner.status(folder)


READERS = (load, status)


def below(folder):
  """What lies in a folder, and when it was written."""
  return sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def tried(pristine, root, name, what, content, reader):
  """Whether a reader refuses a damage, in a line that names the file or step."""
  shutil.rmtree(root, ignore_errors=True)
  shutil.copytree(pristine, root)
  folder = root / "run"
  put(folder / name, content)
  there = below(folder)
  where = f"{reader.__name__}: {name}: {what}"
  refused = False
  try:
    with damage.limited(SECONDS):
      found = reader(folder)
    if found is not None:
      step, weights = found
      assert step in STEPS, where
      jax.tree.map(np.testing.assert_array_equal, weights, weights_of(step))
  except (*MISTAKES, RunFailedError) as e:
    text = damage.one_line(e, 3000)
    words = (pathlib.Path(name).name, "step 2", str(folder))
    assert any(word in text for word in words), (where, text)
    refused = True
  except Exception as e:
    raise AssertionError(f"{where}: {type(e).__name__}: {e}"[:1000]) from e
  if reader is not resume:
    assert below(folder) == there, where
  assert (root / "outside").read_text() == SECRET, where
  assert sorted(p.name for p in root.iterdir()) == ["outside", "run"], where
  return refused


def fuzz(root, seed, count):
  make_in = root / "pristine"
  make_in.mkdir()
  cases = cases_of(make(make_in))
  rng, refused = random.Random(seed), 0
  by_file = {name: [case for case in cases if case[0] == name] for name in FILES}
  for i in range(count):
    case = rng.choice(by_file[FILES[i % len(FILES)]])
    reader = resume if rng.random() < 0.5 else rng.choice(READERS)
    refused += tried(make_in, root / "tried", *case, reader)
  return refused


def test_damaged_runs_are_refused_in_one_line_or_opened_right(tmp_path):
  assert QUICK / 10 < fuzz(tmp_path, 0, QUICK) < QUICK


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 7))
def test_damaged_runs_often(seed, tmp_path):
  assert fuzz(tmp_path, seed, 500) < 500


@pytest.mark.parametrize("reader", [resume, *READERS], ids=lambda f: f.__name__)
def test_what_is_no_file_hangs_nobody(reader, tmp_path):
  (tmp_path / "pristine").mkdir()
  make(tmp_path / "pristine")
  for name in FILES:
    for what in NO_FILES:
      tried(tmp_path / "pristine", tmp_path / "tried", name, what, what, reader)
