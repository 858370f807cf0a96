"""Reading and generating across windows, against the model's own windows and against other implementations.

Tolerances are those of `test_promises`: the two sides of a comparison differ by rounding alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, decoding, generate, model, params, sharding
from sleep_jax.config import ConfigError, MeshConfig, SleepConfig
from sleep_jax.generate import SamplingConfig
from tests import hybrids, oracle
from tests.hybrids import assert_near, assert_same

NEAR = 1e-4
PAIR = ("gdn", "attn")
TWO = SleepConfig(num_passes=2)
KEY = jax.random.key(3)


@functools.cache
def weights_of(cfg):
  return hybrids.random_params(cfg)


@functools.cache
def programs(cfg, sleep_cfg):
  """(tokens, state, valid) -> state asleep; -> logits awake, of a window that is filled up with pads."""
  weights = weights_of(cfg)
  asleep = hybrids.jit(lambda x, s, valid: model.consolidate(weights, x, s, cfg, sleep_cfg, valid=valid))
  full = hybrids.jit(lambda x, s, valid: model.predict(weights, x, s, cfg, valid=valid)[0])

  def awake(tokens, state, valid):
    length, room = tokens.shape[1], ((0, 0), (0, cfg.window - tokens.shape[1]))
    return full(np.pad(tokens, room), state, np.pad(valid, room))[:, :length]

  return asleep, awake


def slow_logits(tokens, cfg, sleep_cfg, valid=None):
  """Logits [B, vocab] after the last token: full windows one after the other, then the open one, anew."""
  asleep, awake = programs(cfg, sleep_cfg)
  valid = np.ones(tokens.shape, bool) if valid is None else valid
  state, at = model.init_state(cfg, tokens.shape[0], sleep_cfg), 0
  while tokens.shape[1] - at > cfg.window:
    state = asleep(tokens[:, at : at + cfg.window], state, valid[:, at : at + cfg.window])
    at += cfg.window
  return awake(tokens[:, at:], state, valid[:, at:])[:, -1]


def reading(cfg, sleep_cfg, tokens, cuts=(), session=None, **options):
  """The session that has read tokens [B, T] in the parts between `cuts`."""
  session = session or generate.start(cfg, sleep_cfg, tokens.shape[0])
  edges = [0, *cuts, tokens.shape[1]]
  for a, b in zip(edges, edges[1:], strict=False):
    session = generate.read(weights_of(cfg), tokens[:, a:b], session, cfg, sleep_cfg, **options)
  return session


class ReadTest(parameterized.TestCase):
  @parameterized.parameters("hard", "sliding")
  def test_token_by_token_equals_whole_windows(self, eviction):
    cfg, tokens = hybrids.model_config(PAIR, eviction=eviction), hybrids.random_tokens(2, 10)
    asleep, awake = programs(cfg, TWO)
    session, state = generate.start(cfg, TWO, 2), model.init_state(cfg, 2)
    real = np.ones((2, 4), bool)
    for at in range(0, 10, 4):
      length = min(4, 10 - at)
      expected = awake(tokens[:, at : at + length], state, real[:, :length])
      for t in range(length):
        self.assertEqual((session.filled, session.windows, session.tokens_read), (t, at // 4, at + t))
        session = reading(cfg, TWO, tokens[:, at + t : at + t + 1], session=session)
        assert_near(session.logits, expected[:, t], NEAR)
      if length == 4:  # asleep at once, and as one who never was awake
        self.assertEqual((session.filled, session.windows), (0, at // 4 + 1))
        state = asleep(tokens[:, at : at + 4], state, real)
        assert_near(session.start, state, NEAR)

  @parameterized.parameters("hard", "sliding")
  def test_one_pass_is_the_hybrid_that_is_never_cut(self, eviction):
    """Independently of the package: the whole sequence at once, with masks."""
    cfg, tokens = hybrids.model_config(PAIR, eviction=eviction), hybrids.random_tokens(2, 10)
    one = SleepConfig(num_passes=1)
    plain = oracle.unwindowed_hybrid(weights_of(cfg), tokens, pattern=PAIR, window=4, eviction=eviction)
    session = generate.start(cfg, one, 2)
    for t in range(10):
      session = reading(cfg, one, tokens[:, t : t + 1], session=session)
      assert_near(session.logits, plain["logits"][:, t], NEAR)

  @parameterized.parameters("hard", "sliding")
  def test_how_tokens_come_in_does_not_matter(self, eviction):
    cfg, tokens = hybrids.model_config(PAIR, eviction=eviction), hybrids.random_tokens(2, 11)
    whole = reading(cfg, TWO, tokens)
    self.assertEqual((whole.windows, whole.filled), (2, 3))
    assert_near(whole.logits, slow_logits(tokens, cfg, TWO), NEAR)
    for cuts in ((4, 8), (1, 3, 6), range(1, 11), (10,)):
      parts = reading(cfg, TWO, tokens, cuts)
      self.assertEqual((parts.windows, parts.filled), (2, 3))
      assert_same((parts.start, parts.tokens, parts.valid), (whole.start, whole.tokens, whole.valid))
      assert_near((parts.logits, parts.fast, parts.cache), (whole.logits, whole.fast, whole.cache), NEAR)

  def test_the_last_window_may_just_be_full(self):
    cfg, tokens = hybrids.model_config(PAIR), hybrids.random_tokens(2, 8)
    for cuts in ((), (4,), (3,), (7,)):
      session = reading(cfg, TWO, tokens, cuts)
      self.assertEqual((session.windows, session.filled), (2, 0))
      assert_near(session.logits, slow_logits(tokens, cfg, TWO), NEAR)

  def test_a_session_has_one_size_whatever_was_read(self):
    cfg, shapes = hybrids.model_config(PAIR, eviction="sliding"), set()
    for length in (1, 4, 30):
      session = reading(cfg, TWO, hybrids.random_tokens(2, length))
      shapes.add(str(jax.tree.map(lambda x: (x.shape, x.dtype), session.replace(filled=0, windows=0))))
      self.assertEqual(generate.state_bytes(session), generate.state_bytes(generate.start(cfg, TWO, 2)))
    self.assertLen(shapes, 1)

  def test_awake_programs_do_not_know_how_long_sleep_was(self):
    cfg = hybrids.model_config(("gdn",))
    before = decoding.token._cache_size()
    for num_passes, length in ((1, 1), (1, 6), (3, 9)):
      sleep_cfg = SleepConfig(num_passes=num_passes)
      tokens = hybrids.random_tokens(1, length)
      reading(cfg, sleep_cfg, tokens, (length - 1,) if length > 1 else ())
    self.assertEqual(decoding.token._cache_size(), before + 1)

  @parameterized.parameters(4, 5, 9)
  def test_a_padded_row_is_the_row_alone(self, pads):
    """Alone its first window is the shorter by what is left of its pads."""
    cfg, tokens = hybrids.model_config(PAIR), hybrids.random_tokens(2, 14)
    valid = np.ones((2, 14), bool)
    valid[1, :pads] = False
    together = generate.read(weights_of(cfg), tokens, generate.start(cfg, TWO, 2), cfg, TWO, valid=valid)
    asleep, awake = programs(cfg, TWO)
    state, at = model.init_state(cfg, 1), pads
    while at < 12:
      stop = at // 4 * 4 + 4
      state = asleep(tokens[1:, at:stop], state, np.ones((1, stop - at), bool))
      at = stop
    assert_near(together.logits[1:], awake(tokens[1:, 12:], state, np.ones((1, 2), bool))[:, -1], NEAR)
    if pads == 4:
      assert_near(together.logits[1:], reading(cfg, TWO, tokens[1:, 4:]).logits, NEAR)

  def test_the_watcher_sees_every_step(self):
    cfg, seen = hybrids.model_config(PAIR), []
    reading(
      cfg,
      TWO,
      hybrids.random_tokens(1, 10),
      (1,),
      watch=lambda what, s, t: seen.append((what, s.windows, t > 0)),
    )
    self.assertEqual(seen, [("awake", 0, True), ("asleep", 1, True), ("asleep", 2, True), ("awake", 2, True)])

  def test_bad_tokens(self):
    cfg = hybrids.model_config(PAIR)
    session = generate.start(cfg, TWO)
    for tokens, message in (
      (np.zeros((1, 0)), "prompt: has no tokens"),
      ([[3, cfg.vocab_size]], "prompt: tokens must lie in 0..10, there are some in 3..11"),
      ([[-1]], "prompt: tokens must lie in 0..10"),
    ):
      with self.assertRaisesRegex(ConfigError, message):
        generate.read(weights_of(cfg), tokens, session, cfg, TWO)
    with self.assertRaisesRegex(ValueError, r"must be \[1, T\], got \(2, 3\)"):
      generate.read(weights_of(cfg), np.zeros((2, 3)), session, cfg, TWO)
    with self.assertRaisesRegex(ConfigError, "prompt: has no tokens"):
      next(generate.generate(weights_of(cfg), session, cfg, TWO, count=1, key=KEY))


class GenerateTest(parameterized.TestCase):
  @parameterized.parameters(("hard", SamplingConfig()), ("sliding", SamplingConfig(1.0, 5, 0.9)))
  def test_a_prompt_longer_than_the_window_equals_a_plain_loop(self, eviction, sampling):
    cfg, tokens = hybrids.model_config(PAIR, eviction=eviction), hybrids.random_tokens(2, 10)
    made = list(
      generate.generate(
        weights_of(cfg), reading(cfg, TWO, tokens), cfg, TWO, count=8, key=KEY, sampling=sampling
      )
    )
    self.assertLen(made, 8)
    self.assertEqual([s.windows for _, s in made], [2, 3, 3, 3, 3, 4, 4, 4])
    for token, session in made:
      logits = slow_logits(tokens, cfg, TWO)
      drawn = generate.sample(logits, jax.random.fold_in(KEY, tokens.shape[1]), sampling)
      np.testing.assert_array_equal(token, drawn)
      tokens = np.concatenate([tokens, token[:, None]], axis=1)
      self.assertEqual(session.tokens_read, tokens.shape[1])

  def test_a_generation_that_is_cut_goes_on(self):
    cfg, tokens = hybrids.model_config(PAIR), hybrids.random_tokens(2, 6)
    run = functools.partial(
      generate.generate, weights_of(cfg), cfg=cfg, sleep_cfg=TWO, key=KEY, sampling=SamplingConfig(2.0)
    )
    whole = [token for token, _ in run(reading(cfg, TWO, tokens), count=7)]
    first = list(run(reading(cfg, TWO, tokens), count=3))
    rest = [token for token, _ in run(first[-1][1], count=4)]
    np.testing.assert_array_equal(whole, [token for token, _ in first] + rest)

  def test_a_looped_transformer_has_a_cache_for_each_pass(self):
    """Without fast weights sleep leaves nothing, and awake there are two passes."""
    cfg = hybrids.model_config(("attn",), predict_passes=2, loop_norm=True)
    tokens = hybrids.random_tokens(1, 7)
    session = reading(cfg, TWO, tokens, range(1, 7))
    self.assertLen(session.cache, 2)
    assert_near(session.logits, slow_logits(tokens[:, 4:], cfg, TWO), NEAR)
    self.assertEqual(model.init_state(cfg, 1), model.State({}, {}))


class MeshTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_four_by_two_devices_are_one(self):
    cfg, tokens = hybrids.model_config(PAIR, vocab_size=12, embed_dim=16), hybrids.random_tokens(4, 7)
    alone = reading(cfg, TWO, tokens)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=4, model=2))):
      weights = jax.tree.map(
        lambda w, x: sharding.constrain(jnp.asarray(x), w.axes),
        model.declare(cfg),
        weights_of(cfg),
        is_leaf=params.is_weight,
      )
      session = generate.read(weights, tokens, generate.start(cfg, TWO, 4), cfg, TWO)
      self.assertFalse(session.start.fast["0"].S.sharding.is_fully_replicated)
      assert_near(session.logits, alone.logits, NEAR)
      [(token, session)] = generate.generate(weights, session, cfg, TWO, count=1, key=KEY)
    self.assertEqual((session.windows, session.filled), (2, 0))
    np.testing.assert_array_equal(token, np.argmax(alone.logits, axis=-1))


class SampleTest(parameterized.TestCase):
  logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))

  def shares(self, **sampling):
    """How often each token is drawn in 4,000 draws: [2, 4]; its standard error is below 0.008."""
    draw = jax.vmap(lambda key: generate.sample(self.logits, key, SamplingConfig(**sampling)))
    drawn = np.asarray(draw(jax.random.split(KEY, 4000)))
    return np.stack([np.bincount(x, minlength=4) / 4000 for x in drawn.T])

  def test_greedy_takes_the_likeliest_and_of_equals_the_first(self):
    np.testing.assert_array_equal(self.shares(), [[0, 1, 0, 0], [1, 0, 0, 0]])

  @parameterized.named_parameters(
    ("as they are", {"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3], [0.25] * 4),
    ("colder: squares, over 0.30", {"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30], [0.25] * 4),
    ("two", {"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]),
    ("one", {"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0], [1, 0, 0, 0]),
    ("more than there are", {"temperature": 1.0, "top_k": 9}, [0.1, 0.4, 0.2, 0.3], [0.25] * 4),
    ("0.4 and 0.3 reach 0.65", {"temperature": 1.0, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7], [1 / 3] * 3 + [0]),
    ("0.4 alone", {"temperature": 1.0, "top_p": 0.35}, [0, 1, 0, 0], [0.5, 0.5, 0, 0]),
    ("never none", {"temperature": 1.0, "top_p": 1e-6}, [0, 1, 0, 0], [1, 0, 0, 0]),
    (
      "of three, 4/9 and 3/9 reach 0.7",
      {"temperature": 1.0, "top_k": 3, "top_p": 0.7},
      [0, 4 / 7, 0, 3 / 7],
      [1 / 3] * 3 + [0],
    ),
  )
  def test_shares(self, sampling, *expected):
    got = self.shares(**sampling)
    np.testing.assert_allclose(got, expected, atol=0.03)
    np.testing.assert_array_equal(got == 0, np.array(expected) == 0)

  @parameterized.parameters(
    ({"temperature": -1.0}, "sampling.temperature: must be at least 0, got -1.0"),
    ({"top_k": 0}, "sampling.top_k: must be at least 1, got 0"),
    ({"top_p": 0.0}, r"sampling.top_p: must lie in \(0, 1\], got 0.0"),
    ({"top_p": 1.5}, r"sampling.top_p: must lie in \(0, 1\], got 1.5"),
    ({"temperature": float("nan")}, "sampling.temperature: must be at least 0, got nan"),
  )
  def test_bad_settings(self, values, message):
    with self.assertRaisesRegex(ConfigError, message):
      config.from_dict(SamplingConfig, values)
