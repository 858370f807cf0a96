"""The mesh: one table decides, nothing is replicated by forgetting it, and a laptop checks a pod."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sleep_jax import model, params, products, sharding, windows
from sleep_jax.config import AttentionConfig, ConfigError, FastConfig, MeshConfig, ModelConfig, SleepConfig
from sleep_jax.data import rule110

CONFIG = ModelConfig(
  vocab_size=4,
  embed_dim=16,
  mlp_dim=32,
  blocks=("attn", "gdn"),
  window=6,
  attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=4),
  fast=FastConfig(num_heads=2, key_dim=8, value_dim=4),
)

# Where each weight of CONFIG lies on a mesh (data, model) that divides everything but one key head.
LAYOUT = {
  "embed": P("model", None),
  "final_norm": P(None),
  "head": P("data", "model"),
  "blocks/0/norm": P(None),
  "blocks/0/mixer/q": P("data", "model", None),
  "blocks/0/mixer/k": P("data", None, None),
  "blocks/0/mixer/v": P("data", None, None),
  "blocks/0/mixer/o": P("model", None, "data"),
  "blocks/0/mixer/q_norm": P(None),
  "blocks/0/mlp/gate": P("data", "model"),
  "blocks/0/mlp/up": P("data", "model"),
  "blocks/0/mlp/down": P("model", "data"),
  "blocks/1/mixer/q": P("data", "model", None),
  "blocks/1/mixer/gate": P("data", "model", None),
  "blocks/1/mixer/o": P("model", None, "data"),
  "blocks/1/mixer/a": P("data", "model"),
  "blocks/1/mixer/A_log": P("model"),
  "blocks/1/mixer/out_norm": P(None),
  "blocks/1/mixer/k_conv": P(None, "model", None),
}


def four_by_two():
  return sharding.make_mesh(MeshConfig(data=4, model=2))


class MeshTest(parameterized.TestCase):
  @parameterized.parameters(
    (-1, 1, (8, 1)), (-1, 2, (4, 2)), (2, 4, (2, 4)), (1, 1, (1, 1)), (2, 1, (2, 1)), (-1, 8, (1, 8))
  )
  def test_sizes(self, data, size, want):
    mesh = sharding.make_mesh(MeshConfig(data=data, model=size))
    self.assertEqual(mesh.devices.shape, want)
    self.assertEqual(mesh.axis_names, ("data", "model"))
    self.assertEqual(set(mesh.axis_types), {AxisType.Explicit})

  @parameterized.parameters((9, 1), (4, 4), (-1, 3), (-1, 16))
  def test_what_does_not_fit_the_devices_is_refused(self, data, size):
    with self.assertRaisesRegex(
      ConfigError, rf"^mesh: data = {data} x model = {size} does not fit 8 device\(s\)$"
    ):
      sharding.make_mesh(MeshConfig(data=data, model=size))


class SpecTest(parameterized.TestCase):
  def test_without_a_mesh_it_is_nothing(self):
    self.assertIsNone(sharding.spec(("batch", "no such name"), (8, 8)))
    x = np.ones((3, 4))
    self.assertIs(sharding.constrain(x, ("batch", "heads")), x)

  def test_each_rule(self):
    shape = (8, 8, 8, 8)
    with jax.set_mesh(four_by_two()):
      self.assertEqual(
        sharding.spec(("batch", "seq", "heads", "head_dim"), shape), P("data", None, "model", None)
      )
      self.assertEqual(sharding.spec(("batch", "seq", "embed", None), shape), P("data", None, None, None))
      self.assertEqual(sharding.spec(("w_embed", "mlp"), (8, 8)), P("data", "model"))
      self.assertEqual(sharding.spec(("vocab", None), (8, 8)), P("model", None))

  def test_a_dimension_that_does_not_divide_stays_whole(self):
    with jax.set_mesh(four_by_two()):
      self.assertEqual(sharding.spec(("batch", "heads"), (6, 8)), P(None, "model"))
      self.assertEqual(sharding.spec(("batch", "heads"), (8, 3)), P("data", None))
      self.assertEqual(sharding.spec(("vocab", None), (3, 8)), P(None, None))

  def test_an_unknown_name_is_an_error_and_no_replica(self):
    with jax.set_mesh(four_by_two()), self.assertRaisesRegex(KeyError, "hedas"):
      sharding.spec(("batch", "hedas"), (8, 8))

  def test_a_mesh_axis_serves_one_dimension(self):
    with jax.set_mesh(four_by_two()), self.assertRaisesRegex(ValueError, "one mesh axis on two dimensions"):
      sharding.spec(("heads", "mlp"), (8, 8))

  def test_lengths_must_agree(self):
    with jax.set_mesh(four_by_two()), self.assertRaises(ValueError):
      sharding.spec(("batch",), (8, 8))

  def test_constrain_lays_out_and_changes_no_value(self):
    x = np.arange(64.0).reshape(8, 8)
    with jax.set_mesh(four_by_two()):
      y = sharding.constrain(jax.numpy.asarray(x), ("batch", "heads"))
      self.assertEqual(y.sharding.spec, P("data", "model"))
      self.assertEqual({s.data.shape for s in y.addressable_shards}, {(2, 4)})
    np.testing.assert_array_equal(y, x)


class WeightsTest(parameterized.TestCase):
  def test_weights_lie_where_the_table_says(self):
    with jax.set_mesh(four_by_two()):
      weights = jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0)))
      paths, _ = jax.tree_util.tree_flatten_with_path(weights)
      got = {params.name_of(path): x.sharding.spec for path, x in paths}
    for name, want in LAYOUT.items():
      self.assertEqual(got[name], want, name)

  def test_every_axis_of_every_weight_has_a_rule(self):
    for weight in jax.tree.leaves(model.declare(CONFIG), is_leaf=params.is_weight):
      for axis in weight.axes:
        self.assertTrue(axis is None or axis in sharding.RULES, weight)

  def test_a_mesh_changes_no_draw(self):
    draw = functools.partial(params.init, model.declare(CONFIG)["blocks"]["0"]["mixer"])
    plain = jax.jit(draw)(jax.random.key(0))
    with jax.set_mesh(four_by_two()):
      split = jax.jit(draw)(jax.random.key(0))
      self.assertEqual(split["q"].sharding.spec, P("data", "model", None))
    for name, x in plain.items():
      np.testing.assert_allclose(split[name], x, rtol=1e-6, atol=1e-7, err_msg=name)

  @parameterized.parameters(("scan", "same"), ("unroll", "same"), ("scan", "bfloat16"))
  def test_a_pod_of_256_chips_is_checked_without_one(self, loops, matmul_dtype):
    cfg = ModelConfig(
      matmul_dtype=matmul_dtype,
      vocab_size=8,
      embed_dim=128,
      mlp_dim=256,
      blocks=("attn", "gdn"),
      window=24,
      attention=AttentionConfig(num_heads=4, head_dim=32),
      fast=FastConfig(num_heads=4, key_dim=16, value_dim=16),
    )
    task = rule110.Rule110Config()
    segments = windows.plan(rule110.layout(task), cfg.window)
    sleep_cfg = SleepConfig(num_passes=2, loops=loops)

    def loss(weights):
      batch = rule110.batch(task, jax.random.key(0), 0, 128)
      batch = jax.tree.map(lambda x: sharding.constrain(x, ("batch", "seq")), batch)
      return model.loss(weights, batch, segments, cfg, sleep_cfg)[0]

    mesh = AbstractMesh((64, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
      weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
      grads = jax.eval_shape(jax.grad(loss), weights)
    self.assertEqual(weights["blocks"]["1"]["mixer"]["q"].sharding.spec, P("data", "model", None))
    jax.tree.map(lambda g, w: self.assertEqual(g.sharding, w.sharding), grads, weights)

  def test_products_of_rounded_operands_are_split_like_exact_ones(self):
    x, w = jax.numpy.ones((8, 3, 16)), jax.numpy.ones((16, 4, 6))
    axes = ("batch", "seq", "heads", "head_dim")

    def gradients(x, w, rounded):
      y, pull = jax.vjp(lambda x, w: products.dense(x, w, axes, rounded=rounded), x, w)
      return y, *pull(y)

    with jax.set_mesh(four_by_two()):
      x = sharding.constrain(x, ("batch", "seq", "embed"))
      w = sharding.constrain(w, ("w_embed", "heads", "head_dim"))
      exact, got = (gradients(x, w, rounded) for rounded in (None, "bfloat16"))
    for a, b in zip(exact, got, strict=True):
      self.assertEqual(a.sharding, b.sharding)
      np.testing.assert_array_equal(a, b)  # sums of ones are exact


def test_the_mesh_of_eight_is_data_4_by_model_2(mesh_of_eight):
  assert sharding.spec(("batch", "heads"), (4, 2)) == P("data", "model")
  with pytest.raises(KeyError):
    sharding.spec(("hosts",), (4,))
