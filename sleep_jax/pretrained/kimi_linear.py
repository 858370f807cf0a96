"""Kimi Linear (arXiv 2510.26692) without experts: Kimi Delta Attention, and attention of a latent.

The published model has experts in all blocks but the first; a config that has any is refused. It has fast
weights of its own, and sleeps as it is.
"""

from typing import Any

from sleep_jax.config import AttentionConfig, FastConfig
from sleep_jax.pretrained.dense import ACTIVATIONS
from sleep_jax.pretrained.fields import LARGEST, LAYERS, Fields, shown

_KINDS = {"linear_attention": "kda", "full_attention": "nope"}
_EXPERTS = "experts are not supported: every block must have an MLP of its own"
# Of experts, which no block has, and of rotary angles, which no block has either.
_UNUSED = (
  *("moe_intermediate_size", "moe_renormalize", "moe_router_activation_func", "num_experts_per_token"),
  *("num_experts_per_tok", "norm_topk_prob", "num_expert_group", "n_group", "topk_group", "use_grouped_topk"),
  *("num_shared_experts", "n_shared_experts", "routed_scaling_factor", "output_router_logits"),
  *("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "qk_head_dim", "model_max_length"),
)


def read_config(fields: Fields) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`.

  Which blocks attend and how large the others are stands in `linear_attn_config` in published files, and in
  `layer_types` and `linear_*` in those that transformers 5 writes.
  """
  count, heads = fields.size("num_hidden_layers", most=LAYERS), fields.size("num_attention_heads")
  _without_experts(fields, count)
  fields.only("hidden_act", ACTIVATIONS, "the MLP is SwiGLU")
  fields.only("attention_bias", (False,), "projections have no bias")
  fields.only("q_lora_rank", (), "queries are made from the input")
  fields.only("mla_use_nope", (True,), "attention has no rotary angles")
  fields.only("num_key_value_heads", (heads,), "each head has keys and values of its own")
  fields.only("num_nextn_predict_layers", (0,), "no block drafts tokens")
  fields.skip(*_UNUSED)
  own, shared = fields.size("qk_nope_head_dim"), fields.get("qk_rope_head_dim", int)
  if not 0 <= shared <= LARGEST:
    raise fields.error("qk_rope_head_dim", f"must lie in 0..{LARGEST}, got {shown(shared)}")
  value = fields.size("v_head_dim")
  if value > own + shared:
    raise fields.error("v_head_dim", f"must be at most {own + shared}, the width of a key, got {value}")
  kinds, fast_heads, width, taps = _delta(fields, count)
  eps = fields.positive("rms_norm_eps")
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "blocks": kinds,
    "norm_eps": eps,
    "norm_cast": "first",
    "tied_embeddings": fields.get("tie_word_embeddings", bool),
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=heads,
      head_dim=own + shared,
      qk_norm=False,
      latent_dim=fields.size("kv_lora_rank"),
      shared_dim=shared,
      value_dim=value,
    ),
    "fast": FastConfig(
      num_heads=fast_heads, key_dim=width, value_dim=width, conv_size=taps, out_norm_eps=eps
    ),
  }


def _without_experts(fields: Fields, count: int) -> None:
  """Refuses a config in which a block has experts.

  `mlp_layer_types` says which. Where it is absent, those from `first_k_dense_replace` on have some (by
  default all but the first), unless `num_experts` is null.
  """
  kinds = fields.values.get("mlp_layer_types")
  none = "num_experts" in fields.values and not fields.given("num_experts")
  fields.skip("mlp_layer_types", "num_experts", "num_local_experts", "moe_layer_freq")
  dense = fields.get("first_k_dense_replace", int, 1)
  if kinds is not None:
    names = fields.names("mlp_layer_types", count, ("dense", "sparse"))
    if "sparse" in names:
      raise fields.error(f"mlp_layer_types[{names.index('sparse')}]", f"= 'sparse': {_EXPERTS}")
  elif not none and dense < count:
    raise fields.error("first_k_dense_replace", f"= {shown(dense)} of {count} blocks: {_EXPERTS}")


def _delta(fields: Fields, count: int) -> tuple[tuple[str, ...], int, int, int]:
  """The kind of each block; heads, width of a head and taps of Kimi Delta Attention."""
  heads, width, taps = (
    fields.size(f"linear_{name}") for name in ("num_heads", "head_dim", "conv_kernel_dim")
  )
  if not fields.given("linear_attn_config"):
    return _kinds(fields, count), heads, width, taps
  inner = fields.group("linear_attn_config")
  heads, width = inner.size("num_heads", heads), inner.size("head_dim", width)
  taps = inner.size("short_conv_kernel_size", taps)
  kinds = _numbered(inner, count) if inner.given("full_attn_layers") else _kinds(fields, count)
  fields.skip("layer_types")
  inner.skip("kda_layers", "full_attn_layers")
  inner.finish()
  return kinds, heads, width, taps


def _kinds(fields: Fields, count: int) -> tuple[str, ...]:
  if fields.given("layer_types"):
    return tuple(_KINDS[name] for name in fields.names("layer_types", count, _KINDS))
  return tuple("nope" if i and i % 4 == 0 else "kda" for i in range(count))


def _numbered(inner: Fields, count: int) -> tuple[str, ...]:
  """From two lists of the numbers of blocks, from 1 on."""
  places: dict[int, str] = {}
  for name, kind in (("kda_layers", "kda"), ("full_attn_layers", "nope")):
    numbers = inner.values.get(name) or []
    fits = isinstance(numbers, list) and all(type(x) is int and 1 <= x <= count for x in numbers)
    if not fits or len({*places, *numbers}) < len(places) + len(numbers):
      raise inner.error(name, f"must be a list of numbers of blocks, 1..{count}, none of them twice")
    places |= dict.fromkeys(numbers, kind)
  if len(places) < count:
    raise inner.error(
      "kda_layers", f"and full_attn_layers must name all {count} blocks, they name {len(places)}"
    )
  return tuple(places[i + 1] for i in range(count))
