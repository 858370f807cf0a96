"""Several processes in one run: the same numbers as one, one writer, and an end in common."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax.runtime import metrics, processes
from tests import compiling
from tests.forked import Experiment

ROOT = pathlib.Path(__file__).parents[2]
RULE110 = ("-m", "experiments.rule110", "--config=experiments/configs/rule110.py:tiny")
GSM = (
  "-m",
  "experiments.gsm_infinite",
  "--config=experiments/configs/gsm_infinite.py:tiny",
  "--config.train.steps=4",
  "--config.train.batch_size=4",
  "--config.train.log_every=1",
  "--config.train.save_every=2",
  "--config.train.eval_every=4",
  "--config.train.eval_sequences=12",
  "--config.train.eval_batch_size=4",
  "--config.data.tokenizer_texts=8",
  "--config.model.blocks=('gdn',)",
  "--config.sleep.last_block=1",
  "--config.sleep.num_passes=1",
)


def environment(devices):
  path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
  flags = compiling.flags(f"--xla_force_host_platform_device_count={devices}")
  return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags}


def start(*arguments, devices=1):
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def spread(*arguments, count=2, devices=1):
  launcher = ("-m", "launch.local_multiprocess", f"--processes={count}", f"--devices={devices}", "--")
  return start(*launcher, *arguments)


def end(process):
  """Exit code, stdout and stderr; C++ prints lines of its own on both."""
  out, err = process.communicate(timeout=900)
  return process.returncode, out, "\n".join(x for x in err.splitlines() if "[Gloo]" not in x)


def rows(folder, *kinds):
  """Rows of metrics.jsonl without what the clock says."""
  timed = ("wall_s", "cpu_s", "tokens_per_s", "data_wait")
  return [
    {name: x for name, x in row.items() if name not in timed}
    for row in metrics.read(folder / "metrics.jsonl")
    if row["kind"] in kinds
  ]


class OneProcessTest(parameterized.TestCase):
  def test_one_process_agrees_with_itself(self):
    self.assertTrue(processes.primary())
    self.assertEqual(processes.agree(lambda: [1, "a"]), [1, "a"])
    self.assertEqual(processes.any_process(True, False), [True, False])
    whole = processes.gather({"a": jnp.arange(3)})
    self.assertIsInstance(whole["a"], np.ndarray)
    with self.assertRaisesRegex(KeyError, "as it was"):
      processes.agree(lambda: {}["as it was"])

  def test_nothing_is_written_by_all_but_the_first(self):
    with metrics.Silent() as writer:
      writer.write({"kind": "train", "step": 1})
      self.assertIsNone(writer.last())
      self.assertEqual(writer.truncate_after(0), 0)

  @parameterized.named_parameters(
    ("not_distributed", ("--num_processes=2",), "--num_processes says nothing without --distributed"),
    (
      "incomplete",
      ("--distributed", "--process_id=0"),
      "--coordinator_address is required beside",
    ),
    ("no_cluster", ("--distributed",), "--distributed: no cluster was found here; give coordinator_address,"),
    (
      "out_of_range",
      ("--distributed", "--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"),
      "--process_id: must lie in 0..1, got 2",
    ),
  )
  def test_flags_that_do_not_fit_are_one_line(self, flags, said):
    _, module, *config = RULE110
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
      with Experiment(module, pathlib.Path(scratch)) as experiment:
        ended = experiment.run(*config, f"--workdir={folder}/run", *flags)
      self.assertEqual(ended.code, 2, ended.err)
      self.assertIn(said, ended.err)
      self.assertEqual(len(ended.err.splitlines()), 1, ended.err)
      self.assertEqual(os.listdir(folder), [])

  def test_a_launcher_without_a_program_says_so(self):
    code, _, err = end(start("-m", "launch.local_multiprocess"))
    self.assertEqual((code, len(err.splitlines())), (2, 1))
    self.assertIn("nothing to run", err)


class RunsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def assert_same_numbers(self, got, want):
    self.assertEqual([row["step"] for row in got], [row["step"] for row in want])
    for a, b in zip(got, want, strict=True):
      self.assertEqual(a.keys(), b.keys())
      for name in a:
        if isinstance(a[name], float):
          np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=f"{name} of step {a['step']}")
        else:
          self.assertEqual(a[name], b[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
class SeveralProcessesTest(RunsTest):
  @parameterized.named_parameters(("data_from_the_device", RULE110), ("data_from_the_hosts", GSM))
  def test_two_processes_train_as_one(self, command):
    two, one = self.folder / "two", self.folder / "one"
    runs = [spread(*command, f"--workdir={two}", devices=1), start(*command, f"--workdir={one}", devices=2)]
    for code, out, err in map(end, runs):
      self.assertEqual(code, 0, out + err)
    self.assert_same_numbers(rows(two, "train", "eval"), rows(one, "train", "eval"))
    self.assertEqual(rows(two, "done"), rows(one, "done"))
    self.assertLen(rows(two, "cost", "sleep"), 2)  # written once

  def test_stopped_and_resumed_it_ends_as_the_whole_run(self):
    whole, broken = self.folder / "whole", self.folder / "broken"
    long = (*RULE110, *(f"--config.train.{name}=100" for name in ("steps", "eval_every", "save_every")))
    code, out, err = end(spread(*long, f"--workdir={whole}"))
    self.assertEqual(code, 0, out + err)
    process = spread(*long, f"--workdir={broken}")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
      if (broken / "metrics.jsonl").exists() and rows(broken, "train"):
        break
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    self.assertEqual(code, 3, out + err)
    self.assertIn("rerun the same command to go on", err)
    steps = [row["step"] for row in rows(broken, "train")]
    self.assertLess(max(steps), 100)
    code, out, err = end(spread(*long, f"--workdir={broken}"))
    self.assertEqual(code, 0, out + err)
    self.assertIn("resuming at step", out)
    self.assertEqual(rows(broken, "train", "eval", "done"), rows(whole, "train", "eval", "done"))

  def test_a_workdir_of_another_run_is_refused_by_all(self):
    folder = self.folder / "run"
    code, out, err = end(spread(*RULE110, f"--workdir={folder}", "--config.train.steps=10"))
    self.assertEqual(code, 0, out + err)
    before = (folder / "metrics.jsonl").read_bytes()
    code, _, err = end(spread(*RULE110, f"--workdir={folder}"))
    self.assertEqual(code, 2, err)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    self.assertLen(lines, 2)
    self.assertEqual({"train.steps: 10 in the workdir, 20 asked for" in line for line in lines}, {True})
    self.assertNotIn("Traceback", err)
    self.assertEqual((folder / "metrics.jsonl").read_bytes(), before)

  def test_a_mesh_that_leaves_a_process_without_devices_is_refused(self):
    code, _, err = end(spread(*RULE110, f"--workdir={self.folder}/run", "--config.mesh.data=1"))
    self.assertEqual(code, 2, err)
    self.assertIn("mesh: of 2 processes must take all 2 devices", err)
    self.assertFalse((self.folder / "run").exists())


def two_halves(folder, first, second):
  """The rows of a run of 10 steps on (processes, devices of each), that is then made longer on others."""
  grown = ()
  for steps, (count, devices) in ((10, first), (20, second)):
    command = (*RULE110, f"--workdir={folder}", f"--config.train.steps={steps}", "--tensorboard=False")
    many = count > 1
    process = spread(*command, count=count, devices=devices) if many else start(*command, devices=devices)
    code, out, err = end(process)
    assert code == 0, out + err
    if grown:
      assert "resuming at step 10 of 20" in out
      assert rows(folder, "train", "eval")[: len(grown)] == grown
    grown = rows(folder, "train", "eval")
  assert [row["step"] for row in grown if row["kind"] == "train"] == [5, 10, 15, 20]
  return grown


@functools.cache
def two_halves_here():
  with tempfile.TemporaryDirectory() as folder:
    return two_halves(pathlib.Path(folder, "run"), (1, 1), (1, 1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
class OtherMachinesTest(RunsTest):
  """A run that goes on where there are other processes, or devices, than there were: the same numbers."""

  @parameterized.parameters(
    ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 8), (1, 4)), ((1, 4), (2, 4)), ((2, 4), (1, 4))
  )
  def test_it_goes_on_elsewhere(self, first, second):
    self.assert_same_numbers(two_halves(self.folder / "run", first, second), two_halves_here())


class GatherTest(parameterized.TestCase):
  def test_a_split_array_comes_whole(self):
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.device_put(
      jnp.arange(16.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    np.testing.assert_array_equal(processes.gather([split])[0], np.arange(16.0))
