"""Checkpoints across processes: killed in a save, without space, or two that share one run."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from sleep_jax.runtime.checkpoint import Checkpoints
from tests import compiling

CHILD = pathlib.Path(__file__).with_name("checkpoint_child.py")


def run_child(*args, **kw):
  """Runs checkpoint_child.py to its end; its output, errors included."""
  done = subprocess.run(
    [sys.executable, CHILD, *map(str, args)],
    capture_output=True,
    text=True,
    timeout=120,
    env=child_env(),
    **kw,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def child_env(**kw):
  path = os.pathsep.join([str(CHILD.parent.parent), *filter(None, sys.path)])
  return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": compiling.flags()} | kw


class ProcessTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "checkpoints"

  def latest(self, *shape):
    """The newest step that restores here, where `w` has a shape."""
    with Checkpoints(self.dir, read_only=True) as c:
      step, _ = c.restore({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, subset=True)
    return step

  def kill_often(self, kills, seed):
    """Kills a run that saves without pause, at random moments of a save; each restart checks every step."""
    rng, acknowledged, in_flight, took = random.Random(seed), 0, 0, 0.25
    for kill in range(kills + 1):
      command = [sys.executable, CHILD, "save", str(self.dir), str(kill == kills)]
      child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=child_env()
      )
      timer, after, begun = None, rng.randint(2, 4), time.monotonic()
      saving = 0
      for line in child.stdout:
        if not line.endswith("\n"):  # killed in the middle of a word
          break
        word, _, value = line.strip().partition(" ")
        if word == "START":  # the steps it found, each compared with the truth, and the one restored
          found = json.loads(value)
          self.assertEqual(found["wrong"], [])
          self.assertGreaterEqual(found["restored"] or 0, acknowledged)
          self.assertEqual(found["said"], [s for s in found["said"] if "was still being saved" in s])
        elif word == "SAVED":
          acknowledged, saving, took = max(acknowledged, int(value)), 0, time.monotonic() - begun
        elif word == "SAVE":
          saving, after, begun = 1, after - 1, time.monotonic()
          if after == 0 and kill < kills:
            timer = threading.Timer(rng.uniform(0, took), child.send_signal, [signal.SIGKILL])
            timer.start()
      child.wait()
      child.stdout.close()
      in_flight += saving and kill < kills
      self.assertEqual(child.returncode, -signal.SIGKILL if kill < kills else 0)
    self.assertGreater(acknowledged, kills)
    return in_flight

  def test_what_was_called_saved_survives_a_kill(self):
    self.kill_often(6, seed=0)

  @pytest.mark.slow
  def test_what_was_called_saved_survives_many_kills(self):
    self.assertGreater(self.kill_often(50, seed=1), 10)  # or the timing of this test has gone stale

  def test_a_failed_save_is_tried_again_and_then_is_an_error(self):
    out = run_child("fail", self.dir)
    self.assertRegex(
      out,
      r"(?s)step 1 was not saved: .*\(\d+ MB free in .*\); trying once more.*"
      r"ERROR step 1 was not saved: .*second attempt\n.*"  # the state was there, and the disk still full
      r"polled \[\] latest None\n.*"
      r"saved \[2\]\n.*"  # space again
      r"step 3 was not saved: .*; its arrays were donated, the next save is the second attempt\n.*"
      r"saved \[4\]\n.*"
      r"step 5 was not saved: .*; its arrays were donated, the next save is the second attempt\n.*"
      r"ERROR step 5 was not saved: ",  # wait() with nothing left to try
    )
    self.assertEqual(self.latest(40, 8), 4)

  @pytest.mark.slow
  def test_two_processes_save_fall_back_and_restore_together_and_one_alone_reads_it(self):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    command = [sys.executable, CHILD, "pair", str(self.dir), str(port)]
    pair = [
      subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                       env=child_env(XLA_FLAGS=compiling.flags("--xla_force_host_platform_device_count=2")))
      for i in range(2)
    ]  # fmt: skip
    try:
      outs = [p.communicate(timeout=120)[0] for p in pair]
    finally:
      for p in pair:
        p.kill()
    for i, out in enumerate(outs):
      self.assertEqual(pair[i].returncode, 0, out)
      self.assertIn("restored 1 equal True", out)
      self.assertIn("all damaged True", out)
    self.assertIn("step 2 is damaged", outs[0])
    self.assertNotIn("step 2 is damaged", outs[1])
    self.assertEqual(self.latest(8, 4), 3)
