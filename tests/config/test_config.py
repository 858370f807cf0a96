"""Configs: what is read is what was written, and every mistake is one line that names the field."""

import dataclasses
import json

import jax.numpy as jnp
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sleep_jax import config
from sleep_jax.config import (
  AttentionConfig,
  Config,
  ConfigError,
  FastConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  SleepConfig,
  TrainConfig,
)
from sleep_jax.data.rule110 import Rule110Config

SMALL = Config(
  data=Rule110Config(num_strings=2, num_cells=12, rollout_steps=4),
  model=ModelConfig(
    vocab_size=3,
    blocks=("attn", "gdn", "hebbian"),
    window=12,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    fast=FastConfig(decay_init=(0.25, 2.0), kernel="xla"),
  ),
  sleep=SleepConfig(num_passes=4, backprop_passes=2, first_block=1, last_block=3),
  seed=7,
)


def read(values):
  """The whole config of nested plain values, as `experiments` build it."""
  data = config.from_dict(Rule110Config, values["data"], "data.")
  return config.from_dict(Config, values | {"data": data})


def model(**changes):
  return ModelConfig(**{"vocab_size": 3} | changes)


def with_blocks(**sleep):
  return Config(data=None, model=model(blocks=("attn", "gdn")), sleep=SleepConfig(**sleep))


