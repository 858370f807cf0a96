"""Bytes and operations on paper, against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config, windows
from sleep_jax.cost import flops, footprint
from sleep_jax.experiments import memory_table
from sleep_jax.pretrained import jet_nemotron, memory, ouro
from tests import hybrids

OURO = memory.memory_config(ouro.config_1_4b(dtype="bfloat16"))


def test_what_a_gradient_keeps():
  """A sine keeps its cosine, a product its other factor; what is recomputed keeps nothing but its input."""
  x = np.ones((3, 5), np.float32)

  def layers(w, remat):
    one = lambda h: jnp.sin(h @ w)  # noqa: E731
    one = jax.checkpoint(one) if remat else one
    return jnp.sum(one(one(one(jnp.asarray(x)))))

  w = jax.ShapeDtypeStruct((5, 5), jnp.float32)
  plain, again = (footprint.saved(lambda w, r=r: layers(w, r), w) for r in (False, True))
  assert again == 4 * 3 * 15  # the three inputs
  assert plain == 4 * (3 + 3) * 15  # and three cosines


def test_a_fine_recomputation_keeps_less_and_only_passes_grow_with_n():
  cfg = hybrids.model_config(("attn", "jet"))

  def kept(remat, n):
    return footprint.gradient(cfg, config.SleepConfig(num_passes=n, remat=remat), 8 * cfg.window)

  sizes = [kept(remat, 4) for remat in footprint.REMAT]
  assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5, sizes
  carry = 4 * (cfg.fast.num_heads * cfg.fast.key_dim * cfg.fast.value_dim + cfg.window * cfg.embed_dim)
  assert kept("pass", 4) - kept("pass", 3) == 7 * carry  # S and h of one more pass in each window asleep
  assert kept("window", 4) - kept("window", 3) == carry  # in one window
  assert kept("offload", 4) - kept("offload", 3) <= 7 * 14  # what says which pass of which window a step is

  def moved(remat, n):
    return footprint.on_host(cfg, config.SleepConfig(num_passes=n, remat=remat), 8 * cfg.window)

  assert moved("offload", 4) - moved("offload", 3) == 7 * (carry + footprint.state(cfg))
  assert moved("window", 4) == 0


def test_states_and_caches_of_the_published_sizes():
  jet = jet_nemotron.config_2b(dtype="bfloat16")
  count = jet.blocks.count("jet")
  assert footprint.state(jet) == count * (12 * 96 * 256 * 4 + 3 * 12 * 256 * 2)
  rows = 2000 * (2 * 2 * 128 * 2 + 1)  # keys and values of two heads, and a flag
  assert footprint.cache(jet) == 4 * (rows + 4)
  assert footprint.state(OURO, batch=3) == 3 * 6 * (16 * 128 * 128 * 4 + 3 * 16 * 128 * 2)
  assert footprint.cache(OURO) == 24 * (2000 * (2 * 16 * 128 * 2 + 1) + 4)


def test_optimizers_of_the_published_sizes():
  """A momentum for a matrix of the body, two moments for all others, 4 bytes each; none when frozen."""
  d, mlp, vocab = 2048, 5632, 49152
  body = 24 * (4 * d * d + 3 * d * mlp)
  wide, reduced = 16 * 128, 16 * 128 // 8
  jet = 5 * d * wide + d * reduced + reduced * wide * 4
  jet_rest = 2 * d * 16 + 2 * 16 + 128 + wide * 4 + d  # gates, A and dt, both norms, bias of the taps
  rest = 24 * 4 * d + 2 * vocab * d + d + d + 1
  counters = 4 * 8  # int32 step counts of chains
  whole = footprint.optimizer(OURO, config.OptimConfig())
  assert 0 <= whole - 4 * (body + 6 * jet + 2 * (rest + 6 * jet_rest)) <= counters
  early = footprint.optimizer(OURO, config.OptimConfig(trained=memory.memory_weights(OURO)))
  assert 0 <= early - 4 * (6 * jet + 2 * 6 * jet_rest) <= counters


def test_operations_of_jet_nemotron_by_hand():
  """Prelude and coda once, the loop N times; a sliding layer's queries see 1152 keys, all but the first."""
  d, mlp, length = 1536, 3 * 1536 * 8960, 2000
  matrices = 2 * d * 12 * 96 + 2 * d * 12 * 256 + 12 * 256 * d + d * 384 + 384 * 12 * 256 * 4
  rule = 2 * 12 * (2 * 64 * 96 + 3 * 96 * 256 + 2 * 64 * 256)  # in chunks of 64
  jet = 2 * (matrices + mlp) + rule
  attn = 2 * (2 * d * d + 2 * d * 256 + mlp) + 4 * d * length / 2
  swa = attn - 4 * d * length / 2 + 4 * d * (1152 - 1152**2 / (2 * length))
  cfg = jet_nemotron.config_2b()
  once = 24 * jet + 2 * attn + 2 * swa
  looped = 11 * jet + 2 * attn + swa
  segments = windows.plan(np.arange(2 * length) == 2 * length - 1, length)
  count = flops.per_sequence(segments, cfg, dataclasses.replace(jet_nemotron.SLEEP_2B, num_passes=5))
  np.testing.assert_allclose(count.asleep, length * (once + 4 * looped), rtol=1e-9)
  np.testing.assert_allclose(count.awake, length * once + 2 * d * 151936, rtol=1e-9)


def test_operations_of_a_memory_by_hand():
  """An inserted layer has no MLP."""
  d = 2048
  jet = 2 * (5 * d * 2048 + d * 256 + 256 * 2048 * 4) + 2 * 16 * (4 * 64 * 128 + 3 * 128 * 128)
  segments = windows.plan(np.arange(4000) == 3999, 2000)
  with_memory, without = (
    flops.per_sequence(segments, cfg, config.SleepConfig(num_passes=3)) for cfg in (OURO, plain())
  )
  np.testing.assert_allclose(with_memory.asleep - without.asleep, 3 * 2000 * 6 * jet, rtol=1e-9)


def plain():
  return dataclasses.replace(ouro.config_1_4b(), predict_passes=1)


def test_the_table_holds_the_published_numbers_of_parameters():
  text = memory_table.sizes(memory_table.rows())
  assert "| 1,964,806,208 | 7.86 |" in text and "| Ouro 1.4B + memory | 1,576,666,049 |" in text


@pytest.mark.slow
def test_the_whole_table():
  models = memory_table.rows()
  lines = memory_table.gradients(models, (2,), 6000).splitlines()[2:]
  for line in lines:
    sizes = [float(x) for x in line.split("|")[3:-1]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 10 * sizes[1]
  assert len(memory_table.times(models, (1, 2), 6000).splitlines()) == 6
