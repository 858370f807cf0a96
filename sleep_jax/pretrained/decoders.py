"""The decoders of a `tokenizer.json`, a piece at a time.

The file names a chain of them: each takes a list of tokens and makes another one of it. Here each takes a
piece of a token and passes on what no later piece can change. The rest is held back: the bytes of a character
that is not complete, or a space that the next token may need.
"""

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from sleep_jax.pretrained.joints import LETTERS

Piece = tuple[str, bool]  # a piece of a token's text, and whether the token ends with it
BYTES = {c: b for b, c in enumerate(LETTERS)}
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
CLEANED = (
  (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
  (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Stage:
  """A decoder. `state` is plain data; here it is nothing, and every piece is passed on."""

  def __init__(self) -> None:
    self.state: dict[str, Any] = {}

  def add(self, text: str, ends: bool) -> list[Piece]:
    """Takes the next piece of the open token; if that ends with it, the next piece is of another."""
    return [(text, ends)]

  def close(self) -> list[Piece]:
    """There are no more tokens."""
    return []


class _Whole(Stage):
  """A decoder that looks at whole tokens."""

  def __init__(self) -> None:
    self.state = {"part": ""}

  def add(self, text: str, ends: bool) -> list[Piece]:
    text = self.state["part"] + text
    self.state["part"] = "" if ends else text
    return self.token(text) if ends else []

  def token(self, text: str) -> list[Piece]:
    raise NotImplementedError


class _Fuse(Stage):
  """Makes one token of all."""

  def add(self, text: str, ends: bool) -> list[Piece]:
    del ends
    return [(text, False)]

  def close(self) -> list[Piece]:
    return [("", True)]


class _ByteLevel(_Whole):
  """One token of all, whose characters stand for bytes; one that has others is taken as it is."""

  def __init__(self) -> None:
    super().__init__()
    self.state |= {"bytes": []}

  def token(self, text: str) -> list[Piece]:
    data = bytes(self.state["bytes"]) + _bytes_of(text)
    known, used = codecs.utf_8_decode(data, "replace", False)
    self.state["bytes"] = list(data[used:])
    return [(known, False)]

  def close(self) -> list[Piece]:
    return [(bytes(self.state["bytes"]).decode("utf-8", "replace"), True)]


class _ByteFallback(_Whole):
  """A run of `<0xAB>` is text if all of it is UTF-8; if not, each is a replacement character."""

  def __init__(self) -> None:
    super().__init__()
    self.state |= {"run": []}

  def token(self, text: str) -> list[Piece]:
    byte = re.fullmatch(r"<0x([+0-9A-Fa-f][0-9A-Fa-f])>", text)
    if byte:
      self.state["run"].append(int(byte[1], 16))
      return []
    return [*self.close(), (text, True)]

  def close(self) -> list[Piece]:
    run, self.state["run"] = bytes(self.state["run"]), []
    try:
      return [(run.decode("utf-8"), True)] if run else []
    except UnicodeDecodeError:
      return [(UNKNOWN, True)] * len(run)


class _Replace(Stage):
  """Replaces a text in each token. The end of a piece that may be the beginning of one is held back."""

  def __init__(self, pattern: str, content: str) -> None:
    self._pattern, self._content = pattern, content
    self.state = {"held": ""}

  def add(self, text: str, ends: bool) -> list[Piece]:
    *before, rest = (self.state["held"] + text).split(self._pattern)
    held = 0 if ends else overlap(rest, self._pattern)
    self.state["held"] = rest[len(rest) - held :]
    done = "".join(part + self._content for part in before) + rest[: len(rest) - held]
    return [(done, ends)]


class _Strip(Stage):
  """Takes up to `start` characters `content` from the front of each token, and up to `stop` from its end."""

  def __init__(self, content: str, start: int, stop: int) -> None:
    self._content, self._start, self._stop = content, start, stop
    self.state = {"left": start, "held": ""}

  def add(self, text: str, ends: bool) -> list[Piece]:
    while text and self.state["left"]:
      if text[0] != self._content:
        self.state["left"] = 0
      else:
        text, self.state["left"] = text[1:], self.state["left"] - 1
    text = self.state["held"] + text
    held = min(self._stop, len(text) - len(text.rstrip(self._content)))
    self.state["held"] = "" if ends else text[len(text) - held :]
    self.state["left"] = self._start if ends else self.state["left"]
    return [(text[: len(text) - held], ends)]


class _Metaspace(Stage):
  """A mark stands for a space; in the first token for nothing, unless there never is one in front."""

  def __init__(self, mark: str, first: str) -> None:
    self._mark, self._first = mark, first
    self.state = {"begun": False}

  def add(self, text: str, ends: bool) -> list[Piece]:
    text = text.replace(self._mark, " " if self.state["begun"] else self._first)
    self.state["begun"] |= ends
    return [(text, ends)]


class _Spaced(_Whole):
  """A space before each token but the first, unless it begins with `prefix`, which is taken away."""

  def __init__(self, prefix: str | None, cleanup: bool) -> None:
    super().__init__()
    self._prefix, self._cleanup = prefix, cleanup
    self.state |= {"begun": False}

  def token(self, text: str) -> list[Piece]:
    if self.state["begun"]:
      inside = self._prefix is not None and text.startswith(self._prefix)
      text = text[len(self._prefix or "") :] if inside else f" {text}"
    self.state["begun"] = True
    return [(_cleaned(text) if self._cleanup else text, True)]


class _WordEnd(_Whole):
  """A suffix stands for a space; in the last token for nothing."""

  def __init__(self, suffix: str) -> None:
    super().__init__()
    self._suffix = suffix
    self.state |= {"held": None}

  def token(self, text: str) -> list[Piece]:
    before = self._pass_on(" ")
    if self._suffix not in text:
      return [*before, (text, True)]
    self.state["held"] = text
    return before

  def close(self) -> list[Piece]:
    return self._pass_on("")

  def _pass_on(self, space: str) -> list[Piece]:
    held, self.state["held"] = self.state["held"], None
    return [] if held is None else [(held.replace(self._suffix, space), True)]


class _All(_Whole):
  """Any other decoder: nothing is certain before the end.

  Args:
    decode: the library's decoder.
    alone: it looks at each token alone, so that the end of one is enough.
  """

  def __init__(self, decode: Any, alone: bool = False) -> None:
    super().__init__()
    self._decode, self._alone = decode, alone
    self.state |= {"tokens": []}

  def token(self, text: str) -> list[Piece]:
    if self._alone:
      return [(self._decode([text]), True)]
    self.state["tokens"].append(text)
    return []

  def close(self) -> list[Piece]:
    tokens, self.state["tokens"] = self.state["tokens"], []
    return [(self._decode(tokens), True)] if tokens else []


def of(decoder: dict[str, Any] | None) -> list[Stage]:
  """The decoders of a `tokenizer.json`, in their order."""
  if decoder is None:
    return [_Spaced(None, cleanup=False)]
  stages: list[Stage] = []
  for part in _flat(decoder):
    stage = _stage(part)
    if stage is None:
      return [_All(_library(decoder))]
    stages.append(stage)
  return stages


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
  if decoder["type"] != "Sequence":
    return [decoder]
  return [part for inner in decoder["decoders"] for part in _flat(inner)]


def _stage(part: dict[str, Any]) -> Stage | None:
  match part:
    case {"type": "Fuse"}:
      return _Fuse()
    case {"type": "ByteLevel"}:
      return _ByteLevel()
    case {"type": "ByteFallback"}:
      return _ByteFallback()
    case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
      return _Replace(pattern, content)
    case {"type": "Replace"}:
      return _All(_library(part), alone=True)
    case {"type": "Strip", "content": str(content), "start": int(start), "stop": int(stop)}:
      return _Strip(content, start, stop)
    case {"type": "Metaspace", "replacement": str(mark)}:
      return _Metaspace(mark, " " if part.get("prepend_scheme") == "never" else "")
    case {"type": "WordPiece", "prefix": str(prefix), "cleanup": bool(cleanup)}:
      return _Spaced(prefix, cleanup)
    case {"type": "BPEDecoder", "suffix": str(suffix)}:
      return _WordEnd(suffix)
  return None


def _library(decoder: dict[str, Any]) -> Any:
  """The library's own decoder of this kind, list of tokens to text."""
  empty = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="")).to_str())
  return tokenizers.Tokenizer.from_str(json.dumps(empty | {"decoder": decoder})).decoder.decode


def through(stages: Iterable[Stage], pieces: list[Piece], close: bool = False) -> str:
  """What comes out behind the last stage."""
  for stage in stages:
    after = [out for piece in pieces for out in stage.add(*piece)]
    pieces = after + stage.close() if close else after
  return "".join(text for text, _ in pieces)


def _bytes_of(token: str) -> bytes:
  """The bytes that a byte-level token stands for."""
  values = [BYTES[c] for c in token if c in BYTES]
  return bytes(values) if len(values) == len(token) else token.encode()


def overlap(text: str, pattern: str) -> int:
  """The length of the longest end of a text that is a beginning of the pattern, and not all of it."""
  longest = min(len(text), len(pattern) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(pattern[:n])), 0)


def _cleaned(text: str) -> str:
  """English as WordPiece's decoder writes it."""
  for before, after in CLEANED:
    text = text.replace(before, after)
  return text
