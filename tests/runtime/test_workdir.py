"""Workdirs: one run at a time, one configuration, nothing overwritten by mistake."""

import copy
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
from unittest import mock

import jax
from absl.testing import parameterized

from sleep_jax.runtime import metrics, workdir
from sleep_jax.runtime.workdir import WorkdirError, prepare

CONFIG = {
  "seed": 0,
  "optim": {"muon_lr": 0.003, "clip": float("inf"), "nesterov": True},
  "model": {"pattern": ["attn", "gdn"], "window": 16, "dims": (1, 2)},
  "train": {"steps": 100},
}


def changed(**dotted):
  config = copy.deepcopy(CONFIG)
  for key, value in dotted.items():
    *groups, name = key.split("__")
    tree = config
    for group in groups:
      tree = tree[group]
    if value is None:
      del tree[name]
    else:
      tree[name] = value
  return config


class WorkdirTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(os.path.realpath(self.enterContext(tempfile.TemporaryDirectory())))
    self.path = self.tmp / "run"

  def contents(self):
    return {str(p.relative_to(self.tmp)): p.read_bytes() for p in self.tmp.rglob("*") if p.is_file()}

  def assert_refused(self, pattern, path=None, config=CONFIG, **kw):
    before = self.contents()
    with self.assertRaisesRegex(WorkdirError, pattern) as caught:
      prepare(self.path if path is None else path, config, **kw)
    self.assertNotIn("\n", str(caught.exception))
    after = self.contents()
    self.assertEqual({k: v for k, v in after.items() if not k.endswith("lock")},
                     {k: v for k, v in before.items() if not k.endswith("lock")})  # fmt: skip

  def test_a_new_one_records_configuration_and_environment(self):
    with prepare(self.path, CONFIG) as w:
      self.assertEqual(w.path, self.path)
      written = json.loads((self.path / "config.json").read_text())
      self.assertEqual(written["model"], {"pattern": ["attn", "gdn"], "window": 16, "dims": [1, 2]})
      self.assertEqual(written["optim"]["clip"], "Infinity")
      env = json.loads((self.path / "env.json").read_text())
      self.assertEqual(env["versions"]["jax"], jax.__version__)
      self.assertEqual(env["versions"]["python"], ".".join(map(str, sys.version_info[:3])))
      self.assertIn("orbax-checkpoint", env["versions"])
      self.assertEqual(env["devices"], [d.device_kind for d in jax.devices()])
      self.assertEqual(env["command"], sys.argv)
      self.assertEqual(env["earlier"], [])
      self.assertTrue(w.checkpoints.is_dir() and w.figures.is_dir())

  def test_the_commit_is_that_of_the_repository(self):
    here = pathlib.Path(workdir.__file__).parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    with prepare(self.path, CONFIG):
      env = json.loads((self.path / "env.json").read_text())
    if git.returncode == 0:
      self.assertEqual(env["git"]["commit"], git.stdout.strip())
      self.assertIsInstance(env["git"]["dirty"], bool)
    else:
      self.assertIsNone(env["git"])

  def test_a_command_line_keeps_its_secrets(self):
    with mock.patch.object(sys, "argv", ["train", "--hub_token=hf_abc", "--config.model.num_tokens=7"]):
      with prepare(self.path, CONFIG):
        env = json.loads((self.path / "env.json").read_text())
    self.assertEqual(env["command"], ["train", "--hub_token=***", "--config.model.num_tokens=7"])

  def test_a_relative_path_is_resolved_at_once(self):
    with tempfile.TemporaryDirectory() as elsewhere:
      here = os.getcwd()
      self.addCleanup(os.chdir, here)
      os.chdir(self.tmp)
      with prepare("run", CONFIG) as w:
        os.chdir(elsewhere)
        self.assertEqual(w.path, self.path)
        self.assertTrue((w.path / "config.json").exists())
      os.chdir(here)

  def test_the_same_configuration_resumes_and_earlier_starts_are_kept(self):
    for _ in range(3):
      prepare(self.path, CONFIG).close()
    env = json.loads((self.path / "env.json").read_text())
    self.assertLen(env["earlier"], 2)
    self.assertNotIn("earlier", env["earlier"][0])

  @parameterized.named_parameters(
    ("value", {"optim__muon_lr": 0.01}, r"optim.muon_lr: 0.003 in the workdir, 0.01 asked for$"),
    (
      "list",
      {"model__pattern": ["gdn"]},
      r'model.pattern: \["attn", "gdn"\] in the workdir, \["gdn"\] asked',
    ),
    ("gone", {"model__window": None}, r"model.window: 16 in the workdir, absent asked for"),
    ("new", {"model__remat": "none"}, r'model.remat: absent in the workdir, "none" asked for'),
    ("bool_is_no_int", {"optim__nesterov": 1}, r"optim.nesterov: true in the workdir, 1 asked for"),
    (
      "two",
      {"seed": 3, "train__steps": 7},
      r"seed: 0 in .*, 3 asked for; train.steps: 100 in .*, 7 asked for",
    ),
    (
      "one_allowed_one_not",
      {"seed": 3, "train__steps": 7},
      r"configuration: seed: 0 [^;]*$",
      ("train.steps",),
    ),
  )
  def test_another_configuration_is_refused_by_dotted_key(self, change, pattern, may_change=()):
    prepare(self.path, CONFIG).close()
    self.assert_refused(pattern, config=changed(**change), may_change=may_change)
    prepare(self.path, CONFIG).close()  # the refusal let go of the lock

  def test_a_field_that_came_later_had_its_default(self):
    """A run from before `model.remat` and the group `sleep` goes on, and its config.json then has them."""
    later = changed(model__remat="none") | {"sleep": {"state": "carry", "kept": None}}
    defaults = {"model": {"remat": "none", "window": 24}, "sleep": {"state": "carry", "kept": None}}
    prepare(self.path, CONFIG).close()
    for values, pattern in (
      (later | {"seed": 1}, r"configuration: seed: 0 in the workdir, 1 asked for$"),
      (later | {"new": 1}, r"configuration: new: absent in the workdir, 1 asked for$"),
      (changed(model__remat="block"), r'model.remat: "none" in the workdir, "block" asked for$'),
      (changed(model__window=24), r"model.window: 16 in the workdir, 24 asked for$"),
      (changed(model__window=None), r"model.window: 16 in the workdir, absent asked for$"),
    ):
      self.assert_refused(pattern, config=values, defaults=defaults)
    prepare(self.path, later, defaults=defaults).close()
    self.assertEqual(json.loads((self.path / "config.json").read_text())["model"]["remat"], "none")
    prepare(self.path, later).close()

  def test_equal_numbers_are_equal_settings(self):
    prepare(self.path, changed(optim__muon_lr=1.0)).close()
    prepare(self.path, changed(optim__muon_lr=1)).close()

  def test_keys_that_may_change_are_taken_over(self):
    prepare(self.path, CONFIG).close()
    more = changed(train__steps=200)
    prepare(self.path, more, may_change=("train.steps",)).close()
    prepare(self.path, more).close()
    self.assert_refused("train.steps: 200 in the workdir, 100 asked for")

  @parameterized.parameters("", "{", "[1]", "\x00\xff")
  def test_an_unreadable_configuration_is_one_line(self, text):
    self.path.mkdir()
    (self.path / "config.json").write_text(text, encoding="latin-1")
    self.assert_refused("config.json cannot be read")

  def test_a_configuration_that_json_cannot_hold_is_refused(self):
    self.assert_refused("cannot be written as JSON", config={"a": object()})
    self.assertFalse(self.path.exists())

  def test_bad_paths_are_refused(self):
    (self.tmp / "file").write_text("mine")
    self.assert_refused("is a file", path=self.tmp / "file")
    self.assert_refused("cannot be written", path=self.tmp / "file" / "run")
    self.assert_refused("cannot be written", path="/proc/run")
    self.assert_refused("not a URL", path="gs://bucket/run")
    self.assert_refused("empty path", path="")
    self.assertFalse(os.path.exists("gs:"))

  def test_files_of_others_are_refused_by_name(self):
    self.path.mkdir()
    (self.path / "thesis.tex").write_text("mine")
    self.assert_refused("holds thesis.tex but no config.json")

  def test_our_files_without_a_configuration_are_refused(self):
    prepare(self.path, CONFIG).close()
    (self.path / "checkpoints" / "100").mkdir()
    (self.path / "config.json").unlink()
    self.assert_refused("holds checkpoints but no config.json")

  def test_a_run_killed_at_its_start_is_no_obstacle(self):
    self.path.mkdir()
    for name in ("lock", "env.json", ".config.json.tmp"):
      (self.path / name).write_text("half")
    prepare(self.path, CONFIG).close()

  def test_done(self):
    with prepare(self.path, CONFIG) as w:
      self.assertIsNone(w.done_step)
      with metrics.Writer(w.path, tensorboard=False) as writer:
        writer.write({"kind": "train", "step": 100})
        self.assertIsNone(w.done_step)
        writer.write({"kind": "done", "step": 100})
      self.assertEqual(w.done_step, 100)

  def test_write_file_replaces_whole_or_not_at_all(self):
    path = self.tmp / "a.json"
    workdir.write_file(path, "old")
    with mock.patch("os.replace", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
      workdir.write_file(path, "new")
    self.assertEqual(path.read_text(), "old")
    workdir.write_file(path, "new")
    self.assertEqual(path.read_text(), "new")

  def test_a_second_run_is_refused_until_the_first_one_is_gone_however_it_went(self):
    child = textwrap.dedent(f"""
      import time
      from sleep_jax.runtime.workdir import prepare
      held = prepare({str(self.path)!r}, {{"a": 1}})
      print("held", flush=True)
      time.sleep(60)
    """)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, env=env)
    try:
      self.assertEqual(process.stdout.readline(), "held\n")
      self.assert_refused(f"is in use by process {process.pid} on .*, started 20", config={"a": 1})
    finally:
      process.send_signal(signal.SIGKILL)
      process.wait()
      process.stdout.close()
    self.assertIn(f"process {process.pid}", (self.path / "lock").read_text())  # stale, and no matter
    with prepare(self.path, {"a": 1}):
      self.assert_refused(f"process {os.getpid()}", config={"a": 1})  # a second one in this process, too
    prepare(self.path, {"a": 1}).close()
