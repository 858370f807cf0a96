"""The presets for checkpoints: the paper's settings, full size without a byte of weights, and mistakes."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from sleep_jax import config, model, params, pretrained, train
from sleep_jax.data import batching
from sleep_jax.data.gsm_infinite import task
from sleep_jax.experiments import gsm_infinite, runner
from sleep_jax.experiments.configs import gsm_infinite as presets
from tests import forked
from tests.pretrained import tiny

PUBLISHED = forked.ROOT / "tests" / "data" / "published"
FILE = f"{forked.ROOT}/experiments/configs/gsm_infinite.py"
MEMORY = {"pretrained.memory_layers": 1}
MEMORY |= {
  f"pretrained.fast.{name}": size for name, size in (("num_heads", 1), ("key_dim", 8), ("value_dim", 8))
}


def jet_tensors() -> dict[str, tuple[int, ...]]:
  """Names and shapes of Jet-Nemotron-2B, written out."""
  found = {"model.embed_tokens.weight": (151936, 1536), "model.norm.weight": (1536,)}
  attention = {"o_proj.weight": (1536, 1536)}
  for x, width in (("q", 1536), ("k", 256), ("v", 256)):
    attention |= {f"{x}_proj.weight": (width, 1536), f"{x}_proj.bias": (width,)}
  generator = "dynamic_conv1d.kernel_generator."
  jet = {"A_log": (12,), "dt_bias": (12,), "o_norm.weight": (256,), "o_proj.weight": (1536, 3072)}
  jet |= {f"{x}_proj.weight": (n, 1536) for x, n in (("q", 1152), ("k", 1152), ("v", 3072), ("g", 3072))}
  jet |= {f"{x}_proj.weight": (12, 1536) for x in "ab"}
  jet |= {f"{generator}w1.weight": (384, 1536), f"{generator}w2.weight": (12288, 384)}
  jet |= {f"{generator}w2.bias": (12288,)}
  for i in range(28):
    block = {f"self_attn.{name}": s for name, s in (attention if i in (14, 19, 20, 21) else jet).items()}
    block |= {"input_layernorm.weight": (1536,), "post_attention_layernorm.weight": (1536,)}
    block |= {f"mlp.{x}_proj.weight": (8960, 1536) for x in ("gate", "up")}
    block |= {"mlp.down_proj.weight": (1536, 8960)}
    found |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
  return found


def ouro_tensors() -> dict[str, tuple[int, ...]]:
  """Names and shapes of Ouro-1.4B, written out."""
  found = {f"{name}.weight": (49152, 2048) for name in ("model.embed_tokens", "lm_head")}
  found |= {"model.norm.weight": (2048,)}
  found |= {"model.early_exit_gate.weight": (1, 2048), "model.early_exit_gate.bias": (1,)}
  for i in range(24):
    block = {f"self_attn.{x}_proj.weight": (2048, 2048) for x in "qkvo"}
    block |= {f"mlp.{x}_proj.weight": (5632, 2048) for x in ("gate", "up")}
    block |= {"mlp.down_proj.weight": (2048, 5632)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
      block |= {f"{norm}.weight": (2048,), f"{norm}_2.weight": (2048,)}
    found |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
  return found


FULL = {"jet_nemotron_2b": jet_tensors, "ouro_1_4b": ouro_tensors}


def full_size(folder: pathlib.Path, name: str) -> pathlib.Path:
  """A checkpoint of the published size whose file is one hole: a header, and nothing on disk behind it."""
  folder.mkdir()
  shutil.copyfile(PUBLISHED / f"{name}.json", folder / "config.json")
  header, at = {}, 0
  for tensor, shape in FULL[name]().items():
    size = 2 * int(np.prod(shape))
    header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header).encode()
  with open(folder / "model.safetensors", "wb") as out:
    out.write(len(text).to_bytes(8, "little") + text)
    out.truncate(8 + len(text) + at)
  tiny.make_tokenizer(folder / "tokenizer.json")
  return folder


def values_of(preset, folder, **changes):
  values = presets.get_config(preset)
  values.pretrained.folder = str(folder)
  values.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
  return values.to_dict()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """name -> a checkpoint: `jet` and `ouro` of the published sizes, `tiny` ones."""
  root = tmp_path_factory.mktemp("checkpoints")
  made = {name.partition("_")[0]: full_size(root / name, name) for name in FULL}
  return made | {f"tiny_{name}": tiny.checkpoint(root / f"tiny_{name}", name) for name in tiny.CONFIGS}


@pytest.mark.parametrize(
  ("preset", "base", "parameters"),
  [("jet_2b", "jet", 1_964_806_208), ("ouro", "ouro", 1_434_652_673), ("ouro_memory", "ouro", 1_434_652_673)],
)
def test_full_size_from_the_published_files(folders, preset, base, parameters):
  """Config, names and shapes are the published ones; the memory's parameters are counted by hand."""
  cfg = gsm_infinite.build(values_of(preset, folders[base]))
  wide, reduced = 16 * 128, 16 * 128 // 8
  layer = (
    5 * 2048 * wide + 2048 * reduced + reduced * 4 * wide + 4 * wide + 2 * 16 * 2048 + 2 * 16 + 128 + 2048
  )
  declared = model.declare(cfg.model)
  assert params.count(declared) == parameters + (0 if preset == "jet_2b" else 6 * layer)
  train.check_fits(cfg)
  assert len(pretrained.open_source(folders[base]).tensors.files) == (482 if preset == "jet_2b" else 269)
  shapes = jax.eval_shape(lambda: train.init_state(cfg, train.optimization(cfg).tx))
  size = sum(x.size for x in jax.tree.leaves(shapes.opt_state) if x.ndim)
  assert size < (13 * layer if preset == "ouro_memory" else 2 * params.count(declared))


