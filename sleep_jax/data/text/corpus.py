"""Documents as tokens, made once and kept in a cache that is verified.

The cache of a corpus is two files, named by its digest: an array_record with the tokens, in records of at
most `RECORD` tokens of one document, and a JSON index with the documents and the record file's SHA-256. What
is not whole or not of this corpus is made again. The digest is of the contents alone: files may be moved.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from sleep_jax.config import ConfigError, check
from sleep_jax.data.text import files, tokens

FORMAT = 2  # of the cache; 1 had no names
RECORD = 1 << 16  # tokens
CACHED = 64  # records that a process holds, 0.8 MB each


def digest(paths: Sequence[pathlib.Path], field: str) -> str:
  """Which texts these are: a hash of the contents of all files, in order, and of how they are read."""
  # Not FORMAT: a run that goes on with a newer form of the cache still reads the same texts.
  sums = hashlib.sha256(f"text 1 {field!r}\n".encode())
  for path in paths:
    kind = f"{'lines' if files.is_lines(path) else 'whole'} {'gz' if path.name.endswith('.gz') else 'plain'}"
    sums.update(f"{kind} {files.digest(path)}\n".encode())
  return sums.hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Random access to the tokens of documents. Holds names and numbers alone.

  Attributes:
    path: the array_record.
    counts: tokens of each document.
    sizes: bytes of each document.
    first: number of each document's first record.
  """

  path: str
  counts: tuple[int, ...]
  sizes: tuple[int, ...]
  first: tuple[int, ...]

  def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens `start` .. `stop` - 1 of a document, and the bytes and the name that each stands for.

    Returns:
      [n] int32 each, as `tokens.Tokenizer.encode` gives them.
    """
    records = range(self.first[document] + start // RECORD, self.first[document] + (stop - 1) // RECORD + 1)
    ids, sizes, names = np.concatenate([_record(self.path, i) for i in records], axis=1)
    at = slice(start % RECORD, start % RECORD + stop - start)
    return ids[at], sizes[at], names[at]


@functools.lru_cache(maxsize=8)
def _source(path: str) -> Any:
  return grain.sources.ArrayRecordDataSource(path)


@functools.lru_cache(maxsize=CACHED)
def _record(path: str, index: int) -> np.ndarray:
  """Tokens, their bytes and their names: [3, n] int32."""
  return np.frombuffer(_source(path)[index], "<i4").reshape(3, -1)


def open_corpus(
  paths: Sequence[pathlib.Path],
  field: str,
  tokenizer: pathlib.Path,
  folder: pathlib.Path,
  *,
  vocab_size: int,
  report: Callable[[str], None],
) -> Corpus:
  """The tokens of files: from the cache, or made now.

  Args:
    paths: the files, in order.
    field: of a .jsonl.
    tokenizer: a tokenizer.json.
    folder: of the cache; made where there is none.
    vocab_size: of the model.
    report: takes lines for the user.

  Raises:
    ConfigError: as `files.documents`; or if the tokenizer has tokens that the model lacks.
  """
  name = hashlib.sha256(f"{digest(paths, field)} {files.digest(tokenizer)}".encode()).hexdigest()
  known = tokens.Tokenizer(tokenizer)
  check(
    0 <= known.highest < vocab_size,
    "model.vocab_size",
    f"must be above {known.highest}, the highest token of {tokenizer}, got {vocab_size}",
  )
  record, index = folder / f"{name[:32]}.array_record", folder / f"{name[:32]}.json"
  if found := _whole(record, index, name):
    return found
  if index.exists():
    report(f"{index}: the cache is damaged or of an older form, it is made again")
  folder.mkdir(parents=True, exist_ok=True)
  mark = f".{socket.gethostname()}.{os.getpid()}.tmp"
  temporary = record.with_name(f".{record.name}{mark}")
  try:
    values = _write(paths, field, known, temporary) | {"format": FORMAT, "corpus": name}
    values["sha256"] = files.digest(temporary)
    os.replace(temporary, record)
    _source.cache_clear()
    _record.cache_clear()
    temporary = index.with_name(f".{index.name}{mark}")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, index)
  finally:
    temporary.unlink(missing_ok=True)
  made = _corpus(record, values)
  report(f"tokenized {len(made.counts)} documents: {sum(made.counts):,} tokens, {sum(made.sizes):,} bytes")
  return made


def keep_tokenizer(path: pathlib.Path, name: str, train: Callable[[pathlib.Path], pathlib.Path]) -> None:
  """Trains a tokenizer unless the one that is there is whole and of the same name.

  Args:
    path: of the tokenizer.json.
    name: what it is made from.
    train: writes one into a folder; its path.
  """
  note = path.with_name("tokenizer.sha256")
  with contextlib.suppress(OSError, ConfigError):
    if note.read_text(encoding="utf-8") == f"{files.digest(path)} {name}\n":
      return
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    made = train(pathlib.Path(folder))
    os.replace(made, path)
  note.write_text(f"{files.digest(path)} {name}\n", encoding="utf-8")


def _write(
  paths: Sequence[pathlib.Path], field: str, known: tokens.Tokenizer, record: pathlib.Path
) -> dict[str, Any]:
  """Writes the records; what the index says of the documents."""
  documents, records = [], 0
  with contextlib.closing(ArrayRecordWriter(str(record), "group_size:1")) as writer:
    for path in paths:
      for text in files.documents(path, field):
        encoded = np.stack(known.encode(text)).astype("<i4")
        documents.append([encoded.shape[1], int(encoded[1].sum()), records])
        for at in range(0, encoded.shape[1], RECORD):
          writer.write(np.ascontiguousarray(encoded[:, at : at + RECORD]).tobytes())
          records += 1
  return {"documents": documents}


def _whole(record: pathlib.Path, index: pathlib.Path, name: str) -> Corpus | None:
  """The corpus of a cache that is complete and undamaged."""
  try:
    values = json.loads(index.read_text(encoding="utf-8"))
    if (values["format"], values["corpus"]) == (FORMAT, name) and files.digest(record) == values["sha256"]:
      return _corpus(record, values)
  except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError):
    pass
  return None


def _corpus(record: pathlib.Path, values: dict[str, Any]) -> Corpus:
  counts, sizes, first = (tuple(map(int, column)) for column in zip(*values["documents"], strict=True))
  return Corpus(str(record), counts, sizes, first)
