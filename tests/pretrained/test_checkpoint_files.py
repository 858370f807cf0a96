"""What real folders hold beside weights: buffers of older versions, tied heads, licences, templates, code."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sleep_jax import config, pretrained
from sleep_jax.pretrained import safetensors_io
from sleep_jax.pretrained.memory import memory_config
from tests import hybrids
from tests.pretrained import tiny

THETA = dict.fromkeys(tiny.CONFIGS, 1e4) | {"jet": 1e6, "ouro": 1e6}
HALF = dict.fromkeys(tiny.CONFIGS, 4) | {"qwen3_5": 2}  # pairs of channels that are turned


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def save(folder, tensors, files=1, **index):
  """Writes tensors into one file, or into several with an index."""
  (folder / "model.safetensors").unlink(missing_ok=True)
  if files == 1:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return
  names, where = sorted(tensors), {}
  for k in range(files):
    file = f"model-{k + 1:05}-of-{files:05}.safetensors"
    safetensors.numpy.save_file({n: tensors[n] for n in names[k::files]}, folder / file, {"format": "pt"})
    where |= dict.fromkeys(names[k::files], file)
  values = {"metadata": {"total_size": 1}, "weight_map": where | index}
  (folder / "model.safetensors.index.json").write_text(json.dumps(values))


def edit(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def buffers_of(theta: float, half: int) -> dict[str, np.ndarray]:
  """Tensors that older versions of the classes saved with the parameters, in many dtypes."""
  angles = theta ** (-np.arange(half) / half)
  made = {}
  for i, dtype in enumerate((np.float32, np.float16, jnp.bfloat16)):
    made[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = angles.astype(dtype)
  return made | {
    "model.rotary_emb.inv_freq": angles,
    "model.rotary_emb.original_inv_freq": angles.astype(np.float32),
    "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 4, 2 * half), np.float16),
    "model.layers.0.self_attn.rotary_emb.sin_cached": np.ones((4, 2 * half), np.float32),
    "model.layers.0.self_attn.masked_bias": np.array(-1e4, np.float32),
    "model.layers.0.attn.masked_bias": np.array(-1e4, np.float16),
    "model.layers.0.self_attn.bias": np.tril(np.ones((1, 1, 4, 4), bool)),
    "model.layers.0.attn.bias": np.tril(np.ones((1, 1, 4, 4), np.uint8)),
    "model.causal_mask": np.tril(np.ones((4, 4), np.int8)),
    "model.position_ids": np.arange(4, dtype=np.int64)[None],
  }


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_buffers_are_no_weights_and_are_written_back_as_they_were(name, files, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", name, tokenizer=False)
  _, weights, _ = pretrained.load(folder)
  save(folder, tensors_of(folder) | buffers_of(THETA[name], HALF[name]), files)
  cfg, again, source = pretrained.load(folder)
  hybrids.assert_same(again, weights)
  pretrained.export(tmp_path / "out", cfg, again, source)
  for file in os.listdir(folder):
    assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes(), file
  pretrained.export(tmp_path / "wide", cfg, jax.tree.map(lambda x: x * 1.001, again), source, dtype="float32")
  _, wide, opened = pretrained.load(tmp_path / "wide")
  hybrids.assert_same(wide, jax.tree.map(lambda x: x * 1.001, again))
  for buffer in buffers_of(THETA[name], HALF[name]):
    assert opened.tensors.dtypes[buffer] == source.tensors.dtypes[buffer]
    assert opened.tensors.read(buffer).tobytes() == source.tensors.read(buffer).tobytes()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"model.rotary_emb.inv_freq": 5e5 ** (-np.arange(4) / 4)},
      "inv_freq: differs from what rope_theta = 1000",
    ),
    ({"model.rotary_emb.inv_freq": np.ones(3)}, r"inv_freq: must have shape \[4\], half of head_dim"),
    ({"model.layers.0.self_attn.bias": np.ones(4, np.float32)}, "unexpected: model.layers.0.self_attn.bias"),
    ({"model.layers.0.self_attn.q_proj.extra": np.ones(4, np.float32)}, "unexpected: .*q_proj.extra"),
  ],
)
def test_a_tensor_that_would_change_the_numbers_is_refused(change, message, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "llama", tokenizer=False)
  save(folder, tensors_of(folder) | change)
  with pytest.raises(config.ConfigError, match=message):
    pretrained.load(folder)


def test_frequencies_may_be_stored_scaled_or_not(tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "llama", tokenizer=False)
  edit(folder, rope_scaling={"type": "linear", "factor": 4.0})
  plain = 1e4 ** (-np.arange(4) / 4)
  for stored in (plain, plain / 4):
    save(folder, tensors_of(folder) | {"model.rotary_emb.inv_freq": stored})
    assert pretrained.load(folder)[0].attention.rope_scaling.factor == 4.0
  save(folder, tensors_of(folder) | {"model.rotary_emb.inv_freq": plain / 2})
  with pytest.raises(config.ConfigError, match="inv_freq: differs from"):
    pretrained.load(folder)


def tied_variants(tensors, files):
  """(tensors, index beside them) in the ways in which a tied model is stored."""
  head, embed = "lm_head.weight", "model.embed_tokens.weight"
  alone = {n: x for n, x in tensors.items() if n != head}
  shard = {head: f"model-00001-of-{files:05}.safetensors"}
  return {
    "embedding alone": (alone, {}),
    "both": (alone | {head: alone[embed]}, {}),
    "head alone": ({head if n == embed else n: x for n, x in alone.items()}, {}),
    "head in the index alone": (alone, shard),
    "head and a buffer in the index alone": (alone, shard | {"model.rotary_emb.inv_freq": shard[head]}),
  }


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("name", ["jet", "qwen2", "llama", "ouro"])
def test_a_tied_head_may_be_stored_in_every_way(name, files, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", name, tokenizer=False)
  edit(folder, tie_word_embeddings=True)
  tensors, seen = tensors_of(folder), None
  for how, (variant, index) in tied_variants(tensors, files).items():
    if index and files == 1:
      continue
    for old in folder.glob("model*"):
      old.unlink()
    save(folder, variant, files, **index)
    cfg, weights, source = pretrained.load(folder)
    assert cfg.tied_embeddings and "head" not in set(weights), how
    if seen is not None:
      hybrids.assert_same(weights, seen)
    seen = weights
    out = tmp_path / f"out {how}"
    pretrained.export(out, cfg, weights, source)
    for file in os.listdir(folder):
      assert (out / file).read_bytes() == (folder / file).read_bytes(), (how, file)
    assert not pretrained.differing(pretrained.open_source(out), weights)


@pytest.mark.parametrize(
  ("tied", "lacking"),
  [(False, "lm_head.weight"), (True, "model.norm.weight"), (True, "model.layers.0.self_attn.extra")],
)
def test_what_the_index_names_and_the_model_needs_must_be_in_a_shard(tied, lacking, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "qwen2", tokenizer=False)
  edit(folder, tie_word_embeddings=tied)
  tensors = {n: x for n, x in tensors_of(folder).items() if n != lacking}
  save(folder, tensors, 2, **{lacking: "model-00001-of-00002.safetensors"})
  with pytest.raises(config.ConfigError, match=f"{lacking}"):
    pretrained.load(folder)


COMPANIONS = {
  "tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "x"}', "special_tokens_map.json": "{}",
  "added_tokens.json": "{}", "vocab.json": "{}", "merges.txt": "a b", "tokenizer.model": "\x00\x01",
  "vocab.txt": "a", "generation_config.json": '{"eos_token_id": [1, 2]}', "chat_template.jinja": "{{ x }}",
  "chat_template.json": "{}", "README.md": "---\nlicense: apache-2.0\n---", "LICENSE": "Apache",
  "LICENCE.txt": "A", "LICENSE-MODEL": "M", "NOTICE": "N", "Notice.txt": "N", "USE_POLICY.md": "U",
  "COPYING": "C",
  "configuration_llama.py": "raise SystemExit('executed')", "modeling_llama.py": "from .kv_cache import X",
  "kv_cache.py": "X = 1", "additional_chat_templates/tool_use.jinja": "{{ y }}", "qwen.tiktoken": "IQ== 0",
}  # fmt: skip
NOT_COPIED = (
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "model.gguf",
  "original/consolidated.00.pth",
)


@pytest.fixture
def furnished(tmp_path):
  """A checkpoint in a folder as hubs have them."""
  folder = tiny.checkpoint(tmp_path / "in", "llama", tokenizer=False)
  edit(folder, auto_map={"AutoConfig": "configuration_llama.LlamaConfig", "AutoModel": "org/other--m.X"})
  for name in ("additional_chat_templates", "original", ".cache"):
    (folder / name).mkdir()
  for name, text in COMPANIONS.items():
    (folder / name).write_text(text)
  for name in (*NOT_COPIED, ".gitattributes", ".cache/x"):
    (folder / name).write_text("not to be copied")
  return folder


@pytest.mark.parametrize("dtype", ["published", "float32"])
def test_what_is_exported_opens_where_the_original_opened(dtype, furnished, tmp_path):
  cfg, weights, source = pretrained.load(furnished)
  lines = []
  pretrained.export(tmp_path / "out", cfg, weights, source, dtype=dtype, report=lines.append)
  out = tmp_path / "out"
  there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
  assert there == {*COMPANIONS, "config.json", "model.safetensors"}
  for name, text in COMPANIONS.items():
    assert (out / name).read_text() == text
  assert json.loads((out / "config.json").read_text())["auto_map"] == source.config["auto_map"]
  (line,) = lines
  assert line.startswith("not copied from ") and all(n.partition("/")[0] in line for n in NOT_COPIED)


def test_a_link_out_of_the_folder_is_not_followed(furnished, tmp_path):
  secret = tmp_path / "secret.txt"
  secret.write_text("secret")
  (furnished / "LICENSE.md").symlink_to(secret)
  (furnished / "notes.txt").symlink_to("/etc/hostname")
  (furnished / "vocab.txt").unlink()
  (furnished / "vocab.txt").symlink_to("vocab.json")  # inside the folder: followed
  os.mkfifo(furnished / "pipe.txt")
  (furnished / "folder.json").mkdir()
  cfg, weights, source = pretrained.load(furnished)
  lines = []
  pretrained.export(tmp_path / "out", cfg, weights, source, report=lines.append)
  there = os.listdir(tmp_path / "out")
  assert not {"LICENSE.md", "notes.txt", "pipe.txt", "folder.json"} & set(there)
  assert (tmp_path / "out/vocab.txt").read_text() == "{}" and not (tmp_path / "out/vocab.txt").is_symlink()
  text = "\n".join(lines)
  for name in (
    "LICENSE.md: is a link to",
    "notes.txt: is a link to",
    "pipe.txt: is not a file",
    "folder.json",
  ):
    assert name in text
  assert all("\n" not in line for line in lines)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "memory.json", "memory.safetensors"])
@pytest.mark.parametrize("how", ["link", "dangling", "pipe", "folder", "device", "loop"])
def test_whatever_stands_in_place_of_a_file_is_one_line(name, how, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "qwen2", tokenizer=False)
  if name.startswith("memory"):
    (folder / "memory.json").write_text('{"blocks": {"1": "jet"}, "fast": {}}')
  path = folder / name
  outside = tmp_path / "outside"
  if path.exists():
    path.rename(outside)
  make = {
    "link": lambda: path.symlink_to(outside),
    "dangling": lambda: path.symlink_to(folder / "nothing"),
    "pipe": lambda: os.mkfifo(path),
    "folder": path.mkdir,
    "device": lambda: path.symlink_to("/dev/zero"),
    "loop": lambda: path.symlink_to(name),
  }
  make[how]()
  with pytest.raises(pretrained.PretrainedError, match=name) as caught:
    pretrained.open_source(folder)
  assert "\n" not in str(caught.value)


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(tmp_path):
  real = tiny.checkpoint(tmp_path / "real", "qwen2")
  (tmp_path / "cache/blobs").mkdir(parents=True)
  snapshot = tmp_path / "cache/snapshots/0123abc"
  snapshot.mkdir(parents=True)
  for i, path in enumerate(sorted(real.iterdir())):
    path.rename(tmp_path / f"cache/blobs/{i}")
    (snapshot / path.name).symlink_to(f"../../blobs/{i}")
  cfg, weights, source = pretrained.load(snapshot)
  pretrained.export(tmp_path / "out", cfg, weights, source)
  assert {p.name for p in (tmp_path / "out").iterdir()} == {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  }
  assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["gdn", "hebbian", "delta", "kda", "gdn2"])
def test_a_memory_of_any_rule_is_written_and_read(kind, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "qwen2", tokenizer=False)
  source = pretrained.open_source(folder)
  fast = config.FastConfig(num_heads=1, key_dim=4, value_dim=6, out_norm_eps=1e-4)
  cfg = memory_config(source.model, num_layers=1, kind=kind, fast=fast)
  weights = tiny.weights(cfg)
  pretrained.export(tmp_path / "out", cfg, weights, source, dtype="float32")
  again, read, _ = pretrained.load(tmp_path / "out")
  assert again == cfg
  hybrids.assert_same(read, weights)


def test_order_and_metadata_of_a_file_are_kept(tmp_path):
  """A file that another program wrote, in an order and with metadata of its own."""
  folder = tiny.checkpoint(tmp_path / "in", "llama", tokenizer=False)
  tensors = tensors_of(folder)
  order = {n: ("BF16", tensors[n].shape) for n in sorted(tensors, reverse=True)}
  safetensors_io.write(folder / "model.safetensors", order, tensors.get, {"format": "pt", "note": "größer"})
  cfg, weights, source = pretrained.load(folder)
  pretrained.export(tmp_path / "out", cfg, weights, source)
  assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
  assert safetensors.numpy.load_file(folder / "model.safetensors").keys() == tensors.keys()


def test_a_target_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
  folder = tiny.checkpoint(tmp_path / "in", "llama", tokenizer=False)
  cfg, weights, source = pretrained.load(folder)

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors_io, "write", full)
  with pytest.raises(OSError, match="No space"):
    pretrained.export(tmp_path / "new/deep/out", cfg, weights, source)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
