"""Plain dense transformers of the Qwen2 and Llama kind: pre-norm, grouped queries, bias (Qwen2) or none."""

from typing import Any

from sleep_jax.config import AttentionConfig
from sleep_jax.pretrained.fields import LAYERS, Fields, rope

ACTIVATIONS = ("silu", "swish")  # two names of one function


def read_config(fields: Fields, *, bias: bool) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`.

  Args:
    fields: of the file.
    bias: whether queries, keys and values always have one, and nothing else may (Qwen2). Otherwise
      `attention_bias` and `mlp_bias` say which projections have one (Llama).
  """
  count, heads = fields.size("num_hidden_layers", most=LAYERS), fields.size("num_attention_heads")
  full_attention(fields, count)
  fields.only("hidden_act", ACTIVATIONS, "the MLP is SwiGLU")
  biases = {"attention_bias": False, "mlp_bias": False}
  for name in biases:
    if bias:
      fields.only(name, (False,), "only queries, keys and values have a bias, as in Qwen2")
    else:
      biases[name] = fields.get(name, bool)
  theta, scaling = rope(fields)
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "mlp_bias": biases["mlp_bias"],
    "blocks": ("attn",) * count,
    "norm_eps": fields.positive("rms_norm_eps"),
    "norm_cast": "first",
    "tied_embeddings": fields.get("tie_word_embeddings", bool),
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      head_dim=fields.size("head_dim", fields.size("hidden_size") // heads),
      rope_theta=theta,
      rope_scaling=scaling,
      qk_norm=False,
      bias=bias or biases["attention_bias"],
      out_bias=biases["attention_bias"],
    ),
  }


def full_attention(fields: Fields, count: int) -> None:
  """Refuses layers that attend to the last few tokens alone.

  `layer_types` says which layers do. Where it is absent, those from `max_window_layers` on do, if
  `use_sliding_window` is set and `sliding_window` is not null.
  """
  fields.names("layer_types", count, ("full_attention",), "full_attention")
  fields.skip("sliding_window", "max_window_layers")
  if not fields.given("use_sliding_window") or not fields.get("use_sliding_window", bool):
    fields.skip("use_sliding_window")
    return
  none = "sliding_window" in fields.values and not fields.given("sliding_window")
  if not fields.given("layer_types") and not none and fields.get("max_window_layers", int, 0) < count:
    fields.only("use_sliding_window", (False,), "attention is full")
