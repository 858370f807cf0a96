"""What each baseline isolates: it is what its name says, made from a model that sleeps.

Tolerances are those of `test_model_oracle`, for its reasons.
"""

import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, windows
from sleep_jax.config import baselines
from tests import hybrids, oracle
from tests.hybrids import assert_near

NEAR, GRADIENT = 1e-4, 1e-3
PAIR = ("gdn", "attn")


def baseline(name, pattern=PAIR, *, sleep=None, **changes):
  """The configs of a baseline of a sleeping hybrid."""
  sleeping = config.Config(
    data=None,
    model=hybrids.model_config(pattern, **changes),
    sleep=config.SleepConfig(**{"num_passes": 3, "first_block": 1} | (sleep or {})),
  )
  made = baselines.BASELINES[name](sleeping)
  return made.model, made.sleep


def unwindowed(eviction):
  """The hybrid that is never cut, at the scored positions, in the form that `oracle.loss` asks for."""

  def run(params, inputs, loss_mask, **settings):
    at = np.flatnonzero(np.any(loss_mask, axis=0))
    plain = oracle.unwindowed_hybrid(params, inputs, pattern=PAIR, window=4, eviction=eviction, **settings)
    return {"logits": plain["logits"][:, at], "positions": at}

  return run


ORDINARY = (("vanilla_hybrid", "sliding", "hard"), ("sliding_window_hybrid", "hard", "sliding"))


class OrdinaryHybridTest(parameterized.TestCase):
  """Without further passes a sleeping model is the hybrid of its kind, windows or no windows."""

  @parameterized.parameters(*ORDINARY)
  def test_logits(self, name, before, after):
    cfg, sleep_cfg = baseline(name, eviction=before)
    batch, layout = hybrids.random_batch(10, (8, 9), pads=(0, 3))
    params, segments = hybrids.random_params(cfg), windows.plan(layout, cfg.window)
    logits, _ = hybrids.reader(segments, cfg, sleep_cfg)(params, batch)
    plain = unwindowed(after)(params, batch.inputs, layout[None], valid=batch.valid)
    assert_near(logits, plain["logits"], NEAR)

  @parameterized.parameters(*ORDINARY)
  @pytest.mark.slow
  def test_gradients(self, name, before, after):
    """Against central differences of the float64 oracle, whose own error is below 1e-8."""
    cfg, sleep_cfg = baseline(name, eviction=before)
    batch, layout = hybrids.random_batch(10, (8, 9), pads=(0, 3))
    params, segments = hybrids.random_params(cfg), windows.plan(layout, cfg.window)
    _, grads, _ = hybrids.program(segments, cfg, sleep_cfg)(params, batch)
    rng, used = np.random.default_rng(0), np.unique(batch.inputs[batch.valid])

    def loss(path, index, step):
      moved = np.array(oracle.leaf(params, path), np.float64)
      moved[index] += step
      data = (batch.inputs, batch.targets, batch.loss_mask)
      changed = oracle.replace_leaf(params, path, moved)
      return oracle.loss(changed, *data, run=unwindowed(after), valid=batch.valid)

    for path, value in oracle.leaves(params):
      got = np.asarray(oracle.leaf(grads, path), np.float64)
      for _ in range(2):
        index = tuple(int(rng.integers(n)) for n in value.shape)
        if path == ("embed",):
          index = (int(rng.choice(used)), index[1])
        exact = (loss(path, index, 1e-5) - loss(path, index, -1e-5)) / 2e-5
        self.assertLess(abs(got[index] - exact), GRADIENT * np.abs(got).max() + 1e-8, (path, index))


class LoopTest(parameterized.TestCase):
  def test_loop_with_reset_state_isolates_the_carry(self):
    """With one pass there is nothing to carry; with two it differs from carrying S and nothing else."""
    runs = {}
    batch, layout = hybrids.random_batch(5, (4,))
    for n in (1, 2):
      cfg, reset = baseline(
        "loop_with_reset_state", sleep={"num_passes": n, "first_block": 0, "loops": "unroll"}
      )
      carry = config.replace(reset, state="carry")
      self.assertEqual((cfg, reset.state), (hybrids.model_config(PAIR), "reset"))
      for sleep_cfg in (carry, reset):
        run = hybrids.reader(windows.plan(layout, cfg.window), cfg, sleep_cfg)
        runs[n, sleep_cfg.state] = np.asarray(run(hybrids.random_params(cfg), batch)[0])
    np.testing.assert_array_equal(runs[1, "carry"], runs[1, "reset"])
    self.assertGreater(hybrids.distance(runs[2, "reset"], runs[2, "carry"]), 1e-3)


class PlainTransformerTest(parameterized.TestCase):
  @parameterized.parameters(("hard", 8), ("sliding", 3))
  def test_its_answers_depend_on_what_is_cached_alone(self, eviction, oldest):
    """Two attention blocks, L = 4, the answer at 9: hard sees from 8 on, sliding from 9 - 2 * 3 on."""
    cfg, sleep_cfg = baseline("plain_transformer", eviction=eviction)
    self.assertEqual((cfg.blocks, cfg.eviction, sleep_cfg.num_passes), (("attn", "attn"), eviction, 1))
    batch, layout = hybrids.random_batch(10, (9,))
    run = hybrids.reader(windows.plan(layout, cfg.window), cfg, sleep_cfg)
    params = hybrids.random_params(cfg)
    answers = np.asarray(run(params, batch)[0])
    for at in range(10):
      other = np.array(batch.inputs)
      other[:, at] = (other[:, at] + 1) % cfg.vocab_size
      moved = np.any(np.asarray(run(params, batch.replace(inputs=other))[0]) != answers)
      self.assertEqual(moved, at >= oldest, at)
