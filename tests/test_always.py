"""`sleep.when` = `always`: training reads and sleeps exactly as generation does.

The oracles judge its logits, state and gradients in `test_model_oracle` and `test_carry`.
"""

import dataclasses

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, generate, model, windows
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.cost import flops
from sleep_jax.scoring import sleep_changes, stability
from tests import hybrids
from tests.hybrids import assert_near, assert_same

NEAR = 1e-4  # of the largest entry, as in `test_promises`
PAIR = ("gdn", "attn")
LENGTH = 14  # with L = 4 the last window is half as long


def always(**how) -> SleepConfig:
  return SleepConfig(when="always", **({"num_passes": 3} | how))


def whole(cfg, sleep_cfg, *, pads=(0, 0), length=LENGTH):
  """Weights, a batch with a loss everywhere but at pads, and its plan."""
  batch, layout = hybrids.random_batch(length, range(length), pads=pads)
  return hybrids.random_params(cfg), batch, windows.plan(layout, cfg.window, sleep_cfg)


def token_by_token(weights, batch, cfg, sleep_cfg):
  """What a generation session predicts after each token: [B, T, vocab], and the session at the end."""
  session, logits = generate.start(cfg, sleep_cfg, len(batch.inputs)), []
  valid = np.ones(batch.inputs.shape, bool) if batch.valid is None else batch.valid
  for t in range(batch.inputs.shape[1]):
    at = np.s_[:, t : t + 1]
    session = generate.read(weights, batch.inputs[at], session, cfg, sleep_cfg, valid=valid[at])
    logits.append(np.asarray(session.logits))
  return np.stack(logits, axis=1), session


class PlanTest(parameterized.TestCase):
  def test_every_window_but_the_last_is_slept_on(self):
    layout = np.isin(np.arange(LENGTH), (1, 5, 13))  # the third window has no loss
    got = [(s.start, s.count, s.reads, s.asleep) for s in windows.plan(layout, 4, always())]
    self.assertEqual(got, [(0, 2, (1,), True), (8, 1, (), True), (12, 1, (1,), False)])

  @parameterized.parameters(12, 11)
  def test_the_last_window_is_not_whether_it_has_a_loss_or_is_full(self, length):
    for scored in ((1,), (1, length - 1)):
      layout = np.isin(np.arange(length), scored)
      self.assertEqual([s.asleep for s in windows.plan(layout, 4, always())][-1], False)

  def test_one_pass_is_planned_as_the_plain_hybrid(self):
    layout = np.arange(LENGTH) % 3 > 0
    self.assertEqual(windows.plan(layout, 4, always(num_passes=1)), windows.plan(layout, 4))

  def test_a_plan_of_the_other_kind_is_refused(self):
    cfg = hybrids.model_config(PAIR)
    weights, batch, planned = whole(cfg, always())
    unread = windows.plan([True] * LENGTH, 4)
    with self.assertRaisesRegex(ValueError, "sleeps on windows with a loss"):
      model.forward(weights, batch, planned, cfg, SleepConfig(num_passes=3))
    with self.assertRaisesRegex(ValueError, "does not sleep on every window"):
      model.forward(weights, batch, unread, cfg, always())


