"""A memory that is added changes nothing until it is trained; which blocks sleep; dense models and a peer."""

import json

import jax
import numpy as np
import pytest

from sleep_jax import blocks, carry, config, model, pretrained, windows
from tests import hybrids

BASE = hybrids.model_config(("attn", "attn", "attn", "attn"), norm_placement="sandwich", loop_norm=True)
FAST = config.FastConfig(num_heads=2, key_dim=3, value_dim=4)
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
SLEEP = config.SleepConfig(num_passes=2)


@pytest.mark.slow
def test_fresh_memory_changes_no_bit_and_trains_away():
  weights = model.init(BASE, jax.random.key(0))
  cfg, larger = pretrained.add_memory(BASE, weights, jax.random.key(1), num_layers=2, fast=FAST)
  assert cfg.blocks == ("attn", "jet", "attn", "attn", "jet", "attn") and cfg.without_mlp == (1, 4)
  batch, layout = hybrids.random_batch(7, [5, 6])
  segments = windows.plan(layout, cfg.window)
  _, _, before = hybrids.program(segments, BASE, SLEEP)(weights, batch)
  step = hybrids.program(segments, cfg, SLEEP)
  _, grads, after = step(larger, batch)
  np.testing.assert_array_equal(after, before)

  def moved(grads):
    return {name for i in "14" for name, g in grads["blocks"][i]["mixer"].items() if np.any(np.asarray(g))}

  assert moved(grads) == {"o"}
  trained = jax.tree.map(lambda w, g: w - 0.1 * g, larger, grads)
  _, grads, _ = step(trained, batch)
  assert moved(grads) == set(larger["blocks"]["1"]["mixer"])


def test_memory_is_for_attention_only_models():
  cfg = hybrids.model_config()
  with pytest.raises(config.ConfigError, match="attention-only"):
    pretrained.add_memory(cfg, {}, jax.random.key(0))


def test_a_second_pass_awake_beside_fast_weights_is_refused():
  with pytest.raises(config.ConfigError, match="model.predict_passes: must be 1 beside fast weights .jet."):
    hybrids.model_config(("attn", "jet"), predict_passes=2)


def test_prelude_and_coda_write_once_and_the_loop_n_times():
  """Against the passes written out by hand."""
  cfg = hybrids.model_config(("jet", "jet", "jet"))
  sleep_cfg = config.SleepConfig(num_passes=3, first_block=1, last_block=2)
  weights, tokens = model.init(cfg, jax.random.key(0)), hybrids.random_tokens(2, 4)

  @hybrids.jit
  def both(weights):
    start = model.init_state(cfg, 2)
    one = [blocks.arrange(weights["blocks"], cfg, i, i + 1) for i in range(3)]
    h, state, _ = blocks.run(one[0], model.embed(weights, tokens, cfg), start, cfg)
    for _ in range(3):
      opened = state | carry.rewind(state.within(1, 2), start)
      h, state, _ = blocks.run(one[1], h, opened, cfg)
    _, state, _ = blocks.run(one[2], h, state, cfg)
    return model.consolidate(weights, tokens, start, cfg, sleep_cfg), state

  got, want = both(weights)
  hybrids.assert_near(got, want, 1e-5)


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(
  ("kind", "options"),
  [
    ("Qwen2", {"tie_word_embeddings": False}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Llama", {"tie_word_embeddings": True}),
    ("Llama", {"attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("Llama", {"mlp_bias": True, "rope_scaling": LLAMA3, "rope_theta": 100.0}),
  ],
)
def test_dense_models_equal_transformers(kind, options, tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.manual_seed(0)
  settings = getattr(transformers, f"{kind}Config")(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **options,
    max_position_embeddings=64,
    attn_implementation="eager",
  )
  peer = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
  with torch.no_grad():
    for weight in peer.parameters():
      weight.add_(0.2 * torch.randn_like(weight))
  peer.save_pretrained(tmp_path / "peer")
  cfg, weights, source = pretrained.load(tmp_path / "peer")
  assert cfg.attention.rope_scaling.kind == options.get("rope_scaling", {}).get("rope_type", "none")
  tokens = np.random.default_rng(0).integers(0, 23, (2, 9), dtype=np.int32)
  with torch.no_grad():
    want = peer(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  predict = hybrids.jit(lambda w: model.predict(w, tokens, model.init_state(cfg, len(tokens)), cfg)[0])
  with jax.default_matmul_precision("highest"):
    got = predict(weights)
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
  pretrained.export(tmp_path / "out", cfg, weights, source)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written == json.loads((tmp_path / "peer" / "config.json").read_text())
  assert (tmp_path / "out/model.safetensors").read_bytes() == (
    tmp_path / "peer/model.safetensors"
  ).read_bytes()

  # What was trained here since, they read too.
  trained = jax.tree.map(lambda x: x + 0.05 * np.sin(np.arange(x.size)).reshape(x.shape), weights)
  pretrained.export(tmp_path / "trained", cfg, trained, source, dtype="float32")
  again = type(peer).from_pretrained(tmp_path / "trained", attn_implementation="eager").eval()
  with torch.no_grad():
    want = again(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  with jax.default_matmul_precision("highest"):
    far = predict(weights)
    np.testing.assert_allclose(predict(trained), want, atol=2e-5 * np.abs(want).max())
  assert np.abs(far - want).max() > 0.1
