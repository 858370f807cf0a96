"""The blocks `kda`, `gdn2` and `delta` in a whole model: as the oracle, and at home everywhere `gdn` is.

The layers themselves, pads and cuts are in test_fast_weights.py, their kernels in tests/kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import carry, config, fast_weights, flax_module, looped, model, optim, params, windows
from sleep_jax.config import SleepConfig
from sleep_jax.cost import flops, footprint
from tests import hybrids, oracle, test_model_oracle, test_promises, torch_peer

KINDS = ("kda", "gdn2", "delta")
MIXED = ("kda", "attn", "gdn2", "delta")
CASE = test_model_oracle.case("the others", pattern=MIXED, length=10, scored=(8, 9), sleep={"num_passes": 2})


class DeclarationTest(parameterized.TestCase):
  @parameterized.parameters(*KINDS)
  def test_shapes_are_those_of_the_papers_layers(self, kind):
    """The oracle's parameters were written from the equations."""
    cfg = hybrids.model_config((kind,))
    declared = jax.tree.map(lambda w: w.shape, model.declare(cfg), is_leaf=params.is_weight)
    self.assertEqual(declared, jax.tree.map(np.shape, oracle.random_params(0, (kind,))))

  def test_every_weight_has_an_optimizer_and_matrices_have_muon(self):
    cfg = hybrids.model_config(MIXED)
    declared = model.declare(cfg)
    tx = optim.make(config.OptimConfig(), declared, 10)
    optim.check_partition(jax.eval_shape(tx.init, footprint.weights(cfg)), declared)
    kda, _, gdn2, delta = (declared["blocks"][str(i)]["mixer"] for i in range(4))
    matrices = lambda mixer: {name for name, w in mixer.items() if w.group == "muon"}  # noqa: E731
    shared = {"q", "k", "v", "o"}
    low_rank = {"f_a", "f_b", "gate_a", "gate_b"}
    self.assertEqual(matrices(kda), shared | low_rank)
    self.assertEqual(matrices(gdn2), shared | low_rank | {"e", "w"})
    self.assertEqual(matrices(delta), shared | {"gate"})
    undecayed = {name for name, w in gdn2.items() if not w.decay}
    self.assertEqual(undecayed, {"A_log", "dt_bias", "gate_bias", "out_norm"})

  def test_at_the_start_channels_forget_at_rates_of_their_own(self):
    """exp(A_log) in the config's range, softplus(dt_bias) log-uniform on (1e-3, 1e-1), one a channel."""
    cfg = hybrids.model_config(("kda",), fast={"num_heads": 50, "key_dim": 40, "decay_init": (0.5, 2.0)})
    mixer = params.init(fast_weights.declare(cfg, "kda"), jax.random.key(0))
    steps = np.log(jax.nn.softplus(mixer["dt_bias"]))
    self.assertEqual(steps.shape, (50, 40))
    self.assertBetween(np.exp(mixer["A_log"]).min(), 0.5, 0.6)
    self.assertBetween(np.exp(mixer["A_log"]).max(), 1.9, 2.0)
    self.assertBetween(steps.min(), np.log(1e-3) - 1e-3, np.log(1.05e-3))
    self.assertBetween(np.mean(steps), np.log(1e-2) - 0.15, np.log(1e-2) + 0.15)

  def test_flops_by_hand(self):
    cfg = hybrids.model_config(("kda", "gdn2"), embed_dim=16, window=8, fast={"key_dim": 4, "value_dim": 6})
    segments = windows.plan(np.arange(16) >= 15, 8)  # one window asleep, one with one answer
    shared = (
      16 * 2 * (4 + 4 + 6) + 2 * 6 * 16 + 2 * 16 * 6 + 6 * 2 * (4 + 6)
    )  # q k v, o, f_a gate_a, f_b gate_b
    mlp, chunk = 3 * 16 * 16, 2 * 2 * (2 * 8 * 4 + 3 * 4 * 6 + 2 * 8 * 6)
    kda, gdn2 = 2 * (shared + mlp) + chunk, 2 * (shared + 16 * 2 * (4 + 6) + mlp) + chunk
    count = flops.per_sequence(segments, cfg, SleepConfig(num_passes=3))
    self.assertEqual(count.asleep, 3 * 8 * (kda + gdn2))
    self.assertEqual(count.awake, 8 * (kda + gdn2) + 2 * 16 * 11)

  def test_the_state_costs_what_that_of_gdn_costs(self):
    sizes = {kind: footprint.state(hybrids.model_config((kind,))) for kind in ("gdn", *KINDS)}
    self.assertEqual(sizes, dict.fromkeys(sizes, sizes["gdn"]))