# What is asked for -> the words that the message must have, its field first.
BOUNDS = {
  "no_passes": (lambda: SleepConfig(num_passes=0), "sleep.num_passes: must be at least 1, got 0"),
  "no_backprop": (
    lambda: SleepConfig(num_passes=3, backprop_passes=0),
    "sleep.backprop_passes: must lie in 1..3 (sleep.num_passes), got 0",
  ),
  "more_backprop_than_passes": (
    lambda: SleepConfig(num_passes=3, backprop_passes=4),
    "sleep.backprop_passes: must lie in 1..3 (sleep.num_passes), got 4",
  ),
  "first_block_below_0": (lambda: SleepConfig(first_block=-1), "sleep.first_block: must be at least 0"),
  "no_looped_block": (
    lambda: SleepConfig(first_block=2, last_block=2),
    "sleep.last_block: must be above 2, got 2",
  ),
  "last_block_beyond": (lambda: with_blocks(last_block=3), "sleep.last_block: must be at most 2"),
  "first_block_beyond": (lambda: with_blocks(first_block=2), "sleep.first_block: must be below 2"),
  "remat": (
    lambda: SleepConfig(remat="blocks"),
    "sleep.remat: unknown value 'blocks'; did you mean \"block\"",
  ),
  "loops": (lambda: SleepConfig(loops="for"), "sleep.loops: unknown value 'for'; known: scan, unroll"),
  "window": (lambda: model(window=0), "model.window: must be at least 1, got 0"),
  "vocab": (lambda: model(vocab_size=0), "model.vocab_size: must be at least 1"),
  "embed_dim": (lambda: model(embed_dim=0), "model.embed_dim: must be at least 1"),
  "mlp_dim": (lambda: model(mlp_dim=0), "model.mlp_dim: must be at least 1"),
  "no_blocks": (lambda: model(blocks=()), "model.blocks: must be at least 1"),
  "eviction": (lambda: model(eviction="hart"), "model.eviction: unknown value 'hart'; did you mean \"hard\""),
  "embed_std": (lambda: model(embed_std=0.0), "model.embed_std: must be above 0"),
  "norm_eps": (lambda: model(norm_eps=0.0), "model.norm_eps: must be above 0"),
  "norm_eps_nan": (lambda: model(norm_eps=float("nan")), "model.norm_eps: must be above 0, got nan"),
  "dtype": (lambda: model(dtype="float16"), "model.dtype: unknown value 'float16'; did you mean"),
  "heads_do_not_divide": (
    lambda: model(embed_dim=256, attention=AttentionConfig(num_heads=3)),
    "model.embed_dim: must be a multiple of model.attention.num_heads = 3 (or set head_dim), got 256",
  ),
  "odd_head": (
    lambda: model(embed_dim=12, attention=AttentionConfig(num_heads=4)),
    "model.attention.head_dim: must be even for RoPE, got 12 / 4",
  ),
  "odd_head_given": (lambda: AttentionConfig(head_dim=7), "model.attention.head_dim: must be even for RoPE"),
  "narrow_head": (lambda: AttentionConfig(head_dim=0), "model.attention.head_dim: must be at least 2"),
  "no_heads": (lambda: AttentionConfig(num_heads=0), "model.attention.num_heads: must be at least 1"),
  "no_kv_heads": (
    lambda: AttentionConfig(num_kv_heads=0),
    "model.attention.num_kv_heads: must be at least 1",
  ),
  "kv_heads_do_not_divide": (
    lambda: AttentionConfig(num_heads=4, num_kv_heads=3),
    "model.attention.num_kv_heads: must divide num_heads = 4, got 3",
  ),
  "theta": (lambda: AttentionConfig(rope_theta=0.0), "model.attention.rope_theta: must be above 0"),
  "fast_heads": (lambda: FastConfig(num_heads=0), "model.fast.num_heads: must be at least 1"),
  "key_dim": (lambda: FastConfig(key_dim=0), "model.fast.key_dim: must be at least 1"),
  "value_dim": (lambda: FastConfig(value_dim=0), "model.fast.value_dim: must be at least 1"),
  "conv_size": (lambda: FastConfig(conv_size=-1), "model.fast.conv_size: must be at least 0"),
  "conv_context": (lambda: FastConfig(conv_context="carries"), "model.fast.conv_context: unknown value"),
  "decay_zero": (lambda: FastConfig(decay_init=(0.0, 1.0)), "model.fast.decay_init: needs 0 < low <= high"),
  "decay_order": (lambda: FastConfig(decay_init=(2.0, 1.0)), "model.fast.decay_init: needs 0 < low <= high"),
  "muon_lr": (lambda: OptimConfig(muon_lr=0.0), "optim.muon_lr: must be above 0, got 0.0"),
  "adam_lr": (lambda: OptimConfig(adam_lr=-1e-3), "optim.adam_lr: must be above 0"),
  "adam_eps": (lambda: OptimConfig(adam_eps=0.0), "optim.adam_eps: must be above 0"),
  "clip_norm": (lambda: OptimConfig(clip_norm=0.0), "optim.clip_norm: must be above 0"),
  "momentum": (lambda: OptimConfig(muon_momentum=1.0), "optim.muon_momentum: must lie in [0, 1), got 1.0"),
  "b1": (lambda: OptimConfig(adam_b1=-0.1), "optim.adam_b1: must lie in [0, 1)"),
  "b2": (lambda: OptimConfig(adam_b2=1.5), "optim.adam_b2: must lie in [0, 1)"),
  "newton_schulz_steps": (lambda: OptimConfig(newton_schulz_steps=0), "optim.newton_schulz_steps: must be"),
  "newton_schulz_dtype": (
    lambda: OptimConfig(newton_schulz_dtype="float64"),
    "optim.newton_schulz_dtype: unknown value 'float64'",
  ),
  "weight_decay": (lambda: OptimConfig(weight_decay=-1.0), "optim.weight_decay: must be at least 0"),
  "warmup": (lambda: OptimConfig(warmup_steps=-1), "optim.warmup_steps: must be at least 0"),
  "warm-up twice": (
    lambda: OptimConfig(warmup_steps=3, warmup_share=0.5),
    "optim.warmup_share: must be 0 where optim.warmup_steps = 3 says the same thing, got 0.5",
  ),
  "decay twice": (
    lambda: OptimConfig(decay_steps=3, decay_share=0.5),
    "optim.decay_share: must be 0 where optim.decay_steps = 3 says the same thing, got 0.5",
  ),
  "decay_share": (lambda: OptimConfig(decay_share=1.0), "optim.decay_share: must lie in [0, 1), got 1.0"),
  "decay_steps": (lambda: OptimConfig(decay_steps=-1), "optim.decay_steps: must be at least 0"),
  "final_scale": (lambda: OptimConfig(final_scale=-0.5), "optim.final_scale: must be at least 0"),
  **{
    f.name: (lambda name=f.name: TrainConfig(**{name: 0}), f"train.{f.name}: must be at least 1, got 0")
    for f in dataclasses.fields(TrainConfig)
    if not f.name.startswith("init_")
  },
  "eval_batches": (
    lambda: TrainConfig(eval_sequences=100, eval_batch_size=64),
    "train.eval_batch_size: must divide train.eval_sequences = 100, got 64",
  ),
  "microbatches": (
    lambda: TrainConfig(batch_size=10, microbatches=4),
    "train.microbatches: must divide train.batch_size = 10, got 4",
  ),
  "mesh_data": (lambda: MeshConfig(data=0), "mesh.data: must be -1 or at least 1, got 0"),
  "mesh_model": (lambda: MeshConfig(model=0), "mesh.model: must be at least 1"),
  "seed": (lambda: Config(data=None, model=model(), seed=-1), "seed: must be at least 0, got -1"),
  "strings": (lambda: Rule110Config(num_strings=0), "data.num_strings: must be at least 1"),
  "few_cells": (lambda: Rule110Config(num_cells=2), "data.num_cells: must lie in 3..32, got 2"),
  "many_cells": (lambda: Rule110Config(num_cells=33), "data.num_cells: must lie in 3..32, got 33"),
  "rollout": (lambda: Rule110Config(rollout_steps=-1), "data.rollout_steps: must be at least 0"),
  "boundary": (
    lambda: Rule110Config(boundary="periodical"),
    "data.boundary: unknown value 'periodical'; did you mean \"periodic\"",
  ),
  "held_out_seed": (lambda: Rule110Config(held_out_seed=-1), "data.held_out_seed: must be at least 0"),
}

