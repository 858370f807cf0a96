"""Ouro (arXiv 2510.25741): sandwich norms, and all blocks looped with the final norm after each loop.

As published it reads in `total_ut_steps` passes awake. As the sleeping model of arXiv 2605.26099 it takes N
passes asleep and one awake: `predict_passes=1`, with fast weights added by `add_memory`.
"""

from typing import Any

from sleep_jax.config import AttentionConfig, ModelConfig
from sleep_jax.pretrained import published
from sleep_jax.pretrained.dense import ACTIVATIONS, full_attention
from sleep_jax.pretrained.fields import LAYERS, PASSES, Fields, rope_theta

ARCHITECTURE = published.OURO


def read_config(fields: Fields) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`.

  `early_exit_threshold` = 1 means the last loop, which is what None forces: in bfloat16 the sum of
  probabilities can round up to 1 before.
  """
  count = fields.size("num_hidden_layers", most=LAYERS)
  full_attention(fields, count)
  fields.only("hidden_act", ACTIVATIONS, "the MLP is SwiGLU")
  for name in ("attention_bias", "mlp_bias"):
    fields.only(name, (False,), "nothing but the exit gate has a bias")
  threshold, heads = fields.positive("early_exit_threshold"), fields.size("num_attention_heads")
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "blocks": ("attn",) * count,
    "norm_eps": fields.positive("rms_norm_eps"),
    "norm_placement": "sandwich",
    "norm_cast": "first",
    "loop_norm": True,
    "tied_embeddings": fields.get("tie_word_embeddings", bool),
    "predict_passes": fields.size("total_ut_steps", most=PASSES),
    "exit_gate": True,
    "exit_threshold": None if threshold >= 1 else threshold,
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      head_dim=fields.size("head_dim", fields.size("hidden_size") // heads),
      rope_theta=rope_theta(fields),
      qk_norm=False,
    ),
  }


# The published config.json of Ouro-1.4B, as far as it says what is computed.
PUBLISHED_1_4B = {
  "architectures": [ARCHITECTURE],
  "early_exit_threshold": 1.0,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 5632,
  "model_type": "ouro",
  "num_attention_heads": 16,
  "num_hidden_layers": 24,
  "num_key_value_heads": 16,
  "rms_norm_eps": 1e-6,
  "rope_scaling": None,
  "rope_theta": 1e6,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "total_ut_steps": 4,
  "vocab_size": 49152,
}


def config_1_4b(**changes: Any) -> ModelConfig:
  """Ouro-1.4B; L is 2000 unless changed."""
  return ModelConfig(**{"window": 2000, **read_config(Fields(PUBLISHED_1_4B, "1.4B")), **changes})
