"""Attention inside a window against the NumPy oracle; the cache against attention without one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax import attention, config
from tests import hybrids, oracle

TOLERANCE = 3e-6  # float32 against float64, relative to the largest entry; measured: 4e-7


def setting(**changes):
  """Config, weights, x [2, 6, D]."""
  cfg = hybrids.model_config(("attn",), window=6, attention=changes)
  weights = hybrids.random_params(cfg)["blocks"]["0"]["mixer"]
  x = np.random.default_rng(1).normal(size=(2, 6, cfg.embed_dim)).astype(np.float32)
  return cfg, weights, x


@functools.cache
def compiled(cfg):
  """Reading a window, (weights, x, valid) -> out, and decoding, (weights, x, cache, valid) -> out, cache."""
  window = hybrids.jit(lambda w, x, valid: attention.read_window(w, x, cfg, valid=valid))
  return window, hybrids.jit(lambda w, x, cache, valid: attention.decode(w, x, cache, cfg, valid=valid))


def run(cfg, weights, x, valid=None):
  return compiled(cfg)[0](weights, x, valid)


def decode(cfg, weights, x, cache, valid=None):
  return compiled(cfg)[1](weights, x, cache, valid)


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters(
    {},
    {"num_kv_heads": 4},
    {"num_kv_heads": 1, "qk_norm": False},
    {"num_kv_heads": None, "head_dim": 6, "rope_theta": 50.0},
  )
  def test_equals_the_oracle(self, **changes):
    cfg, weights, x = setting(**changes)
    keep = np.arange(6) >= np.array([[0], [2]])
    for valid in (None, keep):
      out = run(cfg, weights, x, valid)
      everywhere = np.ones((2, 6), bool) if valid is None else valid
      exact = oracle.attention(
        oracle.as_float64(weights), x.astype(float), everywhere, cfg.attention.rope_theta
      )
      hybrids.assert_near(np.asarray(out)[everywhere], exact[everywhere], TOLERANCE)

  def test_no_token_sees_its_future(self):
    cfg, weights, x = setting()
    slope = hybrids.jit(jax.jacobian(lambda x: jnp.sum(attention.read_window(weights, x, cfg)[0], -1)))(x)
    seen = np.any(slope[:, 0] != 0, axis=-1)  # [out position, in position]
    np.testing.assert_array_equal(seen, np.tri(6, dtype=bool))

  def test_nobody_attends_to_a_pad_and_a_pad_is_finite(self):
    cfg, weights, x = setting()
    valid = np.arange(6) >= np.array([[3], [6]])  # the second row is all pads
    other = np.where(valid[..., None], x, 100 * x + 7)
    a, b = (np.asarray(run(cfg, weights, y, valid)) for y in (x, other))
    np.testing.assert_array_equal(a[valid], b[valid])
    self.assertTrue(np.all(np.isfinite(a)))

    def total(x):
      return jnp.sum(jnp.where(valid[..., None], attention.read_window(weights, x, cfg, valid=valid), 0) ** 2)

    slope = hybrids.jit(jax.grad(total))(x)
    np.testing.assert_array_equal(slope[~valid], 0)
    self.assertTrue(np.all(np.isfinite(slope)))

  def test_bfloat16_stays_near(self):
    cfg, weights, x = setting()
    cfg16 = config.replace(cfg, dtype="bfloat16")
    out = run(cfg16, weights, x.astype(jnp.bfloat16))
    self.assertEqual(out.dtype, jnp.bfloat16)
    hybrids.assert_near(out, run(cfg, weights, x), 0.03)  # 2^-8 an operation, a handful of them


class CacheTest(parameterized.TestCase):
  @parameterized.product(cuts=((1, 1, 1, 1, 1, 1), (3, 2, 1), (6,)), padded=(False, True))
  def test_piece_by_piece_equals_all_at_once(self, cuts, padded):
    cfg, weights, x = setting()
    valid = np.arange(6) >= np.array([[0], [2]]) if padded else None
    whole = run(cfg, weights, x, valid)
    cache, pieces, at = attention.init_cache(cfg, 2), [], 0
    for length in cuts:
      part = slice(at, at + length)
      out, cache = decode(cfg, weights, x[:, part], cache, None if valid is None else valid[:, part])
      pieces.append(out)
      at += length
    keep = np.ones((2, 6), bool) if valid is None else valid
    got = np.concatenate(pieces, axis=1)
    hybrids.assert_near(got[keep], np.asarray(whole)[keep], TOLERANCE)
    self.assertEqual(int(cache.length), 6)
    np.testing.assert_array_equal(cache.valid, keep)

  def test_rows_that_are_not_set_are_not_seen(self):
    cfg, weights, x = setting()
    cache = attention.init_cache(cfg, 2)
    dirty = cache.replace(k=cache.k + 50.0, v=cache.v - 50.0)
    outs = [decode(cfg, weights, x[:, :3], c)[0] for c in (cache, dirty)]
    np.testing.assert_array_equal(*outs)

  @parameterized.parameters("float32", "bfloat16")
  def test_a_step_keeps_every_shape_and_dtype(self, dtype):
    cfg = config.replace(setting()[0], dtype=dtype)
    weights, cache = setting()[1], attention.init_cache(cfg, 2)
    x = jax.ShapeDtypeStruct((2, 1, cfg.embed_dim), cfg.dtype)
    _, after = jax.eval_shape(lambda x, c: attention.decode(weights, x, c, cfg), x, cache)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, after)
    self.assertEqual(cache.k.shape, (2, cfg.window, 2, 4))
    self.assertEqual(cache.k.dtype, dtype)
