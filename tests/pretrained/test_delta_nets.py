"""Qwen3.5, OLMo-Hybrid, Kimi Linear: what configs say, what files hold, and that they sleep as they are.

`test_delta_net_peers` compares them with transformers.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sleep_jax import config, generate, model, pretrained, train
from sleep_jax.config import SleepConfig
from sleep_jax.experiments import text
from sleep_jax.experiments.configs import text as presets
from sleep_jax.pretrained.ends import end_tokens
from sleep_jax.runtime import metrics, workdir
from tests import hybrids
from tests.hybrids import assert_near, assert_same
from tests.pretrained import tiny
from tests.pretrained.test_published_configs import read, values_of

FAMILIES = ("qwen3_5", "olmo_hybrid", "kimi_linear")
TWO = SleepConfig(num_passes=2)


@pytest.mark.parametrize(
  ("name", "settings", "kinds"),
  [
    ("qwen3_5", {"layer_types": None, "num_hidden_layers": 8}, "gdn gdn gdn attn gdn gdn gdn attn"),
    ("qwen3_5", {"layer_types": None, "full_attention_interval": 2}, "gdn attn"),
    ("qwen3_5", {"full_attention_interval": 1}, "gdn attn"),  # layer_types says otherwise, and is asked first
    ("olmo_hybrid", {"layer_types": None, "num_hidden_layers": 5}, "gdn gdn gdn attn gdn"),
    ("olmo_hybrid", {"layer_types": None, "num_hidden_layers": 3}, "gdn gdn attn"),
    ("olmo_hybrid", {"rope_theta": None}, "gdn nope"),
    ("olmo_hybrid", {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, "gdn nope"),
    ("olmo_hybrid", {"rope_parameters": None}, "gdn attn"),
    ("olmo_hybrid", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "gdn attn"),
    ("kimi_linear", {}, "kda nope"),
    (
      "kimi_linear",
      {"layer_types": None, "num_hidden_layers": 6, "mlp_layer_types": None, "first_k_dense_replace": 6},
      "kda kda kda kda nope kda",
    ),
    (
      "kimi_linear",
      {"linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2], "num_heads": 2, "head_dim": 4}},
      "nope kda",
    ),
    ("kimi_linear", {"mlp_layer_types": None, "num_experts": None}, "kda nope"),
  ],
)
def test_what_each_block_is(name, settings, kinds):
  assert read(values_of(name) | settings)["blocks"] == tuple(kinds.split())


@pytest.mark.parametrize(
  ("written", "turned"),
  [
    ({}, 2),  # 0.25 of 8
    ({"partial_rotary_factor": 0.5}, 4),
    (
      {"partial_rotary_factor": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}},
      6,
    ),
    ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [11, 11, 10], "mrope_interleaved": True}}, 2),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}, "rope_theta": 1e4}, None),
    ({"partial_rotary_factor": 1}, None),
  ],
)
def test_rotary_angles_turn_a_share_of_a_head(written, turned):
  plain = {
    n: x for n, x in values_of("qwen3_5").items() if n not in ("rope_parameters", "partial_rotary_factor")
  }
  assert read(plain | written)["attention"].rotary_dim == turned


def test_sizes_that_are_derived_from_others():
  values = {n: x for n, x in values_of("olmo_hybrid").items() if not n.startswith("linear_")}
  fast = read(values | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": None})["fast"]
  assert (fast.num_heads, fast.num_key_heads, fast.key_dim, fast.value_dim) == (4, None, 12, 24)
  assert (fast.write_most, fast.conv_size, fast.out_norm_eps) == (2.0, 4, 1e-5)
  assert read(values_of("olmo_hybrid") | {"linear_allow_neg_eigval": False})["fast"].write_most == 1
  assert read(values_of("qwen3_5") | {"rms_norm_eps": 0.1})["fast"].out_norm_eps == 0.1


@pytest.mark.parametrize(
  ("name", "written", "message"),
  [
    (
      "qwen3_5",
      {"rope_parameters": {"partial_rotary_factor": 0.5}},
      "rotary_factor is 0.25, rope_parameters.p",
    ),
    ("qwen3_5", {"partial_rotary_factor": 0.2}, "partial_rotary_factor must give an even number of the 8"),
    ("qwen3_5", {"partial_rotary_factor": 2}, "partial_rotary_factor must give an even number of the 8"),
    ("qwen3_5", {"partial_rotary_factor": "all"}, "partial_rotary_factor must be of type float"),
    ("qwen3_5", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type"),
    ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate = False is not supported"),
    ("qwen3_5", {"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid' is not supported"),
    (
      "qwen3_5",
      {"linear_num_key_heads": 3},
      "linear_num_key_heads must divide linear_num_value_h.* = 2, got 3",
    ),
    ("qwen3_5", {"layer_types": ["linear_attention", "sliding_attention"]}, r"layer_types\[1\] = 'sliding"),
    ("qwen3_5", {"full_attention_interval": 0, "layer_types": None}, "full_attention_interval must lie in 1"),
    ("qwen3_5", {"num_experts": 4}, "unknown field.s. num_experts"),
    ("qwen3_5", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ("olmo_hybrid", {"linear_allow_neg_eigval": "yes"}, "linear_allow_neg_eigval must be of type bool"),
    ("olmo_hybrid", {"linear_num_key_heads": 5}, "linear_num_key_heads must divide"),
    ("olmo_hybrid", {"layer_types": ["linear_attention"]}, "layer_types must be a list of 2 names"),
    ("olmo_hybrid", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ("olmo_hybrid", {"sliding_window": 8}, "unknown field.s. sliding_window"),
    (
      "kimi_linear",
      {"mlp_layer_types": ["dense", "sparse"]},
      r"mlp_layer_types\[1\] = 'sparse': experts are not supported",
    ),
    (
      "kimi_linear",
      {"mlp_layer_types": None},
      "first_k_dense_replace = 1 of 2 blocks: experts are not supported",
    ),
    ("kimi_linear", {"q_lora_rank": 8}, "q_lora_rank = 8 is not supported"),
    ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope = False is not supported"),
    ("kimi_linear", {"attention_bias": True}, "attention_bias = True is not supported"),
    ("kimi_linear", {"num_key_value_heads": 1}, "num_key_value_heads = 1 is not supported"),
    ("kimi_linear", {"v_head_dim": 9}, "v_head_dim must be at most 8, the width of a key, got 9"),
    ("kimi_linear", {"qk_rope_head_dim": -1}, "qk_rope_head_dim must lie in 0..16777216, got -1"),
    (
      "kimi_linear",
      {"linear_attn_config": {"full_attn_layers": [1, 2], "kda_layers": [2], "num_heads": 2}},
      "linear_attn_config.full_attn_layers must be a list of numbers of blocks, 1..2, none of them twice",
    ),
    (
      "kimi_linear",
      {"linear_attn_config": {"full_attn_layers": [1], "kda_layers": []}},
      "linear_attn_config.kda_layers and full_attn_layers must name all 2 blocks, they name 1",
    ),
  ],
)
def test_what_is_not_supported_is_refused_by_name(name, written, message):
  with pytest.raises(pretrained.PretrainedError, match=f"^config.json: .*{message}") as caught:
    read(values_of(name) | written)
  assert "\n" not in str(caught.value)


def rewritten(folder: pathlib.Path, rename, config_json, more=(), without=()) -> pathlib.Path:
  """A tiny checkpoint whose tensors have other names, beside others."""
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  made = {rename(name): x for name, x in tensors.items()} | dict(more)
  made = {name: x for name, x in made.items() if name not in without}
  safetensors.numpy.save_file(made, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(config_json))
  return folder


def with_images(values: dict, **top) -> dict:
  """The config of a checkpoint that reads images too, around a text model's."""
  inner = {n: x for n, x in values.items() if n != "architectures"} | {"model_type": "qwen3_5_text"}
  ids = {f"{x}_token_id": 7 for x in ("image", "video", "vision_start", "vision_end")}
  outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
  return (
    outer | ids | {"text_config": inner, "vision_config": {"depth": 2, "model_type": "qwen3_5_vision"}} | top
  )


