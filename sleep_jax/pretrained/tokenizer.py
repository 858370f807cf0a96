"""Text to tokens and back, from a checkpoint's `tokenizer.json`. Nothing is added, nothing cut off."""

import contextlib
import json
import os
import pathlib
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import sleep_jax

try:
  import tokenizers
except ImportError:
  sleep_jax.require("tokenizers", "tokenizers")
  raise

from sleep_jax.config import ModelConfig
from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.pretrained.joints import Joints

NAME = "tokenizer.json"
LARGEST = 1 << 28  # bytes of a tokenizer.json; published ones have up to 35 MB
PIECE = 1 << 16  # characters tokenized at a time
AROUND = 64  # characters before and behind a piece that are tokenized with it
PATIENCE_S = 20.0  # for one piece, which takes a tenth of a second
T = TypeVar("T")


class Tokenizer:
  """A checkpoint's own tokenizer.

  Args:
    folder: which holds `tokenizer.json`.
    cfg: of the model that is to read the tokens.

  Raises:
    PretrainedError: if there is no tokenizer, it cannot be read, or it has a token that the embedding lacks.
      (An embedding may have rows to spare, as that of Qwen2.5 does.)
  """

  def __init__(self, folder: str | os.PathLike, cfg: ModelConfig):
    data = _read(pathlib.Path(folder) / NAME)
    self._tokenizer = _guarded("is no tokenizer", lambda: tokenizers.Tokenizer.from_buffer(data))
    # A file can ask for texts that are cut to a length or filled up to one.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < cfg.vocab_size:
      raise PretrainedError(
        f"{NAME}: its tokens go up to {highest}, the model's vocabulary to {cfg.vocab_size - 1}"
      )
    added = self._tokenizer.get_added_tokens_decoder()
    self._special = {token.content for token in added.values() if token.special}
    self._joints = Joints(self._tokenizer)

  @property
  def decoder(self) -> dict[str, Any] | None:
    """The decoder as the file has it."""
    decoder = self._tokenizer.decoder
    return None if decoder is None else json.loads(decoder.__getstate__())

  def encode(self, text: str) -> list[int]:
    """Tokens of a text, nothing added.

    Raises:
      PretrainedError: if there are none, or the tokenizer fails.
    """
    tokens = self._encoded(text).ids
    if not tokens:
      raise PretrainedError("prompt: has no tokens")
    return tokens

  def encode_parts(
    self, parts: Iterable[str], *, piece: int = PIECE, report: Callable[[str], None] | None = None
  ) -> Iterator[list[int]]:
    """Tokens of a text that comes in parts: joined, they are `encode` of the parts joined.

    The text is cut where no token and no rule of the tokenizer can reach across, and memory does not grow
    with it. Where a text has no such place, as much of it is tokenized at once as it takes.

    Args:
      parts: of the text, cut anywhere.
      piece: characters to tokenize at a time, at least.
      report: takes a line for the user if the text has no place to cut it for long.

    Yields:
      Tokens, never none.

    Raises:
      PretrainedError: if there are none in all, or the tokenizer fails.
    """
    held, begin, looked, some = "", 0, 0, False  # `held` goes on from `begin`; before it is what was read
    for part in _sliced(parts, piece):
      held += part
      if len(held) - begin < piece:
        continue
      at = self._joints.last(held, max(begin, looked))
      if at is None:
        looked = max(begin, len(held) - 2)
        if report is not None and len(held) - begin >= 16 * piece:
          report(f"{NAME} gives no place to cut this text: it is read whole, and memory grows with it")
          report = None
        continue
      if tokens := self._between(held[: at + AROUND], begin, at):
        some = True
        yield tokens
      left = max(0, at - AROUND)
      held, begin, looked = held[left:], at - left, 0
    if tokens := self._between(held, begin, len(held)):
      some = True
      yield tokens
    if not some:
      raise PretrainedError("prompt: has no tokens")

  def decode(self, tokens: Iterable[int]) -> str:
    """Text of tokens; special ones are left out."""
    return _guarded("cannot decode", lambda: self._tokenizer.decode(list(tokens), skip_special_tokens=True))

  def text_of(self, token: int) -> str | None:
    """A token as the vocabulary writes it; None if it is special or there is no such token."""
    text = self._tokenizer.id_to_token(token)
    return None if text in self._special else text

  def name_of(self, token: int) -> str | None:
    """A token as the vocabulary writes it, special or not."""
    return self._tokenizer.id_to_token(token)

  def _encoded(self, text: str) -> tokenizers.Encoding:
    try:
      text.encode()
    except UnicodeEncodeError as e:
      raise PretrainedError(f"prompt: character {e.start} is half of one, which no text has") from e
    # The batch of one lets go of the interpreter meanwhile, so that somebody can look at the clock.
    call = lambda: self._tokenizer.encode_batch([text], add_special_tokens=False)[0]  # noqa: E731
    patience = PATIENCE_S * max(1, len(text) / PIECE)
    return _guarded(f"fails on a text of {len(text)} characters", call, patience)

  def _between(self, text: str, begin: int, end: int) -> list[int]:
    """Tokens of text[begin:end], in a text whose joints both are, or its ends."""
    encoded = self._encoded(text)
    if begin == 0 and end == len(text):
      return encoded.ids
    inside = []
    for token, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
      if start < begin < stop or start < end < stop:
        raise PretrainedError(f"{NAME}: token {token} reaches over a place where no token can")
      if (begin == 0 or start >= begin) and start < end:
        inside.append(token)
    return inside


