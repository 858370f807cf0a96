"""Tokenizers of every kind that checkpoints come with, trained here in milliseconds on a page of text."""

import functools
import json
import pathlib
import tempfile

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from sleep_jax.config import ModelConfig
from sleep_jax.pretrained.tokenizer import Tokenizer

PAGE = [
  "The quick brown fox, it's jumping over 123 lazy dogs!\n\n",
  "どこで生れたかとんと見当がつかぬ。何でも薄暗い😀👨\u200d👩\u200d👧\u200d👦\n",
  "  def f(x):\n    return x+1\naaa bbb   ccc\t\tddd\r\neee ... --- ñandú éa über Straße ",
] * 3
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
  r"|\s+(?!\S)|\s+"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA_DECODER = decoders.Sequence(
  [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
# What texts are drawn from: letters, marks that join, spaces, scripts, and texts that are tokens somewhere.
ALPHABET = [
  *"abcdefxyz ABC.,!?'\"0123\n\t\r-—。、私どれたñé\u0301ß😀\u200d👩👨🇩🇪\u00a0\u3000\u1100\u1161\u11a8",
  *"\uff9e\uff76Σςﬀ<>|\u00ad\x07",
  *("<s>", "<|im_end|>", "foo bar", "xyz", "<m>", "  ", "   ", "'s", "the ", "quick ", "\n\n", "[SEP]"),
  *("▁", "</w>", "##"),
]


def _assembled(model, normalizer, pre_tokenizer, decoder):
  made = tokenizers.Tokenizer(model)
  for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
    if part is not None:
      setattr(made, name, part)
  return made


def _byte_level(normalizer, pre_tokenizer, added=()):
  made = _assembled(models.BPE(), normalizer, pre_tokenizer, decoders.ByteLevel())
  trainer = trainers.BpeTrainer(
    vocab_size=350, special_tokens=["<s>", "</s>"], initial_alphabet=BYTES, show_progress=False
  )
  made.train_from_iterator(PAGE, trainer)
  made.add_tokens(list(added))
  return made


def _byte_fallback(normalizer, pre_tokenizer, decoder, added=(), in_words=True):
  """in_words: no token reaches over a space, as in Llama's, though nothing splits a text there."""
  trained = pre_tokenizers.Metaspace(prepend_scheme="never") if in_words else pre_tokenizer
  made = _assembled(models.BPE(byte_fallback=True, unk_token="<unk>"), normalizer, trained, decoder)
  letters = [f"<0x{byte:02X}>" for byte in range(256)]
  trainer = trainers.BpeTrainer(
    vocab_size=550, special_tokens=["<s>", "</s>", "<unk>", *letters], limit_alphabet=60, show_progress=False
  )
  made.train_from_iterator(PAGE, trainer)
  values = json.loads(made.to_str())  # the bytes are plain tokens, of which a text has none
  values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] not in letters]
  values["pre_tokenizer"] = None if pre_tokenizer is None else json.loads(pre_tokenizer.__getstate__())
  made = tokenizers.Tokenizer.from_str(json.dumps(values))
  made.add_tokens(list(added))
  return made


def _unigram(normalizer, pre_tokenizer):
  made = _assembled(models.Unigram(), normalizer, pre_tokenizer, decoders.Metaspace())
  trainer = trainers.UnigramTrainer(
    vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
  )
  made.train_from_iterator(PAGE, trainer)
  return made


def _wordpiece():
  made = _assembled(
    models.WordPiece(unk_token="[UNK]"),
    normalizers.BertNormalizer(),
    pre_tokenizers.BertPreTokenizer(),
    decoders.WordPiece(),
  )
  trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
  made.train_from_iterator(PAGE, trainer)
  return made


def _word_ends():
  made = _assembled(
    models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
    None,
    pre_tokenizers.Whitespace(),
    decoders.BPEDecoder(),
  )
  trainer = trainers.BpeTrainer(
    vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
  )
  made.train_from_iterator(PAGE, trainer)
  return made


_spaces = normalizers.Replace(Regex(" {2,}"), " ")
MADE = {
  "gpt2": lambda: _byte_level(None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
  "gpt2 with a space in front": lambda: _byte_level(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
  "llama3": lambda: _byte_level(
    normalizers.NFC(),
    pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    ),
    added=[
      *("<|im_end|>", "foo bar"),
      AddedToken("xyz", single_word=True),
      AddedToken("<m>", lstrip=True, rstrip=True, normalized=True),
    ],
  ),
  "smollm": lambda: _byte_level(
    None,
    pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
  ),
  "bytes in one piece": lambda: _byte_level(
    None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  ),
  "llama2": lambda: _byte_fallback(
    normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, LLAMA_DECODER
  ),
  "llama2 of today": lambda: _byte_fallback(
    None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), LLAMA_DECODER, added=["<m>"]
  ),
  "gemma": lambda: _byte_fallback(
    normalizers.Replace(" ", "▁"),
    pre_tokenizers.Split(" ", "merged_with_previous"),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    in_words=False,
  ),
  "t5": lambda: _unigram(normalizers.Sequence([normalizers.NFKC(), _spaces]), pre_tokenizers.Metaspace()),
  "xlm": lambda: _unigram(
    normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), _spaces, normalizers.Strip()]),
    pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
  ),
  "bert": _wordpiece,
  "clip": _word_ends,
}
# A unigram model over a whole text adds up rounding from its beginning on: it has no place to cut.
WHOLE = {"unigram in one piece": lambda: _unigram(None, pre_tokenizers.Metaspace(split=False))}


@functools.cache
def library(kind: str) -> tokenizers.Tokenizer:
  """A tokenizer of the library's own, the judge."""
  return (MADE | WHOLE)[kind]()


@functools.cache
def ours(kind: str) -> Tokenizer:
  """The same through a tokenizer.json."""
  return saved(library(kind))


def saved(made: tokenizers.Tokenizer) -> Tokenizer:
  with tempfile.TemporaryDirectory() as folder:
    made.save(str(pathlib.Path(folder) / "tokenizer.json"))
    return Tokenizer(folder, ModelConfig(vocab_size=1000))
