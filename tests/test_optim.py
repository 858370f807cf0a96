"""The optimizer against the recipe of arXiv 2511.07384, written again in NumPy as PyTorch would have it."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from jax.sharding import PartitionSpec as P

from sleep_jax import model, optim, params, sharding, windows
from sleep_jax.config import AttentionConfig, ConfigError, FastConfig, MeshConfig, ModelConfig, OptimConfig
from sleep_jax.train import step as training_step

STEPS = 8
CONFIG = OptimConfig(
  muon_lr=0.02,
  adam_lr=0.003,
  newton_schulz_dtype="float32",
  weight_decay=0.1,
  clip_norm=1.5,
  warmup_steps=2,
  decay_steps=4,
  final_scale=0.1,
)


def declared():
  """Matrices square, wide and tall, some of one shape, some with heads on either side; and AdamW's."""
  matrix = params.matrix
  return {
    "square": matrix(8, 8, axes=("w_embed", "mlp")),
    "wide": matrix(8, 20, axes=("w_embed", "mlp")),
    "tall": matrix(20, 8, axes=("mlp", "w_embed")),
    "heads": {
      "q": matrix(8, 2, 10, axes=("w_embed", "heads", "head_dim")),
      "k": matrix(8, 2, 3, axes=("w_embed", "heads", "head_dim")),
      "o": matrix(2, 10, 8, axes=("heads", "head_dim", "w_embed"), num_in=2),
    },
    "embed": params.Weight((4, 8), ("vocab", None), params.normal(1.0)),
    "norm": params.scale(8),
  }


# The same facts again, for the oracle: name -> number of input dimensions of a matrix.
NUM_IN = {"square": 1, "wide": 1, "tall": 1, "heads/q": 1, "heads/k": 1, "heads/o": 2}
UNDECAYED = {"norm"}


def flat(tree):
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {params.name_of(path): np.asarray(x, np.float64) for path, x in paths}


def random_like(tree, seed, size=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda w: jnp.asarray(rng.normal(size=w.shape) * size, jnp.float32), tree, is_leaf=params.is_weight
  )


