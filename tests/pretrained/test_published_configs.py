"""Configs as they are published: fields removed, null, at their defaults, and all others that programs write.

The families are read beside the classes that define their defaults. Where torch and transformers are
installed (`make peers`), defaults and logits are compared with theirs.
"""

import json
import pathlib

import pytest

from sleep_jax import config, pretrained
from sleep_jax.pretrained import loading, published
from tests.pretrained import tiny

NAMES = {
  "qwen2": published.QWEN2,
  "qwen3": published.QWEN3,
  "smollm3": published.SMOLLM3,
  "llama": published.LLAMA,
  "jet": published.JET_NEMOTRON,
  "ouro": published.OURO,
  "qwen3_5": published.QWEN3_5,
  "olmo_hybrid": published.OLMO_HYBRID,
  "kimi_linear": published.KIMI_LINEAR,
}
# What the base class of all configs writes, with its defaults: transformers 4.31.0 and 4.51.3 write all of
# these when asked to (`to_json_file(use_diff=False)`), 5.23.0 some.
BASE_FIELDS = {
  "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
  "torch_dtype": "float32", "dtype": None, "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
  "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
  "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False,
  "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
  "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
  "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
  "encoder_no_repeat_ngram_size": 0,
  "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False,
  "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
  "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
  "finetuning_task": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
  "label2id": {"LABEL_0": 0, "LABEL_1": 1},
  "tokenizer_class": None, "prefix": None, "bos_token_id": 1, "pad_token_id": None, "eos_token_id": [2, 3],
  "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
  "_name_or_path": "org/name", "_commit_hash": None, "transformers_version": "4.51.3", "use_cache": True,
  "initializer_range": 0.02, "_attn_implementation_autoset": True,
  "auto_map": {"AutoConfig": "configuration_x.XConfig"},
}  # fmt: skip
# What published files of these families carry beside the fields of their classes.
IN_THE_WILD = {
  "qwen2": {
    "use_mrope": False, "sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False,
  },
  "qwen3": {
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "rope_scaling": None,
    "mlp_bias": False, "pad_token_id": 0,
  },
  "smollm3": {
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "pretraining_tp": 2,
    "layer_types": ["full_attention"] * 3, "rope_scaling": None, "rope_interleaved": False,
    "no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 4,
  },
  "llama": {
    "pretraining_tp": 1, "is_llama_config": True, "rope_interleaved": False, "mlp_bias": False,
    "transformers.js_config": {"dtype": "q4"}, "head_dim": None, "rope_scaling": None,
  },
  "qwen3_5": {
    "attn_output_gate": True, "full_attention_interval": 4, "mamba_ssm_dtype": "float32", "use_mrope": False,
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "output_gate_type": "swish",
  },
  "olmo_hybrid": {
    "linear_a_log_min": 0.0, "linear_a_log_max": 16.0, "linear_dt_min": 0.001, "linear_dt_max": 0.1,
    "linear_dt_init_floor": 1e-4, "rope_scaling": None,
  },
  "kimi_linear": {
    "mla_use_nope": True, "q_lora_rank": None, "rope_scaling": None, "rope_theta": 10000.0, "head_dim": 72,
    "num_experts": None, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "moe_layer_freq": 1,
    "use_grouped_topk": True, "model_max_length": 1048576, "routed_scaling_factor": 2.446,
  },
  "jet": {"use_mrope": False, "max_window_layers": 28, "rope_scaling": None, "attention_dropout": 0.0},
  "ouro": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "rope_scaling": None},
}  # fmt: skip


def values_of(name: str) -> dict:
  """A tiny config of a family that says everything that its class has a default for."""
  values = json.loads(json.dumps(tiny.CONFIGS[name]))
  for field, default in published.FAMILIES[NAMES[name]].defaults.items():
    if default is not None:
      values.setdefault(field, default)
  values.pop("rope_theta", None)
  values.pop("rope_parameters", None)
  return values | {"rope_theta": 1e4, "model_type": published.FAMILIES[NAMES[name]].model_type}


