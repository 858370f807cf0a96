"""Text to tokens: in pieces as in one, whatever the tokenizer, and one line for every file that is none."""

import json
import os
import pathlib
import random
import re

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers

from sleep_jax.config import ModelConfig
from sleep_jax.pretrained import tokenizer as room
from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.pretrained.tokenizer import Tokenizer
from tests.pretrained import tokenizer_kinds as kinds

CFG = ModelConfig(vocab_size=1000)
TEXTS = st.lists(st.sampled_from(kinds.ALPHABET), min_size=1, max_size=60).map("".join)


def in_pieces(kind, text, piece, cuts=()):
  edges = [0, *sorted(cuts), len(text)]
  parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
  return list(kinds.ours(kind).encode_parts(parts, piece=piece))


@pytest.mark.parametrize("kind", [*kinds.MADE, *kinds.WHOLE])
@hypothesis.settings(max_examples=25)
@hypothesis.given(text=TEXTS, piece=st.integers(1, 20), cuts=st.lists(st.integers(0, 60), max_size=3))
def test_pieces_have_the_tokens_of_the_whole(kind, text, piece, cuts):
  expected = kinds.library(kind).encode(text, add_special_tokens=False).ids
  if expected:
    parts = in_pieces(kind, text, piece, [min(c, len(text)) for c in cuts])
    assert sum(parts, []) == expected
    assert all(parts)
  else:
    with pytest.raises(PretrainedError, match="has no tokens"):
      in_pieces(kind, text, piece)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*kinds.MADE, *kinds.WHOLE])
def test_many_texts_in_pieces(kind):
  rng = random.Random(kind)
  for _ in range(1000):
    text = "".join(rng.choice(kinds.ALPHABET) for _ in range(rng.randint(1, 150)))
    expected = kinds.library(kind).encode(text, add_special_tokens=False).ids
    if expected:
      assert sum(in_pieces(kind, text, rng.choice([1, 2, 5, 20])), []) == expected


@pytest.mark.parametrize(
  "kind", [kind for kind in kinds.MADE if kind != "gemma"]
)  # its tokens reach over spaces
def test_ordinary_text_is_cut_where_it_should_be(kind):
  """A piece that is asked to have 200 characters never has twice as many, so that memory is bounded."""
  text = " ".join(kinds.PAGE) * 8
  parts = in_pieces(kind, text, 200)
  assert sum(parts, []) == kinds.library(kind).encode(text, add_special_tokens=False).ids
  assert len(parts) >= len(text) // 400


def test_what_cannot_be_cut_says_so():
  told = []
  [tokens] = kinds.ours("unigram in one piece").encode_parts(["aaa bbb " * 40], piece=10, report=told.append)
  assert tokens == kinds.library("unigram in one piece").encode("aaa bbb " * 40).ids
  assert told == [
    "tokenizer.json gives no place to cut this text: it is read whole, and memory grows with it"
  ]


def test_a_long_run_without_a_joint_is_read_whole():
  text = "a" * 500 + " " * 500 + "b"
  assert sum(in_pieces("gpt2", text, 50), []) == kinds.library("gpt2").encode(text).ids


def test_nothing_is_cut_off_or_filled_up():
  """A tokenizer.json can ask for both, and for a size that cannot be allocated."""
  made = kinds._byte_level(None, pre_tokenizers.ByteLevel(add_prefix_space=False))
  text = "The quick brown fox" * 10
  expected = made.encode(text).ids
  made.enable_truncation(4)
  made.enable_padding(length=1 << 40)
  assert kinds.saved(made).encode(text) == expected


def test_text_that_is_none():
  for call in (kinds.ours("gpt2").encode, lambda text: list(kinds.ours("gpt2").encode_parts([text]))):
    with pytest.raises(PretrainedError, match="prompt: character 2 is half of one, which no text has"):
      call("ab\udcffc")
    with pytest.raises(PretrainedError, match="prompt: has no tokens"):
      call("")


def json_of(**changes):
  base = json.loads(kinds.library("llama3").to_str())
  return json.dumps(base | changes)


def refused(folder, data, capfd, text="aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"):
  """The one line that a tokenizer.json gives, when it is read or when it reads; nothing goes to stderr."""
  path = pathlib.Path(folder) / "tokenizer.json"
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  with pytest.raises(PretrainedError) as caught:
    Tokenizer(folder, CFG).encode(text)
  line = str(caught.value)
  assert "\n" not in line and "tokenizer.json" in line and len(line) < 400
  assert capfd.readouterr() == ("", "")
  return line


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("[", "is no tokenizer"),
    ("(?<n>", "is no tokenizer"),
    ("(a+)+b", "fails on a text of 40 characters .*retry-limit"),
    ("(?:a|a)*?[bc]{2}", "fails on a text of 40 characters .*retry-limit"),
  ],
)
def test_patterns_that_fail(pattern, message, tmp_path, capfd):
  data = json_of(pre_tokenizer=SPLIT | {"pattern": {"Regex": pattern}})
  line = refused(tmp_path, data, capfd, text="a" * 37 + "xbb")
  assert re.search(message, line), line


