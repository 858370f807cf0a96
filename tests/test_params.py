"""Slow weights: drawn one by one whatever else is declared, and declared once for all readers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax import fast_weights, model, params
from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig
from tests import oracle_params

CONFIG = ModelConfig(
  vocab_size=11,
  embed_dim=12,
  mlp_dim=16,
  blocks=("attn", "gdn", "hebbian"),
  attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
  fast=FastConfig(num_heads=2, key_dim=3, value_dim=5),
)

# The matrices of the body, by the last part of their names; everything else is AdamW's.
MATRICES = {"q", "k", "v", "o", "gate", "up", "down"}
UNDECAYED = {"norm", "mlp_norm", "final_norm", "q_norm", "k_norm", "out_norm", "A_log", "dt_bias"}


def flat(tree):
  paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=params.is_weight)
  return {params.name_of(path): leaf for path, leaf in paths}


class InitTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.key = jax.random.key(3)
    self.declared = {
      "a": params.matrix(4, 6, axes=(None, None)),
      "b": {"c": params.matrix(4, 6, axes=(None, None)), "d": params.scale(5)},
      "e": params.Weight((6,), (None,), params.normal(0.5)),
    }

  def test_a_weight_added_changes_no_other(self):
    before = flat(params.init(self.declared, self.key))
    more = {"A": params.matrix(4, 6, axes=(None, None)), "z": params.matrix(9, 2, axes=(None, None))}
    after = flat(params.init({**self.declared, **more}, self.key))
    self.assertSetEqual(set(after) - set(before), {"A", "z"})
    for name, value in before.items():
      np.testing.assert_array_equal(after[name], value, err_msg=name)

  def test_each_is_drawn_as_if_it_were_alone(self):
    together = params.init(self.declared, self.key)
    alone = {
      "a": params.init({"a": self.declared["a"]}, self.key)["a"],
      "b": params.init({"b": self.declared["b"]}, self.key)["b"],
      "e": params.init({"e": self.declared["e"]}, self.key)["e"],
    }
    jax.tree.map(np.testing.assert_array_equal, together, alone)

  def test_compiling_changes_no_draw(self):
    together = jax.jit(lambda key: params.init(self.declared, key))(self.key)
    for name, x in flat(params.init(self.declared, self.key)).items():
      # the same bits are drawn; only their way to a normal number may round differently
      np.testing.assert_allclose(flat(together)[name], x, rtol=1e-6, atol=1e-7, err_msg=name)

  def test_outside_of_a_program_each_kind_is_one_that_is_compiled_quickly(self):
    """And inside of one, with a key that is no part of it, the options of that program hold."""
    names = []
    seen = lambda name, _, **said: names.append(said.get("fun_name")) if "backend_compile" in name else None  # noqa: E731
    shapes = [(13, 3), (13, 5), (13, 3), (13, 3)]
    declared = {str(i): params.matrix(*shape, axes=(None, None)) for i, shape in enumerate(shapes)}
    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
      params.init(declared, self.key)
    finally:
      jax.monitoring.unregister_event_duration_listener(seen)
    self.assertEqual(names.count("jit(_drawn)"), 2)
    self.assertLessEqual(len(names), 3)  # and the zero that tells whether this is inside of a program
    inside = jax.jit(lambda x: x + params.init(declared, self.key)["0"])(0.0)
    np.testing.assert_allclose(inside, params.init(declared, self.key)["0"], rtol=1e-6, atol=1e-7)

  def test_no_two_are_alike_and_the_key_decides(self):
    weights = params.init(self.declared, self.key)
    again, other = params.init(self.declared, self.key), params.init(self.declared, jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, weights, again)
    self.assertFalse(np.any(weights["a"] == weights["b"]["c"]))
    self.assertFalse(np.any(weights["a"] == other["a"]))

  def test_the_width_of_the_draw_is_that_of_the_inputs(self):
    declared = {
      "narrow": params.matrix(64, 400, axes=(None, None)),
      "heads_in": params.matrix(4, 25, 300, axes=(None,) * 3, num_in=2),
      "heads_out": params.matrix(100, 4, 75, axes=(None,) * 3),
    }
    weights = params.init(declared, self.key)
    for name, fan_in in (("narrow", 64), ("heads_in", 100), ("heads_out", 100)):
      x = np.asarray(weights[name], np.float64)
      # the deviation of a mean square of n normal numbers is sqrt(2 / n) of it
      self.assertAlmostEqual(np.mean(x**2) * fan_in, 1.0, delta=5 * math.sqrt(2 / x.size), msg=name)
      self.assertAlmostEqual(np.mean(x) * fan_in**0.5, 0.0, delta=5 / math.sqrt(x.size), msg=name)
    np.testing.assert_array_equal(params.init({"s": params.scale(7)}, self.key)["s"], np.ones(7))

  def test_decays_start_in_their_range(self):
    cfg = ModelConfig(
      vocab_size=3,
      blocks=("gdn",),
      fast=FastConfig(num_heads=512, key_dim=1, value_dim=1, decay_init=(0.25, 2)),
    )
    mixer = params.init(fast_weights.declare(cfg), self.key)
    rate, step = np.exp(mixer["A_log"]), np.log1p(np.exp(np.asarray(mixer["dt_bias"], np.float64)))
    self.assertBetween(rate.min(), 0.25, 0.30)
    self.assertBetween(rate.max(), 1.95, 2.0 * (1 + 1e-6))
    self.assertBetween(step.min(), 1e-3 * (1 - 1e-4), 1.2e-3)
    self.assertBetween(step.max(), 0.08, 0.1 * (1 + 1e-4))


class DeclarationTest(parameterized.TestCase):
  def test_the_model_holds_what_the_oracle_holds(self):
    for conv, qk_norm in itertools.product((4, 0), (True, False)):
      cfg = ModelConfig(
        vocab_size=11,
        embed_dim=12,
        mlp_dim=16,
        blocks=CONFIG.blocks,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=qk_norm),
        fast=FastConfig(num_heads=2, key_dim=3, value_dim=5, conv_size=conv),
      )
      declared = flat(model.declare(cfg))
      want = oracle_params.random_params(0, cfg.blocks, conv_size=conv, qk_norm=qk_norm)
      want = {"/".join(path): value.shape for path, value in oracle_params.leaves(want)}
      self.assertDictEqual({name: w.shape for name, w in declared.items()}, want)

  def test_values_have_the_declared_structure_and_size(self):
    declared = model.declare(CONFIG)
    weights = jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0)))
    self.assertDictEqual(
      {name: x.shape for name, x in flat(weights).items()},
      {name: w.shape for name, w in flat(declared).items()},
    )
    self.assertEqual({x.dtype for x in jax.tree.leaves(weights)}, {jnp.dtype("float32")})
    self.assertEqual(params.count(declared), sum(x.size for x in jax.tree.leaves(weights)))

  def test_groups_and_decay_of_every_weight(self):
    for name, weight in flat(model.declare(CONFIG)).items():
      last = name.split("/")[-1]
      self.assertEqual(weight.group, "muon" if last in MATRICES else "adam", name)
      self.assertEqual(weight.decay, last not in UNDECAYED, name)

  def test_matrices_know_their_inputs(self):
    d = CONFIG.embed_dim
    for name, weight in flat(model.declare(CONFIG)).items():
      if weight.group == "muon":
        out_of_d = name.split("/")[-1] in ("o", "down")
        ins, outs = weight.shape[: weight.num_in], weight.shape[weight.num_in :]
        self.assertEqual(outs if out_of_d else ins, (d,), name)

  def test_a_declaration_that_contradicts_itself_is_refused(self):
    with self.assertRaisesRegex(ValueError, "differ in length"):
      params.Weight((3, 4), (None,), params.normal(1.0))
    with self.assertRaisesRegex(ValueError, "unknown optimizer group 'sgd'; known: muon, adam"):
      params.Weight((3,), (None,), params.normal(1.0), group="sgd")
    for shape, num_in in (((3,), 1), ((3, 4), 2), ((3, 4), 0)):
      with self.assertRaisesRegex(ValueError, "needs input and output axes"):
        params.Weight(shape, (None,) * len(shape), params.normal(1.0), group="muon", num_in=num_in)
