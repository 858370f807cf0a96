"""Runs fed by the host: resumed they repeat, scores know no batch size, and a thread's error is heard."""

import pathlib
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, model, sharding, train, windows
from sleep_jax.config import ConfigError
from sleep_jax.data import batching
from sleep_jax.data.batching import CutConfig, Example
from sleep_jax.runtime import metrics, workdir
from sleep_jax.scoring import by_group
from sleep_jax.train import host_steps

CUT = CutConfig(max_tokens=16, answer_tokens=3, bucket_batches=2)
ONE = sharding.make_mesh(config.MeshConfig(data=1), jax.devices()[:1])


class Made:
  """Example i: tokens drawn from i; the answer is the first token, once or twice, and the end (1)."""

  def __init__(self, broken_at=10**9):
    self.broken_at = broken_at

  def __len__(self):
    return 10_000

  def __getitem__(self, i):
    if i >= self.broken_at:
      raise OSError("the disk is gone")
    rng = np.random.default_rng(i)
    prompt = rng.integers(2, 6, (3, 9, 7)[i % 3])  # two shapes, which is two programs to compile
    return Example(prompt, np.asarray([*[prompt[0]] * (1 + i % 2), 1]), i % 3)


HELD_OUT = [Made()[5000 + i] for i in range(14)]


def settings(**changes):
  fast = config.FastConfig(num_heads=1, key_dim=4, value_dim=4, decay_init=(1 / 16, 1.0))
  attention = config.AttentionConfig(num_heads=1)
  cfg = config.Config(
    data=None,
    model=config.ModelConfig(6, 8, 8, blocks=("gdn",), window=6, attention=attention, fast=fast),
    sleep=config.SleepConfig(num_passes=1),
    optim=config.OptimConfig(muon_lr=1e-2, adam_lr=1e-2, newton_schulz_dtype="float32"),
    train=config.TrainConfig(
      steps=5, batch_size=4, steps_per_dispatch=1, log_every=1, eval_every=5, save_every=3,
      eval_sequences=14, eval_batch_size=2,
    ),
    mesh=config.MeshConfig(data=1),
  )  # fmt: skip
  return config.replace(cfg, **changes)


def run(folder, cfg=None, source=None):
  cfg = cfg or settings()
  task = host_steps.HostTask(source or Made(), CUT, {"first": batching.HeldOut(HELD_OUT)}, ["a", "b", "c"])
  with workdir.prepare(folder, config.to_dict(cfg)) as made:
    row = train.train(cfg, task, made, report=lambda line: None)
  return row, metrics.read(pathlib.Path(folder, "metrics.jsonl"))


def losses(rows):
  return [(r["step"], r["loss"], r["tokens"]) for r in rows if r["kind"] == "train"]


@pytest.fixture(scope="module")
def whole():
  with tempfile.TemporaryDirectory() as folder:
    yield run(folder)


def test_rows_count_tokens_pads_and_waiting(whole):
  row, rows = whole
  seen = 0
  plan = batching.BatchPlan(Made(), CUT, window=6, batch_size=4, steps=5, seed=0)
  stream = batching.feed(plan, CUT, 0)
  for r in (r for r in rows if r["kind"] == "train"):
    planned = next(stream)
    seen += planned.rows["valid"].sum()
    assert r["tokens"] == seen
    np.testing.assert_allclose(r["padding"], 1 - planned.rows["valid"].mean(), atol=1e-9)
    assert 0 <= r["data_wait"] <= 1
  assert row["a_asked"] + row["b_asked"] + row["c_asked"] == len(HELD_OUT)
  assert rows[-1]["kind"] == "done"


def test_a_run_that_broke_and_resumed_repeats_the_whole_one(whole):
  with tempfile.TemporaryDirectory() as folder:
    with pytest.raises(OSError, match="the disk is gone"):
      run(folder, source=Made(broken_at=16))  # blocks of 8: steps 0 .. 3 are made, 3 was saved
    row, rows = run(folder)
  assert losses(rows) == losses(whole[1])
  assert row["loss"] == whole[0]["loss"]


@pytest.mark.slow
def test_two_devices_give_the_same_losses(whole):
  with tempfile.TemporaryDirectory() as folder:
    row, rows = run(folder, settings(mesh={"data": 2}))
  got, want = losses(rows), losses(whole[1])
  np.testing.assert_allclose(got, want, rtol=2e-5)
  assert row["a_exact"] == whole[0]["a_exact"]


class EvaluateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.cfg = settings()
    self.weights = model.init(self.cfg.model, jax.random.key(3))

  def evaluate(self, size, examples=HELD_OUT, names=("a", "b", "c"), **others):
    cfg = self.cfg
    sets = {"first": batching.HeldOut(examples), **others}
    test = by_group.make_host_evaluate(sets, names, CUT, size, cfg.model, cfg.sleep, ONE)
    return test(self.weights)

  def test_scores_do_not_depend_on_the_batch_size(self):
    want = self.evaluate(5)
    got = self.evaluate(1)
    self.assertEqual(got.keys(), want.keys())
    for name in set(want) - {"by_answer"}:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)

  def test_teacher_forcing_finds_what_greedy_decoding_gets_right(self):
    """Half of the answers are what the model itself says, token after token, half have a wrong end."""
    window, right = self.cfg.model.window, 0
    examples = []
    for i in range(6):
      prompt, said = HELD_OUT[i].prompt, []
      for _ in range(3):
        guess = Example(prompt, np.asarray([*said, 0]))
        bucket = batching.bucket_of(Example(prompt, np.zeros(3, int)), CUT, window)
        batch, _ = by_group.stack([guess], bucket, CUT, window)
        segments = windows.plan(batching.layout(bucket, CUT, window), window)
        batch = jax.tree.map(jnp.asarray, batch)
        logits, _ = model.forward(self.weights, batch, segments, self.cfg.model, self.cfg.sleep)
        said.append(int(jnp.argmax(logits[0, len(said)])))
      right += i % 2
      said[-1] = said[-1] if i % 2 else (said[-1] + 1) % 6
      examples.append(Example(prompt, np.asarray(said), 0))
    row = self.evaluate(4, examples, ("a",))
    self.assertEqual(row["a_exact"], right / 6)

  def test_majority_is_of_whole_answers(self):
    vectors = [tuple(e.answer) for e in HELD_OUT]
    want = max(map(vectors.count, vectors)) / len(vectors)
    self.assertAlmostEqual(self.evaluate(5)["const_exact"], want)

  def test_every_set_is_scored_as_if_it_were_alone(self):
    second = [e for e in HELD_OUT if e.group != 1][:7]
    guessed = [i % 3 == 0 for i in range(7)]
    row = self.evaluate(5, second=batching.HeldOut(second, {"guess": guessed}))
    alone = self.evaluate(3, second)
    self.assertEqual(row["second_b_asked"], 0)
    self.assertTrue(np.isnan(row["second_b_guess"]))
    for g, name in ((0, "a"), (2, "c")):
      right = [hit for e, hit in zip(second, guessed, strict=True) if e.group == g]
      self.assertEqual(row[f"second_{name}_guess"], np.mean(right))
    for name in set(alone) - {"by_answer"}:
      np.testing.assert_allclose(row[f"second_{name}"], alone[name], rtol=1e-5, err_msg=name)
    self.assertEqual([row[f"{name}_asked"] for name in "abc"], [5, 4, 5])
    self.assertEqual(
      row.keys() - {"second_" + name for name in (*alone, *(f"{g}_guess" for g in "abc"))}, alone.keys()
    )


class PrefetchTest(parameterized.TestCase):
  def test_order_end_and_error(self):
    def items():
      yield from range(5)
      raise OSError("gone")

    with host_steps.Prefetch(range(7), 2) as made:
      self.assertEqual(list(made), list(range(7)))
      self.assertEqual(list(made), [])
    with host_steps.Prefetch(items(), 2) as made:
      self.assertEqual([next(made) for _ in range(5)], list(range(5)))
      for _ in range(2):
        with self.assertRaisesRegex(OSError, "gone"):
          next(made)

  def test_no_more_than_asked_is_made_ahead_and_closing_ends_it(self):
    made, before = [], threading.active_count()

    def items():
      for i in range(100):
        made.append(i)
        yield i

    with host_steps.Prefetch(items(), 2) as stream:
      next(stream)
    self.assertEqual(threading.active_count(), before)
    self.assertLessEqual(len(made), 4)


class MistakeTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"model": {"window": 17}}, "model.window: must be at most data.cut.max_tokens = 16"),
    ({"model": {"window": 2}}, "model.window: must be at least 3"),
    ({"train": {"steps_per_dispatch": 5}}, "train.steps_per_dispatch: must be 1"),
  )
  def test_one_line(self, changes, message):
    with self.assertRaisesRegex(ConfigError, message):
      host_steps.check_fits(settings(**changes), CUT)
