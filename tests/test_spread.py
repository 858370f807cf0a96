"""A sleep that is spread over the next tokens: what is answered meanwhile, and that nothing else differs.

The reference replays the tokens from the start with whole windows alone (`model.consolidate`,
`model.predict`); it has no session, no cache and no pass that is made by itself.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config, decoding, generate, model, session_file, spread
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.session import due
from tests import hybrids
from tests.hybrids import assert_near, assert_same

NEAR = 1e-4  # of the largest entry, as in `test_promises`
KEY = jax.random.key(3)
PAIR, DEEP = ("gdn", "attn"), ("attn", "gdn", "attn", "hebbian")


@functools.cache
def weights_of(cfg):
  return hybrids.random_params(cfg)


@functools.cache
def programs(cfg, sleep_cfg):
  """(tokens, state, valid) -> the state asleep; -> logits awake and the state behind them; any length."""
  weights = weights_of(cfg)
  long = dataclasses.replace(cfg, window=2 * cfg.window)  # a window that did not end; hard eviction alone
  asleep = hybrids.jit(lambda x, s, valid: model.consolidate(weights, x, s, cfg, sleep_cfg, valid=valid))
  awake = hybrids.jit(lambda x, s, valid: model.predict(weights, x, s, cfg, valid=valid))
  awake_long = hybrids.jit(lambda x, s, valid: model.predict(weights, x, s, long, valid=valid)[0])
  return asleep, awake, awake_long


def replayed(tokens, cfg, sleep_cfg, valid):
  """Logits [B, T, vocab] that each token is to see, and the states with which the windows begin.

  Nothing that follows a token changes its logits, so that windows are read whole.
  """
  asleep, awake, awake_long = programs(cfg, dataclasses.replace(sleep_cfg, spread=None))
  window, late, (rows, length) = cfg.window, sleep_cfg.spread or 0, tokens.shape
  room = ((0, 0), (0, -length % window))
  tokens, valid = np.pad(tokens, room), np.pad(valid, room)
  states, logits = [model.init_state(cfg, rows, sleep_cfg)], []
  for at in range(0, length, window):
    here = np.s_[:, at : at + window]
    out = np.array(awake(tokens[here], states[-1], valid[here])[0])
    if at and late:
      before = np.s_[:, at - window : at]
      if cfg.eviction == "hard":
        both = np.s_[:, at - window : at + window]
        out[:, :late] = awake_long(tokens[both], states[-2], valid[both])[:, window : window + late]
      else:  # what sliding eviction keeps of a window that was only read awake
        _, state = awake(tokens[before], states[-2], valid[before])
        out[:, :late] = awake(tokens[here], state, valid[here])[0][:, :late]
    logits.append(out)
    states.append(asleep(tokens[here], states[-1], valid[here]))
  return np.concatenate(logits, axis=1)[:, :length], states


def read(cfg, sleep_cfg, tokens, cuts, valid, session=None, **how):
  """Sessions after each part of the tokens between `cuts`."""
  session = session or generate.start(cfg, sleep_cfg, tokens.shape[0])
  edges, sessions = [0, *cuts, tokens.shape[1]], []
  for a, b in zip(edges, edges[1:], strict=False):
    part = np.s_[:, a:b]
    session = generate.read(weights_of(cfg), tokens[part], session, cfg, sleep_cfg, valid=valid[part], **how)
    sessions.append(session)
  return sessions


def slow(*values):
  return [pytest.param(value, marks=pytest.mark.slow) for value in values]


CASES = {
  "hard, a pass a token, with pads": (PAIR, {}, {"num_passes": 3, "spread": 3}, (0, 2)),
  "sliding, each pass, with pads": (
    PAIR,
    {"eviction": "sliding"},
    {"num_passes": 2, "spread": 3, "kept": "each"},
    (3, 0),
  ),
}
SLOW = {
  "hard": (PAIR, {}, {"num_passes": 2, "spread": 3}, (0, 0)),
  "hard, one pass, at once": (PAIR, {}, {"num_passes": 1, "spread": 1}, (0, 0)),
  "sliding": (PAIR, {"eviction": "sliding"}, {"num_passes": 2, "spread": 2}, (0, 0)),
  "the middle loops": (DEEP, {}, {"num_passes": 2, "spread": 3, "first_block": 1, "last_block": 3}, (0, 5)),
  "the middle loops, sliding, each pass": (
    DEEP,
    {"eviction": "sliding"},
    {"num_passes": 3, "spread": 3, "first_block": 1, "last_block": 3, "kept": "each"},
    (0, 1),
  ),
  "reset, a norm between": (
    DEEP,
    {"loop_norm": True, "fast": {"conv_context": "reset"}},
    {"num_passes": 2, "spread": 2, "state": "reset", "loops": "unroll", "remat": "window"},
    (0, 0),
  ),
  "all blocks alike": (("gdn", "gdn", "attn", "attn"), {}, {"num_passes": 3, "spread": 3}, (0, 0)),
}


@pytest.mark.parametrize("case", [*CASES, *slow(*SLOW)])
def test_every_token_sees_what_it_is_to_see(case):
  """Token by token: the logits of the replay, and the memory of a sleep that is not spread."""
  pattern, changes, how, pads = (CASES | SLOW)[case]
  cfg, sleep_cfg = hybrids.model_config(pattern, **changes), SleepConfig(**how)
  tokens = hybrids.random_tokens(2, 11)
  valid = np.arange(11) >= np.array(pads)[:, None]
  wanted, states = replayed(tokens, cfg, sleep_cfg, valid)
  plain = replayed(tokens, cfg, dataclasses.replace(sleep_cfg, spread=None), valid)[0]
  sessions = read(cfg, sleep_cfg, tokens, range(1, 11), valid)
  for t, session in enumerate(sessions):
    windows, filled = divmod(t + 1, cfg.window)
    assert (session.windows, session.filled, session.tokens_read) == (windows, filled, t + 1)
    real = valid[:, t]
    assert_near(np.asarray(session.logits)[real], wanted[real, t], NEAR)
    late = windows > 0 and filled < sleep_cfg.spread  # else the sleep is over
    assert (session.night is not None) == late and session.behind == (
      windows > 0 and filled <= sleep_cfg.spread
    )
    assert_near(session.start, states[windows - late], NEAR)
    between = t >= cfg.window and t % cfg.window < sleep_cfg.spread
    far = hybrids.distance(np.asarray(session.logits)[real], plain[real, t]) if real.any() else 0
    assert far < NEAR or between
  assert hybrids.distance(wanted[:, cfg.window], plain[:, cfg.window]) > 10 * NEAR  # it can be told apart


@pytest.mark.parametrize("eviction", ["hard", *slow("sliding")])
def test_how_tokens_come_in_does_not_matter(eviction):
  """And what outlives a window does not depend on it to the bit."""
  cfg = hybrids.model_config(PAIR, eviction=eviction)
  sleep_cfg, tokens = SleepConfig(num_passes=2, spread=3), hybrids.random_tokens(2, 15)
  valid = np.ones(tokens.shape, bool)
  slowly = read(cfg, sleep_cfg, tokens, range(1, 15), valid)
  for cuts in ((), (4,), (5, 6), (3, 9), (6, 13), (8, 12)):
    for at, session in zip([*cuts, 15], read(cfg, sleep_cfg, tokens, cuts, valid), strict=True):
      same = slowly[at - 1]
      assert jax.tree.structure(session) == jax.tree.structure(same), (cuts, at)
      assert_same((session.start, session.tokens, session.valid), (same.start, same.tokens, same.valid))
      assert_same(session.night, same.night)
      assert_near((session.logits, session.fast, session.cache), (same.logits, same.fast, same.cache), NEAR)
  parts = generate.read_parts(
    weights_of(cfg), [tokens[:, :6], tokens[:, 6:]], generate.start(cfg, sleep_cfg, 2), cfg, sleep_cfg
  )
  assert_near(parts.logits, slowly[-1].logits, NEAR)


def test_after_it_a_session_is_that_of_a_sleep_that_was_not_spread():
  cfg, tokens = hybrids.model_config(PAIR), hybrids.random_tokens(2, 8)
  valid = np.ones(tokens.shape, bool)
  (plain,) = read(cfg, SleepConfig(num_passes=2), tokens[:, :7], (), valid[:, :7])
  (late,) = read(cfg, SleepConfig(num_passes=2, spread=2), tokens[:, :7], (), valid[:, :7])
  assert_near((late.start, late.fast, late.logits), (plain.start, plain.fast, plain.logits), NEAR)
  rows = jax.tree.map(lambda x: x[:, :4] if x.ndim > 1 else x, late.cache)
  assert_near(rows, plain.cache, NEAR)


@pytest.mark.parametrize("passes", [2, *slow(1, 3, 4, 5)])
def test_no_token_waits_for_more_than_one_pass(passes, monkeypatch):
  """Counted where the passes are made, for every K that is taken."""
  cfg, made = hybrids.model_config(("gdn",), window=7), []

  def counted(weights, valid, state, asleep, number, *how):
    made.append(int(number))
    return asleep

  monkeypatch.setattr(decoding, "one_pass", counted)
  for late in range(passes, 7):
    sleep_cfg, per_token = SleepConfig(num_passes=passes, spread=late), []
    session = generate.start(cfg, sleep_cfg)
    for token in hybrids.random_tokens(1, 2 * 7 + late, seed=late)[0]:
      session = generate.read(weights_of(cfg), [[token]], session, cfg, sleep_cfg)
      per_token.append(list(made))
      made.clear()
    behind = per_token[7 : 7 + late]
    assert [n for some in behind for n in some] == list(range(passes))
    assert max(map(len, per_token)) == 1 and not any(per_token[:7]) and not any(per_token[7 + late : 14])
    wanted = [int(np.ceil((n + 1) * late / passes)) for n in range(passes)]
    assert [t + 1 for t, some in enumerate(behind) if some] == wanted
    assert [due(t, sleep_cfg) for t in range(late + 1)][-1] == passes


def test_the_watcher_sees_every_pass():
  cfg, seen = hybrids.model_config(PAIR), []
  sleep_cfg, tokens = SleepConfig(num_passes=2, spread=3), hybrids.random_tokens(1, 8)
  read(cfg, sleep_cfg, tokens, range(1, 8), np.ones((1, 8), bool), watch=lambda what, s, t: seen.append(what))
  assert seen == [*["awake"] * 6, "pass", "awake", "asleep", "awake"]
  seen.clear()
  read(cfg, sleep_cfg, tokens, (6,), np.ones((1, 8), bool), watch=lambda what, s, t: seen.append(what))
  assert seen == ["awake", "pass", "asleep", "awake"]


@pytest.mark.slow
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_generation_is_drawn_from_what_was_read_and_may_reuse_its_memory(eviction):
  cfg = hybrids.model_config(PAIR, eviction=eviction)
  sleep_cfg, tokens = SleepConfig(num_passes=2, spread=3), hybrids.random_tokens(2, 3)
  prompt = [list(tokens[0]), list(tokens[1][:2])]  # of two lengths
  begun = generate.read(weights_of(cfg), prompt, generate.start(cfg, sleep_cfg, 2), cfg, sleep_cfg)
  draw = functools.partial(generate.generate, weights_of(cfg), begun, cfg, sleep_cfg, count=11, key=KEY)
  kept = list(draw())
  for (token, want), (again, session) in zip(kept, draw(reuse=True), strict=True):
    np.testing.assert_array_equal(again, token)
    assert_same(session.logits, want.logits)
  tokens[1] = np.roll(tokens[1], 1)
  valid = np.array([[True] * 3, [False, True, True]])
  for token, session in kept:
    tokens = np.concatenate([tokens, token[:, None]], axis=1)
    valid = np.concatenate([valid, np.ones((2, 1), bool)], axis=1)
    assert_near(session.logits, replayed(tokens, cfg, sleep_cfg, valid)[0][:, -1], NEAR)


@pytest.mark.parametrize("length", [10, *slow(9, 11, 12)])
def test_a_session_is_stored_in_the_middle_of_a_sleep_and_goes_on_to_the_bit(length, tmp_path: pathlib.Path):
  cfg = hybrids.model_config(PAIR, eviction="sliding", dtype="bfloat16")
  sleep_cfg = SleepConfig(num_passes=2, spread=3, kept="each")
  weights, tokens = weights_of(cfg), hybrids.random_tokens(2, length)
  session = generate.read(weights, tokens, generate.start(cfg, sleep_cfg, 2), cfg, sleep_cfg)
  session_file.check_path(tmp_path / "session", cfg, sleep_cfg, 2)
  session_file.save(tmp_path / "session", session, weights, cfg, sleep_cfg)
  back = session_file.load(tmp_path / "session", weights, cfg, sleep_cfg)
  assert jax.tree.structure(back) == jax.tree.structure(session)
  assert_same(back, session)
  how = {"count": 7, "key": KEY, "sampling": generate.SamplingConfig(1.0)}
  for (token, one), (same, other) in zip(
    generate.generate(weights, back, cfg, sleep_cfg, **how),
    generate.generate(weights, session, cfg, sleep_cfg, **how),
    strict=True,
  ):
    np.testing.assert_array_equal(token, same)
    assert_same(one, other)
  with pytest.raises(ConfigError, match="is another model's: sleep.spread was 3, is None"):
    session_file.load(tmp_path / "session", weights, cfg, dataclasses.replace(sleep_cfg, spread=None))


def test_weights_that_are_not_finite_are_named_by_token_and_by_sleep():
  cfg, sleep_cfg = hybrids.model_config(PAIR), SleepConfig(num_passes=2, spread=2)
  weights, tokens = weights_of(cfg), hybrids.random_tokens(1, 6)
  (session,) = read(cfg, sleep_cfg, tokens[:, :5], (), np.ones((1, 5), bool))
  wrong = session.replace(fast=jax.tree.map(lambda x: x * jnp.nan, session.fast))
  with pytest.raises(generate.NotFiniteError, match="logits are not finite|fast weights are not finite"):
    generate.read(weights, tokens[:, 5:], wrong, cfg, sleep_cfg)
  huge = session.replace(
    night=session.night.replace(asleep=jax.tree.map(lambda x: x * jnp.nan, session.night.asleep))
  )
  message = "the fast weights are not finite after sleep on tokens 1..4"
  with pytest.raises(generate.NotFiniteError, match=message):
    generate.read(weights, tokens[:, 5:], huge, cfg, sleep_cfg)
  assert spread.joined(session).tokens_read == session.tokens_read


def test_a_spread_that_cannot_be_is_refused_by_name():
  for wrong in (1, 2):
    with pytest.raises(
      ConfigError, match=f"^sleep.spread: must be at least sleep.num_passes = 3.*t {wrong}$"
    ):
      SleepConfig(num_passes=3, spread=wrong)
  with pytest.raises(ConfigError, match="^sleep.spread: must be at least 0, got -1"):
    SleepConfig(spread=-1)
  assert SleepConfig(spread=0) == SleepConfig()
  cfg = hybrids.model_config(PAIR)
  for late in (4, 5):
    with pytest.raises(ConfigError, match=f"^sleep.spread: must be below model.window = 4, .*got {late}$"):
      generate.start(cfg, SleepConfig(num_passes=2, spread=late))
    with pytest.raises(ConfigError, match="^sleep.spread: must be below"):
      config.check_sleep(SleepConfig(spread=late), cfg)
