"""The oracle judged: by hand, by a second implementation, by finite differences and by others' code."""

import itertools

import numpy as np
import pytest
from absl.testing import parameterized

from tests import oracle, torch_peer

HYBRID = ("attn", "gdn", "attn", "hebbian")
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # the same sums in float64, in another order


def _batch(seed, batch=2, length=18, scored=5, vocab=11):
  """Tokens, targets and a mask that scores some of the last positions."""
  rng = np.random.default_rng(seed)
  inputs, targets = rng.integers(0, vocab, (2, batch, length))
  mask = np.zeros((batch, length))
  mask[:, length - scored :] = rng.random((batch, scored)) < 0.7
  mask[0, -1] = 1
  return inputs, targets, mask


class ByHandTest(parameterized.TestCase):
  """Numbers small enough to check on paper."""

  q, k = np.array([[1.0, -1.0]]), np.array([[0.6, 0.8]])
  v, b, g = np.array([[3.0]]), np.array([0.5]), np.log([0.5])
  S = np.array([[[1.0], [2.0]]])

  def test_gated_delta_step(self):
    # S decays to (0.5, 1); it predicts 0.6 * 0.5 + 0.8 = 1.1; half of 3 - 1.1 is written along k.
    o, S = oracle.gated_delta_step(self.q, self.k, self.v, self.g, self.b, self.S)
    np.testing.assert_allclose(S[0, :, 0], [0.5 + 0.6 * 0.95, 1 + 0.8 * 0.95], rtol=1e-14)
    np.testing.assert_allclose(o, [[-0.69]], rtol=1e-14)

  def test_gated_hebbian_step(self):
    o, S = oracle.gated_hebbian_step(self.q, self.k, self.v, self.g, self.b, self.S)
    np.testing.assert_allclose(S[0, :, 0], [0.5 + 0.6 * 1.5, 1 + 0.8 * 1.5], rtol=1e-14)
    np.testing.assert_allclose(o, [[-0.8]], rtol=1e-14)

  def test_full_strength_without_decay_stores_exactly_and_overwrites(self):
    o, S = oracle.gated_delta_step(self.k, self.k, self.v, np.zeros(1), np.ones(1), self.S)
    np.testing.assert_allclose(o, self.v, rtol=1e-14)
    o, _ = oracle.gated_delta_step(self.k, self.k, -self.v, np.zeros(1), np.ones(1), S)
    np.testing.assert_allclose(o, -self.v, rtol=1e-14)

  def test_the_last_tap_is_the_current_token(self):
    taps = np.array([1.0, 10.0, 100.0])[:, None, None]
    x = np.array([1.0, 2.0, 3.0])[None, :, None, None]
    y, left = oracle.short_convolution(x, taps, np.zeros((1, 2, 1, 1)))
    np.testing.assert_array_equal(y.ravel(), [100, 210, 321])
    np.testing.assert_array_equal(left.ravel(), [2, 3])
    y, left = oracle.short_convolution(x[:, :1], taps, np.array([5.0, 7.0])[None, :, None, None])
    np.testing.assert_array_equal(y.ravel(), [5 + 70 + 100])
    np.testing.assert_array_equal(left.ravel(), [7, 1])

  def test_rope_turns_channel_i_with_channel_i_plus_half(self):
    turned = oracle.rope(np.array([[1.0, 0, 0, 1]]), 3, theta=100.0)  # frequencies 1 and 100^(-2/4) = 0.1
    np.testing.assert_allclose(turned, [[np.cos(3), -np.sin(0.3), np.sin(3), np.cos(0.3)]], rtol=1e-14)

  def test_a_key_value_head_serves_neighbouring_query_heads(self):
    p = oracle.random_params(0, ("attn",), heads=4, kv_heads=2, head_dim=3)["blocks"]["0"]["mixer"]
    x = np.random.default_rng(1).normal(size=(1, 5, 12))
    second = p | {"v": p["v"] * np.array([1.0, 0.0])[:, None]}  # key-value head 1 is silenced
    heads = [
      oracle.attention(second | {"o": np.eye(4)[j][:, None, None] * p["o"]}, x, np.ones((1, 5), bool))
      for j in range(4)
    ]
    self.assertEqual([bool(np.any(out)) for out in heads], [True, True, False, False])

  def test_elementary_functions_far_from_zero(self):
    x = np.array([-800.0, -30, 0, 30, 800])
    np.testing.assert_allclose(oracle.sigmoid(x), [0, np.exp(-30), 0.5, 1, 1], atol=1e-15)
    np.testing.assert_allclose(oracle.softplus(x), [0, np.exp(-30), np.log(2), 30, 800], rtol=1e-12)
    # and their derivatives by complex step: sigmoid' = s (1 - s), softplus' = sigmoid
    step = np.imag(oracle.softplus(x + 1e-30j)) / 1e-30
    np.testing.assert_allclose(step, oracle.sigmoid(x), rtol=1e-12)
    step, s = np.imag(oracle.sigmoid(x + 1e-30j)) / 1e-30, oracle.sigmoid(x)
    np.testing.assert_allclose(step, s * (1 - s), rtol=1e-12, atol=1e-15)


