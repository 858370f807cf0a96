"""What published hybrids have in their blocks and ours have not: each against what it stands for.

`pretrained/test_delta_net_peers` compares whole models with transformers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import attention, blocks, config, fast_weights, layers, model
from sleep_jax.attention import layer
from sleep_jax.config import ConfigError
from sleep_jax.kernels.gated_delta import gated_delta
from tests import hybrids, oracle
from tests.hybrids import assert_near

NEAR = 1e-5
PAIR = ("gdn", "attn")
TOKENS = hybrids.random_tokens(2, 4)


@functools.cache
def base():
  cfg = hybrids.model_config(PAIR)
  return cfg, hybrids.random_params(cfg)


def answer(cfg, weights):
  """Logits of a window and the state behind it; and the same logits token by token."""
  run = hybrids.jit(lambda w: model.predict(w, TOKENS, model.init_state(cfg, 2), cfg))
  step = hybrids.jit(lambda w, x, fast, cache: model.decode(w, x, fast, cache, cfg))
  logits, state = run(weights)
  fast, cache = model.open_window(model.init_state(cfg, 2), cfg, 2)
  for t in range(4):
    one, fast, cache = step(weights, TOKENS[:, t : t + 1], fast, cache)
    assert_near(one[:, 0], logits[:, t], 1e-4)
  assert_near(fast["0"].S, state.fast["0"].S, 1e-4)
  return logits, state


def changed(weights, place, **mixer):
  """The weights with others in one mixer."""
  block = weights["blocks"][place]
  return weights | {"blocks": weights["blocks"] | {place: block | {"mixer": block["mixer"] | mixer}}}


def test_a_head_of_keys_that_serves_two_of_values_is_there_twice():
  cfg, weights = base()
  few = {name: weights["blocks"]["0"]["mixer"][name][:, :1] for name in ("q", "k", "q_conv", "k_conv")}
  assert few["q"].shape == (12, 1, 3) and few["q_conv"].shape == (4, 1, 3)
  grouped = config.replace(cfg, fast={"num_key_heads": 1})
  shapes = {name: w.shape for name, w in fast_weights.declare(grouped).items()}
  assert shapes == {name: x.shape for name, x in (weights["blocks"]["0"]["mixer"] | few).items()}
  got = answer(grouped, changed(weights, "0", **few))
  twice = {name: jnp.repeat(x, 2, axis=1) for name, x in few.items()}
  assert_near(got, answer(cfg, changed(weights, "0", **twice)), NEAR)


def test_a_gate_is_a_sigmoid_behind_the_query_of_its_head():
  """One of zero halves what the heads give; one of a large number leaves it or takes it away."""
  cfg, weights = base()
  gated, mixer = config.replace(cfg, attention={"gate": True}), weights["blocks"]["1"]["mixer"]
  assert attention.declare(gated)["q"].shape == (12, 4, 8)
  beside = lambda w: jnp.concatenate([mixer["q"], w], axis=-1)  # noqa: E731
  halved = answer(cfg, changed(weights, "1", o=mixer["o"] / 2))
  assert_near(answer(gated, changed(weights, "1", q=beside(jnp.zeros_like(mixer["q"])))), halved, NEAR)
  x = np.random.default_rng(0).normal(size=(2, 4, 12)).astype(np.float32)
  w = np.random.default_rng(1).normal(size=(12, 4, 4)).astype(np.float32)
  # With one key a query, each head gives its value: what is left is the gate.
  own = changed(weights, "1", q=beside(w))["blocks"]["1"]["mixer"]
  got = attention.read_window(own, x, gated, reach=1)
  values = np.repeat(np.einsum("btd,dhk->bthk", x, mixer["v"]), 2, axis=2)
  gate = 1 / (1 + np.exp(-np.einsum("btd,dhk->bthk", x, w)))
  assert_near(got, np.einsum("bthk,hkd->btd", values * gate, mixer["o"]), NEAR)


def test_a_norm_whose_weight_is_added_to_one():
  cfg, weights = base()
  centered = config.replace(cfg, norm_zero_centered=True)
  drawn = model.declare(centered)
  assert np.all(np.asarray(drawn["final_norm"].init(jax.random.key(0), (3,), jnp.float32)) == 0)
  names = ("norm", "mlp_norm", "final_norm", "q_norm", "k_norm")  # and not that on what S answers

  def shifted(path, x):
    return x - 1 if path[-1].key in names else x

  assert_near(
    answer(centered, jax.tree_util.tree_map_with_path(shifted, weights)), answer(cfg, weights), NEAR
  )


def test_a_norm_over_the_channels_of_all_heads():
  cfg, weights = base()
  over = config.replace(cfg, attention={"qk_norm_over": "all"})
  shapes = attention.declare(over)
  assert (shapes["q_norm"].shape, shapes["k_norm"].shape) == ((4, 4), (2, 4))
  rng = np.random.default_rng(0)
  x, norms = (
    rng.normal(size=(2, 5, 12)),
    {"q_norm": rng.normal(size=(4, 4)), "k_norm": rng.normal(size=(2, 4))},
  )
  mixer = weights["blocks"]["1"]["mixer"] | {name: jnp.asarray(w, jnp.float32) for name, w in norms.items()}
  for apart in (False, True):
    q, k, _, gate = layer._project(mixer, jnp.asarray(x, jnp.float32), over, apart=apart)
    assert gate is None
    for name, got in (("q", q), ("k", k)):
      flat = np.einsum("btd,dhk->bthk", x, np.asarray(mixer[name], float)).reshape(2, 5, -1)
      wanted = oracle.rms_norm(flat, norms[f"{name}_norm"].reshape(-1), 1e-6).reshape(got.shape)
      assert_near(got, wanted, NEAR)


def test_rotary_angles_of_some_channels():
  cfg = config.replace(base()[0], attention={"head_dim": 8, "rotary_dim": 4})
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
  got = layer._rotate(x, jnp.arange(3), cfg)
  np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
  assert_near(got[..., :4], layers.rope(x[..., :4], jnp.arange(3), cfg.attention.rope_theta), NEAR)
  whole = config.replace(cfg, attention={"rotary_dim": 8})
  none = config.replace(cfg, attention={"rotary_dim": None})
  np.testing.assert_array_equal(*(layer._rotate(x, jnp.arange(3), c) for c in (whole, none)))


def test_attention_may_have_norms_on_what_it_adds_alone():
  cfg, _ = base()
  behind = config.replace(cfg, norm_placement="after_attention")
  declared = blocks.declare(behind)
  assert {name for name in declared["1"] if "norm" in name} == {"post_norm", "mlp_post_norm"}
  assert {name for name in declared["0"] if "norm" in name} == {"norm", "mlp_norm"}
  weights = model.init(behind, jax.random.key(0))["blocks"]["1"]
  h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 12)), jnp.float32)
  got, _ = blocks.block(weights, h, None, kind="attn", mlp=True, cfg=behind)
  norm = lambda x, name: layers.rms_norm(x, weights[name], cfg.norm_eps)  # noqa: E731
  h = h + norm(attention.read_window(weights["mixer"], h, behind), "post_norm")
  assert_near(got, h + norm(layers.swiglu(weights["mlp"], h), "mlp_post_norm"), NEAR)
  answer(behind, model.init(behind, jax.random.key(1)))


def test_a_write_may_be_twice_as_strong():
  cfg, weights = base()
  seen = {}

  def spy(q, k, v, g, b, S, *, mask, implementation):
    seen[len(seen)] = np.asarray(b)
    return gated_delta(q, k, v, g, b, S, mask=mask, implementation=implementation)

  rule = dataclasses.replace(fast_weights.RULES["gdn"], update=spy)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 12)), jnp.float32)
  outs = []
  for most in (1.0, 2.0):
    strong = config.replace(cfg, fast={"write_most": most})
    state = fast_weights.init_state(strong, 2)
    outs.append(fast_weights.fast_weights(weights["blocks"]["0"]["mixer"], x, state, strong, rule)[1].S)
  np.testing.assert_array_equal(seen[1], 2 * seen[0])
  assert np.max(np.abs(outs[0] - outs[1])) > 1e-2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"fast": {"num_key_heads": 3}}, "model.fast.num_key_heads: must divide num_heads = 2, got 3"),
    ({"fast": {"write_most": 0}}, "model.fast.write_most: must be above 0, got 0"),
    (
      {"fast": {"write_most": 2, "kernel": "pallas_tpu_fused"}},
      "model.fast.write_most: must be 1 with kernel",
    ),
    ({"attention": {"rotary_dim": 3}}, "model.attention.rotary_dim: must be even, got 3"),
    ({"attention": {"rotary_dim": 6}}, "model.attention.rotary_dim: must be at most 4 .head_dim., got 6"),
    ({"attention": {"qk_norm_over": "some"}}, "model.attention.qk_norm_over: unknown value 'some'"),
    ({"norm_placement": "after"}, "model.norm_placement: unknown value 'after'"),
  ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
  with pytest.raises(ConfigError, match=f"^{message}"):
    config.replace(base()[0], **changes)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_all_of_it_is_spread_over_a_mesh(key_heads):
  """At trace time: weights, gradients and the caches of a window that is slept on lie as the table says."""
  cfg = config.replace(
    hybrids.model_config(PAIR, vocab_size=12, embed_dim=16),
    attention={"gate": True, "rotary_dim": 2, "qk_norm_over": "all", "bias": True},
    fast={"num_heads": 4, "num_key_heads": key_heads, "write_most": 2.0},
    norm_zero_centered=True,
    norm_placement="after_attention",
  )
  mesh = jax.sharding.AbstractMesh(
    (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
  )

  def loss(weights, tokens, valid):
    asleep = model.consolidate(
      weights, tokens, model.init_state(cfg, 4), cfg, config.SleepConfig(num_passes=2)
    )
    logits, _ = model.predict(weights, tokens, asleep, cfg)
    fast, cache = model.open_window(asleep, cfg, 4, room=3)
    one, _, _ = model.decode(weights, tokens[:, :1], fast, cache, cfg, valid=valid[:, :1])
    return jnp.sum(logits**2) + jnp.sum(one)

  with jax.sharding.use_abstract_mesh(mesh):
    weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    where = jax.NamedSharding(mesh, jax.P("data", None))
    rows = [jax.ShapeDtypeStruct((4, 4), kind, sharding=where) for kind in (jnp.int32, jnp.bool_)]
    gradients = jax.eval_shape(jax.grad(loss), weights, *rows)
  same = jax.tree.map(lambda g, w: g.shape == w.shape and g.sharding == w.sharding, gradients, weights)
  assert all(jax.tree.leaves(same))
