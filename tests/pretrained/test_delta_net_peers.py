"""Qwen3.5, OLMo-Hybrid and Kimi Linear beside transformers, small and random: defaults, logits, states.

With fewer heads of keys than of values and with as many, biases, tied heads, no rotary angles.
"""

import json

import jax
import numpy as np
import pytest

from sleep_jax import model, pretrained
from sleep_jax.pretrained import published
from tests import hybrids
from tests.pretrained.test_published_peers import with_config

pytestmark = [pytest.mark.peers, pytest.mark.slow]
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 9), dtype=np.int32)
SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS = {"linear_key_head_dim": 6, "linear_value_head_dim": 5}
SIZES |= {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
SIZES |= {"pad_token_id": 0, "eos_token_id": 1}


def settings_of(name: str) -> dict:
  """Of a case; Kimi Linear has one width for keys and values, and a name of its own for it."""
  return SIZES | ({} if name.startswith("kimi") else WIDTHS) | CASES[name][1]


CASES = {
  "qwen3_5": ("Qwen3_5Text", {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16}),
  "qwen3_5 with biases, tied": (
    "Qwen3_5Text",
    {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 8, "attention_bias": True}
    | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.5}},
  ),
  "olmo_hybrid": ("OlmoHybrid", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
  "olmo_hybrid without angles": (
    "OlmoHybrid",
    {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_allow_neg_eigval": False}
    | {"rope_parameters": {"rope_theta": None, "rope_type": "default"}, "attention_bias": True},
  ),
  "kimi_linear": (
    "KimiLinear",
    {"num_key_value_heads": 4, "kv_lora_rank": 7, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
    | {"v_head_dim": 5, "linear_num_heads": 2, "linear_head_dim": 6, "mlp_layer_types": ["dense"] * 3},
  ),
}
NAMES = {
  "Qwen3_5Text": published.QWEN3_5,
  "OlmoHybrid": published.OLMO_HYBRID,
  "KimiLinear": published.KIMI_LINEAR,
}
NEAR = 2e-5


@pytest.fixture(scope="module")
def transformers():
  pytest.importorskip("torch")
  return pytest.importorskip("transformers")


def class_of(transformers, name: str):
  return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_defaults_is_that_of_the_class(transformers, name):
  defaults = getattr(transformers, f"{name}Config")()
  for field, value in published.FAMILIES[NAMES[name]].defaults.items():
    if field == "rope_theta":
      assert defaults.rope_parameters["rope_theta"] == value
    elif field == "partial_rotary_factor":
      assert defaults.rope_parameters["partial_rotary_factor"] == value
    elif field == "full_attention_interval":
      assert [i for i, kind in enumerate(defaults.layer_types) if kind == "full_attention"] == [
        *range(3, 32, value)
      ]
    elif value is not None:
      assert getattr(defaults, field) == value, field


@pytest.fixture(scope="module", params=CASES)
def checkpoint(transformers, request, tmp_path_factory):
  """A small model in a folder: (class name, folder, config.json)."""
  import torch

  torch.manual_seed(0)
  name, settings = CASES[request.param][0], settings_of(request.param)
  folder = tmp_path_factory.mktemp("peer")
  peer = class_of(transformers, name)(getattr(transformers, f"{name}Config")(**settings)).eval()
  with torch.no_grad():
    for weight in peer.parameters():
      weight.add_(0.2 * torch.randn_like(weight))
  peer.save_pretrained(folder)
  return name, folder, json.loads((folder / "config.json").read_text())


def peers_answer(transformers, name, folder):
  """Logits, and the caches behind the tokens."""
  import torch

  peer = class_of(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
  with torch.no_grad():
    out = peer(torch.tensor(TOKENS, dtype=torch.long), use_cache=True)
  return out.logits.numpy(), out.past_key_values


PREDICT = hybrids.jit(
  lambda w, cfg: model.predict(w, TOKENS, model.init_state(cfg, 2), cfg), static_argnums=1
)


def our_answer(folder):
  cfg, weights, _ = pretrained.load(folder)
  with jax.default_matmul_precision("highest"):
    logits, state = PREDICT(weights, cfg)
  return np.asarray(logits), state, cfg


def test_logits_and_states_are_those_of_the_peer(transformers, checkpoint):
  name, folder, _ = checkpoint
  wanted, cache = peers_answer(transformers, name, folder)
  got, state, cfg = our_answer(folder)
  np.testing.assert_allclose(got, wanted, atol=NEAR * np.abs(wanted).max())
  groups = cfg.fast.num_heads // (cfg.fast.num_key_heads or cfg.fast.num_heads)
  key = cfg.fast.key_dim
  for i in (0, 2):
    fast = state.fast[str(i)]
    np.testing.assert_allclose(fast.S, cache.get_recurrent_state(i, state_idx=0).numpy(), atol=1e-4)
    theirs = cache.get_conv_state(i, state_idx=0).numpy()[..., 1 - cfg.fast.conv_size :]
    q, k, v = np.split(np.asarray(fast.context), [key, 2 * key], axis=-1)  # [B, c-1, H, K or V]
    ours = [x.reshape(*x.shape[:2], -1) for x in (q[:, :, ::groups], k[:, :, ::groups], v)]
    np.testing.assert_allclose(np.moveaxis(np.concatenate(ours, axis=-1), 1, 2), theirs, atol=1e-4)


def test_what_is_exported_is_what_was_read(transformers, checkpoint, tmp_path):
  name, folder, _ = checkpoint
  cfg, weights, source = pretrained.load(folder)
  pretrained.export(tmp_path / "out", cfg, weights, source)
  for file in ("model.safetensors", "config.json"):
    assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()
  moved = jax.tree.map(lambda x: 1.1 * x, weights)
  pretrained.export(tmp_path / "moved", cfg, moved, source)
  wanted, _ = peers_answer(transformers, name, tmp_path / "moved")
  got, _, _ = our_answer(tmp_path / "moved")
  assert np.max(np.abs(wanted - peers_answer(transformers, name, folder)[0])) > 1e-2
  np.testing.assert_allclose(got, wanted, atol=NEAR * np.abs(wanted).max())


def test_without_a_field_with_null_and_at_its_default_both_compute_the_same(
  transformers, checkpoint, tmp_path
):
  """Every field that the class writes is taken away. Where transformers still computes, we compute that."""
  name, folder, values = checkpoint
  compared = set()
  for i, field in enumerate(values):
    if field == "model_type":  # without it the peer draws the weights that are named otherwise in the file
      continue
    changed = {n: x for n, x in values.items() if n != field}
    for j, variant in enumerate((changed, changed | {field: None})):
      made = with_config(folder, variant, tmp_path / f"{i}_{j}")
      try:
        wanted, _ = peers_answer(transformers, name, made)
      except Exception:  # null where its class wants a number, or tensors that do not fit
        continue
      try:
        got, _, _ = our_answer(made)
      except pretrained.PretrainedError as e:  # a size of the defaults that the tensors do not have
        experts = field == "mlp_layer_types" and "experts are not supported" in str(e)  # its default
        assert experts or "tensors do not fit config.json" in str(e), (field, e)
        continue
      np.testing.assert_allclose(got, wanted, atol=NEAR * np.abs(wanted).max(), err_msg=field)
      compared.add(field)
  needed = {"hidden_act", "rms_norm_eps", "architectures"} | ({"rope_parameters"} & set(values))
  assert needed <= compared, needed - compared


def test_a_model_that_reads_images_has_the_language_model_that_is_read(transformers, tmp_path):
  """As published: both towers in one file, the language model's config inside of another."""
  import torch

  torch.manual_seed(1)
  inner = settings_of("qwen3_5")
  vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
  settings = transformers.Qwen3_5Config(text_config=inner, vision_config=vision)
  peer = transformers.Qwen3_5ForConditionalGeneration(settings).eval()
  peer.save_pretrained(tmp_path / "in")
  with torch.no_grad():
    wanted = peer(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
  cfg, weights, source = pretrained.load(tmp_path / "in")
  got, _, _ = our_answer(tmp_path / "in")
  np.testing.assert_allclose(got, wanted, atol=NEAR * np.abs(wanted).max())
  pretrained.export(tmp_path / "out", cfg, weights, source)
  assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()
