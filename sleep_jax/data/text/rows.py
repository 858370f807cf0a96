"""Documents cut into sequences of T tokens: which tokens stand where, a pure function of (seed, index).

A document begins at the border of a window, where the model's state is empty again (`windows.Batch.begins`):
attention reaches no further back than its window, so no window ever holds two documents, and S, which does
reach back, begins anew. A document longer than T goes on in further sequences, each of which begins anew
too. The last window of a document is filled up on its right with pads, which leave everything as it was.

    packed   document 1 [0:L] | [L:2L] | [2L:..] PAD | document 2 [0:L] | [L:..] PAD ...
    alone    document 1 [0:L] | [L:2L] | [2L:..] PAD | PAD ...

Every token but the first of a document is predicted once: a sequence's last target is the next one's first
token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np

from sleep_jax.config import Bounds, check, check_fields
from sleep_jax.data import limits
from sleep_jax.data.text.corpus import Corpus

KINDS = ("new", "near", "evicted", "long_evicted")
DESCRIPTION = ("bytes", "position", "kind", "evicted_name")  # of a row, for evaluations alone
MOST_VOCAB = 1 << 18


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The texts, and how they are cut into sequences.

  Attributes:
    files: names and patterns of the files to train on, with commas between them: `books/*.txt`. A name that
      ends with `.jsonl` holds a document a line, any other is one document; either may be `.gz`.
    held_out: the same of the files of the evaluation, of which none is trained on.
    field: of the objects in a .jsonl, which holds the text.
    documents: `packed`: several short documents share a sequence; `alone`: each has its own.
    length: T, tokens of a sequence; whole windows. A longer document is cut, and its parts begin anew.
    tokenizer: a tokenizer.json. Empty: one is trained on `files` and kept in the workdir.
    vocab_size: most tokens of a tokenizer that is trained.
    digest: which texts these are, wherever they lie. None: computed when the run starts. Where it is given,
      other texts are refused.
  """

  PATH: ClassVar[str] = "data"

  files: str = ""
  held_out: str = ""
  field: str = "text"
  documents: Literal["packed", "alone"] = "packed"
  length: Annotated[int, Bounds(least=2), Bounds(most=limits.LENGTH)] = 512
  tokenizer: str = ""
  vocab_size: Annotated[int, Bounds(least=257), Bounds(most=MOST_VOCAB)] = 1024
  digest: str | None = None

  def __post_init__(self):
    check_fields(self)


def check_window(length: int, window: int) -> None:
  """Raises `ConfigError` unless sequences are whole windows."""
  check(
    length % window == 0,
    "data.length",
    f"must be a multiple of model.window = {window}, where documents begin; got {length}",
  )


def check_long_enough(found: Sequence["Piece"], window: int, name: str) -> None:
  """Raises `ConfigError` if all texts together are shorter than a window."""
  read = sum(piece.size for piece in found)
  check(read >= window, name, f"has {read} tokens to read, fewer than a window (model.window = {window})")


class Piece(NamedTuple):
  """Tokens `start` .. `start + size` of a document: the first `size` are read, the last `size` predicted."""

  document: int
  start: int
  size: int


def pieces(counts: Sequence[int], length: int) -> list[Piece]:
  """Cuts documents of so many tokens into pieces of at most `length`; one of a single token has none.

  >>> pieces([6, 1, 3], 4)
  [Piece(document=0, start=0, size=4), Piece(document=0, start=4, size=1), Piece(document=2, start=0, size=2)]
  """
  return [
    Piece(document, start, min(length, count - 1 - start))
    for document, count in enumerate(counts)
    for start in range(0, count - 1, length)
  ]


