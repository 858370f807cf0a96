"""GGUF files of the Llama kind: what comes out is what the file stands for; the rest is refused."""

import json
import os
import pathlib
import random
import struct
import tracemalloc

import jax
import numpy as np
import pytest
import tokenizers

from sleep_jax import config, model, pretrained
from sleep_jax.config import RopeScaling
from sleep_jax.pretrained import ends, gguf_header
from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.pretrained.tokenizer import Tokenizer
from tests import forked
from tests.pretrained import gguf_files, tiny

pytest.importorskip("gguf")
from sleep_jax.pretrained import gguf_model

TEXTS = ("what it says is kept", " 1234 times\n\n\tGröße?  naïve", "日本 <|im_end|> x", "don't IT'S we'll")
MOST = 64e6  # bytes that Python and NumPy may hold at once


def checkpoint(path: pathlib.Path, **options) -> gguf_model.Checkpoint:
  return gguf_model.Checkpoint(gguf_header.read(path), **options)


def converted(path: pathlib.Path, **options):
  """The folder that a file becomes, and what `load` makes of it."""
  folder = path.parent / "out"
  pretrained.appear(folder, checkpoint(path, **options).write)
  return folder, *pretrained.load(folder)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_tensors_are_what_the_file_stands_for(tmp_path, kind):
  path, tensors = gguf_files.model(tmp_path, kind)
  _, cfg, weights, source = converted(path)
  assert cfg.tied_embeddings and cfg.attention.num_kv_heads == gguf_files.KV_HEADS
  assert source.tensors.dtypes["model.embed_tokens.weight"] == (kind if kind in ("F16", "BF16") else "F32")
  assert set(source.tensors.files) == set(tensors)
  for name, x in tensors.items():
    np.testing.assert_array_equal(
      np.float32(source.tensors.read(name)), x if x.ndim == 1 else gguf_files.read_back(kind, x), err_msg=name
    )
  assert len(jax.tree.leaves(weights)) == len(tensors)


def test_float32_can_be_asked_for(tmp_path):
  path, _ = gguf_files.model(tmp_path, "BF16")
  source = converted(path, float32=True)[-1]
  assert set(source.tensors.dtypes.values()) == {"F32"} and source.config["dtype"] == "float32"


def test_what_config_json_says(tmp_path):
  path, _ = gguf_files.model(tmp_path, tied=False, bias=True)
  folder, cfg, _, source = converted(path)
  said = json.loads((folder / "config.json").read_text())
  assert said["rms_norm_eps"] == 1e-5 and said["rope_theta"] == 50_000.0  # not their float32 neighbours
  assert said["max_position_embeddings"] == 256 and not said["tie_word_embeddings"]
  assert (cfg.attention.bias, cfg.attention.out_bias, cfg.mlp_bias) == (True, True, True)
  assert (said["bos_token_id"], ends.end_tokens(folder)) == (1, (2, 0))
  assert "m['content']" in (folder / "chat_template.jinja").read_text()
  assert source.config["dtype"] == "float32"


