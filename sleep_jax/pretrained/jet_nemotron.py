"""Jet-Nemotron (arXiv 2508.15884): JetBlocks, grouped-query attention, full and to the last few tokens.

The sleep paper loops the middle 14 of the 28 blocks of the 2B model: `SLEEP_2B`.
"""

from typing import Any

from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig, SleepConfig
from sleep_jax.pretrained import published
from sleep_jax.pretrained.dense import ACTIVATIONS
from sleep_jax.pretrained.fields import LARGEST, LAYERS, LONGEST_WINDOW, Fields, rope_theta, shown

ARCHITECTURE = published.JET_NEMOTRON
SLEEP_2B = SleepConfig(first_block=7, last_block=21)


def read_config(fields: Fields) -> dict[str, Any]:
  """The architecture in `config.json`, as fields of `ModelConfig`."""
  count = fields.size("num_hidden_layers", most=LAYERS)
  kinds = fields.names("layer_types", count, ("jet", "attn", "swa"), "attn")
  attention: dict[str, Any] = {}
  fast = FastConfig()
  if "swa" in kinds or "jet" in kinds:
    groups = fields.group("efficient_attention_config")
    if "swa" in kinds:
      swa = groups.group("swa")
      attention["swa_window"] = swa.size("window_size", most=LONGEST_WINDOW)
      swa.finish()
    if "jet" in kinds:
      fast = _fast(groups.group("jet", published.JET_BLOCK))
    groups.skip("swa", "jet")
    groups.finish()
  fields.skip("efficient_attention_config")
  fields.only("hidden_act", ACTIVATIONS, "the MLP is SwiGLU")
  fields.only("sliding_window", (), "the window stands in efficient_attention_config")
  fields.only("use_sliding_window", (False,), "the window stands in efficient_attention_config")
  for name in ("attention_bias", "mlp_bias"):
    fields.only(name, (False,), "only queries, keys and values of attention have a bias")
  if fields.given("head_dim"):
    attention["head_dim"] = fields.size("head_dim")
  fields.skip("head_dim")
  heads = fields.size("num_attention_heads")
  return {
    "vocab_size": fields.size("vocab_size"),
    "embed_dim": fields.size("hidden_size"),
    "mlp_dim": fields.size("intermediate_size"),
    "blocks": kinds,
    "norm_eps": fields.positive("rms_norm_eps"),
    "tied_embeddings": fields.get("tie_word_embeddings", bool),
    "attention": AttentionConfig(
      num_heads=heads,
      num_kv_heads=fields.size("num_key_value_heads", heads),
      rope_theta=rope_theta(fields),
      qk_norm=False,
      bias=True,
      **attention,
    ),
    "fast": fast,
  }


def _fast(jet: Fields) -> FastConfig:
  """Sizes of the JetBlocks. The width of a value is rounded: expand_v is a decimal of few digits."""
  heads, key, expand = jet.size("num_heads"), jet.size("head_dim"), jet.positive("expand_v")
  wide = heads * key * expand
  if not 1 <= wide <= LARGEST:
    raise jet.error("expand_v", f"x num_heads x head_dim must lie in 1..{LARGEST}, got {wide}")
  value, rest = divmod(round(wide), heads)
  if rest or abs(wide - heads * value) > 1e-5 * wide:
    raise jet.error("expand_v", f"x num_heads x head_dim must be a multiple of num_heads, got {wide}")
  for name in ("mode", "dconv_implementation"):
    jet.get(name, str)  # names a kernel, not another result
  taps, reduction = jet.size("conv_size"), jet.size("dconv_generator_reduction")
  eps = _decimal(jet, "norm_eps")
  jet.finish()
  return FastConfig(heads, key, value, conv_size=taps, generator_reduction=reduction, out_norm_eps=eps)


def _decimal(fields: Fields, name: str) -> float:
  """A number above 0 that may stand there as text, as the published `norm_eps` does."""
  value = fields.values.get(name)
  if isinstance(value, str):
    fields.skip(name)
    try:
      fields = Fields({name: float(value)}, fields.where, prefix=fields.prefix)
    except ValueError:
      raise fields.error(name, f"must be a number, got {shown(value)}") from None
  return fields.positive(name)


def _published(hidden: int, mlp: int, heads: int, kinds: list[str], jet: dict[str, Any], swa: int) -> dict:
  return {
    "architectures": [ARCHITECTURE],
    "efficient_attention_config": {
      "jet": jet
      | {
        "conv_size": 4,
        "dconv_generator_reduction": 8,
        "dconv_implementation": "triton",
        "mode": "chunk",
        "norm_eps": "1e-5",
      },
      "swa": {"window_size": swa},
    },
    "hidden_act": "silu",
    "hidden_size": hidden,
    "intermediate_size": mlp,
    "layer_types": kinds,
    "model_type": "jet_nemotron",
    "num_attention_heads": heads,
    "num_hidden_layers": len(kinds),
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
  }


def _kinds(count: int, attn: tuple[int, ...], swa: tuple[int, ...]) -> list[str]:
  return ["attn" if i in attn else "swa" if i in swa else "jet" for i in range(count)]


# The published config.json of both sizes, as far as it says what is computed.
PUBLISHED_2B = _published(
  1536,
  8960,
  12,
  _kinds(28, (14, 19), (20, 21)),
  {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667},
  1152,
)
PUBLISHED_4B = _published(
  2048,
  11008,
  16,
  _kinds(36, (17, 20, 32), (5, 16, 19, 21, 22, 25, 27)),
  {"num_heads": 16, "head_dim": 128, "expand_v": 2},
  2048,
)


def config_2b(**changes: Any) -> ModelConfig:
  """Jet-Nemotron-2B; L is 2000 unless changed."""
  return ModelConfig(**{"window": 2000, **read_config(Fields(PUBLISHED_2B, "2B")), **changes})


def config_4b(**changes: Any) -> ModelConfig:
  """Jet-Nemotron-4B; L is 2048 unless changed."""
  return ModelConfig(**{"window": 2048, **read_config(Fields(PUBLISHED_4B, "4B")), **changes})
