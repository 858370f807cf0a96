"""Text of tokens that come one by one: the pieces, joined, are what decoding all tokens at once gives."""

import copy
from collections.abc import Sequence
from typing import Any

from sleep_jax.config import check
from sleep_jax.pretrained import decoders
from sleep_jax.pretrained.tokenizer import Tokenizer

TAIL = 256  # tokens of a prompt that decide how the text behind it goes on
# C0, DEL and C1. Every sequence that drives a terminal begins with one of them.
CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - set(map(ord, "\n\t")))


def printable(text: str) -> str:
  """The text without the control characters that can drive a terminal; line ends and tabs stay."""
  return text.translate(CONTROLS)


class TextStream:
  """Tokens in, text out.

  Args:
    tokenizer: whose tokens they are.
    state: of a stream that stopped, to go on from. None: nothing was added yet.

  Raises:
    ConfigError: if `state` is of another decoder.
  """

  def __init__(self, tokenizer: Tokenizer, state: dict[str, Any] | None = None):
    self._tokenizer = tokenizer
    self._stages = decoders.of(tokenizer.decoder)
    self._known = ""  # text of the prompt that the stages have not passed on yet
    if state is not None:
      check(self._goes_on(state), "session", "its text state does not fit this tokenizer's decoder")

  def add(self, token: int) -> str:
    """The text that is certain now and was not before."""
    return self._new(decoders.through(self._stages, self._pieces(token)))

  def skip(self, tokens: Sequence[int]) -> str:
    """Takes tokens whose text is known to the reader, a prompt's; the text then goes on behind them.

    Only the first token and the last `TAIL` are looked at.

    Returns:
      Text of tokens added before that was still held back.
    """
    held = self.end()
    for token in [*tokens[:1], *tokens[max(1, len(tokens) - TAIL) :]]:
      decoders.through(self._stages, self._pieces(token))
    self._known = self._rest()
    return held

  def show(self) -> str:
    """The text that is still held back, if it is complete; what comes later goes on behind it."""
    rest = self.end()
    if decoders.UNKNOWN in rest:
      return ""
    self._known = self._rest()
    return rest

  def end(self) -> str:
    """The text that is still held back, as it is if no token follows; the stream itself stays as it is."""
    return _behind(self._rest(), self._known)

  def state(self) -> dict[str, Any]:
    """What another stream needs to go on from here, as plain data."""
    return {"known": self._known, "stages": [copy.deepcopy(stage.state) for stage in self._stages]}

  def _goes_on(self, state: dict[str, Any]) -> bool:
    """Takes the state of another stream; whether it is one."""
    if not _alike(state, self.state()):
      return False
    self._known = state["known"]
    for stage, values in zip(self._stages, state["stages"], strict=True):
      stage.state = copy.deepcopy(values)
    try:
      self.end()
    except (TypeError, ValueError, OverflowError):  # bytes that are none
      return False
    return True

  def _pieces(self, token: int) -> list[decoders.Piece]:
    text = self._tokenizer.text_of(token)
    return [] if text is None else [(text, True)]

  def _rest(self) -> str:
    """What the stages still hold; they keep it."""
    states = self.state()["stages"]
    text = decoders.through(self._stages, [], close=True)
    for stage, values in zip(self._stages, states, strict=True):
      stage.state = values
    return text

  def _new(self, text: str) -> str:
    """Text without what the prompt had of it."""
    new = _behind(text, self._known)
    self._known = self._known[len(text) :] if not new else ""
    return new


class StopStrings:
  """Text in, text out, until one of some strings is complete; that one and what follows is left out.

  The result does not depend on how the text is cut: what may be the beginning of a string is held back.
  """

  def __init__(self, strings: Sequence[str]):
    self._strings = tuple(strings)
    self.held = ""

  def add(self, text: str) -> tuple[str, str | None]:
    """The text that is certain now, and the string that ends it, if there is one."""
    text, self.held = self.held + text, ""
    found = [(at + len(s), at, s) for s in self._strings if (at := text.find(s)) >= 0]
    if found:
      _, at, string = min(found)
      return text[:at], string
    held = max((decoders.overlap(text, s) for s in self._strings), default=0)
    self.held = text[len(text) - held :]
    return text[: len(text) - held], None


def _behind(text: str, known: str) -> str:
  """The text behind the beginning that it shares with `known`."""
  shared = 0
  while shared < min(len(text), len(known)) and text[shared] == known[shared]:
    shared += 1
  return text[shared:]


def _alike(a: Any, b: Any) -> bool:
  """Whether two pieces of plain data have the same fields and types; lists inside may differ in length."""
  if type(a) is not type(b):
    return a is None or b is None
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(
      _same_stages(a[k], b[k]) if k == "stages" else _alike(a[k], b[k]) for k in a
    )
  if isinstance(a, list):
    return all(isinstance(x, (str, int)) and not isinstance(x, bool) for x in a)
  return True


def _same_stages(a: Any, b: Any) -> bool:
  return isinstance(a, list) and len(a) == len(b) and all(map(_alike, a, b))
