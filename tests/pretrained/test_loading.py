"""Checkpoints in and out: bit-equal, on any mesh, and one line for whatever is wrong with one."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from sleep_jax import config, model, params, pretrained, sharding
from sleep_jax.experiments import convert
from sleep_jax.pretrained import fields, jet_nemotron, ouro, safetensors_io, tokenizer, weight_map
from sleep_jax.pretrained.memory import memory_config
from tests import hybrids

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "data" / "golden"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
NAMES = ("jet_nemotron_tiny", "ouro_tiny")


@pytest.fixture
def copy(tmp_path):
  """A checkpoint that a test may damage: (name) -> folder."""

  def make(name: str) -> pathlib.Path:
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
      shutil.copyfile(GOLDEN / name / file, folder / file)
    return folder

  return make


def edit_config(folder: pathlib.Path, **changes) -> None:
  values = json.loads((folder / "config.json").read_text()) | changes
  (folder / "config.json").write_text(json.dumps(values))


def shards(folder: pathlib.Path, dtype=None) -> dict[str, str]:
  """Splits the one file in two with an index, written by the library."""
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  if dtype is not None:
    tensors = {name: x.astype(dtype) for name, x in tensors.items()}
  names, files = sorted(tensors), {}
  for k in range(2):
    file = f"model-{k + 1:05}-of-00002.safetensors"
    safetensors.numpy.save_file({n: tensors[n] for n in names[k::2]}, folder / file, {"format": "pt"})
    files |= dict.fromkeys(names[k::2], file)
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
  return files


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_the_file_that_was_imported(name, tmp_path):
  cfg, weights, source = pretrained.load(GOLDEN / name)
  pretrained.export(tmp_path / "out", cfg, weights, source)
  for file in ("config.json", "model.safetensors"):
    assert (tmp_path / "out" / file).read_bytes() == (GOLDEN / name / file).read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_shards_in_bfloat16_come_back_bit_equal(copy, tmp_path):
  folder = copy(NAMES[0])
  files = shards(folder, safetensors_io.DTYPES["BF16"])
  cfg, weights, source = pretrained.load(folder)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(weights))
  pretrained.export(tmp_path / "out", cfg, weights, source)
  for file in {*files.values(), "model.safetensors.index.json"}:
    assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()
  _, narrow, _ = pretrained.load(folder, param_dtype="bfloat16")
  assert narrow["embed"].dtype == narrow["blocks"]["0"]["mixer"]["conv_w2"].dtype == "bfloat16"
  assert narrow["blocks"]["0"]["mixer"]["A_log"].dtype == narrow["final_norm"].dtype == "float32"


@pytest.mark.parametrize("name", NAMES)
def test_on_a_mesh_each_weight_lies_where_it_is_declared(name, mesh_of_eight):
  cfg, weights, _ = pretrained.load(GOLDEN / name)
  with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=1), jax.devices()[:1])):
    _, alone, _ = pretrained.load(GOLDEN / name)

  def check(w, x, y):
    assert x.sharding.spec == sharding.spec(w.axes, w.shape)
    np.testing.assert_array_equal(x, y)

  jax.tree.map(check, model.declare(cfg), weights, alone, is_leaf=params.is_weight)


def test_one_tensor_at_a_time_is_in_memory(monkeypatch):
  """Counts host bytes that are alive at each read: those of one tensor, however many there are."""
  import weakref

  alive, most, largest = {}, [0], [0]
  read = safetensors_io.Tensors.read

  def counting(self, name):
    x = read(self, name)
    alive[id(x)] = x.nbytes
    weakref.finalize(x, alive.pop, id(x))
    most[0], largest[0] = max(most[0], sum(alive.values())), max(largest[0], x.nbytes)
    return x

  monkeypatch.setattr(safetensors_io.Tensors, "read", counting)
  with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=4, model=2))):  # parts are copies, not views
    _, weights, _ = pretrained.load(GOLDEN / NAMES[0], param_dtype="bfloat16")
  total = sum(x.nbytes for x in jax.tree.leaves(weights))
  assert 0 < most[0] <= 2 * largest[0] < total, (most, largest, total)


def damage_missing(folder):
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  tensors["extra.weight"] = tensors.pop("model.norm.weight")
  tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:5].copy()
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def damage_truncated(folder):
  data = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(data[:-9])


def damage_dtype(folder):
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int64)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def damage_pickle(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_shard(folder):
  (folder / set(shards(folder).values()).pop()).unlink()


def damage_escape(folder):
  files = shards(folder)
  index = {"weight_map": files | {"model.norm.weight": "../model.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def changed(**changes):
  return lambda folder: edit_config(folder, **changes)


BAD = {
  "tensors": (
    damage_missing,
    r"missing: model.norm.weight; unexpected: extra.weight; misshapen: .*\[5, 64\] instead",
  ),
  "truncated": (damage_truncated, "model.safetensors: is damaged or no safetensors file"),
  "dtype": (damage_dtype, r"dtypes must be F32, BF16, F16, not those of model.norm.weight \(I64\)"),
  "pickle": (damage_pickle, "pytorch_model.bin may execute code"),
  "shard": (damage_shard, "shard model-0000.-of-00002.safetensors is missing"),
  "escape": (damage_escape, "'../model.safetensors' is not the name of a .safetensors file in this folder"),
  "architecture": (
    changed(architectures=["EvilForCausalLM"]),
    "unknown architecture 'EvilForCausalLM'; known: Jet",
  ),
  "field": (changed(rope_sclaing=3), "config.json: unknown field.s. rope_sclaing"),
  "type": (changed(hidden_size="64"), "config.json: hidden_size must be of type int, got '64'"),
  "range": (changed(vocab_size=0), "config.json: vocab_size must lie in 1"),
  "rope": (
    changed(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "config.json: rotary angles scaled in the linear way are not supported here",
  ),
  "value": (changed(hidden_act="gelu"), "config.json: hidden_act = 'gelu' is not supported"),
  "json": (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_says_what_is_wrong_and_nothing_is_written(case, copy, tmp_path):
  folder = copy(NAMES[1])
  damage, message = BAD[case]
  damage(folder)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(config.ConfigError, match=message) as caught:
    convert.convert(convert.ConvertConfig(source=str(folder), target=str(tmp_path / "new" / "out")))
  assert "\n" not in str(caught.value)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  ("written", "read"),
  [
    ({"rope_theta": 1e4}, config.RopeScaling()),
    ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, config.RopeScaling("linear", 2.0)),
    ({"rope_theta": 1e4, "rope_scaling": LLAMA3}, config.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, config.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
  ],
)
def test_scaled_rotary_angles_as_older_and_newer_files_write_them(written, read):
  theta, scaling = fields.rope(told := fields.Fields(written, "config.json"))
  told.finish()
  assert (theta, scaling) == (1e4, read)


@pytest.mark.parametrize(
  ("written", "message"),
  [
    (
      {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn"}},
      "rope_type = 'yarn' is not supported .known: d",
    ),
    (
      {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear"}},
      "config.json: rope_scaling.factor is missing",
    ),
    (
      {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "more": 1}},
      "config.json: unknown field.s. rope_scaling.more",
    ),
    (
      {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}},
      "type = 'llama3' is not supported .rope_type says otherwise",
    ),
    (
      {"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
      "model.attention.rope_scaling.high: must be above 1.0, got 1.0",
    ),
  ],
)
def test_other_rotary_angles_are_refused(written, message):
  with pytest.raises(config.ConfigError, match=message):
    fields.rope(fields.Fields(written, "config.json"))


def test_a_window_shorter_than_the_sliding_layers_is_refused():
  with pytest.raises(
    config.ConfigError, match="model.window: must be at least model.attention.swa_window = 24"
  ):
    pretrained.load(GOLDEN / NAMES[0], window=23)


def test_an_ignored_field_is_no_mistake(copy):
  folder = copy(NAMES[1])
  edit_config(folder, colour="blue")
  assert pretrained.open_source(folder, ignore=("colour",)).model.embed_dim == 64


@pytest.mark.slow
def test_memory_has_documented_names_and_comes_back(tmp_path):
  fast = config.FastConfig(num_heads=2, key_dim=8, value_dim=8)
  told = convert.convert(
    convert.ConvertConfig(
      source=str(GOLDEN / NAMES[1]), target=str(tmp_path / "out"), memory_layers=2, fast=fast
    )
  )
  assert "added 2 layers" in told and "bit-equal" in told
  assert (tmp_path / "out/model.safetensors").read_bytes() == (
    GOLDEN / NAMES[1] / "model.safetensors"
  ).read_bytes()
  cfg, weights, source = pretrained.load(tmp_path / "out")
  assert cfg.blocks == ("jet", "attn", "attn", "jet", "attn") and cfg.without_mlp == (0, 3)
  assert "memory.layers.1.self_attn.o_proj.weight" in source.memory.files
  base_cfg, base, _ = pretrained.load(GOLDEN / NAMES[1], predict_passes=1)
  wanted_cfg, wanted = pretrained.add_memory(base_cfg, base, jax.random.key(0), num_layers=2, fast=fast)
  assert wanted_cfg == cfg
  hybrids.assert_same(weights, wanted)


def small_tokenizer(folder: pathlib.Path, size: int) -> None:
  vocabulary = {
    word: i for i, word in enumerate(["two", "plus", "is", "four"] + [f"w{i}" for i in range(4, size)])
  }
  built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="two"))
  built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  built.save(str(folder / "tokenizer.json"))


def test_tokenizer(tmp_path):
  cfg = hybrids.model_config()
  small_tokenizer(tmp_path, cfg.vocab_size)
  words = tokenizer.Tokenizer(tmp_path, cfg)
  assert words.encode("two plus two is four") == [0, 1, 0, 2, 3]
  assert words.decode([3, 2, 0]) == "four is two"
  with pytest.raises(config.ConfigError, match="prompt: has no tokens"):
    words.encode("")
  small_tokenizer(tmp_path, cfg.vocab_size + 1)
  with pytest.raises(config.ConfigError, match="its tokens go up to 11, the model's vocabulary to 10"):
    tokenizer.Tokenizer(tmp_path, cfg)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(config.ConfigError, match="tokenizer.json: is no tokenizer"):
    tokenizer.Tokenizer(tmp_path, cfg)


@pytest.mark.parametrize(
  ("cfg", "parameters", "tensors"),
  [
    (jet_nemotron.config_2b(), 1_964_806_208, 482),
    (jet_nemotron.config_4b(), 3_960_424_768, None),
    (ouro.config_1_4b(), 1_434_652_673, 269),
  ],
)
def test_the_published_sizes(cfg, parameters, tensors):
  entries = weight_map.entries(cfg)
  assert params.count(model.declare(cfg)) == parameters
  assert sum(int(np.prod(e.shape)) for e in entries) == parameters
  assert tensors is None or len(entries) == tensors


def test_published_shapes():
  jet = {e.name: e.shape for e in weight_map.entries(jet_nemotron.config_2b())}
  mixer = {
    n.removeprefix("model.layers.0.self_attn."): s for n, s in jet.items() if ".layers.0.self_attn." in n
  }
  assert mixer == {
    "q_proj.weight": (1152, 1536),
    "k_proj.weight": (1152, 1536),
    "v_proj.weight": (3072, 1536),
    "g_proj.weight": (3072, 1536),
    "a_proj.weight": (12, 1536),
    "b_proj.weight": (12, 1536),
    "A_log": (12,),
    "dt_bias": (12,),
    "o_norm.weight": (256,),
    "o_proj.weight": (1536, 3072),
    "dynamic_conv1d.kernel_generator.w1.weight": (384, 1536),
    "dynamic_conv1d.kernel_generator.w2.weight": (12288, 384),
    "dynamic_conv1d.kernel_generator.w2.bias": (12288,),
  }
  assert jet["model.layers.20.self_attn.k_proj.bias"] == (256,) and "lm_head.weight" not in jet
  looped = {e.name: e.shape for e in weight_map.entries(ouro.config_1_4b())}
  assert looped["model.early_exit_gate.weight"] == (1, 2048) and looped["lm_head.weight"] == (49152, 2048)
  assert looped["model.layers.23.mlp.down_proj.weight"] == (2048, 5632)


def test_memory_of_ouro_stays_below_a_tenth():
  base, cfg = ouro.config_1_4b(), memory_config(ouro.config_1_4b())
  added = params.count(model.declare(cfg)) / params.count(model.declare(base)) - 1
  assert 0.098 < added < 0.1
  assert [i for i, kind in enumerate(cfg.blocks) if kind == "jet"] == [2, 7, 12, 17, 22, 27]


@pytest.mark.parametrize("cfg", [jet_nemotron.config_2b(), memory_config(ouro.config_1_4b())])
def test_full_size_shardings_of_a_pod(cfg):
  """256 devices, none of them needed: every weight drawn lies as it is declared, and none is left whole."""
  kinds = (jax.sharding.AxisType.Explicit,) * 2
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((64, 4), ("data", "model"), axis_types=kinds)
  ):
    weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    wanted = jax.tree.map(
      lambda w: sharding.spec(w.axes, w.shape), model.declare(cfg), is_leaf=params.is_weight
    )
    for (path, x), spec in zip(
      jax.tree_util.tree_leaves_with_path(weights),
      jax.tree.leaves(wanted, is_leaf=lambda s: isinstance(s, tuple)),
      strict=True,
    ):
      assert x.sharding.spec == spec, params.name_of(path)
      assert x.size < 1e6 or any(spec), params.name_of(path)
