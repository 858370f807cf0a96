"""Text that comes token by token is the text of all tokens, over every stop and resume."""

import functools
import json
import sys
import unicodedata

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models

from sleep_jax.config import ConfigError
from sleep_jax.pretrained.text_stream import StopStrings, TextStream, printable
from tests.pretrained import tokenizer_kinds as kinds

WORDS = [
  *(
    "a",
    "aa",
    "b",
    "ab",
    "▁",
    "▁a",
    "##a",
    " ",
    "<pad>",
    "|",
    "<0xF0>",
    "<0x9F>",
    "<0x98>",
    "<0x80>",
    "<0x41>",
  ),
  *(
    "'s",
    "n't",
    ".",
    "!",
    "do",
    "not",
    "</w>",
    "a</w>",
    "Ġa",
    "ð",
    "Ł",
    "é",
    "私",
    "<0x+F>",
    "<0xg0>",
    "",
    "Ġ</w>",
  ),
]
DECODERS = {
  "none": None,
  "ctc": decoders.CTC(),
  "metaspace that never begins": decoders.Metaspace(prepend_scheme="never"),
  "wordpiece as it is": decoders.WordPiece(cleanup=False),
  "strip": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]),
  "pattern": decoders.Sequence(
    [decoders.Replace(Regex("a+"), "b"), decoders.Fuse(), decoders.Replace("bb", "x")]
  ),
  "pattern behind all": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+"), "b")]),
  "bytes behind all": decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
  "bytes, then words": decoders.Sequence([decoders.ByteFallback(), decoders.WordPiece()]),
  "bytes, then texts": decoders.Sequence(
    [decoders.ByteLevel(), decoders.Strip(" ", 1, 0), decoders.Replace("ab", "c"), decoders.Replace("ca", "")]
  ),
}


def _with(decoder):
  made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
  if decoder is not None:
    made.decoder = decoder
  return made


@functools.cache
def both(kind):
  """The library's tokenizer and ours."""
  library = _with(DECODERS[kind]) if kind in DECODERS else kinds.library(kind)
  return library, kinds.saved(library)


KINDS = [*kinds.MADE, *kinds.WHOLE, *DECODERS]


def resumed(tokenizer, stream):
  """As a session's file keeps it."""
  return TextStream(tokenizer, json.loads(json.dumps(stream.state())))


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_streamed_is_decoded_at_once(kind, data):
  library, tokenizer = both(kind)
  tokens = data.draw(st.lists(st.integers(0, library.get_vocab_size() + 1), max_size=16))
  stops = data.draw(st.sets(st.integers(0, len(tokens))))
  stream, text = TextStream(tokenizer), ""
  for i, token in enumerate(tokens):
    if i in stops:
      stream = resumed(tokenizer, stream)
    text += stream.add(token)
  assert text + stream.end() == library.decode(tokens)
  assert text + resumed(tokenizer, stream).end() == library.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_behind_a_prompt_comes_what_the_whole_has_behind_it(kind, data):
  library, tokenizer = both(kind)
  token = st.integers(0, library.get_vocab_size() - 1)
  prompt, made = (data.draw(st.lists(token, max_size=8)) for _ in range(2))
  cut = data.draw(st.integers(0, len(prompt)))
  stream = TextStream(tokenizer)
  assert stream.skip(prompt[:cut]) == ""
  assert stream.skip(prompt[cut:]) == ""
  stream = resumed(tokenizer, stream)
  text = "".join(map(stream.add, made)) + stream.end()
  whole, before = library.decode(prompt + made), library.decode(prompt)
  if whole.startswith(before):  # a decoder can change what it made of the prompt
    assert before + text == whole


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_text_comes_as_early_as_it_can(kind):
  library, tokenizer = both(kind)
  tokens = library.encode("the quick brown fox it s jumping over lazy dogs", add_special_tokens=False).ids
  stream, text = TextStream(tokenizer), ""
  for i, token in enumerate(tokens):
    text += stream.add(token)
    assert text == library.decode(tokens[: i + 1])


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_character_is_not_broken_by_a_stop(cut):
  """Japanese, whose characters begin and end within tokens, and an emoji of four bytes."""
  library, tokenizer = both("gpt2")
  tokens = library.encode("どこで生れた😀").ids
  at = len(tokens) - cut
  stream = TextStream(tokenizer)
  first = "".join(map(stream.add, tokens[:at]))
  stream = resumed(tokenizer, stream)
  assert first + "".join(map(stream.add, tokens[at:])) == "どこで生れた😀"
  assert stream.end() == ""


