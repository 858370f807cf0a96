"""Places where a text can be cut so that its parts have the same tokens as the whole.

A joint lies between two characters x and y. It holds if every stage of the tokenizer (added tokens,
normalizer, pre-tokenizer, model) treats the text before it and the text behind it independently, or if a
pre-tokenizer splits there. This is decided from the stages' published behaviour and from the vocabulary, pair
by pair, never by trying. The parts are tokenized with some text on either side, so that neither is at the
beginning or the end of a text where the whole is not.
"""

import functools
import json
import unicodedata
from typing import Any

import tokenizers

from sleep_jax.pretrained.patterns import Pattern, UnknownPatternError

SPACES = frozenset(" \n\t\r")
# Characters beside the marks (category M) that join a neighbour in a grapheme or a composition: jamo, voice
# marks of half width, vowel signs that decompose, and letters that stand in front of another
# (Grapheme_Cluster_Break = Prepend). Everything behind the basic plane is left out too.
JOINING = frozenset(
  map(
    chr,
    [
      *range(0x1100, 0x1200),
      *range(0xA960, 0xA980),
      *range(0xD7B0, 0xD800),
      0xFF9E,
      0xFF9F,
      0xE33,
      0xEB3,
      0xD4E,
    ],
  )
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Normalizers that treat each character, or each base with its marks, alone.
LOCAL = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "StripAccents")
# Pre-tokenizers that split at spaces, and elsewhere by what the two characters are.
AT_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")

_SHOWN = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
_HIDDEN = [b for b in range(256) if b not in _SHOWN]
# The character by which byte-level tokenizers write each byte.
LETTERS = [chr(b) if b in _SHOWN else chr(256 + _HIDDEN.index(b)) for b in range(256)]

Pair = tuple[frozenset[str], frozenset[str]]  # what may stand before and behind the joint


