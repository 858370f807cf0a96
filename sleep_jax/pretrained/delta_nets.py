"""Qwen3.5 (dense) and OLMo-Hybrid: gated delta nets (arXiv 2412.06464), and attention in every fourth block.

They have fast weights of their own: they sleep as they are.
"""

from collections.abc import Mapping
from typing import Any

from sleep_jax.config import AttentionConfig, FastConfig
from sleep_jax.pretrained import published
from sleep_jax.pretrained.dense import ACTIVATIONS
from sleep_jax.pretrained.fields import LAYERS, Fields, PretrainedError, rope, shown

_KINDS = {"linear_attention": "gdn", "full_attention": "attn"}
_SHARE = "partial_rotary_factor"
# Of positions in images and videos: in a text all of them are the same.
_IMAGES = ("mrope_section", "mrope_interleaved")


def read_qwen3_5(fields: Fields) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`."""
  count, heads = fields.size("num_hidden_layers", most=LAYERS), fields.size("num_attention_heads")
  if fields.given("layer_types"):
    fields.skip("full_attention_interval")
    kinds = _kinds(fields, count)
  else:
    every = fields.size("full_attention_interval")
    kinds = tuple("gdn" if (i + 1) % every else "attn" for i in range(count))
  theta, scaling = rope(fields, (_SHARE, *_IMAGES))
  width, bias = fields.size("head_dim"), fields.get("attention_bias", bool)
  # What is said of them again, and what belongs to the head that drafts several tokens, which is not run.
  fields.only("attn_output_gate", (True,), "attention has a gate")
  fields.only("output_gate_type", ("swish", "silu"), "the gate of a delta net is SiLU")
  fields.skip("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "unsloth_fixed_mtp")
  return _shared(fields, kinds) | {
    "norm_zero_centered": True,
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      head_dim=width,
      rope_theta=theta,
      rope_scaling=scaling,
      rotary_dim=_turned(fields, width),
      qk_norm=True,
      gate=True,
      bias=bias,
      out_bias=bias,
    ),
    "fast": _fast(
      fields,
      fields.size("linear_num_key_heads"),
      fields.size("linear_num_value_heads"),
      out_norm_eps=fields.positive("rms_norm_eps"),
    ),
  }


def read_qwen3_5_with_images(fields: Fields) -> dict[str, Any]:
  """The language model of a checkpoint that reads images too; what it has for these is not read."""
  family = published.FAMILIES[published.QWEN3_5]
  text = fields.group("text_config", family.defaults, config=True)
  text.settle(family.reads)
  said = read_qwen3_5(text)
  text.finish()
  fields.assumed |= text.assumed
  fields.skip("vision_config", *(f"{x}_token_id" for x in ("image", "video", "vision_start", "vision_end")))
  fields.skip("language_model_only", "unsloth_fixed_mtp")
  if not text.given("tie_word_embeddings"):
    said["tied_embeddings"] = fields.get("tie_word_embeddings", bool, False)
  fields.only("tie_word_embeddings", (said["tied_embeddings"],), "text_config says otherwise")
  return said


def read_olmo_hybrid(fields: Fields) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`.

  A `rope_theta` that is null, and not absent, stands for no rotary angles.
  """
  count, heads = fields.size("num_hidden_layers", most=LAYERS), fields.size("num_attention_heads")
  if fields.given("layer_types"):
    kinds = _kinds(fields, count)
  else:
    kinds = tuple("attn" if i % 4 == 3 else "gdn" for i in range(count))
    kinds = kinds if "attn" in kinds else (*kinds[:-1], "attn")
  plain = _without_angles(fields)
  theta, scaling = rope(fields)
  kinds = tuple("nope" if plain and kind == "attn" else kind for kind in kinds)
  bias, hidden = fields.get("attention_bias", bool), fields.size("hidden_size")
  # From what weights are drawn.
  fields.skip(*(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")))
  few = fields.size("linear_num_key_heads", heads)
  return _shared(fields, kinds) | {
    "norm_placement": "after_attention",
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      head_dim=fields.size("head_dim", hidden // heads),
      rope_theta=theta,
      rope_scaling=scaling,
      qk_norm=True,
      qk_norm_over="all",
      bias=bias,
      out_bias=bias,
    ),
    "fast": _fast(
      fields,
      few,
      fields.size("linear_num_value_heads", heads),
      key_dim=int(0.75 * hidden / few),
      write_most=2.0 if fields.get("linear_allow_neg_eigval", bool) else 1.0,
    ),
  }


def _shared(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
  fields.only("hidden_act", ACTIVATIONS, "the MLP is SwiGLU")
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "blocks": kinds,
    "norm_eps": fields.positive("rms_norm_eps"),
    "tied_embeddings": fields.get("tie_word_embeddings", bool),
  }


def _kinds(fields: Fields, count: int) -> tuple[str, ...]:
  return tuple(_KINDS[name] for name in fields.names("layer_types", count, _KINDS))


def _fast(fields: Fields, few: int, heads: int, *, key_dim: int | None = None, **others: Any) -> FastConfig:
  """The delta nets; `key_dim` where the file says nothing and its family derives it."""
  if heads % few:
    raise fields.error("linear_num_key_heads", f"must divide linear_num_value_heads = {heads}, got {few}")
  key = fields.size("linear_key_head_dim", key_dim)
  return FastConfig(
    num_heads=heads,
    num_key_heads=None if few == heads else few,
    key_dim=key,
    value_dim=fields.size("linear_value_head_dim", None if key_dim is None else 2 * key),
    conv_size=fields.size("linear_conv_kernel_dim"),
    **others,
  )


def _turned(fields: Fields, width: int) -> int | None:
  """Channels of a head, which has `width`, that rotary angles turn; None: all."""
  groups = [fields.group(name) for name in ("rope_parameters", "rope_scaling") if fields.values.get(name)]
  said = [(f"{g.prefix}{_SHARE}", g.get(_SHARE, float)) for g in (*groups, fields) if g.given(_SHARE)]
  fields.skip(_SHARE)
  (name, share), *others = said or [(f"{fields.prefix}{_SHARE}", fields.get(_SHARE, float))]
  for other, again in others:
    if again != share:
      raise PretrainedError(f"{fields.where}: {other} is {again}, {name} is {share}")
  turned = int(width * share) if 0 < share <= 1 else 0
  if turned < 2 or turned % 2:
    problem = f"must give an even number of the {width} channels of a head, got {shown(share)}"
    raise PretrainedError(f"{fields.where}: {name} {problem}")
  return None if turned == width else turned


def _without_angles(fields: Fields) -> bool:
  for name in ("rope_scaling", "rope_parameters"):
    group = fields.values.get(name)
    if isinstance(group, Mapping) and "rope_theta" in group:
      return group["rope_theta"] is None
  return "rope_theta" in fields.values and not fields.given("rope_theta")
