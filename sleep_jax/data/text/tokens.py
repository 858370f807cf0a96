"""The tokens of a text: by any tokenizer.json, or by byte-level BPE that is trained here."""

import pathlib
from collections.abc import Iterable

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

  def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a document, nothing added, and the bytes of the text that each stands for.

    Where several tokens make one character, the first has its bytes. Bytes that belong to no token, such as
    spaces that a tokenizer drops, count to the token before them, so that all of them add up to the text.

    Returns:
      Two arrays [n] int32.
    """
    encoded = self._backend.encode(text, add_special_tokens=False)
    ends = np.asarray([end for _, end in encoded.offsets], np.int64)
    if not len(ends):
      return np.zeros(0, np.int32), np.zeros(0, np.int32)
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths)])
    return np.asarray(encoded.ids, np.int32), np.diff(before[ends], prepend=0).astype(np.int32)