# Dotted field, a value of the wrong type, the words of the message.
WRONG_TYPES = (
  ("sleep.num_passes", "2", "sleep.num_passes: must be a whole number, got '2'"),
  ("sleep.num_passes", 2.0, "sleep.num_passes: must be a whole number, got 2.0"),
  ("sleep.num_passes", True, "sleep.num_passes: must be a whole number, got True"),
  ("sleep.num_passes", None, "sleep.num_passes: must be a whole number, got None"),
  ("sleep.backprop_passes", "all", "sleep.backprop_passes: must be a whole number, got 'all'"),
  ("optim.muon_lr", "0.1", "optim.muon_lr: must be a number, got '0.1'"),
  ("optim.muon_lr", False, "optim.muon_lr: must be a number, got False"),
  ("model.attention.qk_norm", 1, "model.attention.qk_norm: must be true or false, got 1"),
  ("model.dtype", jnp.bfloat16, "model.dtype: must be text, got"),
  ("model.blocks", "attn", "model.blocks: must be a list, got 'attn'"),
  ("model.blocks", ["attn", 3], "model.blocks[1]: must be text, got 3"),
  ("model.fast.decay_init", [1.0], "model.fast.decay_init: must have 2 values, got 1"),
  ("model.fast.decay_init", [1.0, "x"], "model.fast.decay_init[1]: must be a number, got 'x'"),
  ("model.fast", 3, "model.fast: must be a group of fields, got 3"),
  ("data.num_cells", 12.5, "data.num_cells: must be a whole number, got 12.5"),
)

# Dotted field that does not exist, the words of the message.
UNKNOWN = (
  ("sleep.num_pases", 'sleep.num_pases: no such field; did you mean "num_passes"?'),
  ("slep", 'slep: no such field; did you mean "sleep"?'),
  ("model.attention.heads", 'model.attention.heads: no such field; did you mean "num_heads"?'),
  ("data.rollout", 'data.rollout: no such field; did you mean "rollout_steps"?'),
  ("mesh.zzz", "mesh.zzz: no such field; known: data, model"),
)


def put(values, dotted, value):
  *groups, name = dotted.split(".")
  for group in groups:
    values = values[group]
  values[name] = value