def test_the_papers_settings(folders):
  jet, ouro = (gsm_infinite.build(values_of(p, folders[f])) for p, f in (("jet_2b", "jet"), ("ouro", "ouro")))
  first = gsm_infinite.build(values_of("ouro_memory", folders["ouro"]))
  second = gsm_infinite.build(values_of("ouro_sliding", folders["ouro"], pretrained__memory_layers=6))
  for cfg in (jet, ouro, first, second):
    assert (cfg.train.batch_size, cfg.optim.muon_lr, cfg.optim.adam_lr) == (256, 1e-3, 5e-5)
    assert (cfg.data.operations, cfg.data.min_tokens, cfg.data.max_tokens) == ((1, 8), 2000, 3300)
    assert cfg.data.tokenizer == str(pathlib.Path(cfg.train.init_from) / "tokenizer.json")
    assert cfg.train.batch_size // cfg.train.microbatches == 8
    assert (cfg.train.eval_sequences, cfg.data.problems) == (1600, 76_800)
  assert [c.train.steps for c in (jet, ouro, first, second)] == [700, 1000, 300, 600]
  assert [c.train.steps * 256 / 76_800 for c in (first, second)] == [1, 2]  # epochs
  assert [c.model.window for c in (jet, ouro, first, second)] == [2000, 2000, 512, 512]
  assert [c.model.eviction for c in (jet, ouro, first, second)] == ["hard", "hard", "hard", "sliding"]
  assert (jet.sleep.first_block, jet.sleep.last_block, len(jet.model.blocks)) == (7, 21, 28)
  assert (ouro.sleep.first_block, ouro.sleep.last_block, len(ouro.model.blocks)) == (0, None, 30)
  inserted = tuple(f"blocks/{i}/*" for i in (2, 7, 12, 17, 22, 27))
  assert [c.optim.trained for c in (jet, ouro, first, second)] == [("*",), ("*",), inserted, ("*",)]


@pytest.mark.parametrize("preset", presets.PRETRAINED)
def test_every_run_of_a_sweep_is_one_that_the_experiment_takes(folders, preset):
  runs = presets.sweep(preset, 2)
  assert sorted({c["sleep.num_passes"] for c in runs.values()}) == [1, 2, 4, 6][: 3 + (preset == "jet_2b")]
  folder = folders["jet" if preset == "jet_2b" else "ouro"]
  built = {}
  for name, changes in runs.items():
    given = dict.fromkeys(["pretrained.memory_layers"], 6) if preset == "ouro_sliding" else {}
    built[name] = gsm_infinite.build(values_of(preset, folder, **given, **changes))
  assert len(set(built.values())) == len(runs)
  if preset == "ouro_memory":
    kinds = {cfg.sleep.num_passes: cfg.model.eviction for cfg in built.values()}
    assert kinds == {1: "sliding", 2: "hard", 4: "hard"}
  assert set(runner.commands(f"{FILE}:{preset}", "work", 2, {"pretrained.folder": "x"})) == set(runs)


