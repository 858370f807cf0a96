"""Our table of defaults and our reading of configs beside transformers' own (`make peers`)."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from sleep_jax import model, pretrained
from sleep_jax.pretrained import published
from tests import hybrids
from tests.pretrained.test_published_configs import BASE_FIELDS, IN_THE_WILD

pytestmark = [pytest.mark.peers, pytest.mark.slow]
NAMES = {
  "Qwen2": published.QWEN2,
  "Qwen3": published.QWEN3,
  "Llama": published.LLAMA,
  "SmolLM3": published.SMOLLM3,
}
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 9), dtype=np.int32)
SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
# With as many heads as the classes have by default, a config that lacks them is still that of a small model.
SIZES |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 4, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def transformers():
  pytest.importorskip("torch")
  return pytest.importorskip("transformers")


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_defaults_is_that_of_the_class(transformers, name):
  defaults = getattr(transformers, f"{name}Config")()
  for field, value in published.FAMILIES[NAMES[name]].defaults.items():
    if field == "rope_theta":
      assert defaults.rope_parameters == {"rope_type": "default", "rope_theta": value}
    elif field == "rope_scaling":
      assert value is None
    elif field == "sliding_window" and value is not None:  # the class drops it unless it is used
      assert value == getattr(transformers, f"{name}Config")(use_sliding_window=True).sliding_window
    elif value is not None:
      assert getattr(defaults, field) == value, field


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(transformers, request, tmp_path_factory):
  """A small model in a folder, with a config that says everything: (class name, folder, config.json)."""
  import torch

  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp(request.param)
  # hidden_size is no multiple of the heads in Llama's own check, so that heads are few there.
  heads = {"num_attention_heads": 4, "num_key_value_heads": 4} if request.param == "Llama" else {}
  heads |= {"no_rope_layers": [1, 0], "pad_token_id": 0} if request.param == "SmolLM3" else {}
  settings = getattr(transformers, f"{request.param}Config")(**(SIZES | heads))
  peer = getattr(transformers, f"{request.param}ForCausalLM")(settings).eval()
  with torch.no_grad():
    for weight in peer.parameters():
      weight.add_(0.2 * torch.randn_like(weight))
  peer.save_pretrained(folder)
  return request.param, folder, json.loads((folder / "config.json").read_text())


def peers_logits(transformers, name: str, folder: pathlib.Path) -> np.ndarray:
  import torch

  peer = getattr(transformers, f"{name}ForCausalLM").from_pretrained(folder, attn_implementation="eager")
  with torch.no_grad():
    return peer.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def our_logits(folder: pathlib.Path) -> np.ndarray:
  cfg, weights, _ = pretrained.load(folder)
  with jax.default_matmul_precision("highest"):
    return np.asarray(PREDICT(weights, cfg))


PREDICT = hybrids.jit(
  lambda w, cfg: model.predict(w, TOKENS, model.init_state(cfg, 2), cfg)[0], static_argnums=1
)


def with_config(folder: pathlib.Path, values: dict, target: pathlib.Path) -> pathlib.Path:
  """The checkpoint with another config.json."""
  target.mkdir()
  (target / "model.safetensors").symlink_to("weights.safetensors")
  (target / "weights.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
  (target / "config.json").write_text(json.dumps(values))
  return target


def theta_of(values: dict) -> float:
  return values["rope_parameters"]["rope_theta"]


SIZED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}


def test_without_a_field_with_null_and_at_its_default_both_compute_the_same(
  transformers, checkpoint, tmp_path
):
  """Every field that the class writes is taken away. Where transformers still computes, we compute that."""
  name, folder, values = checkpoint
  compared = set()
  for i, field in enumerate(values):
    changed = {n: x for n, x in values.items() if n != field}
    for j, variant in enumerate((changed, changed | {field: None})):
      made = with_config(folder, variant, tmp_path / f"{i}_{j}")
      if field in SIZED:  # a model of another size, which these tensors do not fit
        with pytest.raises(
          pretrained.PretrainedError, match=f"Config hold: .*{field} = |(layer_types|no_rope_layers) must"
        ):
          pretrained.load(made)
        continue
      try:
        wanted = peers_logits(transformers, name, made)
      except Exception:  # the peer refuses null where its class wants a number, or tensors that do not fit
        continue
      np.testing.assert_allclose(our_logits(made), wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=field)
      compared.add(field)
  needed = {"rope_parameters", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "architectures"}
  assert needed <= compared, needed - compared


def test_with_all_that_programs_write_beside_both_compute_the_same(transformers, checkpoint, tmp_path):
  name, folder, values = checkpoint
  wanted = peers_logits(transformers, name, folder)
  full = getattr(transformers, f"{name}Config")(**values).to_dict()
  wild = {n: x for n, x in IN_THE_WILD[name.lower()].items() if not n.startswith(("layer_t", "no_rope"))}
  older = {n: x for n, x in values.items() if n != "rope_parameters"} | {"rope_theta": theta_of(values)}
  nested = values | {"rope_parameters": values["rope_parameters"] | {"partial_rotary_factor": 1.0}}
  extras = [values | {"dtype": "float32"}, json.loads(json.dumps(full, default=str)), nested, older]
  extras += [older | {n: x for n, x in wild.items() if n != "transformers.js_config"}]
  extras += [older | {n: x for n, x in BASE_FIELDS.items() if n not in ("auto_map", "torch_dtype")}]
  for i, variant in enumerate(extras):
    made = with_config(folder, variant, tmp_path / str(i))
    np.testing.assert_array_equal(peers_logits(transformers, name, made), wanted)
    np.testing.assert_allclose(our_logits(made), wanted, atol=2e-5 * np.abs(wanted).max())


def test_with_buffers_that_older_versions_saved_both_compute_the_same(transformers, checkpoint, tmp_path):
  name, folder, values = checkpoint
  made = with_config(folder, values, tmp_path / "buffers")
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  for i in range(2):
    half = np.arange(0, 4, 2) / 4
    tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.float32(theta_of(values) ** -half)
  safetensors.numpy.save_file(tensors, made / "weights.safetensors", {"format": "pt"})
  wanted = peers_logits(transformers, name, made)
  np.testing.assert_allclose(our_logits(made), wanted, atol=2e-5 * np.abs(wanted).max())
  _, weights, source = pretrained.load(made)
  pretrained.export(tmp_path / "out", source.model, weights, source)
  assert (tmp_path / "out/model.safetensors").read_bytes() == (made / "weights.safetensors").read_bytes()
  np.testing.assert_array_equal(peers_logits(transformers, name, tmp_path / "out"), wanted)
