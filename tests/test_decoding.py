"""A token's step reads every weight and the cache once, and copies none of them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import attention, config, decoding, generate, model
from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig, SleepConfig
from tests import hybrids
from tests.hybrids import assert_near, assert_same

TWO = SleepConfig(num_passes=2)
KEY = jax.random.key(3)
# Instructions that put a tensor in another place, order or dtype; inside a fusion nothing is written.
MOVES = ("copy", "transpose", "concatenate", "convert", "pad", "reverse", "gather", "slice", "dynamic-slice")
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f16": 2, "s64": 8, "u64": 8}


def moved(text: str) -> int:
  """Bytes that a compiled program writes by moving tensors, in fusions that do no more and outside of any."""
  total, fused = 0, set(re.findall(r"calls=%([\w.-]+)", text))
  inside = ""
  for line in text.splitlines():
    if begun := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
      inside = begun[1]
    made = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", line)
    if not made or made[2] not in BYTES or (inside in fused and made[4] != "fusion"):
      continue
    named = made[4] == "fusion" and re.match(r"[\w-]*(copy|transpose|concatenate|convert)[\w-]*", made[1])
    if made[4] in MOVES or named:
      total += BYTES[made[2]] * math.prod(int(n) for n in made[3].split(",") if n)
  return total


def test_a_weight_that_is_copied_is_counted():
  x, w = jnp.ones((1, 64)), jnp.ones((512, 64))
  joined = jax.jit(lambda x, a, b: x @ jnp.concatenate([a, b], axis=-1))
  assert moved(joined.lower(x, w.T, w.T).compile().as_text()) >= 2 * w.nbytes
  turned = jax.jit(lambda x, w: jnp.sin(jnp.sin(w.T).T @ x.T))
  assert moved(turned.lower(x, w).compile().as_text()) < w.nbytes  # computed, not only moved
  copied = jax.jit(lambda w: jnp.reshape(w.T, (-1,)))
  assert moved(copied.lower(w).compile().as_text()) >= w.nbytes


def large(eviction: str, tied: bool) -> ModelConfig:
  """Large enough for its weights to outweigh everything else; untied with all that published hybrids have."""
  cfg = ModelConfig(
    vocab_size=2048,
    embed_dim=128,
    mlp_dim=384,
    blocks=("attn", "gdn", "swa", "jet", "nope"),
    window=64,
    eviction=eviction,
    tied_embeddings=tied,
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=32, swa_window=16),
    fast=FastConfig(num_heads=2, key_dim=16, value_dim=32),
  )
  if tied:
    return cfg
  attends = {"gate": True, "rotary_dim": 16, "qk_norm_over": "all"}
  fast = {"num_key_heads": 1, "write_most": 2.0}
  return config.replace(cfg, attention=attends, fast=fast, norm_zero_centered=True)


@pytest.mark.parametrize(("eviction", "tied"), [("hard", True), ("sliding", False)])
def test_a_step_copies_no_weight_and_no_cache(eviction, tied):
  cfg = large(eviction, tied)
  weights = model.init(cfg, KEY)
  session = generate.start(cfg, TWO)
  args = (weights, np.zeros((1, 1), np.int32), np.ones((1, 1), bool), session.fast, session.cache)
  step = decoding.token.lower(*args, cfg).compile()
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
  needed = size(weights) + size(session.cache) + size(session.fast)
  # Rows of one token are moved, and S is written.
  assert moved(step.as_text()) < 0.02 * needed
  assert step.cost_analysis()["bytes accessed"] < 1.1 * needed


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_one_query_against_a_cache_is_attention(heads, kv_heads):
  """With a row that is not set yet, pads, and a row that is a pad itself."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  q, k, v = draw(2, 1, heads, 8), draw(2, 7, kv_heads, 8), draw(2, 7, kv_heads, 8)
  valid = np.array([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]], bool)  # row 5 is the token's own
  own, before = valid[:, 5:6], valid & (np.arange(7) != 5)
  cache = attention.KVCache(k, v, jnp.asarray(before), jnp.int32(5))
  got = attention.attend_one(q, cache, k[:, 5:6], v[:, 5:6], before[:, None, None], own)
  want = attention.dense(q, k, v, valid[:, None, None])
  assert_near(got, want, 1e-6)


@functools.cache
def model_of(eviction):
  cfg = hybrids.model_config(("gdn", "attn", "nope"), eviction=eviction)
  return cfg, model.init(cfg, KEY)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_sessions_that_are_not_needed_any_more_can_give_their_memory(eviction):
  cfg, weights = model_of(eviction)
  begun = generate.read(weights, hybrids.random_tokens(2, 3), generate.start(cfg, TWO, 2), cfg, TWO)
  draw = functools.partial(generate.generate, weights, begun, cfg, TWO, count=11, key=KEY)
  kept = list(draw())  # every session stays as good as it was
  last = None
  for (token, want), (again, session) in zip(kept, draw(reuse=True), strict=True):
    np.testing.assert_array_equal(again, token)
    assert_same(session, want)
    last = session
  assert last is not None
  after = [generate.read(weights, [[1], [2]], s, cfg, TWO).logits for s in (last, kept[-1][1], begun)]
  assert_same(after[0], after[1])
  assert np.all(np.isfinite(after[2]))


def test_several_passes_over_one_cache_are_read_as_before():
  """A cache that all passes share gets a row a pass: such a model takes the other path."""
  cfg = config.replace(model_of("hard")[0], blocks=("attn", "attn"), predict_passes=2, pass_cache="shared")
  assert not decoding.by_rows(cfg) and decoding.by_rows(config.replace(cfg, pass_cache="own"))
  weights = model.init(cfg, KEY)
  session = generate.read(weights, [[1]], generate.start(cfg, TWO), cfg, TWO)
  fast, cache = model.open_window(model.init_state(cfg, 1), cfg, 1)
  logits, _, cache = model.decode(weights, np.array([[1]]), fast, cache, cfg)
  assert_near(session.logits, logits[:, 0], 1e-5)
  assert_near(session.cache, cache, 1e-5)


def test_equal_blocks_are_traced_once():
  """Four times as many blocks of two kinds: the step's program grows by their calls, not by their bodies."""

  def lines(repeats):
    cfg = hybrids.model_config(("attn", "gdn") * repeats)
    weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    session = generate.start(cfg, SleepConfig())
    one, real = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    step = decoding.token.lower(weights, one, real, session.fast, session.cache, cfg)
    return len(step.as_text().splitlines())

  assert lines(8) < 1.6 * lines(2)