def test_a_space_at_a_joint_stays():
  made = tokenizers.Tokenizer(models.BPE(vocab={"▁the": 0, "▁cat": 1}, merges=[]))
  made.decoder = kinds.LLAMA_DECODER
  stream = TextStream(kinds.saved(made))
  assert stream.add(0) == "the"
  assert resumed(stream._tokenizer, stream).add(1) == " cat"
  after_prompt = TextStream(stream._tokenizer)
  after_prompt.skip([0])
  assert after_prompt.add(1) == " cat"


def test_what_was_held_back_is_shown_before_the_next_prompt():
  library, tokenizer = both("gpt2")
  smile = library.encode("😀").ids
  stream = TextStream(tokenizer)
  assert [stream.add(t) for t in smile[:-1]] == [""] * (len(smile) - 1)
  assert stream.skip(library.encode("And you?").ids) == "\N{REPLACEMENT CHARACTER}"
  assert stream.skip(library.encode(" Well?").ids) == ""
  assert "".join(map(stream.add, library.encode(" Fine.").ids)) == " Fine."


def test_what_is_complete_can_be_shown_and_goes_on():
  library, tokenizer = both("llama2")
  smile = [library.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
  stream = TextStream(tokenizer)
  assert [stream.add(t) for t in smile[:3]] == [""] * 3 and stream.show() == ""
  assert (
    stream.add(smile[3]) == "" and stream.show() == "🙂"
  )  # it could still become part of a run that is none
  stream = resumed(tokenizer, stream)
  assert stream.end() == ""
  assert "".join(map(stream.add, smile)) + stream.end() == "🙂"


@pytest.mark.parametrize(
  "change",
  [
    {"known": 1},
    {"stages": []},
    {"stages": [{}]},
    {"stages": [{"part": "", "bytes": ["a"]}]},
    {"stages": [{"part": "", "bytes": [999]}]},
    {"stages": [{"part": 3, "bytes": []}]},
    {"stages": None},
    {"more": 1},
  ],
)
def test_a_state_of_another_decoder(change):
  _, tokenizer = both("gpt2")
  with pytest.raises(ConfigError, match="session: its text state does not fit this tokenizer's decoder"):
    TextStream(tokenizer, TextStream(tokenizer).state() | change)


STRINGS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@hypothesis.given(text=st.text("ab\n", max_size=20), strings=STRINGS, cuts=st.sets(st.integers(0, 20)))
def test_a_stop_string_ends_the_text_however_it_is_cut(text, strings, cuts):
  ends = [(at + len(s), at, s) for s in strings for at in range(len(text)) if text.startswith(s, at)]
  expected = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
  edges, stops, shown = [0, *sorted(c for c in cuts if c < len(text)), len(text)], StopStrings(strings), ""
  for a, b in zip(edges, edges[1:], strict=False):
    new, string = stops.add(text[a:b])
    shown += new
    if string is not None:
      break
  assert (shown + stops.held, string) == expected


def test_a_terminal_gets_all_but_controls():
  dropped = [c for c in map(chr, range(sys.maxunicode + 1)) if printable(c) != c]
  assert dropped == [c for c in map(chr, range(0xA0)) if unicodedata.category(c) == "Cc" and c not in "\n\t"]
  family = "👨\u200d👩\u200d👧\u200d👦 co\u00adoperate \u202e\u2066 \ue000 \U000e0041"
  assert printable(f"\x1b[2J{family}\x9b2J\x07\r\x7f\n\t") == f"[2J{family}2J\n\t"