def _sliced(parts: Iterable[str], most: int) -> Iterator[str]:
  """The parts, those that are longer than `most` in several."""
  for part in parts:
    for at in range(0, len(part), most):
      yield part[at : at + most]


def _read(path: pathlib.Path) -> bytes:
  """The bytes of a regular file that is not too large."""
  try:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
      status = os.fstat(file.fileno())
      if not stat.S_ISREG(status.st_mode):
        raise PretrainedError(f"{path}: is no regular file")
      if status.st_size > LARGEST:
        raise PretrainedError(f"{path}: is larger than {LARGEST >> 20} MB")
      return file.read(status.st_size)
  except FileNotFoundError as e:
    raise PretrainedError(f"{path}: there is no such file") from e
  except (OSError, ValueError) as e:
    raise PretrainedError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


def _guarded(problem: str, call: Callable[[], T], patience: float = PATIENCE_S) -> T:
  """Calls the library, which can panic, and print that, and whose patterns can go on without end.

  Raises:
    PretrainedError: if it fails in any way or does not come back.
  """
  results: list[T] = []
  errors: list[BaseException] = []

  def work() -> None:
    try:
      results.append(call())
    except BaseException as e:  # a panic is no Exception
      errors.append(e)

  with _stderr_held() as dropped:
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(patience)
    dropped.extend(errors)
  if results:
    return results[0]
  if not errors:
    raise PretrainedError(f"{NAME}: {problem}: not done in {patience:.0f} s; a pattern may go on without end")
  if isinstance(errors[0], MemoryError):
    raise errors[0]
  reason = " ".join(str(errors[0]).split())[:200]
  raise PretrainedError(f"{NAME}: {problem} ({reason})") from errors[0]


@contextlib.contextmanager
def _stderr_held() -> Iterator[list[Any]]:
  """Holds back what is written to stderr; it is written in the end unless something is in the list given."""
  dropped: list[Any] = []
  try:
    kept = os.dup(2)
  except OSError:  # closed
    yield dropped
    return
  try:
    with tempfile.TemporaryFile() as held:
      os.dup2(held.fileno(), 2)
      try:
        yield dropped
      finally:
        os.dup2(kept, 2)
        held.seek(0)
        data = b"" if dropped else held.read()
      with contextlib.suppress(OSError):
        os.write(2, data)
  finally:
    os.close(kept)