def read(values: dict, ignore=()) -> dict:
  """What `config.json` says, as fields of `ModelConfig`."""
  values = json.loads(json.dumps(values))
  fields = loading._fields(values, ignore)
  said = loading.ARCHITECTURES[loading._architecture(values)](fields)
  fields.finish()
  return said


def cases():
  """(family, field) of every field that a class has a default for."""
  return [(name, field) for name in NAMES for field in published.FAMILIES[NAMES[name]].defaults]


@pytest.mark.parametrize(("name", "field"), cases())
def test_an_absent_or_null_field_has_the_published_default(name, field):
  """The field at its default, without it, and null say the same, unless null means something else."""
  family = published.FAMILIES[NAMES[name]]
  default = family.defaults[field]
  values = values_of(name)
  if field == "num_hidden_layers" and name == "jet":
    values |= {"layer_types": None}
  sizes = {"num_attention_heads": 32, "num_key_value_heads": 2} if field == "num_attention_heads" else {}
  sizes |= {"num_attention_heads": 32} if field == "num_key_value_heads" else {}
  sizes |= {"linear_num_value_heads": 32} if field == "linear_num_key_heads" else {}
  if name == "smollm3" and field in ("num_hidden_layers", "no_rope_layers", "no_rope_layer_interval"):
    values |= {"no_rope_layers": None}
  if name in ("qwen3_5", "olmo_hybrid") and field in ("num_hidden_layers", "full_attention_interval"):
    values |= {"layer_types": None}
  if name == "kimi_linear":
    experts = {"layer_types": None, "mlp_layer_types": None, "num_experts": None}
    values |= experts if field in ("num_hidden_layers", "mlp_layer_types") else {}
    values |= {"qk_nope_head_dim": 128} if field == "v_head_dim" else {}  # no narrower than its default
    sizes |= {"num_key_value_heads": 32} if field == "num_attention_heads" else {}
  if name == "olmo_hybrid" and field == "rope_theta":  # null: no rotary angles
    assert read(values | {field: None})["blocks"] == ("gdn", "nope")
    return
  values |= {"hidden_size": 64} | sizes
  explicit = read(values | ({} if default is None else {field: default}))
  without = {n: x for n, x in values.items() if n != field}
  assert read(without) == explicit if default is not None else read(without)
  if field == "num_key_value_heads":  # null: as many as there are query heads
    assert read(values | {field: None})["attention"].num_kv_heads == values["num_attention_heads"]
  elif field == "sliding_window":  # null: there is none
    assert read(
      values | {field: None, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
    )
  else:
    assert read(values | {field: None}) == read(without)


@pytest.mark.parametrize("name", NAMES)
def test_what_programs_write_beside_the_fields_of_a_class_changes_nothing(name):
  wanted = read(values_of(name))
  for extra in (BASE_FIELDS, IN_THE_WILD[name], BASE_FIELDS | IN_THE_WILD[name]):
    assert read(values_of(name) | extra) == wanted
  for field in set(published.FREE) - {
    "architectures",
    "model_type",
    "layer_types",
    "max_position_embeddings",
  }:
    if field not in published.FAMILIES[NAMES[name]].defaults:
      assert read(values_of(name) | {field: ["anything"]}) == wanted, field


CHANGES = {
  "attention_dropout": 0.1, "hidden_dropout": 0.1, "use_mrope": True, "rope_interleaved": True,
  "partial_rotary_factor": 0.5, "is_encoder_decoder": True, "add_cross_attention": True,
  "tie_encoder_decoder": True, "cross_attention_hidden_size": 8, "pruned_heads": {"0": [1]},
  "per_layer_config": {"0": {"hidden_size": 4}}, "quantization_config": {"bits": 4}, "draft_vocab_size": 9,
}  # fmt: skip


@pytest.mark.parametrize(
  ("name", "field"),
  [(n, f) for n in NAMES for f in published.SETTLED if f not in published.FAMILIES[NAMES[n]].reads],
)
def test_a_value_that_would_change_the_numbers_is_refused(name, field):
  with pytest.raises(pretrained.PretrainedError, match=f"^config.json: {field} = .* is not supported"):
    read(values_of(name) | {field: CHANGES[field]})


def test_every_settled_field_has_a_value_that_is_tried():
  assert set(CHANGES) == set(published.SETTLED)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "ouro"])
