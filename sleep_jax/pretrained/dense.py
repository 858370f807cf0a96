"""Plain dense transformers of the Qwen2, Qwen3, Llama and SmolLM3 kind: pre-norm, grouped queries, SwiGLU."""

from collections.abc import Callable
from typing import Any

from sleep_jax.config import AttentionConfig
from sleep_jax.pretrained.fields import LAYERS, Fields, rope

ACTIVATIONS = ("silu", "swish")  # two names of one function


def full_attention(fields: Fields, count: int) -> tuple[str, ...]:
  """Blocks that all attend to everything. Refuses layers that attend to the last few tokens alone.

  `layer_types` says which layers do. Where it is absent, those from `max_window_layers` on do, if
  `use_sliding_window` is set and `sliding_window` is not null.
  """
  fields.names("layer_types", count, ("full_attention",), "full_attention")
  fields.skip("sliding_window", "max_window_layers")
  if not fields.given("use_sliding_window") or not fields.get("use_sliding_window", bool):
    fields.skip("use_sliding_window")
    return ("attn",) * count
  none = "sliding_window" in fields.values and not fields.given("sliding_window")
  if not fields.given("layer_types") and not none and fields.get("max_window_layers", int, 0) < count:
    fields.only("use_sliding_window", (False,), "attention is full")
  return ("attn",) * count


def with_nope(fields: Fields, count: int) -> tuple[str, ...]:
  """The same of SmolLM3, where some layers have no rotary angles.

  `no_rope_layers` has 1 for a layer that has them and 0 for one that has none. Where it is absent, each
  `no_rope_layer_interval`-th layer has none. Layers without may attend to the last few tokens alone.
  """
  every = fields.size("no_rope_layer_interval")
  has = fields.values.get("no_rope_layers")
  fields.skip("no_rope_layers", "sliding_window")
  has = [int((i + 1) % every != 0) for i in range(count)] if has is None else has
  if not isinstance(has, list) or len(has) < count or any(type(x) is not int or x not in (0, 1) for x in has):
    raise fields.error("no_rope_layers", f"must be a list of {count} numbers, 0 or 1")
  kinds = tuple("attn" if x else "nope" for x in has[:count])
  fields.names("layer_types", count, ("full_attention",), "full_attention")
  slides = fields.get("use_sliding_window", bool) and fields.given("sliding_window")
  if slides and not fields.given("layer_types") and "nope" in kinds:
    fields.only("use_sliding_window", (False,), "attention is full")
  return kinds


def read_config(
  fields: Fields,
  *,
  bias: bool = False,
  mlp_bias: bool = True,
  qk_norm: bool = False,
  kinds: Callable[[Fields, int], tuple[str, ...]] = full_attention,
) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`.

  Args:
    fields: of the file.
    bias: whether queries, keys and values always have one, and nothing else may (Qwen2). Otherwise
      `attention_bias` says whether they and the output have one.
    mlp_bias: whether the MLP may have one, if `mlp_bias` says so.
    qk_norm: whether there is a norm on queries and keys; the default of `head_dim` is then a number.
    kinds: reads what each block attends to.
  """
  count, heads = fields.size("num_hidden_layers", most=LAYERS), fields.size("num_attention_heads")
  blocks = kinds(fields, count)
  fields.only("hidden_act", ACTIVATIONS, "the MLP is SwiGLU")
  biases = {"attention_bias": False, "mlp_bias": False}
  for name in biases:
    if bias or (name == "mlp_bias" and not mlp_bias):
      which = "queries, keys and values" if bias else "projections of attention"
      fields.only(name, (False,), f"only {which} have a bias, as in {'Qwen2' if bias else 'Qwen3'}")
    else:
      biases[name] = fields.get(name, bool)
  theta, scaling = rope(fields)
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "mlp_bias": biases["mlp_bias"],
    "blocks": blocks,
    "norm_eps": fields.positive("rms_norm_eps"),
    "norm_cast": "first",
    "tied_embeddings": fields.get("tie_word_embeddings", bool),
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      head_dim=fields.size("head_dim", None if qk_norm else fields.size("hidden_size") // heads),
      rope_theta=theta,
      rope_scaling=scaling,
      qk_norm=qk_norm,
      bias=bias or biases["attention_bias"],
      out_bias=biases["attention_bias"],
    ),
  }