BESIDE = {
  "model.visual.blocks.0.attn.qkv.weight": np.ones((3, 2), np.float32),
  "mtp.fc.weight": np.ones((2, 2), np.float16),
}


@pytest.mark.parametrize("kind", ["prefixed", "with images", "drafting"])
def test_the_language_model_of_a_larger_checkpoint_is_read_and_the_rest_written_back(kind, tmp_path):
  """As the published files are: with a tower for images, and a head that drafts several tokens."""
  plain = tiny.checkpoint(tmp_path / "plain", "qwen3_5")
  cfg, weights, _ = pretrained.load(plain)
  values = json.loads((plain / "config.json").read_text())
  tied = {"tie_word_embeddings": True, "eos_token_id": None}
  written = {
    "prefixed": values,
    "with images": with_images(values | {"eos_token_id": 3}, **tied),
    "drafting": values | {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False},
  }[kind]
  inner = (
    (lambda name: name)
    if kind == "drafting"
    else lambda name: name.replace("model.", "model.language_model.")
  )
  folder = rewritten(tiny.checkpoint(tmp_path / "in", "qwen3_5"), inner, written, BESIDE.items())
  again, read_again, source = pretrained.load(folder)
  assert again == cfg
  assert_same(read_again, weights)
  assert not pretrained.differing(source, weights)
  pretrained.export(tmp_path / "out", again, read_again, source)
  for name in ("model.safetensors", "config.json"):
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
  if kind == "with images":
    assert end_tokens(folder) == (3,)
    with pytest.raises(
      pretrained.PretrainedError, match="tie_word_embeddings = False .*text_config says otherwise"
    ):
      (folder / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": False}))
      pretrained.open_source(folder)
    with pytest.raises(pretrained.PretrainedError, match="unknown field.s. text_config.num_experts"):
      (folder / "config.json").write_text(json.dumps(with_images(values | {"num_experts": 2})))
      pretrained.open_source(folder)


def test_tensors_of_another_family_are_not_taken_for_something_beside(tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "qwen3")
  rewritten(folder, lambda name: name, json.loads((folder / "config.json").read_text()), BESIDE.items())
  with pytest.raises(pretrained.PretrainedError, match="unexpected: model.visual.blocks.*, mtp.fc.weight"):
    pretrained.open_source(folder)


def test_the_norms_of_attention_may_be_named_as_all_others(tmp_path):
  """transformers 5 writes OLMo-Hybrid so, and cuts the taps of its convolutions in three equal pieces."""
  plain = tiny.checkpoint(tmp_path / "plain", "olmo_hybrid")
  _, weights, _ = pretrained.load(plain)
  values = json.loads((plain / "config.json").read_text())
  name, taps = "model.layers.1.post_attention_layernorm.weight", "model.layers.0.linear_attn.conv1d.weight"
  tensors = safetensors.numpy.load_file(plain / "model.safetensors")
  assert name in tensors and tensors[taps].shape == (20, 1, 3)
  other = name.replace("post_attention_layernorm", "feedforward_layer_norm")
  for edges in ((4, 8), (7, 14)):  # as published: queries, keys, values; and in equal pieces
    pieces = dict(zip("qkv", np.split(tensors[taps], edges), strict=True))
    folder = rewritten(
      tiny.checkpoint(tmp_path / f"in{edges[0]}", "olmo_hybrid"),
      lambda n: {name: other, taps: "x"}.get(n, n),
      values,
      {
        taps.replace("conv1d", f"{x}_conv1d"): np.ascontiguousarray(piece) for x, piece in pieces.items()
      }.items(),
      without=("x",),
    )
    cfg, again, source = pretrained.load(folder)
    assert_same(again, weights)
    assert not pretrained.differing(source, weights)
    out = tmp_path / f"out{edges[0]}"
    pretrained.export(out, cfg, again, source)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
  rewritten(folder, lambda n: n, values, without=(taps.replace("conv1d", "k_conv1d"),))
  with pytest.raises(
    pretrained.PretrainedError, match="missing: .*conv1d.weight; unexpected: .*q_conv1d.weight"
  ):
    pretrained.open_source(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_is_one_parallel_pass_and_it_sleeps_as_it_is(name, tmp_path):
  """No memory is added. Two passes write something else than one, and as `consolidate` does."""
  cfg, weights, _ = pretrained.load(tiny.checkpoint(tmp_path / name, name), window=6)
  tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 9), dtype=np.int32)
  asleep = hybrids.jit(lambda x, s, how: model.consolidate(weights, x, s, cfg, how), static_argnums=2)
  awake = hybrids.jit(lambda x, s: model.predict(weights, x, s, cfg)[0])
  session, states = generate.start(cfg, TWO, 2), {}
  for n in (1, 2):
    states[n] = asleep(tokens[:, :6], model.init_state(cfg, 2), SleepConfig(num_passes=n))
  assert np.max(np.abs(np.asarray(states[1].fast["0"].S - states[2].fast["0"].S))) > 1e-3
  first, second = awake(tokens[:, :6], model.init_state(cfg, 2)), awake(tokens[:, 6:], states[2])
  wanted = np.concatenate([first, second], axis=1)
  for t in range(9):
    session = generate.read(weights, tokens[:, t : t + 1], session, cfg, TWO)
    assert_near(session.logits, wanted[:, t], 1e-4)
  assert_near(session.start, states[2], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_fine_tuned_with_sleep_and_written_back(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = tiny.checkpoint(tmp_path / "in", name)
  for i, part in enumerate("ab"):
    pathlib.Path(f"{part}.txt").write_text(" ".join(f"What is {n * n} of {n + i}?" for n in range(200)))
  values = presets.get_config("checkpoint")
  changes = {"data.files": "a.txt", "data.held_out": "b.txt", "data.length": 32, "model.window": 16}
  changes |= {"pretrained.folder": str(folder), "pretrained.memory_layers": 0, "pretrained.trained": "all"}
  changes |= {"train.steps": 2, "train.batch_size": 2, "train.microbatches": 1, "train.log_every": 1}
  changes |= {"train.save_every": 2, "train.eval_every": 2, "train.eval_sequences": 2, "mesh.data": 1}
  values.update_from_flattened_dict(changes | {"optim.newton_schulz_dtype": "float32", "sleep.num_passes": 2})
  cfg = text.build(values.to_dict())
  assert cfg.model.without_mlp == () and cfg.sleep.num_passes == 2
  with workdir.prepare(tmp_path / "run", config.to_dict(cfg)) as opened:
    train.train(
      cfg, text.make_task(cfg, str(opened.path)), opened, tensorboard=False, report=lambda line: None
    )
  rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
  assert rows and all(np.isfinite(row["loss"]) for row in rows)
  run = pretrained.load_run(tmp_path / "run")
  moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), run.weights, pretrained.load(folder)[1])
  assert all(jax.tree.leaves(moved["blocks"]))  # and the gates, the taps and the norms with them
  opened = pretrained.open_run(tmp_path / "run")
  pretrained.export(
    tmp_path / "out", opened.model, run.weights, pretrained.run_source(opened), dtype="float32"
  )
  again = pretrained.load(tmp_path / "out")[1]
  assert_same(again, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), run.weights))
