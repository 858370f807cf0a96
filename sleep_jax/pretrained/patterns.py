"""Which characters a pattern of a `tokenizer.json` can match side by side.

A pattern is read as a set of places, each of which takes one character, and of pairs of places that can
follow each other (the position automaton of Glushkov, 1961). If no such pair takes x and then y, then no
attempt to match gets from an x to a y behind it: what is matched on either side does not depend on the other.
Text inside lookaheads and lookbehinds counts as matched, which can only add pairs.

The syntax is that of Oniguruma, which the tokenizers library uses. What is not understood is refused.
"""

import dataclasses
import functools
import re

import tokenizers


class UnknownPatternError(ValueError):
  """The pattern has something whose reach cannot be told."""


@dataclasses.dataclass(frozen=True)
class _Part:
  """A part of a pattern: whether it can match nothing, and places that can come first and last in it."""

  empty: bool
  first: frozenset[int] = frozenset()
  last: frozenset[int] = frozenset()


NOTHING = _Part(True)
# Escapes that look at one character on either side, or at none, and take none.
LOOKS = frozenset("AbBzZ")
CLASSES = frozenset("dDhHsSwW")
ESCAPED = frozenset("tnrfvae")
ESCAPE = re.compile(r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.)", re.S)


class Pattern:
  """A pattern that was understood.

  Args:
    text: in Oniguruma's syntax.

  Attributes:
    empty: whether it may match nothing.
    single: whether it has one place, once or repeated, and no condition: what it takes it matches.

  Raises:
    UnknownPatternError: if it was not.
  """

  def __init__(self, text: str):
    self._text, self._at, self._flags = text, 0, ""
    self._places: list[str] = []
    self._follow: dict[int, set[int]] = {}
    self._looks, self._folds = False, False
    whole = self._alternatives()
    if self._at < len(text):
      raise UnknownPatternError(f"{text!r}: not understood from character {self._at} on")
    self.empty, plain = whole.empty, not whole.empty and not self._looks
    self.single = plain and len(self._places) == 1
    self._alone = _splitter(text) if plain else None
    self._taking: dict[str, frozenset[int]] = {}

  def joins(self, x: str, y: str) -> bool:
    """Whether some attempt to match can get from a character x to a y behind it. False is certain."""
    if self._folds and (len(x.casefold()) > 1 or len(y.casefold()) > 1):
      return True  # under (?i) one character may stand for two places
    behind = self._taken_by(y)
    return any(self._follow.get(place, set()) & behind for place in self._taken_by(x))

  def covers(self, x: str) -> bool:
    """Whether every x is part of a match, if `joins` says that it does not join what follows it."""
    return self._alone is not None and not self._alone.pre_tokenize_str(x)

  def takes(self, x: str) -> bool:
    """Whether x can be part of a match."""
    return bool(self._taken_by(x))

  def _taken_by(self, x: str) -> frozenset[int]:
    """Places that take x; the library's own engine says which."""
    if x not in self._taking:
      places = enumerate(map(_splitter, self._places))
      self._taking[x] = frozenset(i for i, place in places if not place.pre_tokenize_str(x))
    return self._taking[x]

  def _alternatives(self) -> _Part:
    parts = [self._sequence()]
    while self._peek("|"):
      parts.append(self._sequence())
    return _Part(
      any(p.empty for p in parts),
      frozenset().union(*(p.first for p in parts)),
      frozenset().union(*(p.last for p in parts)),
    )

  def _sequence(self) -> _Part:
    whole, flags = NOTHING, self._flags
    while self._at < len(self._text) and self._text[self._at] not in "|)":
      part = self._repeated(self._atom())
      self._join(whole.last, part.first)
      first = whole.first | part.first if whole.empty else whole.first
      last = whole.last | part.last if part.empty else part.last
      whole = _Part(whole.empty and part.empty, first, last)
    self._flags = flags
    return whole

  def _repeated(self, part: _Part) -> _Part:
    while found := re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}").match(self._text, self._at):
      if found[0] == "{}" or found[0] == "{,}":
        raise UnknownPatternError(f"{self._text!r}: {found[0]} is no number of times")
      self._at = found.end()
      low, comma, high = found[1], found[2], found[3]
      once = found[0] == "?" or (comma and high in ("0", "1")) or (not comma and low in ("0", "1"))
      if not once:
        self._join(part.last, part.first)
      if found[0] in "*?" or (found[1] is not None and int(low or 0) == 0):
        part = dataclasses.replace(part, empty=True)
    return part

  def _join(self, last: frozenset[int], first: frozenset[int]) -> None:
    for place in last:
      self._follow.setdefault(place, set()).update(first)

  def _atom(self) -> _Part:
    c = self._text[self._at]
    if c == "(":
      return self._group()
    if c == "[":
      return self._place(self._bracket())
    if c == "\\":
      return self._escape()
    self._at += 1
    if c in "^$":
      self._looks = True
      return NOTHING
    if c in "*+?":
      raise UnknownPatternError(f"{self._text!r}: {c} repeats nothing")
    return self._place(c if c == "." else re.escape(c) if c.isascii() else c)

  def _place(self, text: str) -> _Part:
    one = frozenset({len(self._places)})
    self._places.append(f"(?{self._flags}:{text})")
    return _Part(False, one, one)

  def _group(self) -> _Part:
    opened = re.compile(r"\((?:\?(?:(<?[=!])|[:>]|<([A-Za-z_]\w*)>|([im]*)(?:-([im]*))?([:)])))?").match(
      self._text, self._at
    )
    if opened is None or (opened[0] == "(" and self._text.startswith("(?", self._at)):
      raise UnknownPatternError(f"{self._text!r}: a group is not understood")
    self._at, flags = opened.end(), self._flags
    if opened[5]:
      self._flags = "".join(sorted((set(flags) | set(opened[3])) - set(opened[4] or "")))
      self._folds |= "i" in self._flags
      if opened[5] == ")":  # to the end of the group that it stands in, over bars: as a group of its own
        rest = self._alternatives()
        self._flags = flags
        return rest
    inside = self._alternatives()
    self._flags = flags
    if not self._peek(")"):
      raise UnknownPatternError(f"{self._text!r}: a group is not closed")
    if not opened[1]:
      return inside
    self._looks |= "<" in opened[1]
    return _Part(True, last=inside.last) if "<" in opened[1] else _Part(True, first=inside.first)

  def _bracket(self) -> str:
    begin, depth = self._at, 0
    while self._at < len(self._text):
      c = self._text[self._at]
      if c == "[":
        depth += 1
        if re.compile(r"\[\^?\]").match(self._text, self._at):
          raise UnknownPatternError(f"{self._text!r}: a class begins with ]")
      depth -= c == "]"
      self._at += 2 if c == "\\" else 1
      if depth == 0:
        return self._text[begin : self._at]
    raise UnknownPatternError(f"{self._text!r}: a class is not closed")

  def _escape(self) -> _Part:
    found = ESCAPE.match(self._text, self._at)
    if found is None:
      raise UnknownPatternError(f"{self._text!r}: ends with a \\")
    self._at, letter = found.end(), found[0][1]
    if len(found[0]) == 2 and letter in LOOKS:
      self._looks = True
      return NOTHING
    if len(found[0]) == 2 and letter.isalnum() and letter not in CLASSES | ESCAPED:
      raise UnknownPatternError(f"{self._text!r}: {found[0]} is not understood")
    return self._place(found[0])

  def _peek(self, c: str) -> bool:
    """Whether the next character is c, which is taken then."""
    found = self._text.startswith(c, self._at)
    self._at += found
    return found


@functools.lru_cache(maxsize=512)
def _splitter(text: str) -> tokenizers.pre_tokenizers.PreTokenizer:
  """Leaves nothing of a text that the pattern matches."""
  return tokenizers.pre_tokenizers.Split(tokenizers.Regex(text), "removed")