class Joints:
  """Where texts may be cut for a tokenizer."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._tokenizer = tokenizer
    self._normalizers = _flat(_state(tokenizer.normalizer), "normalizers")
    self._pre_tokenizers = _flat(_state(tokenizer.pre_tokenizer), "pretokenizers")
    contents = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    if tokenizer.normalizer is not None:
      contents |= {tokenizer.normalizer.normalize_str(text) for text in contents}
    self._added = _pairs_in(contents)
    self._added_ends = {text[-1] for text in contents if text}
    self._safe: dict[tuple[str, str], bool] = {}

  def last(self, text: str, after: int) -> int | None:
    """The last joint of a text behind position `after`; there are at least two characters behind it."""
    for at in range(len(text) - 2, after, -1):
      if self.holds(*text[at - 1 : at + 2]):
        return at
    return None

  def holds(self, x: str, y: str, z: str) -> bool:
    """Whether there is a joint between x and y, in every text in which z follows them."""
    if (x, y) not in self._safe:
      self._safe[x, y] = _single(x) and (_single(y) or y in SPACES) and self._independent(x, y)
    return self._safe[x, y] and (_single(z) or z in SPACES)

  def _independent(self, x: str, y: str) -> bool:
    pair: Pair | None = frozenset(x), frozenset(y)
    if self._is_added(pair):
      return False
    for stage in self._normalizers:
      pair = _normalized(stage, pair)
      if pair is None or not all(_single(c) or c in SPACES for c in pair[0] | pair[1]):
        return False
    if self._is_added(pair):
      return False
    for stage in self._pre_tokenizers:
      pair, split = _pre_tokenized(stage, pair)
      if split or pair is None:
        return split
    return self._no_token_spans(pair)

  def _is_added(self, pair: Pair) -> bool:
    """Whether an added token may end before the joint or lie across it."""
    return bool(pair[0] & self._added_ends) or any((a, b) in self._added for a in pair[0] for b in pair[1])

  def _no_token_spans(self, pair: Pair) -> bool:
    """Whether the model, given both characters in one piece of text, never joins them.

    BPE joins only what is a token in the end, so two sides that no token spans are merged independently. A
    unigram model adds up scores along the whole piece, and rounding may decide between equals: not sure.
    """
    model = self._tokenizer.model
    if not isinstance(model, tokenizers.models.BPE):
      return False
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
      return False
    if any(model.token_to_id(c) is None for c in pair[0] | pair[1]):
      return False
    return not any((a, b) in self._spanned for a in pair[0] for b in pair[1])

  @functools.cached_property
  def _spanned(self) -> set[tuple[str, str]]:
    return _pairs_in(self._tokenizer.get_vocab(with_added_tokens=False))


def _pairs_in(texts: Any) -> set[tuple[str, str]]:
  """All pairs of neighbours in some texts."""
  return {pair for text in texts for pair in zip(text, text[1:], strict=False)}


def _single(c: str) -> bool:
  """Whether a character is a letter, digit, mark of punctuation or symbol that stands for itself."""
  return c < "\U00010000" and c not in JOINING and unicodedata.category(c)[0] in "LNPS"


def _state(component: Any) -> dict[str, Any] | None:
  """A part of the tokenizer as its JSON says it."""
  return None if component is None else json.loads(component.__getstate__())


def _flat(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
  """A sequence of stages, and those in it, one after the other."""
  if part is None:
    return []
  if part["type"] != "Sequence":
    return [part]
  return [one for inner in part[inside] for one in _flat(inner, inside)]


def _normalized(stage: dict[str, Any], pair: Pair) -> Pair | None:
  """What may stand at the joint after a normalizer; None if it may treat the two sides together."""
  before, behind = pair
  kind = stage["type"]
  if kind in ("Strip", "Prepend"):  # at the ends of a text, of which there is none here
    return pair
  if kind == "ByteLevel":
    return _as_bytes(pair)
  if kind == "Replace":
    return _replaced(stage, pair)
  if kind not in LOCAL:
    return None
  change = _normalizer(json.dumps(stage))
  lefts, rights = [change(c) for c in before], [change(c) for c in behind]
  if not all(lefts) or not all(rights):
    return None
  return frozenset(text[-1] for text in lefts), frozenset(text[0] for text in rights)


def _replaced(stage: dict[str, Any], pair: Pair) -> Pair | None:
  """The same for a text or a pattern that is replaced by another text."""
  (before, behind), content = pair, stage["content"]
  pattern = _pattern(stage["pattern"])
  if pattern is None or pattern.empty or any(pattern.joins(a, b) for a in before for b in behind):
    return None
  left, right = ({c for c in side if pattern.takes(c)} for side in pair)
  if (left or right) and not content:
    return None
  return (
    (before - left if pattern.single else before) | {content[-1] for _ in left},
    (behind - right if pattern.single else behind) | {content[0] for _ in right},
  )


def _pre_tokenized(stage: dict[str, Any], pair: Pair) -> tuple[Pair | None, bool]:
  """What may stand at the joint after a pre-tokenizer, and whether it splits there for certain."""
  kind, behind = stage["type"], pair[1]
  if kind in AT_SPACES:
    return pair, behind <= SPACES
  if kind in ("Digits", "Punctuation"):  # these go by what the two characters are
    return pair, False
  if kind == "CharDelimiterSplit":
    return pair, behind == {stage["delimiter"]}
  if kind == "Metaspace":
    mark = stage["replacement"]
    marked = tuple(frozenset(mark if c == " " else c for c in side) for side in pair)
    return (marked[0], marked[1]), stage.get("split", True) and marked[1] == {mark}
  if kind == "ByteLevel":
    if not stage.get("use_regex", True):
      return _as_bytes(pair), False
    after, split = _split({"Regex": GPT2}, "Isolated", pair)
    return None if after is None else _as_bytes(after), split
  if kind == "Split":
    return _split(stage["pattern"], stage["behavior"], pair)
  return None, False


def _split(pattern: dict[str, str], behavior: str, pair: Pair) -> tuple[Pair | None, bool]:
  """Pieces that match a pattern, and pieces between them: split where a match ends or begins for certain."""
  read = _pattern(pattern)
  if read is None or any(read.joins(a, b) for a in pair[0] for b in pair[1]):
    return None, False
  ends = all(map(read.covers, pair[0]))
  return pair, behavior in ("Isolated", "Removed") and (ends or read.single and all(map(read.takes, pair[1])))


def _as_bytes(pair: Pair) -> Pair:
  """The characters that stand for the last byte before the joint and the first one behind it."""
  before, behind = pair
  return frozenset(LETTERS[c.encode()[-1]] for c in before), frozenset(LETTERS[c.encode()[0]] for c in behind)


@functools.lru_cache(maxsize=64)
def _read(text: str) -> Pattern | None:
  try:
    return Pattern(text)
  except UnknownPatternError:
    return None


def _pattern(pattern: dict[str, str]) -> Pattern | None:
  """A text or a regular expression; None if it is not understood."""
  if "String" in pattern:
    return _read("".join(rf"\x{{{ord(c):x}}}" for c in pattern["String"]))
  return _read(pattern["Regex"])


@functools.lru_cache(maxsize=64)
def _normalizer(stage: str) -> Any:
  """The library's own normalizer of this kind, text to text."""
  empty = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="")).to_str())
  made = tokenizers.Tokenizer.from_str(json.dumps(empty | {"normalizer": json.loads(stage)}))
  return made.normalizer.normalize_str
