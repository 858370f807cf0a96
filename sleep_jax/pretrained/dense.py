"""Plain dense transformers of the Qwen2 and Llama kind: pre-norm, grouped queries, bias (Qwen2) or none."""

from typing import Any

from sleep_jax.config import AttentionConfig
from sleep_jax.pretrained.fields import Fields, rope

QWEN2, LLAMA = "Qwen2ForCausalLM", "LlamaForCausalLM"


def read_config(fields: Fields, *, bias: bool) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`.

  Args:
    bias: whether queries, keys and values always have one, and nothing else may (Qwen2). Otherwise
      `attention_bias` and `mlp_bias` say which projections have one (Llama).
  """
  count, heads = fields.size("num_hidden_layers"), fields.size("num_attention_heads")
  fields.names("layer_types", count, ("full_attention",), "full_attention")
  fields.only("hidden_act", ("silu",), "the MLP is SwiGLU")
  fields.only("use_sliding_window", (None, False), "attention is full")
  if not fields.values.get("use_sliding_window"):
    fields.only("sliding_window", (None, fields.values.get("sliding_window")), "attention is full")
  told = {"attention_bias": False, "mlp_bias": False}
  for name in told:
    if bias:
      fields.only(name, (None, False), "only queries, keys and values have a bias, as in Qwen2")
    else:
      told[name] = fields.get(name, bool, False)
  theta, scaling = rope(fields)
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "mlp_bias": told["mlp_bias"],
    "blocks": ("attn",) * count,
    "norm_eps": fields.get("rms_norm_eps", float),
    "norm_cast": "first",
    "tied_embeddings": fields.get("tie_word_embeddings", bool, False),
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      head_dim=fields.size("head_dim", fields.size("hidden_size") // heads),
      rope_theta=theta,
      rope_scaling=scaling,
      qk_norm=False,
      bias=bias or told["attention_bias"],
      out_bias=told["attention_bias"],
    ),
  }
