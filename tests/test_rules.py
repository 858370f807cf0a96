"""A rule is one object: built-in ones say what their layers need, and one of the user's is a block like any
other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import blocks, config, fast_weights, model, rules, windows
from sleep_jax.config import SleepConfig
from sleep_jax.kernels.kda import kda
from tests import hybrids


@pytest.fixture(autouse=True)
def forget_registered():
  """Rules that a test registers are gone after it."""
  before = dict(rules.RULES)
  yield
  for name in set(rules.RULES) - set(before):
    del rules.RULES[name]


def decaying(q, k, v, g, e, w, S, *, mask=None, implementation=None):
  """A rule with a decay per channel and gates per channel, token by token: S <- Diag(exp(g)) S + k e (w
  v)^T.
  """
  del implementation
  if mask is not None:
    g, e = (jnp.where(mask[:, :, None, None], x, 0.0) for x in (g, e))

  def token(S, x):
    q, k, v, g, e, w = x
    S = jnp.exp(g)[..., None] * S + (e * k)[..., :, None] * (w * v)[..., None, :]
    return S, jnp.einsum("bhkv,bhk->bhv", S, q)

  S, o = jax.lax.scan(token, S, tuple(jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (q, k, v, g, e, w)))
  return jnp.moveaxis(o, 0, 1).astype(v.dtype), S


class OwnRuleTest(parameterized.TestCase):
  def test_channel_wise_decay_and_writes_in_one_object(self):
    rules.register("own", rules.Rule(decaying, decay="channel", write="channel", read_gate=jax.nn.sigmoid))
    cfg = hybrids.model_config(("attn", "own"))
    declared = model.declare(cfg)["blocks"]["1"]["mixer"]
    self.assertLessEqual({"f_a", "f_b", "A_log", "dt_bias", "e", "w", "gate"}, set(declared))
    self.assertTrue({"a", "b", "gate_a", "gate_bias"}.isdisjoint(declared))
    self.assertEqual(declared["dt_bias"].shape, (cfg.fast.num_heads, cfg.fast.key_dim))

    weights, (batch, layout) = (
      model.init(cfg, jax.random.key(0)),
      hybrids.random_batch(8, (6, 7), pads=(0, 3)),
    )
    loss, grads, _ = hybrids.program(windows.plan(layout, cfg.window), cfg, SleepConfig(num_passes=2))(
      weights, batch
    )
    self.assertTrue(np.isfinite(loss))
    for name, slope in grads["blocks"]["1"]["mixer"].items():
      self.assertGreater(float(jnp.max(jnp.abs(slope))), 0, name)

  def test_the_same_update_under_another_name_is_the_same_block(self):
    rules.register("mine", rules.Rule(kda, decay="channel", read_gate=jax.nn.sigmoid, narrow_gate=True))
    cfg = hybrids.model_config(("kda",))
    weights, x = (
      hybrids.random_params(cfg)["blocks"]["0"]["mixer"],
      np.random.default_rng(0).normal(size=(2, 4, 12)),
    )
    state, x = fast_weights.init_state(cfg, 2, "kda"), x.astype(np.float32)
    got, want = (fast_weights.fast_weights(weights, x, state, cfg, rules.RULES[n]) for n in ("mine", "kda"))
    hybrids.assert_same(got, want)

  @parameterized.parameters("gdn", "attn", "swa", "no name", "")
  def test_a_name_that_is_taken_or_none_is_refused(self, name):
    with self.assertRaisesRegex(config.ConfigError, "^rule: "):
      rules.register(name, rules.Rule(decaying))

  @parameterized.parameters({"decay": "chanel"}, {"write": "vector"}, {"conv": "long"})
  def test_a_kind_that_there_is_not_is_refused(self, **wrong):
    with self.assertRaisesRegex(config.ConfigError, rf"^rule.{next(iter(wrong))}: unknown value"):
      rules.Rule(decaying, **wrong)

  def test_registering_again_replaces_the_rule_in_compiled_programs_too(self):
    outs = []
    for scale in (1.0, 3.0):

      def last(q, k, v, g, b, S, *, mask=None, implementation=None, scale=scale):
        del g, mask, implementation
        written = scale * jnp.einsum("bth,bthk,bthv->bthkv", b, k, v)
        return jnp.einsum("bthkv,bthk->bthv", written, q), S + written[:, -1]

      rules.register("again", rules.Rule(last))
      cfg = hybrids.model_config(("again",))
      weights = hybrids.random_params(hybrids.model_config(("gdn",)))
      groups = blocks.arrange(weights["blocks"], cfg)
      x = jnp.ones((1, 2, cfg.embed_dim))
      outs.append(read(groups, x, cfg).fast["0"].S)
    np.testing.assert_allclose(outs[1], 3 * outs[0], rtol=1e-6)


@functools.partial(jax.jit, static_argnums=2)
def read(groups, x, cfg):
  """The state after x: one compiled program for equal configs."""
  return blocks.run(groups, x, model.init_state(cfg, 1), cfg)[1]
