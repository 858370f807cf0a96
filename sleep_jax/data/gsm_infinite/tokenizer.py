"""Tokens: a tokenizer trained here, for training from scratch, or any tokenizer.json whose digits are tokens.

A text is cut into words (each with the space before it), single digits, runs of marks, and spaces; byte-level
BPE then works inside each piece. Round trips are therefore exact, and the length of a text is the sum of
the lengths of its pieces.

    id 0  <pad>     padding; no loss, no attention
    id 1  <eos>     ends the answer
    id 2  <answer>  ends the problem and asks for the answer
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import sleep_jax

try:
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers
except ImportError:
  sleep_jax.require("tokenizers", "tokenizers")
  raise

from sleep_jax.config import ConfigError, check
from sleep_jax.data.limits import within

PAD, EOS, ANSWER = "<pad>", "<eos>", "<answer>"
SPECIAL = (PAD, EOS, ANSWER)
MOST_WORDS = 200_000  # whose tokens are remembered
MOST_VOCAB = 1 << 18
LEAST_VOCAB = 256 + len(SPECIAL) + 10  # bytes, special tokens, and something to learn
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
_COUNTED = re.compile(r"[^\r\n\w]?[^\W\d_]+|\d| ?[^\s\w]+[\r\n]*|\s+|_")  # where Qwen's tokenizer cuts
_LENGTHS = pathlib.Path(__file__).with_name("qwen_lengths.json")
_KNOWN = {  # names under which published tokenizers have them
  PAD: (PAD, "<|pad|>", "[PAD]", "<|endoftext|>", "</s>"),
  EOS: (EOS, "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
}


class Tokenizer:
  """A `tokenizers.Tokenizer` and the ids that a problem needs beside its text.

  Args:
    backend: the library's tokenizer.
    where: its file, for messages.

  Attributes:
    backend: as given.
    vocab_size: tokens, special ones included.
    pad, eos: ids.
    answer_prompt: ids between the context and the answer.
    by_words: whether the ids of a problem are the ids of its words, one word after the other.
  """

  def __init__(self, backend: tokenizers.Tokenizer, where: str):
    self.backend = backend
    self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
    self.pad, self.eos = (self._special(name, where) for name in (PAD, EOS))
    self._words: dict[str, tuple[int, ...]] = {}
    self.by_words = all(
      [i for word in _WORDS.findall(text) for i in self.encode(word)] == self.encode(text) for text in _PROBES
    )
    own = backend.token_to_id(ANSWER)
    self.answer_prompt = (own,) if own is not None else tuple(self.encode("\nAnswer:"))
    for text in ("0123456789", "equals 42 plus", "V960378"):
      digits = re.findall(r"\d", text)
      tokens = [self.decode([i]) for i in self.encode(text)]
      check(
        [t for t in tokens if re.search(r"\d", t)] == digits,
        "data.tokenizer",
        f"{where} must have one token for each digit, but {text!r} becomes {tokens}",
      )

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def encode_problem(self, text: str) -> list[int]:
    """Returns the ids of `encode` for the text of a problem, six times as fast if words can be looked up."""
    if not self.by_words:
      return self.encode(text)
    known, ids = self._words, []
    for word in _WORDS.findall(text):
      found = known.get(word)
      if found is None:
        found = tuple(self.encode(word))
        if len(known) < MOST_WORDS:
          known[word] = found
      ids += found
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; special tokens are left out."""
    return self.backend.decode(list(ids), skip_special_tokens=True)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a tokenizer.json."""
    self.backend.save(str(path))

  def _special(self, name: str, where: str) -> int:
    found = [i for known in _KNOWN[name] if (i := self.backend.token_to_id(known)) is not None]
    check(bool(found), "data.tokenizer", f"{where} has none of the tokens {', '.join(_KNOWN[name])}")
    return found[0]


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a tokenizer; the same texts give the same one.

  Args:
    texts: to train on.
    vocab_size: most tokens, special ones included.

  Raises:
    ConfigError: if the vocabulary is too small or too large.
  """
  within(vocab_size, LEAST_VOCAB, MOST_VOCAB, "data.vocab_size")
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return Tokenizer(backend, "the trained tokenizer")


@functools.lru_cache(maxsize=8)
def load(path: str) -> Tokenizer:
  """Reads a tokenizer.json, once a process.

  Raises:
    ConfigError: if there is no such file, it is no tokenizer, or its digits are not single tokens.
  """
  try:
    there = pathlib.Path(path).is_file()
  except OSError:  # a name that the file system refuses
    there = False
  check(there, "data.tokenizer", f"there is no file {path[:80]!r}")
  try:
    return Tokenizer(tokenizers.Tokenizer.from_file(path), repr(path))
  except ConfigError:
    raise
  except BaseException as e:  # the library raises no narrower type, and its panics are no `Exception`
    if isinstance(e, (KeyboardInterrupt, SystemExit, GeneratorExit)):
      raise
    reason = next(iter(str(e).splitlines()), type(e).__name__)
    raise ConfigError(f"data.tokenizer: {path!r} is no tokenizer.json: {reason}") from e


def pieces(text: str) -> list[str]:
  """Splits a text into words, digits and marks, within which Qwen's tokenizer joins bytes to tokens."""
  return _COUNTED.findall(text)


def lengths(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
  """Returns the tokens of each piece that has more than one; `qwen_lengths.json` holds them for our words."""
  found = {piece for text in texts for piece in pieces(text)}
  sizes = {piece: len(tokenizer.encode(piece)) for piece in sorted(found)}
  return {piece: size for piece, size in sizes.items() if size > 1}


class Counter:
  """Counts the tokens of texts by adding up those of their words, which are remembered.

  Args:
    path: a tokenizer.json. Empty: counts as Qwen2.5's tokenizer does, without its file. It is recorded which
      of the generator's words take it more than one token; all other words count as one.

  Attributes:
    exact: whether a text has as many tokens as its words have together.
  """

  def __init__(self, path: str):
    if path:
      known = load(path)
      self._count = lambda text: len(known.encode(text))
    else:
      recorded = json.loads(_LENGTHS.read_text(encoding="utf-8"))
      self._count = lambda text: sum(recorded.get(piece, 1) for piece in pieces(text))
    self._sizes: dict[str, int] = {}
    self.exact = all(self(text) == self.whole(text) for text in _PROBES)

  def __call__(self, text: str) -> int:
    """Returns the tokens of all words together, each with the space before it and the line break after it."""
    sizes = self._sizes
    total = 0
    for word in _WORDS.findall(text):
      size = sizes.get(word)
      if size is None:
        size = self._count(word)
        if len(sizes) < MOST_WORDS:
          sizes[word] = size
      total += size
    return total

  def whole(self, text: str) -> int:
    """Returns the tokens of a text that is counted as a whole."""
    return self._count(text)


_WORDS = re.compile(r" ?\S+\n?|\s")
_PROBES = (
  "What is the total number of adult animals in Cedar Valley?\nThe number of"
  " adult blue jay in South Zoo equals 4",
  " The number of futuristic sci-fi movie in Rêves de Belleville equals 3 times the sum of the number of film"
  " about blind painter chess duel in Echo Movie Night, and the total number of movies in"
  " Cinéma de Montreval.",
  " assign V960378 = V705711 + 1. assign V583763 = 8.",
)


@functools.lru_cache(maxsize=8)
def counter(path: str) -> Counter:
  """Returns the counter of a tokenizer, made once a process."""
  return Counter(path)
