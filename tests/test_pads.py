"""What a pad holds has no effect on a model: outputs, state and gradients, in every kind of block.

The embedding of the token that stands at pads is NaN, infinite or huge, and everything else must keep every
bit. The kernels' own pads are in tests/kernels/test_pads.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import attention, config, fast_weights, generate, model, rules, session, windows
from tests import hybrids

PAD = hybrids.VOCAB - 1
POISONS = (np.nan, np.inf, -np.inf, 1e30)
HEAD, CHANNEL = ("attn", "gdn", "swa", "hebbian", "delta", "jet"), ("swa", "kda", "attn", "gdn2")
VALID = np.arange(12) >= np.array([[0], [3], [9]])  # the last row has whole windows of pads


def model_config(pattern: tuple[str, ...], eviction: str = "hard") -> config.ModelConfig:
  return config.ModelConfig(
    vocab_size=hybrids.VOCAB,
    embed_dim=hybrids.WIDTH,
    mlp_dim=8,
    blocks=pattern,
    window=4,
    eviction=eviction,
    attention=config.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, swa_window=2),
    fast=config.FastConfig(num_heads=2, key_dim=3, value_dim=4, conv_size=3),
  )


def random_tokens() -> np.ndarray:
  tokens = np.random.default_rng(0).integers(0, PAD, VALID.shape, dtype=np.int32)  # no token of a text is PAD
  return np.where(VALID, tokens, PAD)


def assert_same(got, want, what: str) -> None:
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.all(np.isfinite(y))
    np.testing.assert_array_equal(x, y, err_msg=what)


def with_pad(weights, value: float):
  return weights | {"embed": weights["embed"].at[PAD].set(value)}


@pytest.mark.parametrize(
  ("pattern", "eviction"),
  [
    (("attn", "jet"), "hard"),
    (("swa", "gdn"), "sliding"),
    *(pytest.param(x, y, marks=pytest.mark.slow) for x in (HEAD, CHANNEL) for y in ("hard", "sliding")),
  ],
)
def test_asleep_and_awake(pattern, eviction):
  """Logits, state and all gradients of a sequence that is slept on and answered."""
  cfg, sleep_cfg = model_config(pattern, eviction), config.SleepConfig(num_passes=2)
  tokens, layout = random_tokens(), np.arange(12) >= 8
  plan = windows.plan(layout, cfg.window)
  batch = windows.Batch(tokens, tokens, (layout & VALID).astype(np.float32), VALID)
  where = windows.answer_positions(plan)

  def loss(weights):
    logits, state = model.forward(weights, batch, plan, cfg, sleep_cfg)
    nats = model.cross_entropy(logits, tokens[:, where], batch.loss_mask[:, where])
    kept = sum(jnp.sum(x**2) for x in jax.tree.leaves(state.fast))
    return nats + kept, (jnp.where(VALID[:, where, None], logits, 0), state)

  run, weights = hybrids.jit(jax.grad(loss, has_aux=True)), model.init(cfg, jax.random.key(0))
  want = run(weights)
  for poison in POISONS:
    got = run(with_pad(weights, poison))
    assert_same(got, want, str(poison))
    np.testing.assert_array_equal(got[0]["embed"][PAD], 0)


@pytest.mark.parametrize(
  ("pattern", "eviction", "how"),
  [
    (("attn", "gdn"), "hard", {}),
    (("attn", "jet"), "sliding", {"kept": "each"}),
    *(
      pytest.param(x, y, how, marks=pytest.mark.slow)
      for x in (HEAD, CHANNEL)
      for y in ("hard", "sliding")
      for how in ({}, {"when": "always", "state": "reset"})
    ),
  ],
)
def test_pads_in_front_of_a_window_are_as_if_they_were_not_there(pattern, eviction, how):
  """In any window, not only at the start: what came before stands next to the first token."""
  cfg, sleep_cfg = model_config(pattern, eviction), config.SleepConfig(**({"num_passes": 2} | how))
  tokens = np.random.default_rng(0).integers(0, PAD, (2, 10), dtype=np.int32)
  scored = np.zeros((2, 10), np.float32)
  scored[:, -2:] = 1
  padded = lambda x, value: np.concatenate([x[:, :8], np.full((2, 2), value, x.dtype), x[:, 8:]], 1)  # noqa: E731
  plain = windows.Batch(tokens, tokens, scored)
  batch = windows.Batch(
    padded(tokens, PAD), padded(tokens, 0), padded(scored, 0), padded(scored == scored, False)
  )
  weights = model.init(cfg, jax.random.key(0))

  def run(batch):
    segments = windows.plan(batch.loss_mask[0] > 0, cfg.window, sleep_cfg)

    def loss(weights):
      logits, state = model.forward(weights, batch, segments, cfg, sleep_cfg)
      where = windows.answer_positions(segments)
      nats = model.cross_entropy(logits, batch.targets[:, where], batch.loss_mask[:, where])
      return nats + sum(jnp.sum(x**2) for x in jax.tree.leaves(state.fast)), (logits, state)

    return hybrids.jit(jax.grad(loss, has_aux=True))(weights)

  (want, (logits, state)), (got, (padded_logits, padded_state)) = run(plain), run(batch)
  hybrids.assert_near((padded_logits, padded_state.fast), (logits, state.fast), 1e-5)
  hybrids.assert_near(got, want, 1e-4)
  seen = lambda kept: jax.tree.map(lambda x: jnp.where(kept.valid[..., None, None], x, 0), (kept.k, kept.v))  # noqa: E731
  for i, kept in state.kept.items():
    np.testing.assert_array_equal(padded_state.kept[i].valid, kept.valid)
    hybrids.assert_near(seen(padded_state.kept[i]), seen(kept), 1e-5)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_read_piece_by_piece(eviction):
  """A window that is open: its cache holds no pad."""
  cfg = model_config(("attn", "swa", "jet"), eviction)
  tokens, valid = random_tokens()[:2, :4], VALID[:2, :4]

  def read(weights):
    fast, cache = model.open_window(model.init_state(cfg, 2), cfg, 2)
    for part in (slice(0, 2), slice(2, 4)):
      logits, fast, cache = model.decode(weights, tokens[:, part], fast, cache, cfg, valid=valid[:, part])
    return logits[:, -1], fast, cache

  run, weights = hybrids.jit(read), model.init(cfg, jax.random.key(0))
  want = run(weights)
  for poison in POISONS:
    assert_same(run(with_pad(weights, poison)), want, str(poison))


def test_pads_first():
  rng = np.random.default_rng(0)
  tokens, valid = rng.integers(1, 99, (20, 7)), rng.random((20, 7)) < 0.5
  moved, kept = session.pads_first(tokens, valid)
  for row in range(20):
    assert moved[row][kept[row]].tolist() == tokens[row][valid[row]].tolist()
    assert not np.any(kept[row][:-1] & ~kept[row][1:])


def alone(weights, cfg, sleep_cfg, tokens, valid):
  """Logits behind the last of one row's tokens, and the state behind its full windows, without any pad."""
  state, logits = model.init_state(cfg, 1, sleep_cfg), np.zeros((1, cfg.vocab_size))
  for at in range(0, len(tokens), cfg.window):
    here = np.s_[at : at + cfg.window]
    text = tokens[here][valid[here]][None]
    if not text.size:
      continue
    logits = _programs(cfg, sleep_cfg)[0](weights, text, state)
    if at + cfg.window <= len(tokens):
      state = _programs(cfg, sleep_cfg)[1](weights, text, state)
  return logits, state