class GenerationTest(parameterized.TestCase):
  """Training's logits are those of a session that is fed one token after the other."""

  def check(self, cfg, sleep_cfg, pads=(0, 4, 6), length=LENGTH):  # no pads, a window, a window and a half
    weights, batch, segments = whole(cfg, sleep_cfg, pads=pads, length=length)
    logits, state = hybrids.reader(segments, cfg, sleep_cfg)(weights, batch)
    expected, session = token_by_token(weights, batch, cfg, sleep_cfg)
    keep = np.ones(batch.inputs.shape, bool) if batch.valid is None else batch.valid
    assert_near(np.asarray(logits)[keep], expected[keep], NEAR)
    if session.filled:  # else the session has slept on its last window too, which nothing follows here
      assert_near({i: s.S for i, s in state.fast.items()}, {i: s.S for i, s in session.fast.items()}, NEAR)

  @parameterized.named_parameters(
    ("hard, with a coda", {}, {"last_block": 1, "remat": "pass"}),
    ("sliding, each pass", {"eviction": "sliding"}, {"kept": "each", "loops": "unroll"}),
  )
  def test_equals_a_session(self, changes, how):
    self.check(hybrids.model_config(PAIR, **changes), always(num_passes=2, **how))

  @parameterized.named_parameters(
    ("hard", {}, {}),
    ("hard, the middle loops", {}, {"first_block": 1, "last_block": 3}),
    ("hard, reset", {"fast": {"conv_context": "reset"}}, {"state": "reset", "remat": "window"}),
    ("sliding, last pass", {"eviction": "sliding"}, {"remat": "window"}),
    (
      "sliding, the middle loops",
      {"eviction": "sliding"},
      {"kept": "each", "first_block": 1, "last_block": 3},
    ),
    ("a norm between passes", {"loop_norm": True}, {"last_block": 2}),
  )
  @pytest.mark.slow
  def test_a_deeper_model_equals_a_session(self, changes, how):
    self.check(hybrids.model_config(("attn", "gdn", "attn", "hebbian"), **changes), always(**how))

  @parameterized.product(
    eviction=("hard", "sliding"),
    kept=("last", "each"),
    loops=("scan", "unroll"),
    remat=("none", "block", "pass", "window"),
    looped=((0, None), (1, 3)),
  )
  @pytest.mark.slow
  def test_equals_a_session_in_every_form(self, eviction, kept, loops, remat, looped):
    how = {"kept": kept, "loops": loops, "remat": remat, "first_block": looped[0], "last_block": looped[1]}
    self.check(hybrids.model_config(("attn", "gdn", "attn"), eviction=eviction), always(num_passes=2, **how))

  @parameterized.parameters("hebbian", "jet", "delta", "kda", "gdn2")
  @pytest.mark.slow
  def test_equals_a_session_with_every_rule(self, rule):
    cfg = hybrids.model_config(("attn", rule))
    weights = model.init(cfg, jax.random.key(0))
    sleep_cfg = always()
    batch, layout = hybrids.random_batch(LENGTH, range(LENGTH), pads=(0, 5))
    logits, _ = model.forward(weights, batch, windows.plan(layout, 4, sleep_cfg), cfg, sleep_cfg)
    expected, _ = token_by_token(weights, batch, cfg, sleep_cfg)
    assert_near(np.asarray(logits)[batch.valid], expected[batch.valid], NEAR)

  @parameterized.parameters(3, 4, 12)
  @pytest.mark.slow
  def test_a_sequence_that_ends_with_or_before_its_window(self, length):
    self.check(hybrids.model_config(PAIR), always(), pads=(0, 1), length=length)


class OnePassTest(parameterized.TestCase):
  @parameterized.parameters(("hard", "scan", 1, 10), ("sliding", "unroll", None, 6))
  def test_is_the_plain_hybrid_to_the_bit(self, eviction, loops, last_block, length):
    cfg = hybrids.model_config(PAIR, eviction=eviction, loop_norm=last_block is not None)
    got = []
    for when, more in (("always", {"last_block": last_block}), ("unread", {})):
      sleep_cfg = SleepConfig(when=when, num_passes=1, loops=loops, **more)
      weights, batch, segments = whole(cfg, sleep_cfg, pads=(0, 5), length=length)
      got.append(hybrids.program(segments, cfg, sleep_cfg)(weights, batch))
    assert_same(*got)

  def test_a_plan_for_more_passes_serves_one(self):
    """As where N is varied on the same sequences."""
    cfg = hybrids.model_config(PAIR, loop_norm=True)
    weights, batch, segments = whole(cfg, always(), length=6)
    one = always(num_passes=1, last_block=1)
    plain = whole(cfg, one, length=6)[2]
    assert_near(
      hybrids.program(segments, cfg, one)(weights, batch),
      hybrids.program(plain, cfg, one)(weights, batch),
      NEAR,
    )