class ConfigTest(parameterized.TestCase):
  def assert_refused(self, message, build):
    with self.assertRaises(ConfigError) as caught:
      build()
    self.assertIn(message, str(caught.exception))
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.named_parameters((name, *case) for name, case in BOUNDS.items())
  def test_what_does_not_work_is_refused_in_one_line(self, build, message):
    self.assert_refused(message, build)

  @parameterized.parameters(*WRONG_TYPES)
  def test_wrong_types_name_field_and_value(self, field, value, message):
    values = config.to_dict(SMALL)
    put(values, field, value)
    self.assert_refused(message, lambda: read(values))

  @parameterized.parameters(*UNKNOWN)
  def test_unknown_fields_get_the_nearest_name(self, field, message):
    values = config.to_dict(SMALL)
    put(values, field, 1)
    self.assert_refused(message, lambda: read(values))

  @parameterized.parameters(("model", "vocab_size"), (None, "model"))
  def test_missing_fields_are_named(self, group, field):
    values = config.to_dict(SMALL)
    del (values[group] if group else values)[field]
    self.assert_refused(f"{group + '.' if group else ''}{field}: is required", lambda: read(values))

  def test_the_bounds_themselves_are_allowed(self):
    SleepConfig(num_passes=1, backprop_passes=1, first_block=0, last_block=1)
    with_blocks(first_block=1, last_block=2)
    model(window=1, embed_dim=2, mlp_dim=1, attention=AttentionConfig(num_heads=1))
    model(blocks=("gdn",), embed_dim=3)  # no attention, so no heads to divide it
    FastConfig(num_heads=1, key_dim=1, value_dim=1, conv_size=0, decay_init=(1.0, 1.0))
    OptimConfig(weight_decay=0.0, final_scale=0.0, muon_momentum=0.0)
    Rule110Config(num_strings=1, num_cells=3, rollout_steps=0, held_out_seed=0)
    Rule110Config(num_cells=32)

  def test_json_keeps_every_field(self):
    values = json.loads(json.dumps(config.to_dict(SMALL)))
    self.assertEqual(values["sleep"]["num_passes"], 4)
    self.assertEqual(read(values), SMALL)

  @given(
    n=st.integers(1, 9),
    k=st.none() | st.integers(1, 9),
    remat=st.sampled_from(["none", "block", "pass", "window"]),
    lr=st.floats(1e-6, 1.0),
    blocks=st.lists(st.sampled_from(["attn", "gdn", "hebbian"]), min_size=1, max_size=5),
  )
  def test_json_keeps_any_config(self, n, k, remat, lr, blocks):
    sleep = SleepConfig(num_passes=n, backprop_passes=k and min(k, n), remat=remat)
    c = Config(
      data=Rule110Config(), model=model(blocks=tuple(blocks)), sleep=sleep, optim=OptimConfig(muon_lr=lr)
    )
    again = read(json.loads(json.dumps(config.to_dict(c))))
    self.assertEqual(again, c)
    self.assertEqual(hash(again), hash(c))

  def test_configs_are_keys(self):
    other = config.replace(SMALL, sleep={"num_passes": 3})
    self.assertLen({SMALL, config.replace(SMALL), other}, 2)
    with self.assertRaises(dataclasses.FrozenInstanceError):
      SMALL.seed = 1

  def test_lists_become_tuples_and_whole_numbers_floats(self):
    values = config.to_dict(SMALL)
    values["model"]["blocks"] = ["gdn"]
    values["sleep"] |= {"first_block": 0, "last_block": None}
    values["optim"]["clip_norm"] = 2
    got = read(values)
    self.assertEqual(got.model.blocks, ("gdn",))
    self.assertIsInstance(got.optim.clip_norm, float)

  def test_defaults_are_those_of_all_fields_that_have_one(self):
    found = config.defaults_of(SMALL)
    self.assertEqual(found["seed"], 0)
    self.assertEqual(found["sleep"], config.to_dict(SleepConfig()))
    self.assertNotIn("vocab_size", found["model"])
    self.assertEqual(found["model"]["window"], 24)
    self.assertEqual(found["model"]["fast"], config.to_dict(FastConfig()))
    self.assertEqual(found["data"], {f.name: f.default for f in dataclasses.fields(Rule110Config)
                                     if f.default is not dataclasses.MISSING})  # fmt: skip

  def test_replace_changes_what_it_names_and_checks_the_result(self):
    got = config.replace(SMALL, model={"attention": {"num_heads": 2}}, seed=1)
    want = config.to_dict(SMALL)
    want["model"]["attention"]["num_heads"], want["seed"] = 2, 1
    self.assertEqual(config.to_dict(got), want)
    self.assert_refused("num_passes", lambda: config.replace(SMALL, sleep={"num_passes": 0}))

  def test_sizes_that_follow_from_others(self):
    c = model(embed_dim=96, attention=AttentionConfig(num_heads=6))
    self.assertEqual((c.head_dim, c.num_kv_heads), (16, 6))
    self.assertEqual((SMALL.model.head_dim, SMALL.model.num_kv_heads), (8, 2))