def test_biases_of_queries_and_keys_are_put_in_order_too(tmp_path):
  path, tensors = gguf_files.model(tmp_path, bias=True)
  source = converted(path)[-1]
  name = "model.layers.1.self_attn.k_proj.bias"
  np.testing.assert_array_equal(source.tensors.read(name), tensors[name])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rotary_angles(tmp_path, factor):
  path, tensors = gguf_files.model(
    tmp_path, **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
  )
  assert checkpoint(path).model.attention.rope_scaling == RopeScaling("linear", 4.0)
  half = gguf_files.WIDTH // gguf_files.HEADS // 2
  plain = 50_000.0 ** (-np.arange(half) / half)
  turns = 8192 * plain / (2 * np.pi)  # as published with Llama 3.1
  smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
  stretched = ("F32", (1 / (smooth + (1 - smooth) / factor)).astype("<f4"))
  stored = gguf_files.as_stored(tensors, "F32") | {"rope_freqs.weight": stretched}
  gguf_files.write(path, gguf_files.fields(tmp_path), stored)
  assert checkpoint(path).model.attention.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)
  stretched[1][half // 2] *= 1.1
  gguf_files.write(path, gguf_files.fields(tmp_path), stored)
  with pytest.raises(PretrainedError, match="scales rotary angles in a way that is not supported"):
    checkpoint(path)


def test_the_tokenizer_is_that_of_the_file(tmp_path):
  path, _ = gguf_files.model(tmp_path)
  folder, cfg, _, _ = converted(path)
  ours, theirs = (
    Tokenizer(folder, cfg),
    tokenizers.Tokenizer.from_file(str(tmp_path / "expected_tokenizer.json")),
  )
  for text in TEXTS:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == text.replace("<|im_end|>", "")


def by_score(text: str, scores: dict[str, float]) -> list[str]:
  """SentencePiece's BPE as it is described: joins the neighbours of the best score, the first of equals."""
  pieces = [p for c in text for p in ([c] if c in scores else [f"<0x{b:02X}>" for b in c.encode()])]
  while True:
    joined = [
      (-scores[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in scores
    ]
    if not joined:
      return pieces
    _, i = min(joined)
    pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_a_tokenizer_with_scores(tmp_path):
  rng = random.Random(0)
  letters = [*"abcdé", "\N{LOWER ONE EIGHTH BLOCK}"]
  words = dict.fromkeys(letters)
  while len(words) < 200:  # each token is two joined
    words.setdefault(rng.choice([*words]) + rng.choice([*words]))
  words = [*words]
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
  scores = np.array([0.0] * 259 + [float(-i) for i in range(len(words))], np.float32)
  kinds = np.array([2, 3, 3] + [6] * 256 + [1] * len(words), np.int32)
  changes = {"model": "llama", "pre": None, "merges": None, "eot_token_id": None, "tokens": tokens}
  changes |= {"scores": scores, "token_type": kinds, "unknown_token_id": 0}
  path, _ = gguf_files.model(tmp_path, **{f"tokenizer.ggml.{name}": x for name, x in changes.items()})
  folder, cfg, _, _ = converted(path)
  ours, known = Tokenizer(folder, cfg), dict(zip(words, scores[259:], strict=True))
  for _ in range(200):
    text = "".join(rng.choices(["a", "b", "c", "d", "é", " ", "ß"], k=rng.randrange(1, 30)))
    spaced = (" " + text).replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    assert ours.encode(text) == [tokens.index(t) for t in by_score(spaced, known)], text
    assert ours.decode(ours.encode(text)) == text


FIELDS = {
  "general.architecture": ["gpt2", "qwen2", None, 3],
  "general.type": ["adapter"],
  "split.count": [4],
  "llama.attention.head_count": [None, 0, 3, 2**31, 4.0, True, "4"],
  "llama.attention.key_length": [8],
  "llama.attention.value_length": [8],
  "llama.attention.layer_norm_rms_epsilon": [None, 0.0, float("nan"), -1e-5],
  "llama.attention.sliding_window": [128],
  "llama.block_count": [1, 3, 10**9],
  "llama.context_length": [None],
  "llama.embedding_length": [32, 2**31],
  "llama.expert_count": [8],
  "llama.rope.dimension_count": [8],
  "llama.rope.freq_base": [float("inf"), 0.0],
  "llama.rope.scaling.type": ["yarn"],
  "llama.vocab_size": [511],
  "tokenizer.chat_template": [7],
  "tokenizer.ggml.add_space_prefix": ["no"],
  "tokenizer.ggml.eos_token_id": [512, "2"],
  "tokenizer.ggml.merges": [None, ["a b c"], ["zz zz"], [""]],
  "tokenizer.ggml.model": ["bert", None, "llama"],
  "tokenizer.ggml.pre": [None, "default"],
  "tokenizer.ggml.token_type": [np.ones(3, np.int32)],
  "tokenizer.ggml.tokens": [None, [], ["a", "a"], ["a" * 1025], [f"t{i}" for i in range(513)]],
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_wrong_is_named_in_one_line(tmp_path, name):
  for value in FIELDS[name]:
    path, _ = gguf_files.model(tmp_path, **{name: value})
    with pytest.raises(PretrainedError) as e:
      checkpoint(path)
    assert len(str(e.value).splitlines()) == 1 and str(e.value).startswith("small.gguf: "), e.value
    short = name.split(".")[-1]
    assert any(word in str(e.value) for word in (short, "tensors do not fit", "token", "head")), e.value


def test_a_field_that_changes_nothing_can_be_named(tmp_path):
  path, _ = gguf_files.model(tmp_path, **{"llama.note": "hello"})
  with pytest.raises(PretrainedError, match="unknown field.s. llama.note"):
    checkpoint(path)
  assert checkpoint(path, ignore=("llama.note",)).model.vocab_size == tiny.VOCAB


def test_tensors_that_do_not_fit(tmp_path):
  path, tensors = gguf_files.model(tmp_path)
  good, fields = gguf_files.as_stored(tensors, "F32"), gguf_files.fields(tmp_path)
  name = "blk.1.ffn_up.weight"
  changes = {
    "missing: model.layers.1.mlp.up_proj.weight": {n: x for n, x in good.items() if n != name},
    "token_embd.weight is missing": {n: x for n, x in good.items() if n != "token_embd.weight"},
    "unexpected: blk.9.ffn_up.weight": good | {"blk.9.ffn_up.weight": good[name]},
    "unexpected: blk.01.ffn_up.weight, other": good
    | {"blk.01.ffn_up.weight": good[name], "other": good[name]},
    r"misshapen: blk.1.ffn_up.weight \[64, 96\] instead of \[96, 64\]": good
    | {name: ("F32", good[name][1].T)},
    "blk.1.ffn_up.weight holds NaN or infinity": good | {name: ("F32", np.full_like(good[name][1], np.nan))},
  }
  for message, stored in changes.items():
    gguf_files.write(path, fields, stored)
    with pytest.raises(PretrainedError, match=message):
      pretrained.appear(tmp_path / "out", checkpoint(path).write)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("kind", "message"), [(12, "rows of 64 are no blocks of 256 .Q4_K."), (26, "I32"), (999, "999")]
)
def test_kinds_of_tensors_that_are_not_supported(tmp_path, kind, message):
  path, _ = gguf_files.model(tmp_path)
  data = bytearray(path.read_bytes())
  name = gguf_files.text("blk.0.ffn_up.weight")
  struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 16, kind)
  path.write_bytes(data)
  with pytest.raises(PretrainedError, match=f"tensor blk.0.ffn_up.weight.*{message}"):
    checkpoint(path)


WILD = (0, 1, 2, 3, 2**16, 2**24, 2**31, 2**32 - 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  path, _ = gguf_files.model(tmp_path_factory.mktemp("fuzz"), "Q8_0")
  return path, path.read_bytes()


def read_or_refused(path: pathlib.Path, data: bytes) -> bool:
  """Whether a damaged file is refused, in one line; if not, it can be read to its end, within bounds."""
  path.write_bytes(data)
  tracemalloc.reset_peak()
  try:
    opened = checkpoint(path)
    for name in opened.tensors:
      opened.read(name)
    return False
  except PretrainedError as e:
    assert len(str(e).splitlines()) == 1 and str(e).startswith("small.gguf: "), e
    return True
  finally:
    assert tracemalloc.get_traced_memory()[1] < MOST


@pytest.fixture
def traced():
  tracemalloc.start()
  yield
  tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_a_file_that_was_cut_off_is_refused(small):
  path, data = small
  rng = random.Random(0)
  end = gguf_header.read(path).tensors["token_embd.weight"].start
  for length in (
    *range(0, 64, 7),
    *rng.sample(range(64, end), 30),
    *rng.sample(range(end, len(data) - 32), 15),
  ):
    assert read_or_refused(path, data[:length]), length


@pytest.mark.usefixtures("traced")
def test_wild_numbers_and_flipped_bits_are_refused_or_harmless(small):
  path, data = small
  rng = random.Random(1)
  end = gguf_header.read(path).tensors["token_embd.weight"].start
  names = data.index(b"token_embd.weight")
  places = [*range(4, 24), *rng.sample(range(24, names), 60), *rng.sample(range(names, end), 60)]
  for place in places:
    broken = bytearray(data)
    if rng.random() < 0.5:
      struct.pack_into("<Q", broken, place, rng.choice(WILD) << 32 * rng.randrange(2))
    else:
      broken[place] ^= 1 << rng.randrange(8)
    read_or_refused(path, bytes(broken))


def test_claims_are_not_believed(small):
  """Counts and lengths that the file does not hold; the tensors' shapes say more than there is."""
  path, data = small
  for place in (8, 16, 24):  # tensors, fields, the length of the first name
    for claim in (2**31, 2**62, 2**64 - 1):
      broken = bytearray(data)
      struct.pack_into("<Q", broken, place, claim)
      assert read_or_refused(path, bytes(broken)) is True
  name = gguf_files.text("token_embd.weight")
  at = data.index(name) + len(name) + 4
  for claim in (2**40, 2**63, 0):
    broken = bytearray(data)
    struct.pack_into("<Q", broken, at + 8, claim)
    assert read_or_refused(path, bytes(broken)) is True


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
  with forked.Experiment("experiments.convert", tmp_path_factory.mktemp("scratch")) as experiment:
    yield experiment.run


GGUF = f"--config={forked.ROOT}/experiments/configs/convert.py:gguf"


def test_the_command(convert, tmp_path):
  path, tensors = gguf_files.model(tmp_path, "Q4_1")
  ended = convert(GGUF, f"--config.source={path}", f"--config.target={tmp_path}/new/out")
  count = sum(x.size for x in tensors.values())
  assert ended.code == 0, ended.err
  said = f"read {path}: {count:,} parameters in {len(tensors)} tensors"
  assert ended.out == f"{said}; wrote {tmp_path}/new/out, equal to the bit\n"
  _, weights, _ = pretrained.load(tmp_path / "new" / "out")
  assert sum(x.size for x in jax.tree.leaves(weights)) == count
  ended = convert(GGUF, f"--config.source={path}")
  assert (ended.code, ended.out) == (0, f"{said}\n")


def test_a_mistake_is_one_line_and_code_2_and_nothing_is_written(convert, tmp_path):
  path, _ = gguf_files.model(tmp_path)
  whole = path.read_bytes()
  (tmp_path / "cut.gguf").write_bytes(whole[:-200])
  (tmp_path / "text.gguf").write_text("no model " * 9)
  os.mkfifo(tmp_path / "pipe.gguf")
  before = sorted(tmp_path.iterdir())
  plain = GGUF.removesuffix(":gguf")
  for flags, message in (
    ([GGUF], "source: is required: the GGUF file"),
    ([GGUF, "--config.source=nowhere.gguf"], "No such file"),
    ([GGUF, f"--config.source={tmp_path}"], "is not a file"),
    ([GGUF, f"--config.source={tmp_path}/pipe.gguf"], "is not a file"),
    ([GGUF, f"--config.source={tmp_path}/text.gguf"], "text.gguf: is no GGUF file"),
    ([GGUF, f"--config.source={tmp_path}/cut.gguf"], "cut.gguf: is damaged or cut off"),
    ([GGUF, f"--config.source={path}", "--config.memory_layers=1"], "memory_layers: must be 0"),
    ([GGUF, f"--config.source={path}", "--config.step=1"], "step: is of a run"),
    ([plain, f"--config.source={path}"], "is a GGUF file: use the preset `gguf`"),
  ):
    ended = convert(*flags, f"--config.target={tmp_path}/new/out", cwd=tmp_path)
    assert ended.code == 2 and ended.out == "", ended
    assert ended.err.startswith("error: ") and message in ended.err and len(ended.err.splitlines()) == 1, (
      ended.err
    )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.peers
@pytest.mark.slow
def test_transformers_gives_the_same_logits(tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  path, _ = gguf_files.model(tmp_path, "Q8_0", tied=False)
  folder, cfg, weights, _ = converted(path)
  tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 40), dtype=np.int32)
  check_logits(torch, transformers, folder, config.replace(cfg, window=40), weights, tokens)


def check_logits(torch, transformers, folder, cfg, weights, tokens):
  peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    want = peer(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
  with jax.default_matmul_precision("highest"):
    got, _ = model.predict(weights, tokens, model.init_state(cfg, 1), cfg)
  # Logits of SmolLM2 reach 40; 1e-4 is the bound for those of size 10, some 80 roundings of float32.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(10, np.abs(want).max()))
  return peer


SMOLLM2 = forked.ROOT / "checkpoints" / "SmolLM2-135M-Instruct"


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs the model: make smollm2")
def test_smollm2_says_what_transformers_says():
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  cfg, weights, _ = pretrained.load(SMOLLM2)
  ours, theirs = Tokenizer(SMOLLM2, cfg), transformers.AutoTokenizer.from_pretrained(SMOLLM2)
  text = theirs.apply_chat_template(
    [{"role": "user", "content": "What is the capital of France?"}],
    add_generation_prompt=True,
    tokenize=False,
  )
  for some in (text, *TEXTS, pathlib.Path(__file__).read_text()):
    assert ours.encode(some) == theirs(some, add_special_tokens=False)["input_ids"]
  answer = "The capital of France is Paris.<|im_end|>"
  tokens = np.array([ours.encode(text + answer)], np.int32)
  peer = check_logits(torch, transformers, SMOLLM2, cfg, weights, tokens)
  begun = torch.tensor([ours.encode(text)])
  said = peer.generate(begun, max_new_tokens=12, do_sample=False)[0, begun.shape[1] :]
  assert theirs.decode(said) == answer
  logits, _ = model.predict(weights, tokens, model.init_state(cfg, 1), cfg)
  greedy = np.argmax(logits[0], -1)[begun.shape[1] - 1 : -1]
  assert greedy.tolist() == said.tolist()