@pytest.mark.parametrize(
  ("settings", "full"),
  [
    ({"use_sliding_window": False, "sliding_window": 16}, True),
    ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, True),
    ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, True),
    ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, False),
    ({"use_sliding_window": True, "max_window_layers": 0}, False),
    ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2}, True),
    ({"layer_types": ["full_attention", "sliding_attention"]}, False),
  ],
)
def test_layers_that_slide_are_told_from_settings_that_do_nothing(name, settings, full):
  values = {n: x for n, x in values_of(name).items() if n not in ("layer_types", "sliding_window")} | settings
  if full:
    assert read(values)["blocks"] == ("attn", "attn")
  else:
    with pytest.raises(pretrained.PretrainedError, match="is not supported"):
      read(values)


@pytest.mark.parametrize(
  ("settings", "kinds"),
  [
    ({"no_rope_layers": [1, 0, 0]}, "attn nope nope"),
    ({"no_rope_layers": [1, 1, 1, 0]}, "attn attn attn"),
    ({"no_rope_layers": None}, "attn attn attn"),
    ({"no_rope_layers": None, "no_rope_layer_interval": 2}, "attn nope attn"),
    ({"no_rope_layers": None, "no_rope_layer_interval": 1}, "nope nope nope"),
    ({"use_sliding_window": True}, "attn nope attn"),
    ({"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 1, 1]}, "attn attn attn"),
    ({"use_sliding_window": True, "sliding_window": 8}, None),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, None),
    ({"no_rope_layers": [1, 0]}, None),
    ({"no_rope_layers": [1, 0, 2]}, None),
    ({"no_rope_layers": [True, False, True]}, None),
    ({"no_rope_layers": "101"}, None),
    ({"no_rope_layer_interval": 0}, None),
  ],
)
def test_layers_without_rotary_angles(settings, kinds):
  values = values_of("smollm3") | settings
  if kinds is not None:
    assert read(values)["blocks"] == tuple(kinds.split())
  else:
    with pytest.raises(pretrained.PretrainedError, match=f"^config.json: ({'|'.join(settings)})"):
      read(values)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NESTED = [
  ({"rope_theta": 5e5}, None),
  ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
  ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}, None),
  ({"rope_parameters": {"rope_theta": 5e5, "rope_type": None}, "rope_theta": None}, None),
  ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, None),
  ({"rope_parameters": {}, "rope_scaling": {}, "rope_theta": 5e5}, None),
  ({"rope_parameters": None, "rope_scaling": {"type": "default"}, "rope_theta": 5e5}, None),
  ({"rope_scaling": {"rope_type": "default", "factor": 8.0, "rope_theta": 5e5}}, None),
  ({"rope_theta": 5e5, "partial_rotary_factor": 1}, None),
  ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, ("linear", 2.0)),
  (
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    ("linear", 2.0),
  ),
  (
    {
      "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
      "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    ("linear", 2.0),
  ),
  (
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "max_position_embeddings": 77},
    ("llama3", 4.0, 1.0, 4.0, 77),
  ),
]


@pytest.mark.parametrize(("written", "scaling"), NESTED)
def test_rotary_angles_in_every_way_in_which_they_are_written(written, scaling):
  said = read({n: x for n, x in values_of("llama").items() if n != "rope_theta"} | written)["attention"]
  assert said.rope_theta == 5e5
  assert said.rope_scaling == (config.RopeScaling() if scaling is None else config.RopeScaling(*scaling))


@pytest.mark.parametrize(
  ("written", "field"),
  [
    ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "rope_theta"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ({"rope_parameters": {"mrope_section": [1]}}, "rope_parameters.mrope_section"),
    (
      {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "default"}},
      "rope_scaling",
    ),
  ],
)
def test_rotary_angles_that_say_something_else_are_refused_by_name(written, field):
  with pytest.raises(pretrained.PretrainedError, match=f"^config.json: .*{field}"):
    read(values_of("llama") | written)