@functools.cache
def _programs(cfg, sleep_cfg):
  return (
    hybrids.jit(lambda weights, x, s: model.predict(weights, x, s, cfg, reads=(x.shape[1] - 1,))[0][:, 0]),
    hybrids.jit(lambda weights, x, s: model.consolidate(weights, x, s, cfg, sleep_cfg)),
  )


@pytest.mark.parametrize(
  ("pattern", "eviction", "how"),
  [
    (("attn", "gdn"), "hard", {}),
    (("attn", "gdn"), "sliding", {"kept": "each"}),
    pytest.param(("swa", "jet", "attn"), "hard", {"spread": 3}, marks=pytest.mark.slow),
    *(pytest.param(x, y, {}, marks=pytest.mark.slow) for x in (HEAD, CHANNEL) for y in ("hard", "sliding")),
    *(pytest.param(HEAD, x, {"spread": 2}, marks=pytest.mark.slow) for x in ("hard", "sliding")),
  ],
)
def test_a_session_reads_a_row_as_if_it_had_no_pads(pattern, eviction, how):
  """Pads at random places of many calls: only the borders of windows tell that they were there."""
  cfg, sleep_cfg = model_config(pattern, eviction), config.SleepConfig(**({"num_passes": 2} | how))
  weights, rng = model.init(cfg, jax.random.key(0)), np.random.default_rng(5)
  tokens = rng.integers(0, PAD, (3, 22), dtype=np.int32)
  valid = rng.random(tokens.shape) < [[0.5], [0.8], [1]]
  valid[0, 9:15] = False  # a whole window and more
  now, at = generate.start(cfg, sleep_cfg, 3), 0
  for length in (1, 2, 3, 1, 4, 1, 1, 6, 2, 1):
    part = np.s_[:, at : at + length]
    at += length
    now = generate.read(weights, tokens[part], now, cfg, sleep_cfg, valid=valid[part])
    for row in range(3):
      logits, state = alone(weights, cfg, sleep_cfg, tokens[row, :at], valid[row, :at])
      if now.night is None:
        mine = jax.tree.map(lambda x, i=row: x[i : i + 1], now.start.fast)
        hybrids.assert_near(mine, state.fast, 1e-3)  # rounding adds up; a pad too many is 0.1 and more
      if not now.behind and (valid[row, part[1]].any() or not how.get("spread")):
        hybrids.assert_near(now.logits[row : row + 1], logits, 1e-3)