def pack(found: Sequence[Piece], length: int, window: int) -> list[list[Piece]]:
  """Puts pieces into rows of `length` tokens, each where it fits most tightly, at the border of a window.

  >>> [len(row) for row in pack([Piece(0, 0, 8), Piece(1, 0, 3), Piece(2, 0, 2)], length=8, window=4)]
  [1, 2]
  """
  rows: list[list[Piece]] = []
  room: dict[int, list[int]] = {}  # windows that are left -> rows
  for piece in found:
    needed = -(-piece.size // window)
    left = min((w for w in room if w >= needed and room[w]), default=None)
    if left is None:
      rows.append([])
      row, left = len(rows) - 1, length // window
    else:
      row = room[left].pop()
    rows[row].append(piece)
    if left > needed:
      room.setdefault(left - needed, []).append(row)
  return rows


@dataclasses.dataclass(frozen=True)
class Rows:
  """The sequences of a corpus; random access without hidden state.

  Attributes:
    corpus: their tokens.
    pieces: what each holds.
    length: T.
    window: L.
  """

  corpus: Corpus
  pieces: tuple[tuple[Piece, ...], ...]
  length: int
  window: int

  def __len__(self) -> int:
    return len(self.pieces)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """`inputs`, `targets`, `loss_mask`, `valid` and `begins`, as in `windows.Batch`, each [T]."""
    return {name: x for name, x in self.described(index).items() if name not in DESCRIPTION}

  def described(self, index: int) -> dict[str, np.ndarray]:
    """The row with what an evaluation needs beside: of each target [T] the `DESCRIPTION`.

    `position`: tokens of the piece that were read before the target. `kind`, an index of `KINDS`: whether
    the piece had the same token before (else `new`), and how many tokens ago: at most L (`near`: attention
    may still reach it), at most 2 L (`evicted`), or more (`long_evicted`). `evicted_name`: part of a
    capitalised word (`tokens.names_of`) that the piece had in an earlier window and not yet in this one.
    """
    fields = ("inputs", "targets", "bytes", "position", "kind")
    row: dict[str, Any] = {field: np.zeros(self.length, np.int32) for field in fields}
    row["loss_mask"] = np.zeros(self.length, np.float32)
    row |= {field: np.zeros(self.length, bool) for field in ("valid", "begins", "evicted_name")}
    at = 0
    for piece in self.pieces[index]:
      ids, sizes, names = self.corpus.read(piece.document, piece.start, piece.start + piece.size + 1)
      here = slice(at, at + piece.size)
      row["inputs"][here], row["targets"][here], row["bytes"][here] = ids[:-1], ids[1:], sizes[1:]
      row["loss_mask"][here], row["valid"][here], row["begins"][at] = 1, True, True
      row["position"][here] = np.arange(1, piece.size + 1)
      row["kind"][here] = _kinds(ids, self.window)
      row["evicted_name"][here] = _evicted(names, self.window)
      at += -(-piece.size // self.window) * self.window
    return row


def make_rows(corpus: Corpus, cfg: TextConfig, window: int, seed: int | None, name: str) -> Rows:
  """All sequences of a corpus.

  Args:
    seed: names the order of the pieces, before they are packed. None: as in the files.
    name: of the field that names the files, for messages.

  Raises:
    ConfigError: if all texts together are shorter than a window.
  """
  found = pieces(corpus.counts, cfg.length)
  check_long_enough(found, window, name)
  if seed is not None:
    found = [found[i] for i in np.random.default_rng((seed, 0)).permutation(len(found))]
  packed = [[piece] for piece in found]
  if cfg.documents == "packed":
    packed = pack(found, cfg.length, window)
  return Rows(corpus, tuple(map(tuple, packed)), cfg.length, window)


def _kinds(ids: np.ndarray, window: int) -> np.ndarray:
  """The kind of each token but the first, [n - 1]."""
  order = np.argsort(ids, kind="stable")
  same = ids[order[1:]] == ids[order[:-1]]
  ago = np.zeros(len(ids), np.int64)  # tokens since the same one; 0: never
  ago[order[1:][same]] = (order[1:] - order[:-1])[same]
  kinds = np.select([ago == 0, ago <= window, ago <= 2 * window], [0, 1, 2], 3)
  return kinds[1:].astype(np.int32)


def _evicted(names: np.ndarray, window: int) -> np.ndarray:
  """Whether each token but the first is part of a name that an earlier window had, and its own not yet.

  The window of a token is the one from which it is predicted: that of the token before it. All tokens of a
  word count as its first one does.
  """
  new = np.flatnonzero((names != 0) & (names != np.concatenate([[0], names[:-1]])))  # first tokens of words
  found = np.zeros(len(names), bool)
  seen: dict[int, int] = {}  # name -> window of its last token
  for start in new.tolist():
    name, stop = int(names[start]), start + 1
    while stop < len(names) and names[stop] == name:
      stop += 1
    here = max(start - 1, 0) // window
    found[start:stop] = seen.get(name, here) < here
    seen[name] = (stop - 1) // window
  return found[1:]