def newton_schulz(g):
  """Five steps on one [out, in] matrix of PyTorch; transposed when it has more rows than columns."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = g / (np.linalg.norm(g) + 1e-7)
  turned = x.shape[0] > x.shape[1]
  x = x.T if turned else x
  for _ in range(5):
    A = x @ x.T
    x = a * x + (b * A + c * A @ A) @ x
  return x.T if turned else x


class Oracle:
  """Muon and AdamW on flat dicts of float64; one call a step."""

  def __init__(self, values, cfg):
    self.w, self.cfg, self.step = dict(values), cfg, 0
    self.m = {name: np.zeros_like(x) for name, x in values.items()}
    self.v = {name: np.zeros_like(x) for name, x in values.items()}

  def multiplier(self):
    cfg, left = self.cfg, STEPS - self.step
    up = min(1.0, (self.step + 1) / cfg.warmup_steps)
    done = min(1.0, max(0.0, 1 - left / cfg.decay_steps))
    return up * (cfg.final_scale + (1 - cfg.final_scale) * math.cos(math.pi * done / 2) ** 2)

  def update(self, grads):
    cfg = self.cfg
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    shrink = min(1.0, cfg.clip_norm / norm)
    rate = self.multiplier()
    self.step += 1
    for name, g in grads.items():
      g = g * shrink
      decay = 0.0 if name in UNDECAYED else cfg.weight_decay
      if name in NUM_IN:
        lr, beta = cfg.muon_lr * rate, cfg.muon_momentum
        self.m[name] = beta * self.m[name] + (1 - beta) * g
        nesterov = beta * self.m[name] + (1 - beta) * g
        fan_in = math.prod(g.shape[: NUM_IN[name]])
        out_in = nesterov.reshape(fan_in, -1).T
        rows, columns = out_in.shape
        direction = math.sqrt(max(1, rows / columns)) * newton_schulz(out_in)
        direction = direction.T.reshape(g.shape)
      else:
        lr, t = cfg.adam_lr * rate, self.step
        self.m[name] = cfg.adam_b1 * self.m[name] + (1 - cfg.adam_b1) * g
        self.v[name] = cfg.adam_b2 * self.v[name] + (1 - cfg.adam_b2) * g**2
        m, v = self.m[name] / (1 - cfg.adam_b1**t), self.v[name] / (1 - cfg.adam_b2**t)
        direction = m / (np.sqrt(v) + cfg.adam_eps)
      self.w[name] = self.w[name] * (1 - lr * decay) - lr * direction
    return self.w


def run(cfg, tree, weights, gradients, steps=STEPS):
  """Weights after each of some steps."""
  tx = optim.make(cfg, tree, steps)

  @jax.jit
  def step(weights, state, grads):
    updates, state = tx.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state

  state, trail = jax.jit(tx.init)(weights), []
  for grads in gradients:
    weights, state = step(weights, state, grads)
    trail.append(weights)
  return trail, state


class RecipeTest(parameterized.TestCase):
  # float32 against float64: Newton-Schulz multiplies small singular values, and their rounding, by up to
  # 3.4445^5 = 485, so that a relative error of 1e-7 becomes 5e-5 of an update, which is 0.02 times as large.
  tolerance = {"rtol": 1e-5, "atol": 2e-6}

  def test_every_step_of_a_run(self):
    tree = declared()
    weights = random_like(tree, 0)
    # the first two are clipped, the third is not, the others are zero but for the momentum
    gradients = [
      random_like(tree, 1 + i, size) for i, size in enumerate((3.0, 0.3, 0.01, 0.02, 1.0, 0.1, 2.0))
    ]
    norms = [math.sqrt(sum((x**2).sum() for x in flat(g).values())) for g in gradients]
    self.assertGreater(norms[0], CONFIG.clip_norm)
    self.assertLess(norms[2], CONFIG.clip_norm)
    oracle = Oracle(flat(weights), CONFIG)
    trail, _ = run(CONFIG, tree, weights, gradients)
    for i, (got, grads) in enumerate(zip(trail, gradients, strict=True)):
      want = oracle.update(flat(grads))
      for name, x in flat(got).items():
        np.testing.assert_allclose(x, want[name], **self.tolerance, err_msg=f"{name} after step {i + 1}")

  def test_adam_group_is_adamw(self):
    tree = {"a": declared()["embed"], "b": declared()["norm"]}
    weights = random_like(tree, 0)
    gradients = [random_like(tree, 1 + i) for i in range(3)]
    cfg = OptimConfig(adam_lr=0.01, weight_decay=0.2, clip_norm=1e9)
    got, _ = run(cfg, tree, weights, gradients)
    tx = optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.2, mask={"a": True, "b": False})
    state = tx.init(weights)
    for i, grads in enumerate(gradients):
      updates, state = tx.update(grads, state, weights)
      weights = optax.apply_updates(weights, updates)
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got[i], weights)

  def test_a_matrix_is_treated_alike_alone_and_among_others(self):
    tree = declared()
    matrices = {"wide": tree["wide"], "tall": tree["tall"], "q": tree["heads"]["q"], "o": tree["heads"]["o"]}
    cfg = OptimConfig(newton_schulz_dtype="float32", clip_norm=1e9)
    weights, grads = random_like(matrices, 0), random_like(matrices, 1)
    [together], _ = run(cfg, matrices, weights, [grads])
    for name in matrices:
      [alone], _ = run(cfg, {name: matrices[name]}, {name: weights[name]}, [{name: grads[name]}])
      np.testing.assert_allclose(together[name], alone[name], rtol=1e-6, atol=1e-7, err_msg=name)

  def test_heads_of_one_projection_are_orthogonalised_together(self):
    tree = {"q": declared()["heads"]["q"], "flat": params.matrix(8, 20, axes=(None, None))}
    grads = random_like(tree, 1)
    grads["flat"] = grads["q"].reshape(8, 20)
    weights = jax.tree.map(jnp.zeros_like, grads)
    [after], _ = run(OptimConfig(newton_schulz_dtype="float32"), tree, weights, [grads])
    np.testing.assert_allclose(after["q"].reshape(8, 20), after["flat"], rtol=1e-6)

  def test_transposing_a_matrix_changes_its_scale_alone(self):
    grads = {"wide": random_like(declared()["wide"], 1), "tall": None}
    grads["tall"] = grads["wide"].T
    tree = {"wide": declared()["wide"], "tall": declared()["tall"]}
    weights = jax.tree.map(jnp.zeros_like, grads)
    cfg = OptimConfig(muon_lr=1.0, newton_schulz_dtype="float32", weight_decay=0.0)
    [after], _ = run(cfg, tree, weights, [grads])
    # 8 inputs and 20 outputs: sqrt(20 / 8) larger than 20 inputs and 8 outputs
    np.testing.assert_allclose(after["wide"], math.sqrt(2.5) * np.asarray(after["tall"]).T, atol=1e-5)

  @parameterized.parameters("bfloat16", "float32")
  def test_an_update_is_nearly_orthogonal(self, dtype):
    tree = {"wide": declared()["wide"]}
    grads = random_like(tree, 1)
    cfg = OptimConfig(muon_lr=1.0, newton_schulz_dtype=dtype, weight_decay=0.0)
    [after], _ = run(cfg, tree, jax.tree.map(jnp.zeros_like, grads), [grads])
    self.assertEqual(after["wide"].dtype, jnp.float32)
    values = np.linalg.svd(np.asarray(after["wide"]), compute_uv=False) / math.sqrt(2.5)
    self.assertBetween(values.min(), 0.6, 1.3)
    self.assertBetween(values.max(), 0.6, 1.3)
    # and points where the gradient does
    u, _, vt = np.linalg.svd(np.asarray(grads["wide"], np.float64), full_matrices=False)
    along = -np.diag(u.T @ np.asarray(after["wide"], np.float64) @ vt.T) / math.sqrt(2.5)
    self.assertGreater(along.min(), 0.6)

  def test_products_have_the_form_that_is_fast_on_the_platform(self):
    """On a CPU one matrix at a time, with results of float32; elsewhere all of a shape in one product."""
    traced = jax.jit(functools.partial(optim.newton_schulz, steps=5)).trace(
      jnp.ones((3, 8, 16), jnp.bfloat16)
    )
    results = {}
    for platform in ("cpu", "tpu", "cuda"):
      text = traced.lower(lowering_platforms=(platform,)).as_text()
      results[platform] = set(re.findall(r"dot_general.*-> tensor<(.*)>", text))
    self.assertEqual(results["cpu"], {"8x8xf32", "8x16xf32"})
    for platform in ("tpu", "cuda"):
      self.assertEqual(results[platform], {"3x8x8xbf16", "3x8x16xbf16"})

  def test_a_gradient_of_zero_moves_nothing_but_decay(self):
    tree = {"wide": declared()["wide"], "norm": declared()["norm"]}
    weights = random_like(tree, 0)
    cfg = OptimConfig(muon_lr=0.5, weight_decay=0.1)
    [after], _ = run(cfg, tree, weights, [jax.tree.map(jnp.zeros_like, weights)])
    np.testing.assert_allclose(after["wide"], np.asarray(weights["wide"]) * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(after["norm"], weights["norm"])

  def test_a_mesh_of_eight_gives_the_same_updates(self):
    tree = declared()
    weights = random_like(tree, 0)
    gradients = [random_like(tree, 1 + i) for i in range(2)]
    plain, _ = run(CONFIG, tree, weights, gradients)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=4, model=2))):
      place = functools.partial(
        jax.tree.map, lambda w, x: sharding.constrain(x, w.axes), tree, is_leaf=params.is_weight
      )
      split, state = run(CONFIG, tree, place(weights), [place(g) for g in gradients])
      optim.check_partition(state, tree)
    self.assertEqual(split[1]["heads"]["o"].sharding.spec, P("model", None, "data"))
    for step in range(2):
      for name, x in flat(split[step]).items():
        np.testing.assert_allclose(x, flat(plain[step])[name], **self.tolerance, err_msg=name)


class MicrobatchTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 6)
  def test_parts_with_unequal_targets_add_up_to_the_whole(self, microbatches):
    random = np.random.default_rng(0)
    x, y, w = random.normal(size=(6, 4, 3)), random.normal(size=(6, 4)), random.normal(size=3)
    mask = random.random((6, 4)) < 0.4
    mask[1] = False  # a sequence without a target: with six parts, a part without any
    batch = windows.Batch(*(jnp.asarray(a, jnp.float32) for a in (x, y, mask)))

    def mean_square(weights, batch):
      error = jnp.einsum("btd,d->bt", batch.inputs, weights["w"]) - batch.targets
      return jnp.sum(batch.loss_mask * error**2) / jnp.maximum(jnp.sum(batch.loss_mask), 1)

    loss, found = training_step.gradients(
      mean_square, {"w": jnp.asarray(w, jnp.float32)}, batch, microbatches
    )
    error = np.einsum("btd,d->bt", x, w) - y
    np.testing.assert_allclose(loss, (mask * error**2).sum() / mask.sum(), rtol=1e-5)
    want = 2 * np.einsum("bt,btd->d", mask * error, x) / mask.sum()
    np.testing.assert_allclose(found["w"], want, rtol=1e-5)


class ScheduleTest(parameterized.TestCase):
  def rates(self, cfg, steps):
    multiplier = optim.schedule(cfg, steps)
    return [float(multiplier(step)) for step in range(steps + 1)]

  def test_constant(self):
    self.assertEqual(self.rates(OptimConfig(), 5), [1.0] * 6)

  def test_warm_up_is_linear_and_starts_above_zero(self):
    np.testing.assert_allclose(
      self.rates(OptimConfig(warmup_steps=4), 6), [0.25, 0.5, 0.75, 1, 1, 1, 1], rtol=1e-6
    )

  def test_decay_is_a_cosine_that_ends_with_the_run(self):
    got = self.rates(OptimConfig(decay_steps=4, final_scale=0.2), 10)
    np.testing.assert_allclose(got[:7], 1.0, rtol=1e-6)
    np.testing.assert_allclose(got[8], 0.6, rtol=1e-6)  # halfway down
    np.testing.assert_allclose(got[10], 0.2, rtol=1e-6)
    self.assertEqual(got, sorted(got, reverse=True))
    # optax's own cosine over the same stretch
    cosine = optax.cosine_decay_schedule(1.0, 4, alpha=0.2)
    np.testing.assert_allclose(got[6:], [float(cosine(i)) for i in range(5)], rtol=1e-6)

  def test_shares_are_of_the_run(self):
    for steps in (8, 80):
      shares = OptimConfig(warmup_share=1 / 8, decay_share=0.5, final_scale=0.0)
      counted = OptimConfig(warmup_steps=steps // 8, decay_steps=steps // 2, final_scale=0.0)
      self.assertEqual(self.rates(shares, steps), self.rates(counted, steps))

  def test_warm_up_and_decay_multiply(self):
    got = self.rates(OptimConfig(warmup_steps=4, decay_steps=4, final_scale=0.0), 4)
    np.testing.assert_allclose(got[1], 0.5 * 0.5 * (1 + math.cos(math.pi / 4)), rtol=1e-6)


class PartitionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tree = declared()
    self.weights = random_like(self.tree, 0)

  def test_the_table_names_every_weight_once(self):
    text = optim.partition_table(self.tree)
    lines = [line.split() for line in text.splitlines()]
    by_name = {name.strip(","): line for line in lines[:-1] for name in line if name[0].isalpha()}
    self.assertEqual(by_name["heads/q"][:2], ["muon", "8x2x10"])
    self.assertEqual(by_name["embed"][:2], ["adam", "4x8"])
    self.assertEqual(by_name["norm"][:4], ["adam", "8", "no", "decay"])
    for name in flat(self.weights):
      self.assertEqual(text.count(name), 1, name)
    muon = 8 * 8 + 2 * 8 * 20 + 8 * 20 + 8 * 6 + 20 * 8
    self.assertEqual(text.splitlines()[-1], f"  muon: {muon} parameters, adam: 40 parameters")
    groups = [line[0] for line in lines[:-1]]
    self.assertEqual(groups, sorted(groups, reverse=True))

  def test_the_state_holds_momentum_for_muon_weights_alone(self):
    state = optim.make(CONFIG, self.tree, STEPS).init(self.weights)
    optim.check_partition(state, self.tree)
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optim.MuonState))
    [momentum] = [s.momentum for s in found if isinstance(s, optim.MuonState)]
    self.assertEqual(set(flat(momentum)), set(NUM_IN))
    adam = optax.tree_utils.tree_get(state, "mu")
    self.assertEqual(set(flat(adam)), {"embed", "norm"})

  def test_frozen_weights_have_no_state_no_update_and_no_part_in_the_norm(self):
    cfg = dataclasses.replace(CONFIG, trained=("heads/*", "norm"), clip_norm=1.0)
    tree = optim.freeze(cfg, self.tree)
    text = optim.partition_table(tree).splitlines()
    self.assertEqual({line.split()[0]: len(line.split(", ")) for line in text[:-1]}["frozen"], 1)
    self.assertTrue(text[-1].endswith(f"frozen: {64 + 160 + 160 + 32} parameters"), text[-1])
    grads = random_like(self.tree, 1)
    [after], state = run(cfg, tree, self.weights, [grads])
    optim.check_partition(state, tree)
    sizes = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    self.assertEqual(sizes, 8 * 2 * 10 + 8 * 2 * 3 + 2 * 10 * 8 + 2 * 8)  # one momentum, two moments
    part = {name: self.tree[name] for name in ("heads", "norm")}
    [alone], _ = run(
      dataclasses.replace(cfg, trained=("*",)),
      part,
      {name: self.weights[name] for name in part},
      [{name: grads[name] for name in part}],
    )
    for name, x in flat(after).items():
      want = flat(alone)[name] if name.startswith(("heads", "norm")) else flat(self.weights)[name]
      np.testing.assert_array_equal(x, want, err_msg=name)
      self.assertEqual(np.array_equal(x, flat(self.weights)[name]), not name.startswith(("heads", "norm")))

  def test_a_state_for_frozen_weights_is_noticed(self):
    state = optim.make(CONFIG, self.tree, STEPS).init(self.weights)
    frozen = optim.freeze(dataclasses.replace(CONFIG, trained=("[!n]*",)), self.tree)
    with self.assertRaisesRegex(AssertionError, r"adam holds \['norm'\] beside"):
      optim.check_partition(state, frozen)

  def test_a_pattern_that_names_nothing_is_refused(self):
    with self.assertRaisesRegex(ConfigError, r"^optim.trained\[1\]: names no weight: 'head'"):
      optim.freeze(dataclasses.replace(CONFIG, trained=("embed", "head")), self.tree)
    with self.assertRaisesRegex(ConfigError, "^optim.trained: must have at least 1"):
      OptimConfig(trained=())

  def test_another_partition_is_noticed(self):
    other = self.tree | {"embed": params.matrix(4, 8, axes=("vocab", None)), "tall": None}
    other["tall"] = params.Weight((20, 8), (None, None), params.normal(1.0))
    state = optim.make(CONFIG, other, STEPS).init(self.weights)
    optim.check_partition(state, other)
    with self.assertRaisesRegex(AssertionError, r"muon holds \['embed'\] .* lacks \['tall'\]"):
      optim.check_partition(state, self.tree)

  def test_the_model_gives_muon_its_matrices(self):
    cfg = ModelConfig(
      vocab_size=3,
      embed_dim=8,
      blocks=("attn", "gdn"),
      attention=AttentionConfig(num_heads=2, head_dim=4),
      fast=FastConfig(num_heads=1, key_dim=4, value_dim=4),
    )
    tree = model.declare(cfg)
    state = jax.eval_shape(lambda: optim.make(CONFIG, tree, STEPS).init(model.init(cfg, jax.random.key(0))))
    optim.check_partition(state, tree)
    self.assertEqual({x.dtype for x in jax.tree.leaves(state) if x.ndim}, {jnp.dtype("float32")})
