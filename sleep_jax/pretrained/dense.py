"""Plain dense transformers of the Qwen2 and Llama kind: pre-norm, grouped queries, bias (Qwen2) or none."""

from typing import Any

from sleep_jax.config import AttentionConfig
from sleep_jax.pretrained.fields import Fields, rope_theta

QWEN2, LLAMA = "Qwen2ForCausalLM", "LlamaForCausalLM"


def read_config(fields: Fields, *, bias: bool) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`.

  Args:
    bias: whether queries, keys and values have one.
  """
  count, heads = fields.size("num_hidden_layers"), fields.size("num_attention_heads")
  fields.names("layer_types", count, ("full_attention",), "full_attention")
  fields.only("hidden_act", ("silu",), "the MLP is SwiGLU")
  fields.only("use_sliding_window", (None, False), "attention is full")
  if not fields.values.get("use_sliding_window"):
    fields.only("sliding_window", (None, fields.values.get("sliding_window")), "attention is full")
  fields.only("attention_bias", (None, False), "only queries, keys and values may have a bias, as in Qwen2")
  fields.only("mlp_bias", (None, False), "the MLP has no bias")
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "blocks": ("attn",) * count,
    "norm_eps": fields.get("rms_norm_eps", float),
    "norm_cast": "first",
    "tied_embeddings": fields.get("tie_word_embeddings", bool, False),
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      head_dim=fields.size("head_dim", fields.size("hidden_size") // heads),
      rope_theta=rope_theta(fields),
      qk_norm=False,
      bias=bias,
    ),
  }
