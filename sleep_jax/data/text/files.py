"""The user's own texts: which files a pattern names, and the documents in them.

NAME.jsonl     a document a line, in a field of the JSON object
any other      one document, plain UTF-8
....gz         either, compressed
"""

import glob
import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Any

from sleep_jax.config import ConfigError, check, shown

LARGEST = 1 << 28  # bytes of a document, uncompressed
CHUNK = 1 << 20


def expand(patterns: str, name: str) -> list[pathlib.Path]:
  """The files that patterns name, each once, in the order of the patterns and then of their names.

  Args:
    patterns: names and patterns (`books/*.txt`, `**` for folders of any depth) with commas between them.
    name: of the field, for messages.

  Raises:
    ConfigError: if a part names no file, or names a folder.
  """
  found: dict[pathlib.Path, None] = {}
  parts = [part.strip() for part in patterns.split(",") if part.strip()]
  check(bool(parts), name, "needs at least one file or pattern, such as 'books/*.txt'")
  for part in parts:
    try:
      literal = pathlib.Path(part)
      folder, exists = literal.is_dir(), literal.exists()
      matches = [literal] if exists else [pathlib.Path(p) for p in sorted(glob.glob(part, recursive=True))]
    except (OSError, ValueError) as e:  # a name that the file system refuses
      raise ConfigError(f"{name}: {shown(part)} is no name of a file") from e
    check(not folder, name, f"{shown(part)} is a folder; name its files, such as '{part}/*.txt'")
    files = [path for path in matches if path.is_file()]
    check(bool(files), name, f"{shown(part)} matches no file")
    found |= dict.fromkeys(files)
  return list(found)


def digest(path: pathlib.Path) -> str:
  """SHA-256 of a file's bytes as they lie on the disk."""
  sums = hashlib.sha256()
  try:
    with open(path, "rb") as file:
      while part := file.read(CHUNK):
        sums.update(part)
  except OSError as e:
    raise _unreadable(path, e) from e
  return sums.hexdigest()


def is_lines(path: pathlib.Path) -> bool:
  """Whether a file holds a document a line."""
  return path.name.removesuffix(".gz").endswith(".jsonl")


def documents(path: pathlib.Path, field: str) -> Iterator[str]:
  """Reads the documents of a file, in order; those of a .jsonl that hold no text are left out.

  Args:
    field: of the JSON objects of a .jsonl.

  Raises:
    ConfigError: naming the file, and the line or byte, if it is empty, binary, not UTF-8, damaged or lacks
      the field.
  """
  some = False
  try:
    opened: Any = gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")
    with opened as file:
      for text in _lines(path, file, field) if is_lines(path) else [_text(path, file.read(LARGEST + 1))]:
        some = True
        yield text
  except (gzip.BadGzipFile, EOFError, zlib.error) as e:
    raise ConfigError(f"{path}: is damaged, it is no whole gzip file") from e
  except OSError as e:
    raise _unreadable(path, e) from e
  check(some, str(path), "is empty: it has no text")


def _text(path: pathlib.Path, data: bytes, line: int | None = None) -> str:
  """A document, or a line of several, as text."""
  where = "" if line is None else f"line {line} "
  check(len(data) <= LARGEST, str(path), f"{where}is larger than {LARGEST >> 20} MB; split it")
  zero = data.find(0)
  check(zero < 0, str(path), f"{where}is binary and no text: byte {zero} is 0")
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise ConfigError(f"{path}: {where}is not UTF-8: byte {e.start} is 0x{data[e.start]:02x}") from e
  check(line is not None or not text.isspace() and text != "", str(path), "is empty: it has no text")
  return text


def _lines(path: pathlib.Path, file: IO[bytes], field: str) -> Iterator[str]:
  """The documents of a .jsonl."""
  number = 0
  while data := file.readline(LARGEST + 1):
    number += 1
    line = _text(path, data, number)
    if not line.strip():
      continue
    try:
      value: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
      raise ConfigError(f"{path}: line {number} is no JSON") from e
    check(isinstance(value, dict), str(path), f"line {number} must be a JSON object, got {shown(value)}")
    known = ", ".join(map(shown, list(value)[:8])) or "none"
    check(
      field in value, str(path), f"line {number} has no field {field!r} (data.field); its fields: {known}"
    )
    text = value[field]
    check(isinstance(text, str), str(path), f"line {number}: {field!r} must be text, got {shown(text)}")
    try:
      text.encode()
    except UnicodeEncodeError as e:
      raise ConfigError(
        f"{path}: line {number}: character {e.start} is half of one, which no text has"
      ) from e
    if text.strip():
      yield text


def _unreadable(path: pathlib.Path, error: OSError) -> ConfigError:
  return ConfigError(f"{path}: cannot be read: {error.strerror or error}")
