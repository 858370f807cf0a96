"""What is published about the configs of each architecture: defaults, and fields that change no number.

Nothing here is guessed. A default is the one of the class that reads the `config.json` of that architecture
(`Family.source`). It holds where a `config.json` lacks the field or has null, since these classes and the
programs that write such files leave out what equals the default.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
LLAMA, SMOLLM3 = "LlamaForCausalLM", "SmolLM3ForCausalLM"
JET_NEMOTRON, OURO = "JetNemotronForCausalLM", "OuroForCausalLM"
QWEN3_5, QWEN3_5_WITH_IMAGES = "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"
OLMO_HYBRID = "OlmoHybridForCausalLM"
KIMI_LINEAR = "KimiLinearForCausalLM"


@dataclasses.dataclass(frozen=True)
class Family:
  """The published defaults of one architecture.

  Attributes:
    model_type: the name of the family in the field `model_type`.
    source: the class, and where it is published.
    defaults: field -> value. None: derived from other fields.
    reads: fields of `SETTLED` that this family reads itself.
  """

  model_type: str
  source: str
  defaults: Mapping[str, Any]
  reads: frozenset[str] = frozenset()


# What the classes have in common. `rope_theta` and `rope_scaling` stand in `rope_parameters` in newer files.
_COMMON = {
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "hidden_size": 4096,
  "head_dim": None,  # hidden_size / num_attention_heads
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "rope_scaling": None,
  "attention_dropout": 0.0,
  "tie_word_embeddings": False,
}
# The first `max_window_layers` layers are full attention; the others too unless `use_sliding_window`.
_SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_QWEN2 = {
  "vocab_size": 151936,
  "intermediate_size": 22016,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
}

FAMILIES: dict[str, Family] = {
  QWEN2: Family(
    "qwen2",
    "transformers 5.23.0, models/qwen2/configuration_qwen2.py, class Qwen2Config",
    _COMMON | _QWEN2 | _SLIDING,
  ),
  QWEN3: Family(
    "qwen3",
    "transformers 5.23.0, models/qwen3/configuration_qwen3.py, class Qwen3Config",
    _COMMON | _QWEN2 | _SLIDING | {"head_dim": 128, "attention_bias": False},
  ),
  LLAMA: Family(
    "llama",
    "transformers 5.23.0, models/llama/configuration_llama.py, class LlamaConfig",
    _COMMON
    | {
      "vocab_size": 32000,
      "intermediate_size": 11008,
      "num_key_value_heads": None,  # num_attention_heads
      "max_position_embeddings": 2048,
      "attention_bias": False,
      "mlp_bias": False,
    },
  ),
  SMOLLM3: Family(
    "smollm3",
    "transformers 5.23.0, models/smollm3/configuration_smollm3.py, class SmolLM3Config",
    _COMMON
    | {
      "vocab_size": 128256,
      "hidden_size": 2048,
      "intermediate_size": 11008,
      "num_hidden_layers": 36,
      "num_attention_heads": 16,
      "num_key_value_heads": 4,
      "max_position_embeddings": 32768,
      "rope_theta": 2e6,
      "use_sliding_window": False,
      "sliding_window": None,  # none
      "layer_types": None,
      "no_rope_layers": None,  # each `no_rope_layer_interval`-th layer
      "no_rope_layer_interval": 4,
      "attention_bias": False,
      "mlp_bias": False,
      "tie_word_embeddings": True,
    },
  ),
  QWEN3_5: Family(
    "qwen3_5_text",
    "transformers 5.24.0, models/qwen3_5/configuration_qwen3_5.py, class Qwen3_5TextConfig",
    _COMMON
    | {
      "vocab_size": 248320,
      "intermediate_size": 12288,
      "num_attention_heads": 16,
      "num_key_value_heads": 4,
      "head_dim": 256,
      "max_position_embeddings": 32768,
      "partial_rotary_factor": 0.25,
      "attention_bias": False,
      "linear_conv_kernel_dim": 4,
      "linear_key_head_dim": 128,
      "linear_value_head_dim": 128,
      "linear_num_key_heads": 16,
      "linear_num_value_heads": 32,
      "layer_types": None,  # attention in each `full_attention_interval`-th layer
      "full_attention_interval": 4,
    },
    frozenset({"partial_rotary_factor"}),
  ),
  QWEN3_5_WITH_IMAGES: Family(
    "qwen3_5",
    "transformers 5.24.0, models/qwen3_5/configuration_qwen3_5.py, class Qwen3_5Config",
    {},
  ),
  OLMO_HYBRID: Family(
    "olmo_hybrid",
    "transformers 5.24.0, models/olmo_hybrid/configuration_olmo_hybrid.py, class OlmoHybridConfig",
    _COMMON
    | {
      "vocab_size": 100352,
      "hidden_size": 3840,
      "intermediate_size": 11008,
      "num_attention_heads": 30,
      "num_key_value_heads": None,  # num_attention_heads
      "max_position_embeddings": 65536,
      "attention_bias": False,
      "layer_types": None,  # attention in every fourth layer, or in the last one alone
      "linear_num_key_heads": None,  # num_attention_heads
      "linear_num_value_heads": None,  # num_attention_heads
      "linear_key_head_dim": None,  # three quarters of hidden_size / linear_num_key_heads
      "linear_value_head_dim": None,  # 2 linear_key_head_dim
      "linear_conv_kernel_dim": 4,
      "linear_allow_neg_eigval": True,
    },
  ),
  KIMI_LINEAR: Family(
    "kimi_linear",
    "transformers 5.23.0, models/kimi_linear/configuration_kimi_linear.py, class KimiLinearConfig",
    {
      "vocab_size": 163840,
      "hidden_size": 2304,
      "intermediate_size": 9216,
      "num_hidden_layers": 27,
      "num_attention_heads": 32,
      "num_key_value_heads": 32,
      "hidden_act": "silu",
      "rms_norm_eps": 1e-5,
      "tie_word_embeddings": False,
      "attention_bias": False,
      "attention_dropout": 0.0,
      "kv_lora_rank": 512,
      "q_lora_rank": None,  # none
      "qk_nope_head_dim": 128,
      "qk_rope_head_dim": 64,
      "v_head_dim": 128,
      "linear_head_dim": 128,
      "linear_num_heads": 32,
      "linear_conv_kernel_dim": 4,
      "layer_types": None,  # attention in every fourth layer, but for the first
      "mlp_layer_types": None,  # experts in all layers but the first
      "num_local_experts": 256,
    },
  ),
  JET_NEMOTRON: Family(
    "jet_nemotron",
    "jet-ai/Jet-Nemotron-2B, configuration_jet_nemotron.py, class JetNemotronConfig",
    _COMMON
    | {
      "vocab_size": 151936,
      "hidden_size": 1536,
      "intermediate_size": 8960,
      "num_hidden_layers": 28,
      "num_attention_heads": 12,
      "num_key_value_heads": 2,
      "max_position_embeddings": 32768,
      "rope_theta": 1e6,
      "tie_word_embeddings": True,
      "layer_types": None,  # `attn` in every layer
    },
  ),
  OURO: Family(
    "ouro",
    "ByteDance/Ouro-1.4B, configuration_ouro.py, class OuroConfig",
    _COMMON | _QWEN2 | _SLIDING | {"total_ut_steps": 4, "early_exit_threshold": 1.0},
  ),
}
# NVlabs/Jet-Nemotron, jetai/modeling/hf/jet_block.py, class JetBlockConfig.
JET_BLOCK = {
  "mode": "chunk",
  "expand_v": 2.0,
  "num_heads": 6,
  "head_dim": 256,
  "norm_eps": 1e-5,
  "conv_size": 4,
  "dconv_generator_reduction": 8,
  "dconv_implementation": "triton",
}

# Fields that may have any value: they do not change what is computed. The names are those that the base class
# of all configs writes (transformers 4.31.0, 4.51.3 and 5.23.0, configuration_utils.py, with the settings of
# generation that it used to hold), those that the four classes have for training, and some that published
# files carry beside these. `auto_map` names code, which is never loaded.
FREE = frozenset(
  "architectures auto_map model_type torch_dtype dtype transformers_version _name_or_path name_or_path"
  " _commit_hash _attn_implementation _attn_implementation_internal _attn_implementation_autoset"
  " attn_implementation _experts_implementation _experts_implementation_internal experts_implementation"
  " use_cache initializer_range max_window_layers max_position_embeddings pretraining_tp layer_types"
  " bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id"
  " return_dict output_hidden_states output_attentions output_scores return_dict_in_generate torchscript"
  " use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder xla_device tie_last_hidden_states"
  " finetuning_task id2label label2id num_labels problem_type tokenizer_class prefix task_specific_params"
  " max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature"
  " top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size"
  " bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values"
  " exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff"
  " encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule"
  " assistant_confidence_threshold assistant_lookbehind target_lookbehind"
  " is_llama_config transformers.js_config unsloth_version unsloth_fixed".split()
)
# Fields that are known at these values alone, at which they change nothing; null stands for an absent one.
SETTLED: dict[str, tuple[tuple[Any, ...], str]] = {
  "attention_dropout": ((0, 0.0), "there is no dropout"),
  "hidden_dropout": ((0, 0.0), "there is no dropout"),
  "use_mrope": ((False,), "positions are one-dimensional"),
  "rope_interleaved": ((False,), "rotary angles turn the two halves of a head"),
  "partial_rotary_factor": ((1, 1.0), "rotary angles turn the whole head"),
  "is_encoder_decoder": ((False,), "the model is a decoder"),
  "add_cross_attention": ((False,), "the model is a decoder"),
  "tie_encoder_decoder": ((False,), "the model is a decoder"),
  "cross_attention_hidden_size": ((), "the model is a decoder"),
  "pruned_heads": (({},), "all heads are there"),
  "per_layer_config": (({},), "all layers are alike"),
  "quantization_config": ((), "weights are read as they are"),
  "draft_vocab_size": ((), "there is no draft model"),
}

# Tensors that are no parameters: buffers that older versions of transformers saved with the model.
_BUFFERS = re.compile(
  r"(?:.*\.)?(?:rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)"
  r"|masked_bias|causal_mask|attn_mask|position_ids)"
)
_MASKS = re.compile(r"(?:.*\.)?(?:attn|attention|self_attn)\.bias")


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
  """Whether a tensor is a buffer, which is computed from the config and not read.

  An `attn.bias` is one, a causal mask, if it has at least two dimensions; a bias has one.
  """
  return bool(_BUFFERS.fullmatch(name)) or (len(shape) > 1 and bool(_MASKS.fullmatch(name)))