def test_a_pattern_that_goes_on_without_end(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(room, "PATIENCE_S", 0.5)
  data = json_of(pre_tokenizer=SPLIT | {"pattern": {"Regex": "a*b?a*[cd]{2}"}})
  line = refused(tmp_path, data, capfd, text="a" * 1500 + "ec")
  assert "not done in 0 s; a pattern may go on without end" in line or "not done in" in line


def test_what_others_write_to_stderr_meanwhile_is_not_lost(capfd):
  def call():
    os.write(2, b"a line")
    return 7

  assert room._guarded("fails", call) == 7
  assert capfd.readouterr().err == "a line"


def test_no_file(tmp_path):
  with pytest.raises(PretrainedError, match="tokenizer.json: there is no such file"):
    Tokenizer(tmp_path, CFG)
  path = tmp_path / "tokenizer.json"
  path.mkdir()
  with pytest.raises(PretrainedError, match="tokenizer.json: cannot be read: Is a directory|no regular file"):
    Tokenizer(tmp_path, CFG)
  path.rmdir()
  os.mkfifo(path)  # nobody writes to it
  with pytest.raises(PretrainedError, match="tokenizer.json: is no regular file"):
    Tokenizer(tmp_path, CFG)
  path.unlink()
  path.symlink_to(path)
  with pytest.raises(PretrainedError, match="tokenizer.json: cannot be read: Too many levels"):
    Tokenizer(tmp_path, CFG)
  path.unlink()
  with path.open("wb") as file:
    file.truncate(room.LARGEST + 1)  # takes no room
  with pytest.raises(PretrainedError, match="tokenizer.json: is larger than 256 MB"):
    Tokenizer(tmp_path, CFG)


VALUES = [
  None,
  True,
  -1,
  0,
  1 << 31,
  1 << 63,
  10**400,
  1e308,
  "",
  "x",
  "\0",
  [],
  {},
  [[]],
  {"type": "Nothing"},
]


def damaged(rng, values, depth=0):
  """A copy of plain data with one value in it replaced, doubled or taken away."""
  if not isinstance(values, (dict, list)) or not values or (depth > 1 and rng.random() < 0.2):
    return rng.choice(VALUES)
  copy = values.copy()
  key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
  if rng.random() < 0.1:
    del copy[key]
  elif isinstance(copy, list) and rng.random() < 0.1:
    copy.append(copy[key])
  else:
    copy[key] = damaged(rng, copy[key], depth + 1)
  return copy


def survives(folder, data):
  """Either a tokenizer that reads, or one line."""
  (folder / "tokenizer.json").write_bytes(data)
  try:
    made = Tokenizer(folder, CFG)
    list(made.encode_parts(["The quick  brown fox.\n\nどこ <s> 12"], piece=5))
    made.decode(range(40))
  except PretrainedError as e:
    assert "\n" not in str(e)


@pytest.mark.parametrize("kind", ["llama3", "llama2", "xlm", "bert"])
def test_damaged_files(kind, tmp_path, capfd, count=40):
  rng = random.Random(kind)
  values = json.loads(kinds.library(kind).to_str())
  for _ in range(count):
    survives(tmp_path, json.dumps(damaged(rng, values)).encode())
  data = kinds.library(kind).to_str().encode()
  for _ in range(count // 2):
    at = rng.randrange(len(data))
    survives(tmp_path, data[:at])
    survives(tmp_path, data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :])
  assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*kinds.MADE])
def test_many_damaged_files(kind, tmp_path, capfd):
  test_damaged_files(kind, tmp_path, capfd, count=400)


def test_stages_that_are_not_known_are_not_cut():
  made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("ab c")}, merges=[]))
  for part in (pre_tokenizers.UnicodeScripts(), pre_tokenizers.FixedLength(3)):
    made.pre_tokenizer = part
    assert len(list(kinds.saved(made).encode_parts(["ab c ab c ab c"], piece=2))) == 1
  made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\G."), "isolated")
  assert len(list(kinds.saved(made).encode_parts(["ab c ab c ab c"], piece=2))) == 1
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  assert len(list(kinds.saved(made).encode_parts(["ab c ab c ab c"], piece=2))) > 2
  made.normalizer = normalizers.Replace(Regex("(?=c)"), "a")  # may match between any two characters
  assert len(list(kinds.saved(made).encode_parts(["ab c ab c ab c"], piece=2))) == 1