class MethodTest(parameterized.TestCase):
  """What Algorithm 1 promises."""

  def setUp(self):
    super().setUp()
    self.inputs, self.targets, self.mask = _batch(1)

  def run_model(self, params, *, pattern=HYBRID, window=5, num_passes=2, inputs=None, mask=None, **settings):
    inputs = self.inputs if inputs is None else inputs
    mask = self.mask if mask is None else mask
    return oracle.forward(
      params, inputs, mask, pattern=pattern, window=window, num_passes=num_passes, **settings
    )

  @parameterized.product(
    pattern=(HYBRID, ("gdn", "attn"), ("hebbian",)),
    window=(5, 6, 18, 40),
    sizes=({}, {"conv_size": 0, "qk_norm": False}, {"conv_size": 2, "kv_heads": 4}),
  )
  def test_one_pass_is_the_hybrid_without_windows(self, pattern, window, sizes):
    params = oracle.random_params(2, pattern, **sizes)
    windowed = self.run_model(params, pattern=pattern, window=window, num_passes=1)
    whole = oracle.unwindowed_hybrid(params, self.inputs, pattern=pattern, window=window)
    # The mask scores nothing before position 13, so the windows before the one that holds it are slept on.
    self.assertEqual(list(windowed["positions"]), list(range(13 // window * window, 18)))
    np.testing.assert_allclose(windowed["logits"], whole["logits"][:, windowed["positions"]], **EXACT)
    for name, S in whole["S"].items():
      np.testing.assert_allclose(windowed["state"]["S"][name], S, **EXACT)

  def test_two_passes_are_something_else(self):
    params = oracle.random_params(2, HYBRID)
    once, twice = (self.run_model(params, num_passes=n) for n in (1, 2))
    self.assertGreater(np.abs(once["logits"] - twice["logits"]).max(), 1e-3)

  def test_a_pass_over_one_block_without_neighbours_by_hand(self):
    """One "gdn" block, N = 2: the second pass reads what the first left in h, with the same left context."""
    params = oracle.random_params(3, ("gdn",))
    p, keep = params["blocks"]["0"], np.ones((2, 5), bool)
    start = oracle.initial_state(params, ("gdn",), 2)
    rng = np.random.default_rng(0)
    start["conv"]["0"] = {name: rng.normal(size=y.shape) for name, y in start["conv"]["0"].items()}
    h, S, left = params["embed"][self.inputs[:, :5]], start["S"]["0"], None
    for _ in range(2):
      x = oracle.rms_norm(h, p["norm"])
      o, S, left = oracle.fast_weights(p["mixer"], x, S, start["conv"]["0"], keep, "gdn")
      h = h + o
      h = h + oracle.mlp(p["mlp"], oracle.rms_norm(h, p["mlp_norm"]))
    slept = self.run_model(
      params, pattern=("gdn",), inputs=self.inputs[:, :5], mask=np.zeros((2, 5)), state=start
    )
    np.testing.assert_allclose(slept["state"]["S"]["0"], S, **EXACT)
    for name, y in left.items():
      np.testing.assert_allclose(slept["state"]["conv"]["0"][name], y, **EXACT)
    self.assertEqual(slept["logits"].shape, (2, 0, 11))

  def test_only_looped_blocks_repeat(self):
    params = oracle.random_params(4, ("gdn", "attn", "gdn", "hebbian"))
    run = self.run_model(params, pattern=("gdn", "attn", "gdn", "hebbian"), num_passes=3, looped=(1, 3))
    visits = [{name: len(S) - 1 for name, S in chunk["S"].items()} for chunk in run["trace"]]
    self.assertEqual([chunk["asleep"] for chunk in run["trace"]], [True, True, False, False])
    self.assertEqual(visits, [{"0": 1, "2": 3, "3": 1}] * 2 + [{"0": 1, "2": 1, "3": 1}] * 2)
    everything = self.run_model(params, pattern=("gdn", "attn", "gdn", "hebbian"), num_passes=3)
    named = self.run_model(params, pattern=("gdn", "attn", "gdn", "hebbian"), num_passes=3, looped=(0, 4))
    np.testing.assert_array_equal(everything["logits"], named["logits"])

  @parameterized.product(conv_context=("carry", "reset"), num_passes=(1, 3), cut=(5, 10, 15))
  def test_stopping_between_windows_changes_nothing(self, conv_context, num_passes, cut):
    params, settings = (
      oracle.random_params(5, HYBRID),
      {"conv_context": conv_context, "num_passes": num_passes},
    )
    whole = self.run_model(params, **settings)
    before = self.run_model(params, inputs=self.inputs[:, :cut], mask=self.mask[:, :cut], **settings)
    after = self.run_model(
      params, inputs=self.inputs[:, cut:], mask=self.mask[:, cut:], state=before["state"], **settings
    )
    logits = np.concatenate([before["logits"], after["logits"]], axis=1)
    np.testing.assert_array_equal(logits, whole["logits"])
    for name, S in whole["state"]["S"].items():
      np.testing.assert_array_equal(after["state"]["S"][name], S)

  @parameterized.product(kind=("gdn", "hebbian"), cut=(1, 2, 4, 7))
  def test_a_recurrence_split_in_two_gives_the_same_state(self, kind, cut):
    params = oracle.random_params(6, (kind,))
    p, state = params["blocks"]["0"]["mixer"], oracle.initial_state(params, (kind,), 2)
    x, keep = np.random.default_rng(0).normal(size=(2, 8, 12)), np.ones((2, 8), bool)
    whole, S, left = oracle.fast_weights(p, x, state["S"]["0"], state["conv"]["0"], keep, kind)
    a, S_cut, left_cut = oracle.fast_weights(
      p, x[:, :cut], state["S"]["0"], state["conv"]["0"], keep[:, :cut], kind
    )
    b, S_cut, left_cut = oracle.fast_weights(p, x[:, cut:], S_cut, left_cut, keep[:, cut:], kind)
    np.testing.assert_allclose(np.concatenate([a, b], axis=1), whole, **EXACT)
    np.testing.assert_allclose(S_cut, S, **EXACT)
    for name in "qkv":
      np.testing.assert_allclose(left_cut[name], left[name], **EXACT)

  def test_evicted_tokens_are_seen_through_the_carried_state_alone(self):
    """Another first window, and what it left replaced by zeros: later logits must not notice."""
    params = oracle.random_params(7, HYBRID)
    other = self.inputs.copy()
    other[:, :5] = (other[:, :5] + 1) % 11

    def difference(conv_context, forget):
      def replace(index, state):
        zeros = oracle.initial_state(params, HYBRID, 2)
        return state | {part: zeros[part] for part in forget} if index == 1 else state

      settings = {"conv_context": conv_context, "at_window_start": replace}
      runs = [self.run_model(params, inputs=tokens, **settings) for tokens in (self.inputs, other)]
      return np.abs(runs[0]["logits"] - runs[1]["logits"]).max()

    self.assertGreater(difference("reset", ()), 1e-3)
    self.assertEqual(difference("reset", ("S",)), 0)
    # With "carry" the c - 1 last convolution inputs are a second, small memory; without both, nothing.
    self.assertGreater(difference("carry", ("S",)), 1e-6)
    self.assertEqual(difference("carry", ("S", "conv")), 0)

  def test_no_token_sees_its_future(self):
    params = oracle.random_params(8, HYBRID)
    changed = self.inputs.copy()
    changed[:, 16] = (changed[:, 16] + 1) % 11
    a, b = (self.run_model(params, inputs=tokens)["logits"] for tokens in (self.inputs, changed))
    differs = np.any(a != b, axis=(0, 2))  # logits of positions 10..17
    np.testing.assert_array_equal(differs, np.arange(10, 18) >= 16)


class PadTest(parameterized.TestCase):
  """A pad changes nothing."""

  pads = (0, 3, 5, 7, 10)  # none, part of a window, a window, a window and a part, two windows

  def setUp(self):
    super().setUp()
    self.params = oracle.random_params(9, HYBRID)
    self.inputs, _, self.mask = _batch(2, batch=len(self.pads))
    self.valid = np.arange(18) >= np.array(self.pads)[:, None]
    self.settings = {"pattern": HYBRID, "window": 5, "num_passes": 2}

  @parameterized.product(conv_context=("carry", "reset"))
  def test_each_row_equals_the_same_tokens_without_pads(self, conv_context):
    settings = self.settings | {"conv_context": conv_context}
    padded = oracle.forward(self.params, self.inputs, self.mask, valid=self.valid, **settings)
    mask = self.mask.any(axis=0, keepdims=True)  # the layout of sleep and wake is the batch's
    for row, pads in enumerate(self.pads):
      state, logits = None, []
      # The row's own windows: the first one shorter by the pads in it.
      cuts = [pads, *range(pads // 5 * 5 + 5, 18, 5), 18]
      for start, stop in itertools.pairwise(cuts):
        run = oracle.forward(
          self.params, self.inputs[row : row + 1, start:stop], mask[:, start:stop], state=state, **settings
        )
        state, logits = run["state"], [*logits, run["logits"]]
      np.testing.assert_allclose(padded["logits"][row], np.concatenate(logits, axis=1)[0], **EXACT)
      for part in ("S", "conv"):
        for (_, expected), (path, got) in zip(
          oracle.leaves(state[part]), oracle.leaves(padded["state"][part]), strict=True
        ):
          np.testing.assert_allclose(got[row], expected[0], **EXACT, err_msg=str((part, path)))

  def test_it_does_not_matter_which_token_a_pad_is(self):
    other = np.where(self.valid, self.inputs, (self.inputs + 1) % 11)
    a, b = (
      oracle.forward(self.params, tokens, self.mask, valid=self.valid, **self.settings)
      for tokens in (self.inputs, other)
    )
    np.testing.assert_array_equal(a["logits"], b["logits"])

  def test_a_window_of_pads_leaves_any_state_as_it_was(self):
    start = oracle.forward(self.params, self.inputs[:, :10], np.zeros((5, 10)), **self.settings)["state"]
    run = oracle.forward(
      self.params, self.inputs[:, :5], np.zeros((5, 5)), valid=np.zeros((5, 5)), state=start, **self.settings
    )
    for name, S in start["S"].items():
      self.assertGreater(np.abs(S).max(), 0)
      np.testing.assert_array_equal(run["state"]["S"][name], S)

  def test_one_pass_without_windows_drops_the_pads(self):
    settings = self.settings | {"num_passes": 1}
    windowed = oracle.forward(self.params, self.inputs, self.mask, valid=self.valid, **settings)
    whole = oracle.unwindowed_hybrid(self.params, self.inputs, pattern=HYBRID, window=5, valid=self.valid)
    np.testing.assert_allclose(windowed["logits"], whole["logits"][:, windowed["positions"]], **EXACT)

  def test_a_scored_pad_is_refused(self):
    with self.assertRaisesRegex(ValueError, "scores a pad"):
      oracle.forward(self.params, self.inputs, np.ones((5, 18)), valid=self.valid, **self.settings)


class DerivativeTest(parameterized.TestCase):
  @parameterized.product(
    settings=(
      {"num_passes": 3, "conv_context": "reset"},
      {"num_passes": 2, "looped": (1, 3), "padded": True},
    )
  )
  def test_complex_step_agrees_with_central_differences(self, settings):
    settings = dict(settings)
    params, (inputs, targets, mask) = oracle.random_params(10, HYBRID), _batch(3, length=10, scored=2)
    if settings.pop("padded", False):
      settings["valid"] = np.arange(10) >= np.array([2, 5])[:, None]
    settings |= {"pattern": HYBRID, "window": 4}
    entries = oracle.sample_gradients(params, inputs, targets, mask, entries=1, seed=1, **settings)
    self.assertEqual([e.path for e in entries], [path for path, _ in oracle.leaves(params)])
    for path, index, gradient in entries:
      around = []
      for step in (1e-6, -1e-6):
        value = np.array(oracle.leaf(params, path))
        value[index] += step
        moved = oracle.replace_leaf(params, path, value)
        around.append(oracle.loss(moved, inputs, targets, mask, **settings))
      # Differences are the weak side: truncation (1e-8 measured where the loss bends most, falling as the
      # square of the step) and rounding (1e-15 over the step).
      np.testing.assert_allclose(gradient, (around[0] - around[1]) / 2e-6, rtol=1e-6, atol=1e-8, err_msg=path)
      self.assertNotEqual(gradient, 0, msg=path)

  def test_the_loss_is_the_mean_surprise_at_scored_positions(self):
    params, (inputs, targets, mask) = oracle.random_params(11, HYBRID), _batch(5)
    settings = {"pattern": HYBRID, "window": 5, "num_passes": 2}
    run = oracle.forward(params, inputs, mask, **settings)
    surprise = [
      -np.log(np.exp(logits[targets[row, at]]) / np.exp(logits).sum())
      for row in range(2)
      for at, logits in zip(run["positions"], run["logits"][row], strict=True)
      if mask[row, at]
    ]
    self.assertEqual(len(surprise), mask.sum())
    np.testing.assert_allclose(oracle.loss(params, inputs, targets, mask, **settings), np.mean(surprise))

  def test_complex_step_is_the_softmax_gradient_for_the_head(self):
    """d loss / d head[:, j] = sum of mask (p_j - [target = j]) x / sum of mask, x before the head."""
    params, (inputs, targets, mask) = oracle.random_params(11, HYBRID), _batch(4)
    settings = {"pattern": HYBRID, "window": 5, "num_passes": 2}
    run = oracle.forward(params, inputs, mask, **settings)
    at = run["positions"]
    probability = oracle.softmax(run["logits"])
    # x by a head that is the identity
    seen = oracle.forward(params | {"head": np.eye(12)}, inputs, mask, **settings)["logits"]
    error = (probability - np.eye(11)[targets[:, at]]) * mask[:, at, None]
    expected = np.einsum("btd,btv->dv", seen, error) / mask.sum()
    for index in ((0, 0), (3, 7), (11, 10)):
      got = oracle.complex_step_gradient(params, ("head",), index, inputs, targets, mask, **settings)
      np.testing.assert_allclose(got, expected[index], rtol=1e-10)


@pytest.mark.peers
class OlmoHybridTest(parameterized.TestCase):
  """The "gdn" layer against transformers' own, which computes in float32."""

  @parameterized.product(conv_size=(4, 0), splits=((70,), (2, 5, 70)))
  def test_the_layer_is_olmo_hybrids(self, conv_size, splits):
    pytest.importorskip("torch")
    pytest.importorskip("transformers.models.olmo_hybrid")
    params = oracle.random_params(12, ("gdn",), width=16, key_width=4, value_width=6, conv_size=conv_size)
    p, state = params["blocks"]["0"]["mixer"], oracle.initial_state(params, ("gdn",), 2)
    rng = np.random.default_rng(0)
    windows = [rng.normal(size=(2, length, 16)) for length in splits]
    theirs, their_S = torch_peer.run_olmo_hybrid(p, *windows)
    S, left = state["S"]["0"], state["conv"]["0"]
    for x, o in zip(windows, theirs, strict=True):
      ours, S, left = oracle.fast_weights(p, x, S, left, np.ones(x.shape[:2], bool), "gdn")
      np.testing.assert_allclose(ours, o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(S, their_S, rtol=1e-5, atol=1e-5)
    self.assertGreater(np.abs(S).max(), 0.1)
