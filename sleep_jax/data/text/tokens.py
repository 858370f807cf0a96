"""The tokens of a text: by any tokenizer.json, or by byte-level BPE that is trained here."""

import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

import sleep_jax

try:
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers
except ImportError:
  sleep_jax.require("tokenizers", "tokenizers")
  raise

from sleep_jax.config import ConfigError, check

LEAST_VOCAB, MOST_VOCAB = 257, 1 << 18
_WORD = re.compile(r"[^\W\d_]{2,}")
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"  # words with the space before them, digits, runs of marks


def train(texts: Iterable[str], vocab_size: int, path: pathlib.Path) -> None:
  """Trains a tokenizer and writes it; the same texts give the same one.

  Args:
    vocab_size: most tokens. The 256 bytes are tokens, so that every text can be written.
  """
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
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  backend.save(str(path))


class Tokenizer:
  """A tokenizer.json that encodes whole documents.

  Attributes:
    highest: the largest token.
  """

  def __init__(self, path: pathlib.Path):
    """Reads it.

    Raises:
      ConfigError: if there is no such file, or it is no tokenizer.
    """
    check(path.is_file(), "data.tokenizer", f"there is no file {str(path)[:200]!r}")
    try:
      self._backend = tokenizers.Tokenizer.from_file(str(path))
      # A file can ask for texts that are cut to a length or filled up to one.
      self._backend.no_truncation()
      self._backend.no_padding()
    except BaseException as e:  # the library raises no narrower type, and its panics are no `Exception`
      if isinstance(e, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise
      reason = next(iter(str(e).splitlines()), type(e).__name__)
      raise ConfigError(f"data.tokenizer: {str(path)!r} is no tokenizer.json: {reason}") from e
    self.highest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

  def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of a document, nothing added; the bytes of the text, and the name, that each stands for.

    Where several tokens make one character, the first has its bytes. Bytes that belong to no token, such as
    spaces that a tokenizer drops, count to the token before them, so that all of them add up to the text.

    Returns:
      Three arrays [n] int32. The last one has the number of the name that a token is a part of (see
      `names_of`), 0 for none.
    """
    encoded = self._backend.encode(text, add_special_tokens=False)
    if not encoded.offsets:
      nothing = np.zeros(0, np.int32)
      return nothing, nothing, nothing
    names = names_of(text, encoded.offsets)
    ends = np.maximum.accumulate(np.asarray([end for _, end in encoded.offsets], np.int64))
    ends[-1] = len(text)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths)])
    return np.asarray(encoded.ids, np.int32), np.diff(before[ends], prepend=0).astype(np.int32), names


def names_of(text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
  """The number of the name that each span of a text has a part of, 0 for none: [n] int32.

  A name is a word of two letters or more that begins with a capital one, wherever it stands in a sentence.
  Names are numbered from 1 on in the order in which they first occur; the same word has the same number.

  Args:
    spans: start and end of each token, in characters.

  >>> names_of("Is Emma in? No, Emma is out", [(0, 2), (2, 5), (5, 7), (7, 11), (11, 15), (15, 20), (20, 27)])
  array([1, 2, 2, 0, 3, 2, 0], dtype=int32)
  """
  found = [m for m in _WORD.finditer(text) if m[0][0].isupper()]
  names = np.zeros(len(spans), np.int32)
  if not found or not len(spans):
    return names
  known: dict[str, int] = {}
  numbers = np.asarray([known.setdefault(m[0], len(known) + 1) for m in found], np.int32)
  starts, ends = (np.asarray([m.span()[i] for m in found]) for i in (0, 1))
  token_starts, token_ends = np.asarray(spans, np.int64).reshape(-1, 2).T
  word = np.searchsorted(ends, token_starts, side="right")  # the first one that ends behind a token's start
  inside = word < len(found)
  inside[inside] = starts[word[inside]] < token_ends[inside]
  names[inside] = numbers[word[inside]]
  return names
