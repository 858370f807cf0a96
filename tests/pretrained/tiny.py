"""Tiny random checkpoints in published format, with a tokenizer: what a user has on disk, made in a second.

Written through the safetensors library, in bfloat16 as the published ones are; not by the code under test.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

from sleep_jax import model, params
from sleep_jax.config import ModelConfig
from sleep_jax.data import gsm_infinite as generator
from sleep_jax.pretrained import jet_nemotron, loading, ouro, published, weight_map
from sleep_jax.pretrained.fields import Fields

VOCAB = 512
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"vocab_size": VOCAB}
JET = {
  "num_heads": 1,
  "head_dim": 8,
  "expand_v": 2,
  "conv_size": 4,
  "dconv_generator_reduction": 4,
  "norm_eps": "1e-5",
  "mode": "chunk",
  "dconv_implementation": "triton",
}
CONFIGS: dict[str, dict[str, Any]] = {
  "jet": jet_nemotron.PUBLISHED_2B
  | SIZES
  | {
    "layer_types": ["jet", "jet", "attn", "swa"],
    "num_hidden_layers": 4,
    "efficient_attention_config": {"jet": JET, "swa": {"window_size": 24}},
  },
  "ouro": ouro.PUBLISHED_1_4B | SIZES | {"num_hidden_layers": 2, "head_dim": 8, "total_ut_steps": 2},
  "qwen2": SIZES
  | {
    "architectures": [published.QWEN2],
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
  },
  "qwen3": SIZES
  | {
    "architectures": [published.QWEN3],
    "num_hidden_layers": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
  },
  "smollm3": SIZES
  | {
    "architectures": [published.SMOLLM3],
    "num_hidden_layers": 3,
    "no_rope_layers": [1, 0, 1],
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
  },
  "qwen3_5": SIZES
  | {
    "architectures": [published.QWEN3_5],
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
  },
  "olmo_hybrid": SIZES
  | {
    "architectures": [published.OLMO_HYBRID],
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "linear_allow_neg_eigval": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  },
  "kimi_linear": SIZES
  | {
    "architectures": [published.KIMI_LINEAR],
    "num_hidden_layers": 2,
    "num_key_value_heads": SIZES["num_attention_heads"],
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense"],
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 3,
    "v_head_dim": 6,
    "linear_num_heads": 2,
    "linear_head_dim": 4,
    "linear_conv_kernel_dim": 3,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  },
  "llama": SIZES
  | {
    "architectures": [published.LLAMA],
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
  },
}


def checkpoint(folder: pathlib.Path, name: str, *, seed: int = 0, tokenizer: bool = True) -> pathlib.Path:
  """Makes one, of the name in CONFIGS."""
  folder.mkdir(parents=True)
  published = CONFIGS[name]
  (folder / "config.json").write_text(json.dumps(published, indent=2))
  read = loading.ARCHITECTURES[published["architectures"][0]]
  cfg = ModelConfig(window=64, **read(Fields(published, name)))
  rng = np.random.default_rng(seed)
  layout = weight_map.layout_of(published["architectures"][0])
  tensors = {e.name: _drawn(rng, e).astype(jnp.bfloat16) for e in weight_map.entries(cfg, layout)}
  safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  if tokenizer:
    make_tokenizer(folder / "tokenizer.json")
  return folder


def weights(cfg: ModelConfig, seed: int = 0) -> Any:
  """Random weights of a model, drawn without compiling anything."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda w: rng.normal(size=w.shape).astype(np.float32), model.declare(cfg), is_leaf=params.is_weight
  )


def make_tokenizer(path: pathlib.Path, size: int = VOCAB) -> None:
  """A byte-level BPE with Qwen2.5's special tokens and one token a digit, as both published ones have."""
  texts = [
    generator.problem(generator.GsmInfiniteConfig(min_tokens=0, max_tokens=300), 7, i).text for i in range(24)
  ]
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  pieces = tokenizers.Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s")
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(pieces, behavior="isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator([*texts, *["\nAnswer:"] * 50], trainer)
  made.save(str(path))


def _drawn(rng: np.random.Generator, entry: weight_map.Entry) -> np.ndarray:
  """A random tensor: matrices keep the size of what they read, norms are near 1, other vectors near 0."""
  x = rng.normal(size=entry.shape)
  if len(entry.shape) == 2:
    return x / np.sqrt(entry.shape[1])
  return 0.1 * x + entry.path.endswith("norm")