class GradientTest(parameterized.TestCase):
  @parameterized.product(remat=("block", "pass", "window"), loops=("scan", "unroll"))
  @pytest.mark.slow
  def test_remat_and_loops_change_no_gradient(self, remat, loops):
    cfg = hybrids.model_config(PAIR)
    expected, got = (
      hybrids.program(whole(cfg, s)[2], cfg, s)(*whole(cfg, s)[:2])
      for s in (always(), always(remat=remat, loops=loops))
    )
    assert_near(got, expected, NEAR)

  @parameterized.parameters(1, 2)
  @pytest.mark.slow
  def test_truncation_changes_gradients_alone(self, backprop_passes):
    cfg = hybrids.model_config(PAIR)
    (loss, grads, logits), (cut_loss, cut, cut_logits) = (
      hybrids.program(whole(cfg, s)[2], cfg, s)(*whole(cfg, s)[:2])
      for s in (always(), always(backprop_passes=backprop_passes))
    )
    assert_near((cut_loss, cut_logits), (loss, logits), 1e-6)
    self.assertGreater(hybrids.distance(cut["embed"], grads["embed"]), 1e-3)

  def test_every_loss_learns_from_what_was_slept_on_before(self):
    """The gradient of one window's loss alone reaches the tokens of the window before it."""
    cfg, sleep_cfg = hybrids.model_config(PAIR), always(num_passes=2)
    weights, batch, segments = whole(cfg, sleep_cfg, length=10)
    batch = dataclasses.replace(
      batch,
      inputs=np.arange(10, dtype=np.int32)[None],
      targets=batch.targets[:1],
      loss_mask=(np.arange(10) // 4 == 1).astype(np.float32)[None],
    )
    grads = hybrids.program(segments, cfg, sleep_cfg)(weights, batch)[1]["embed"]
    moved = np.abs(np.asarray(grads)).max(axis=1) > 0
    self.assertTrue(moved[:8].all())
    self.assertFalse(moved[8:].any())


def test_a_model_that_reads_awake_in_several_passes_is_refused():
  looped = hybrids.model_config(("attn", "attn"), predict_passes=2)
  with pytest.raises(
    ConfigError, match="^sleep.when: must be `unread` where model.predict_passes is above 1"
  ):
    config.Config(data=None, model=looped, sleep=always())


def test_an_unknown_word_is_refused():
  with pytest.raises(ConfigError, match="^sleep.when: unknown value 'alway'; did you mean \"always\""):
    SleepConfig(when="alway")


def test_passes_are_counted_once():
  """N passes in all over the repeated blocks; those behind them run twice, and nothing else is added."""
  cfg = hybrids.model_config(("attn", "gdn", "attn", "gdn"))
  layout = [True] * 12  # three windows, the last one only read

  def counted(**how):
    s = always(**how)
    return flops.per_sequence(windows.plan(layout, 4, s), cfg, s)

  plain = counted(num_passes=1)
  assert plain.asleep == 0
  head = 12 * 2 * cfg.embed_dim * cfg.vocab_size
  a_window = (plain.awake - head) / 3
  for n in (2, 3):
    assert counted(num_passes=n).awake == plain.awake
    assert counted(num_passes=n).asleep == pytest.approx(2 * (n - 1) * a_window)
    middle = counted(num_passes=n, first_block=0, last_block=2)  # half of the blocks loop, half are the coda
    assert middle.asleep == pytest.approx(2 * (n - 1) * a_window / 2 + 2 * a_window / 2)


@pytest.mark.slow
def test_measures_know_it():
  cfg = hybrids.model_config(("gdn", "gdn"), loop_norm=True)
  sleep_cfg = always(num_passes=2, last_block=1)
  weights, batch, segments = whole(cfg, sleep_cfg, length=10)
  growth = stability.gradient_growth(weights, batch, segments, cfg, sleep_cfg)
  assert (len(growth.by_window), {len(x) for x in growth.by_pass}) == (2, {2})
  fast = {i: s.S for i, s in model.init_state(cfg, 2, sleep_cfg).fast.items()}
  zeros = {i: np.zeros((2, *S.shape), np.float32) for i, S in fast.items()}
  by_pass = {"0": np.zeros((2, 2, *fast["0"].shape), np.float32)}
  loss = hybrids.jit(
    lambda weights, added: stability.perturbed_loss(weights, added, batch, segments, cfg, sleep_cfg)
  )
  added = loss(weights, (zeros, by_pass))
  assert_near(added, hybrids.program(segments, cfg, sleep_cfg)(weights, batch)[0], NEAR)
  changes = sleep_changes.sleep_changes(weights, batch, segments, cfg, sleep_cfg)
  assert {(len(x), len(x[0])) for x in changes.values()} == {(2, 2)}


@pytest.mark.parametrize("eviction, how", [("hard", {}), ("sliding", {"kept": "each"})])
def test_a_text_that_begins_at_a_window_is_read_as_if_it_were_alone(eviction, how):
  """`Batch.begins`: the row in which it begins equals its two texts, each read from the start."""
  cfg, sleep_cfg = hybrids.model_config(PAIR, eviction=eviction), always(num_passes=2, **how)
  weights, batch, segments = whole(cfg, sleep_cfg, length=12)
  begins = np.zeros(batch.inputs.shape, bool)
  begins[0, [0, 8]] = True  # row 1 goes on
  logits = hybrids.reader(segments, cfg, sleep_cfg)(weights, batch.replace(begins=begins))[0]
  through = hybrids.reader(segments, cfg, sleep_cfg)(weights, batch)[0]
  last = windows.plan([True] * 4, cfg.window, sleep_cfg)
  alone, _ = hybrids.reader(last, cfg, sleep_cfg)(weights, jax.tree.map(lambda x: x[:, 8:], batch))
  assert_near(logits[:, :8], through[:, :8], NEAR)
  assert_near(logits[1], through[1], NEAR)
  assert_near(logits[0, 8:], alone[0], NEAR)
  assert hybrids.distance(through[0, 8:], alone[0]) > 0.01
