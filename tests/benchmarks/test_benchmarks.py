"""The benchmarks time what they say: the rival computes the same, tables hold what was measured."""

import contextlib
import csv
import getpass
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, model, pretrained, windows
from sleep_jax.benchmarks import (
  attention,
  generation_memory,
  measure,
  memory,
  scaling,
  stall,
  tables,
  training,
)
from sleep_jax.cost import flops
from sleep_jax.data import rule110
from sleep_jax.pretrained.tokenizer import Tokenizer
from sleep_jax.runtime.files import RunFailedError


def small(num_passes=2, **changes):
  sleep = {"num_passes": num_passes, "loops": "scan"}
  return measure.rule110_config("tiny", sleep=sleep, train={"batch_size": 8}, **changes)


def found(folder, pattern):
  (path,) = pathlib.Path(folder).glob(pattern)
  return path


def csv_rows(path):
  with path.open(encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.peers
class TorchModelTest(parameterized.TestCase):
  """PyTorch must compute our loss, gradients and updates, or its times would mean nothing."""

  @pytest.mark.slow
  def test_equals_ours_with_heads_and_more_blocks(self):
    self.check_equals_ours(3, ("gdn", "attn", "gdn"))

  def test_equals_ours(self):
    self.check_equals_ours(2, ("attn", "gdn"))

  def check_equals_ours(self, num_passes, blocks):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(2)
    cfg, task = small(num_passes, model={"blocks": blocks, "fast": {"num_heads": 2}})
    found = training.differences(cfg, task)
    for name, value in found.items():
      assert value <= training.TOLERANCE[name], found

  def test_chunks_give_the_same_loss(self):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sleep_jax.benchmarks import torch_model

    cfg, task = small()
    weights = torch_model.from_jax(model.init(cfg.model, jax.random.key(0)))
    batch = torch_model.make_batch(cfg.data, 4, torch.Generator().manual_seed(0))
    whole, padded, split = (
      torch_model.Model(cfg, task.layout, chunk).loss(weights, batch).item() for chunk in (None, 64, 3)
    )
    np.testing.assert_allclose([padded, split], whole, rtol=1e-5)

  def test_a_step_in_parts_is_the_step(self):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    cfg, task = small()
    losses = []
    for parts in (1, 2):
      parted = config.replace(cfg, train={"microbatches": parts})
      step = training._torch_step(parted, task, None)
      losses.append([step() for _ in range(3)])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert len(set(losses[0])) == 3

  def test_data_is_the_same_task(self):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sleep_jax.benchmarks import torch_model

    data = rule110.Rule110Config(num_strings=3, num_cells=24, rollout_steps=5)
    strings = np.random.default_rng(0).integers(0, 1 << 24, (6, 3))
    ours = rule110.sequences(data, strings.astype(np.uint32))
    peer = torch_model.sequences(data, torch.from_numpy(strings))
    for name, value in peer.items():
      np.testing.assert_array_equal(value.numpy(), np.asarray(getattr(ours, name)))

  def test_refuses_what_it_does_not_do(self):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sleep_jax.benchmarks import torch_model

    cfg = config.replace(small()[0], sleep={"backprop_passes": 1})
    with pytest.raises(config.ConfigError, match="sleep"):
      torch_model.check_config(cfg)


def _sleeper(seconds):
  return lambda: time.sleep(seconds)


def _killed(cfg, task):
  """What memory's end looks like from within."""
  del cfg, task
  os.kill(os.getpid(), signal.SIGKILL)


def _failing(how):
  """A maker that fails as `how` says, at once or at the second call."""
  calls = []

  def fail():
    if how.startswith("dies"):
      os._exit(7)
    raise ValueError("not today")

  def call():
    calls.append(how)
    if len(calls) > 1:
      fail()

  if "later" not in how:
    fail()
  return call


class MeasureTest(parameterized.TestCase):
  def test_turns(self):
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = measure.interleave(calls, 4, least_s=0.0)
    assert all(len(t.wall) == len(t.cpu) == 4 for t in times.values())
    assert "".join(seen) == "ab" + "aabb" + "bbaa" + "aabb" + "bbaa"

  def test_cpu_time_leaves_waiting_out(self):
    t = measure.interleave({"wait": lambda: time.sleep(0.02)}, 3, least_s=0.0)["wait"]
    assert t.least("wall") >= 0.02 > 2 * t.median("cpu")

  def test_a_contender_in_a_process_of_its_own(self):
    with contextlib.closing(measure.Elsewhere(_sleeper, 0.02)) as contender:
      t = measure.interleave({"there": contender, "here": lambda: None}, 2, least_s=0.0)["there"]
    assert t.least("wall") >= 0.02 > 2 * t.median("cpu")

  @parameterized.parameters(("raises", "ValueError: not today"), ("dies", "ended with code 7"))
  def test_a_contender_that_fails_is_a_failure(self, how, said):
    with pytest.raises(RunFailedError, match=said):
      measure.Elsewhere(_failing, how)
    with contextlib.closing(measure.Elsewhere(_failing, f"{how} later")) as contender:
      with pytest.raises(RunFailedError, match=said):
        contender()

  def test_a_contender_that_ends_while_it_waits_is_named(self):
    with contextlib.closing(measure.Elsewhere(_sleeper, 0.0)) as contender:
      contender._process.kill()  # as Linux does where memory ends
      contender._process.join()
      with pytest.raises(RunFailedError, match=r"^the rival: its process ended with code -9 \(killed"):
        measure.interleave({"ours": lambda: None, "the rival": contender}, 1, least_s=0.0)

  def test_too_many_cores_is_the_users_mistake(self):
    with pytest.raises(config.ConfigError, match="--threads"):
      measure.pin(1000)

  def test_product_counts_its_work(self):
    call, work = measure.matrix_product(8)
    assert work == 1024
    assert call().shape == (8, 8)


class TablesTest(parameterized.TestCase):
  def test_markdown_and_csv_hold_the_same_rows(self):
    rows = [{"model": "ours", "ms": 1.23456789, "bytes": 12345, "none": None}]
    assert tables.markdown(rows).splitlines()[-1] == "| ours | 1.23 | 12,345 | – |"
    assert tables.comma_separated(rows) == "model,ms,bytes,none\nours,1.23457,12345,\n"

  def test_machine_names_no_host_and_no_user(self):
    facts = tables.machine()
    assert {"machine", "versions", "command", "date", "commit"} <= set(facts)
    text = " ".join(facts[name] for name in ("machine", "devices", "versions", "date", "commit"))
    assert socket.gethostname() not in text
    assert getpass.getuser() not in text.split()


class TrainingTest(parameterized.TestCase):
  def test_nothing_is_timed_unless_the_models_are_equal(self):
    equal = {"loss": 1e-7, "grad_norm": 1e-7, "gradient": 1e-5, "update": 1e-4}
    training.require_equal(equal)
    for wrong in ({"gradient": 0.02}, {"loss": float("nan")}):
      with pytest.raises(RuntimeError, match="differs from ours"):
        training.require_equal(equal | wrong)

  @parameterized.parameters(1, 4)
  def test_dropped_work_does_not_grow_with_passes(self, num_passes):
    cfg, task = small(num_passes)
    segments = windows.plan(task.layout, cfg.model.window)
    dropped = flops.per_sequence(segments, cfg.model, cfg.sleep).train - training.needed_flops(cfg, task)
    # Of D = 16, V = 16, F = 32: gate, output and three matrices of the MLP, for 12 tokens, forward and back.
    assert dropped == 3 * 2 * 12 * (16 * 16 * 2 + 3 * 16 * 32)

  def test_table_of_known_times(self):
    cfg, task = small()
    times = {
      training.OURS: measure.Times((0.1,), (0.2,)),
      "rival": measure.Times((0.3,), (0.4,)),
      training.PRODUCT: measure.Times((1.0,), (2.0,)),
    }
    ours, rival = training.table(cfg, task, times, product=4.0 * training.needed_flops(cfg, task))
    assert ours["tokens/s"] == 8 * 14 * 10
    assert (rival["× wall"], rival["× CPU"]) == (pytest.approx(3.0), pytest.approx(2.0))
    assert ours["of product"] == "2000%"  # 8 sequences in 0.2 s, against 4 in 2 s

  @pytest.mark.slow
  def test_runs(self):
    out = self.enterContext(tempfile.TemporaryDirectory())
    flags = ["--preset=tiny", "--passes=1", "--batch=4", "--rounds=1", "--turn=0", "--product=32"]
    assert training.main([*flags, "--no-peers", "--rounded", f"--out={out}"]) == 0
    rows = csv_rows(found(out, "training_tiny_*.csv"))
    assert [row["model"] for row in rows] == [training.OURS, training.SCANNED, training.ROUNDED]

  def test_a_comparison_that_is_killed_is_a_failure(self):
    with mock.patch.object(training, "differences", _killed):
      with pytest.raises(RunFailedError, match="was killed"):
        training.compared(*small())

  def test_what_was_measured_before_a_contender_failed_is_kept(self):
    out = self.enterContext(tempfile.TemporaryDirectory())

    @contextlib.contextmanager
    def contenders(cfg, task, **chosen):
      if cfg.sleep.num_passes == 2:
        raise RunFailedError("PyTorch: it went")
      yield {training.OURS: lambda: time.sleep(0.001)}, {}

    flags = ["--preset=tiny", "--passes=1,2", "--batch=4", "--rounds=1", "--turn=0", "--product=32"]
    with mock.patch.object(training, "contenders", contenders):
      with pytest.raises(RunFailedError, match=r"^N = 2: PyTorch: it went$"):
        training.main([*flags, "--no-peers", f"--out={out}"])
    assert [row["N"] for row in csv_rows(found(out, "training_tiny_*.csv"))] == ["1"]


class ScalingTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_runs(self):
    out = self.enterContext(tempfile.TemporaryDirectory())
    flags = ["--preset=tiny", "--passes=1,2", "--lengths=6,12", "--batch=1", "--rounds=1", "--turn=0"]
    assert scaling.main([*flags, f"--out={out}"]) == 0
    asleep = csv_rows(found(out, "scaling_tiny_sleep*.csv"))
    awake = csv_rows(found(out, "scaling_tiny_wake*.csv"))
    assert [row["N"] for row in asleep] == ["1", "2"]
    assert len({row["state bytes"] for row in awake}) == 1
    # Two blocks, keys and values of 16 numbers, 4 bytes: what a transformer keeps of each token.
    assert [row["transformer bytes"] for row in awake[:2]] == [str(2 * 2 * 16 * 4 * t) for t in (6, 12)]

  def test_fit_and_spread(self):
    rows = [{"batch": 1, "N": n, "ms": 3.0 + 2.0 * n} for n in (1, 2, 4)]
    assert scaling.fit(rows, "ms") == "batch 1: 3 + 2 N ms"
    assert scaling.spread(rows, "ms").endswith("2.20")


class MemoryTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_runs_and_passes_cost_less_when_they_are_recomputed(self):
    out = self.enterContext(tempfile.TemporaryDirectory())
    flags = ["--preset=tiny", "--passes=1,3", "--unrolled=", "--remat=none,window", "--timed=3", "--batch=2"]
    assert memory.main([*flags, "--rounds=1", "--turn=0", f"--out={out}"]) == 0
    rows = csv_rows(found(out, "memory_tiny_memory*.csv"))
    kept, recomputed = (float(row["MB a pass"]) for row in rows)
    assert recomputed < 0.5 * kept
    assert [row["remat"] for row in csv_rows(found(out, "memory_tiny_time*.csv"))] == ["none", "window"]


class AttentionTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_each_form_has_a_row_for_each_length_and_mode(self):
    out = self.enterContext(tempfile.TemporaryDirectory())
    sizes = ["--lengths=8,16", "--heads=2", "--kv_heads=1", "--width=8", "--rounds=1", "--turn=0"]
    assert attention.main([*sizes, "--reach=4", f"--out={out}"]) == 0
    rows = csv_rows(found(out, "attention_cpu_float32_reach4.csv"))
    assert [(row["L"], row["mode"], row["form"]) for row in rows] == [
      (length, mode, form)
      for length in ("8", "16")
      for mode in attention.MODES
      for form in ("dense", "blocked", attention.PEER)
    ]
    assert all(float(row["wall ms"]) > 0 for row in rows)

  def test_contenders_compute_the_same(self):
    args = attention._arguments(["--heads=2", "--kv_heads=1", "--width=8", "--reach=4"])
    inputs = attention.operands(13, args)
    outputs = [measure.quick(form)(*inputs) for form in attention.contenders(args).values()]
    for out in outputs[1:]:
      np.testing.assert_allclose(out, outputs[0], atol=1e-5)


class GenerationMemoryTest(parameterized.TestCase):
  def test_prompts_of_the_size_that_is_said(self):
    with tempfile.TemporaryDirectory() as folder:
      prompt = pathlib.Path(folder) / "prompt"
      generation_memory.write_prompt(prompt, 250_000)
      text = prompt.read_text()
      self.assertLen(text, 250_000)
      self.assertLessEqual(set(text.split()), set(generation_memory.vocabulary()))
      generation_memory.make_checkpoint(pathlib.Path(folder) / "checkpoint")
      cfg = pretrained.open_source(pathlib.Path(folder) / "checkpoint").model
      tokens = Tokenizer(pathlib.Path(folder) / "checkpoint", cfg).encode(text)
      self.assertLen(tokens, 250_000 // (generation_memory.LETTERS + 1))

  def test_a_process_is_not_charged_for_its_parent(self):
    """This process holds more than the child does."""
    held = np.ones(1 << 25)
    child = [sys.executable, "-S", "-c", "x = bytearray(40 << 20)"]
    done = subprocess.run(
      [sys.executable, "-S", "-c", generation_memory.STARTER, *child], capture_output=True, check=True
    )
    used = json.loads(done.stdout)
    self.assertEqual(used["code"], 0)
    self.assertBetween(used["bytes"], 40 << 20, 100 << 20)
    self.assertGreater(held.nbytes, used["bytes"])

  @pytest.mark.slow
  def test_a_row_for_each_prompt(self):
    first, second = generation_memory.measured((1, 2))
    self.assertEqual((first["prompt, MB"], first["tokens"], first["more, %"]), (1, 10_000, 0))
    self.assertLess(second["more, %"], 100 * generation_memory.WITHIN)


class StallTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_a_row_for_each_spread(self):
    cfg = config.ModelConfig(vocab_size=7, embed_dim=8, blocks=("attn", "gdn"), window=6)
    cfg = config.replace(cfg, attention={"num_heads": 1}, fast={"num_heads": 1, "key_dim": 4, "value_dim": 4})
    sleeps = [config.SleepConfig(num_passes=2, spread=late) for late in (0, 3)]
    weights = model.init(cfg, jax.random.key(0))
    rows = stall.measured(weights, cfg, sleeps, windows=1, rounds=1)
    assert [(row["spread"], row["tokens"]) for row in rows] == [(0, 12), (3, 12)]
    for row in rows:
      assert 0 < row["p50 ms"] <= row["p99 ms"] <= row["most ms"] and row["tokens/s"] > 0
    tokens = np.random.default_rng(0).integers(0, 7, 15, dtype=np.int32)
    plain, late = stall.predicted(weights, cfg, sleeps, tokens)
    assert (plain["tokens"], plain["behind a window"]) == (late["tokens"], late["behind a window"]) == (14, 5)
    # What differs lies behind a window, and all of it.
    gap = 5 * (plain["nats behind a window"] - late["nats behind a window"])
    assert abs(gap) > 1e-4
    self.assertAlmostEqual(14 * (plain["nats a token"] - late["nats a token"]), gap, places=4)

  @parameterized.parameters(
    (["--spread=2"], "sleep.spread: must be at least sleep.num_passes = 4"),
    (["--window=8", "--spread=0,8"], "sleep.spread: must be below model.window = 8"),
    (["--checkpoint=/nowhere"], "/nowhere: there is no such folder"),
    (["--text=x"], "--text: needs --checkpoint"),
  )
  def test_a_mistake_is_one_line(self, flags, message):
    with self.assertRaisesRegex(config.ConfigError, message):
      stall.main(flags)