def test_an_unknown_field_is_ignored_by_its_dotted_name_wherever_it_is_nested():
  values = values_of("jet")
  values["rope_parameters"] = {"rope_theta": 1e4, "note": 1}
  values["efficient_attention_config"]["jet"]["colour"] = "blue"
  values["efficient_attention_config"]["swa"]["sinks"] = None
  values["extra"] = {"a": 1}
  groups = "efficient_attention_config"
  names = ("rope_parameters.note", f"{groups}.jet.colour", f"{groups}.swa.sinks", "extra")
  assert read(values, names) == read(values_of("jet"))
  for name in names:
    with pytest.raises(pretrained.PretrainedError, match=f"unknown field.s. {name}; .*`ignore`"):
      read(values, set(names) - {name})


@pytest.mark.parametrize(
  ("written", "read_as"), [("1e-5", 1e-5), ("1e-06", 1e-6), (1e-6, 1e-6), (None, 1e-5), (1, 1.0)]
)
def test_the_epsilon_of_a_jetblock_is_passed_on(written, read_as):
  values = values_of("jet")
  values["efficient_attention_config"]["jet"]["norm_eps"] = written
  assert read(values)["fast"].out_norm_eps == read_as


@pytest.mark.parametrize("wrong", ["small", "nan", "inf", 0, -1e-5, True, [1e-5]])
def test_an_epsilon_that_is_none_is_refused(wrong):
  values = values_of("jet")
  values["efficient_attention_config"]["jet"]["norm_eps"] = wrong
  with pytest.raises(
    pretrained.PretrainedError, match="^config.json: efficient_attention_config.jet.norm_eps must"
  ):
    read(values)


@pytest.mark.parametrize("field", published.JET_BLOCK)
def test_a_jetblock_without_a_field_has_the_default_of_its_class(field):
  values = values_of("jet")
  jet = values["efficient_attention_config"]["jet"]
  jet[field] = published.JET_BLOCK[field]
  explicit = read(values)
  for change in ({field: None}, None):
    again = {n: x for n, x in jet.items() if n != field} | (change or {})
    groups = values["efficient_attention_config"] | {"jet": again}
    assert read(values | {"efficient_attention_config": groups}) == explicit


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_is_found_by_model_type_alone_and_must_agree_with_it(name):
  values = values_of(name)
  wanted = read(values)
  assert read(values | {"architectures": None}) == wanted
  with pytest.raises(pretrained.PretrainedError, match="model_type = 'mistral' is not supported"):
    read(values | {"model_type": "mistral"})


def test_a_misfit_says_which_sizes_were_taken_from_the_defaults(tmp_path):
  folder = tiny.checkpoint(tmp_path / "llama", "llama")
  values = json.loads((folder / "config.json").read_text())
  del values["hidden_size"], values["intermediate_size"]
  (folder / "config.json").write_text(json.dumps(values))
  with pytest.raises(
    config.ConfigError, match="defaults of LlamaConfig hold: .*hidden_size = 4096, interm"
  ) as e:
    pretrained.open_source(folder)
  assert "misshapen: lm_head.weight [512, 16] instead of [512, 4096]" in str(e.value)


def test_the_table_in_the_docs_is_the_table_in_the_code():
  text = (pathlib.Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
  rows = [
    [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
  ]
  rows = {row[0].partition("`")[0]: row[1:] for row in rows if len(row) == 5}
  for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
    wanted = [
      str(published.FAMILIES[NAMES[name]].defaults[field]) for name in ("qwen2", "llama", "jet", "ouro")
    ]
    assert rows[field] == wanted
  for field in ("rope_theta", "rms_norm_eps"):
    wanted = [published.FAMILIES[NAMES[name]].defaults[field] for name in ("qwen2", "llama", "jet", "ouro")]
    assert [float(x) for x in rows[field]] == wanted