@functools.cache
def mixer(kind: str):
  """(weights, x) -> outputs at tokens, what the mixer leaves, and gradients of both; and weights that fit."""
  cfg, valid = model_config((kind,) if kind in rules.RULES else ("attn",), "sliding"), VALID[:, :4]

  def run(weights, x):
    if kind in rules.RULES:
      state = fast_weights.init_state(cfg, 3, kind)
      out, after = fast_weights.fast_weights(weights, x, state, cfg, rules.RULES[kind], valid=valid)
    elif kind == "decode":
      out, after = attention.decode(weights, x, attention.init_cache(cfg, 3), cfg, valid=valid)
    elif kind == "read_behind":
      out, after = attention.read_behind(weights, x, attention.init_kept(cfg, 3), cfg, valid=valid)
    else:
      out, after = attention.read_window(weights, x, cfg, valid=valid), ()
    out = jnp.where(valid[..., None], out, 0)
    total = jnp.sum(jnp.sin(out))
    if kind in rules.RULES:
      total = total + jnp.sum(after.S**2)
    return total, (out, after)

  return hybrids.jit(jax.grad(run, argnums=(0, 1), has_aux=True)), model.init(cfg, jax.random.key(1))


@pytest.mark.parametrize("kind", [*sorted(rules.BUILT_IN), "read_window", "read_behind", "decode"])
def test_a_mixer_alone(kind):
  run, weights = mixer(kind)
  weights = weights["blocks"]["0"]["mixer"]
  x = np.random.default_rng(2).normal(size=(3, 4, hybrids.WIDTH)).astype(np.float32)
  want = run(weights, x)
  for poison in POISONS:
    x[~VALID[:, :4]] = poison
    got = run(weights, x)
    assert_same(got, want, str(poison))
    np.testing.assert_array_equal(got[0][1][~VALID[:, :4]], 0)