def test_epochs_read_all_problems_in_an_order_of_their_own(folders):
  cfg = gsm_infinite.build(
    values_of("jet_2b", folders["tiny_jet"], data__problems=7, sleep__last_block=4, sleep__first_block=1)
  )
  source = task.training(cfg.data, 0, 17)
  assert isinstance(source, batching.Epochs) and len(source) == 17
  plain = task.training(config.replace(cfg.data, problems=0), 0, 7)
  wanted = [plain[i].prompt.tobytes() for i in range(7)]
  read = [source[i].prompt.tobytes() for i in range(17)]
  assert read[:7] == wanted and sorted(read[7:14]) == sorted(wanted) and read[7:14] != wanted
  assert len(set(read[14:])) == 3 and [source[i].prompt.tobytes() for i in (16, 9)] == [read[16], read[9]]
  with pytest.raises(IndexError):
    source[17]


MISTAKES = {
  "no folder": ("ouro", None, {}, "pretrained.folder: is required"),
  "nothing there": ("ouro", "nowhere", {}, "nowhere: there is no such folder"),
  "no memory": ("ouro_sliding", "tiny_ouro", {}, "has no fast weights, nothing that sleep could write"),
  "own memory": ("jet_2b", "tiny_jet", {"pretrained.trained": "memory"}, "pretrained.trained: must be `all`"),
  "memory for jet": ("jet_2b", "tiny_jet", {"pretrained.memory_layers": 1}, "attention-only models"),
  "too many": ("ouro", "tiny_ouro", {"pretrained.memory_layers": 3}, "num_layers: must be at most 2, got 3"),
  "trained": ("ouro", "tiny_ouro", {"pretrained.trained": "some"}, "trained: unknown value 'some'"),
  "no passes": ("ouro", "tiny_ouro", {"sleep.num_passes": 0}, "sleep.num_passes: must be at least 1, got 0"),
  "short window": ("jet_2b", "tiny_jet", {"model.window": 23}, "window: must be at least model.attention"),
  "blocks": ("jet_2b", "tiny_jet", {}, "sleep.last_block: must be at most 4"),
  "window": ("ouro", "tiny_ouro", {"model.window": 5000}, "window: must be at most data.cut.max_tokens"),
  "dtype": ("ouro", "tiny_ouro", {"model.dtype": "float64"}, "model.dtype: unknown value 'float64'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(folders, case):
  preset, folder, changes, message = MISTAKES[case]
  folder = folders.get(folder, folder)
  given = MEMORY if preset in ("ouro", "ouro_memory") else {}
  with pytest.raises(config.ConfigError) as caught:
    gsm_infinite.build(
      values_of(preset, folder, **(given | changes)) | ({} if folder else {"pretrained": {}})
    )
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_checkpoint_says_cannot_be_said_again(folders):
  values = values_of("ouro", folders["tiny_ouro"], **MEMORY)
  for group, field in (
    ("model", "embed_dim"),
    ("data", "tokenizer"),
    ("optim", "trained"),
    ("train", "init_from"),
  ):
    again = values | {group: values[group] | {field: "x"}}
    with pytest.raises(config.ConfigError, match=f"{group}.{field}: is said by"):
      gsm_infinite.build(again)
  again = values | {"model": values["model"] | {"fast": {"key_dim": 8}}}
  with pytest.raises(config.ConfigError, match="model.fast.key_dim: is said by the checkpoint"):
    gsm_infinite.build(again)
  again = values | {"model": values["model"] | {"attention": {"rope_theta": 2.0}}}
  with pytest.raises(config.ConfigError, match="model.attention.rope_theta: is said by the checkpoint"):
    gsm_infinite.build(again)
  named = values | {"model": values["model"] | {"attention": {"implementation": "blocked"}}}
  assert gsm_infinite.build(named).model.attention.implementation == "blocked"


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_and_nothing_is_written(tmp_path):
  folder = tiny.checkpoint(tmp_path / "ouro", "ouro", tokenizer=False)
  with forked.Experiment("experiments.gsm_infinite", tmp_path) as experiment:
    command = [f"--config={FILE}:ouro", f"--config.pretrained.folder={folder}", f"--workdir={tmp_path}/run"]
    command += [f"--config.{name}={value}" for name, value in MEMORY.items()]
    assert (
      "tokenizer.json: there is no such file" in (ended := experiment.run(*command)).err and ended.code == 2
    )
    tiny.make_tokenizer(folder / "tokenizer.json", tiny.VOCAB + 1)
    ended = experiment.run(*command)
    said = "tokenizer.json: its tokens go up to 512, the model's vocabulary to 511"
    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {said}\n")
    ended = experiment.run(*command, "--config.model.embed_dim=8")
    assert ended.code == 2 and "config.model has no field 'embed_dim'" in ended.err
  assert not (tmp_path / "run").exists()