class ModelTest(parameterized.TestCase):
  def test_logits_and_state_equal_the_oracles_and_those_token_by_token(self):
    cfg, sleep_cfg, weights, batch, segments, settings = test_model_oracle.prepared(CASE)
    logits, state = hybrids.reader(segments, cfg, sleep_cfg)(weights, batch)
    expected = oracle.forward(weights, batch.inputs, batch.loss_mask, **settings)
    test_model_oracle.check_logits(self, logits, expected, batch, segments)
    hybrids.assert_near(
      hybrids.as_dicts(state.fast), hybrids.from_oracle(expected["state"]), test_model_oracle.STATE
    )

    tokens = hybrids.random_tokens(len(batch.inputs), 3, 6)
    opened = carry.open_window(state, cfg)
    whole, after = hybrids.jit(lambda x, s: model.predict(weights, x, s, cfg))(tokens, opened)
    decode = hybrids.jit(lambda x, s, cache: model.decode(weights, x, s, cache, cfg))
    fast, cache, one_by_one = opened.fast, looped.init_cache(cfg, len(tokens)), []
    for t in range(3):
      out, fast, cache = decode(tokens[:, t : t + 1], fast, cache)
      one_by_one.append(out)
    hybrids.assert_near(np.concatenate(one_by_one, axis=1), whole, 2e-5)
    hybrids.assert_near(hybrids.as_dicts(fast), hybrids.as_dicts(after.fast), 2e-5)

  @pytest.mark.slow
  def test_loss_and_gradients_of_every_weight(self):
    """By complex step in the oracle, through two passes over two windows."""
    test_model_oracle.GradientTest.check(self, CASE, entries=2)

  @pytest.mark.slow
  def test_the_flax_face_computes_the_same(self):
    cfg, sleep_cfg, weights, batch, segments, _ = test_model_oracle.prepared(CASE)
    module = flax_module.SleepingHybrid(cfg, sleep_cfg, weights=weights)
    hybrids.assert_same(module.tree(), weights)
    got = hybrids.jit(lambda batch: module(batch, segments)[0])(batch)
    hybrids.assert_near(got, hybrids.reader(segments, cfg, sleep_cfg)(weights, batch)[0], 1e-6)


@pytest.mark.slow
class MeshTest(test_promises.MeshTest):
  """One device and eight give the same; a pod is checked without one."""

  cfg = hybrids.model_config(("kda", "gdn2", "attn"), vocab_size=12, embed_dim=16)


@pytest.mark.peers
class KimiLinearTest(parameterized.TestCase):
  """The `kda` layer against transformers' own; both in float32, each with its own order of sums."""

  def test_outputs_and_gradients(self):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers.models.kimi_linear")
    cfg = hybrids.model_config(("kda",), fast={"key_dim": 5, "value_dim": 5})  # theirs has one width
    weights = hybrids.random_params(cfg)["blocks"]["0"]["mixer"]
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 2, 19, cfg.embed_dim)).astype(np.float32)
    module, names = torch_peer.kimi_linear_layer(weights)
    their_x = torch.from_numpy(x).requires_grad_()
    theirs = module(their_x)
    theirs.backward(torch.from_numpy(cotangent))
    tensors = dict(module.named_parameters())
    expected = {name: tensors[their].grad.numpy() for name, their in names.items()}
    sizes = 3 * [cfg.fast.num_heads * cfg.fast.key_dim]
    taps = np.split(tensors["conv1d.weight"].grad.numpy()[:, 0].T, np.cumsum(sizes)[:2], axis=1)
    expected = {name: value.T if value.ndim == 2 else value for name, value in expected.items()}
    expected |= {f"{name}_conv": tap for name, tap in zip("qkv", taps, strict=True)}
    expected = {name: value.reshape(weights[name].shape) for name, value in expected.items()}
    self.assertEqual(set(expected), set(weights))

    def total(weights, x):
      state = fast_weights.init_state(cfg, 2, "kda")
      out = fast_weights.fast_weights(weights, x, state, cfg, fast_weights.RULES["kda"])[0]
      return jnp.sum(cotangent * out), out

    slopes, out = hybrids.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(weights, x)
    hybrids.assert_near(out, theirs.detach().numpy(), 2e-5)
    hybrids.assert_near(slopes, (expected, their_x.grad.numpy()), 1e-4)
