"""A directory of checkpoints as files: which steps are whole, damaged, unfinished or on their way out.

    1200/manifest.json     size and SHA-256 of every file of the step; the type of every array
    1200/default/          the arrays; `checkpoint.py` has Orbax write and read them
    aside/1100             damaged or unfinished steps, kept for whoever wants to look
    .trash/                retired steps, renamed there in one go before anything of them is deleted
    in_flight.json         the step being saved, until its manifest is written

A manifest is written once its step is committed, and carries a hash of itself, so that damage to it reads as
damage and not as a model of another shape. Symbolic links are followed nowhere. Nothing here knows of JAX.
"""

import concurrent.futures
import difflib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from sleep_jax.runtime import workdir

ASIDE, TRASH = "aside", ".trash"
_MANIFEST, _IN_FLIGHT = "manifest.json", "in_flight.json"
_FORMAT = 1
_MAX_NAMED = 10  # steps or paths named in one message


class CheckpointError(ValueError):
  """A checkpoint cannot be saved or restored; the message is one line and says which and why."""


class CheckpointFiles:
  """The steps below one directory. One process at a time may call what writes."""

  def __init__(self, directory: pathlib.Path, report: Callable[[str], None], read_only: bool):
    self.directory, self._report, self._read_only = directory, report, read_only

  def path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def saved(self) -> list[int]:
    """The steps that have a manifest, oldest first."""
    return [step for step in self._committed() if (self.path(step) / _MANIFEST).is_file()]

  def tidy(self) -> None:
    """Makes the directory if absent and clears up after a run that was killed."""
    if self._read_only:
      self._committed()
      return
    self.directory.mkdir(parents=True, exist_ok=True)
    self._committed()
    unfinished = self._unfinished()
    if unfinished is not None:
      where = self._set_aside(unfinished)
      self._report(f"step {unfinished} was still being saved when its run ended; not used, see {where}")
    (self.directory / _IN_FLIGHT).unlink(missing_ok=True)
    self.purge()

  def begin(self, step: int) -> None:
    """Notes that `step` is about to be written: without its manifest it is unfinished then, not damaged."""
    workdir.write_file(self.directory / _IN_FLIGHT, json.dumps({"step": step}))

  def finish(self, step: int, tree: Mapping[str, str]) -> None:
    """Writes the manifest of a committed step; from here on the step is saved."""
    write_manifest(self.path(step), tree)
    (self.directory / _IN_FLIGHT).unlink(missing_ok=True)

  def choose(self) -> int | None:
    """The newest step that is what its manifest says; None if nothing was ever saved.

    Newer ones are reported and moved aside, but only if there is something to fall back to: otherwise a
    second try would find an empty directory and start the run from the beginning.

    Raises:
      CheckpointError: if all are damaged.
    """
    damaged, good, unfinished = {}, None, self._unfinished()
    for step in reversed(self._committed()):
      if step == unfinished:  # another process is at it, and we only read
        continue
      problem = damage(self.path(step))
      if problem is None:
        good = step
        break
      damaged[step] = problem
    if damaged and good is None:
      told = "; ".join(f"step {step}: {problem}" for step, problem in list(damaged.items())[:_MAX_NAMED])
      raise CheckpointError(f"all checkpoints in {self.directory} are damaged, nothing was changed: {told}")
    for step, problem in damaged.items():
      kept = "" if self._read_only else f"; the damaged one is kept as {self._set_aside(step)}"
      self._report(f"step {step} is damaged ({problem}), falling back to step {good}{kept}")
    return good

  def chosen(self, step: int) -> int:
    """The step itself, if it was saved and is what its manifest says; nothing is moved.

    Raises:
      CheckpointError: if it was not saved, or is damaged.
    """
    saved = self.saved()
    if step not in saved:
      known = some([str(s) for s in saved]) if saved else "none"
      raise CheckpointError(f"step {step} was not saved in {self.directory}; saved steps: {known}")
    problem = damage(self.path(step))
    if problem is not None:
      raise CheckpointError(f"step {step} in {self.directory} is damaged ({problem})")
    return step

  def purge(self) -> None:
    """Empties the trash. What cannot be deleted now is tried again next time."""
    trash = self.directory / TRASH
    if trash.is_dir() and not trash.is_symlink():
      for path in trash.iterdir():
        if path.name.isdecimal():
          shutil.rmtree(path, ignore_errors=True)

  def clear_failed(self, step: int) -> None:
    """Makes room for a second attempt at `step`: the trash, and whatever the first one wrote."""
    self.purge()
    for path in self.directory.glob(f"{step}*"):
      if path.name == str(step) or path.name.startswith(f"{step}.orbax-checkpoint-tmp"):
        shutil.rmtree(path, ignore_errors=True)

  def _committed(self) -> list[int]:
    if not self.directory.is_dir():
      return []
    paths = [p for p in self.directory.iterdir() if p.name.isdecimal() or p.name in (TRASH, ASIDE)]
    for path in paths:
      if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link; a checkpoint directory must hold its files itself")
      if not path.is_dir():
        raise CheckpointError(f"{path} is a file, but has the name of a directory of checkpoints")
    return sorted(int(p.name) for p in paths if p.name.isdecimal())

  def _unfinished(self) -> int | None:
    """The step that was committed but has no manifest yet, if there is one."""
    try:
      step = int(json.loads((self.directory / _IN_FLIGHT).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
      return None
    return step if self.path(step).is_dir() and not (self.path(step) / _MANIFEST).exists() else None

  def _set_aside(self, step: int) -> pathlib.Path:
    aside = self.directory / ASIDE
    aside.mkdir(exist_ok=True)
    target, n = aside / str(step), 1
    while target.exists():
      target, n = aside / f"{step}.{n}", n + 1
    os.rename(self.path(step), target)
    return target


# Manifests.


def describe(flat: Mapping[str, Any]) -> dict[str, str]:
  """The type of every array, by path: `float32[256,64]`. Leaves need only `shape` and `dtype`."""
  return {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in flat.items()}


def differences(saved: Mapping[str, str], wanted: Mapping[str, str], subset: bool) -> str | None:
  """One line about the paths that do not fit; with `subset`, saved arrays that nobody asked for do fit."""
  faults = []
  for path, ours in wanted.items():
    if path not in saved:
      near = difflib.get_close_matches(path, saved.keys() - wanted.keys() or saved, n=1, cutoff=0.0)
      faults.append(f"{path} is not in it (nearest name: {', '.join(near)})")
    elif saved[path] != ours:
      faults.append(f"{path} is {saved[path]}, {ours} was asked for")
  if not subset:
    faults += [f"{path} was not asked for" for path in saved if path not in wanted]
  return some(faults, "; ") if faults else None


def write_manifest(folder: pathlib.Path, tree: Mapping[str, str]) -> None:
  """Hashes all files below a step's folder and writes its manifest, durably and whole or not at all."""
  paths = (path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
  files = _hash_all(folder, sorted(path.relative_to(folder).as_posix() for path in paths))
  manifest = {"format": _FORMAT, "step": int(folder.name), "tree": dict(tree), "files": files}
  workdir.write_file(folder / _MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}))


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a step: `step`, `tree` (as `describe` gives it), `files` (name: [bytes, SHA-256]).

  Raises:
    CheckpointError: if it is missing, not what was written, or of another step.
  """
  try:
    manifest = json.loads((folder / _MANIFEST).read_bytes())
    written = manifest.pop("sha256")
  except FileNotFoundError:
    raise CheckpointError(f"{_MANIFEST}: found no file") from None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise CheckpointError(f"{_MANIFEST}: unreadable, {type(e).__name__}") from e
  found = _digest(manifest)
  if written != found:
    raise CheckpointError(f"{_MANIFEST}: expected sha256 {str(written)[:12]} of its text, found {found[:12]}")
  if manifest["format"] != _FORMAT or str(manifest["step"]) != folder.name:
    raise CheckpointError(f"{_MANIFEST}: is in format {manifest['format']} and of step {manifest['step']}")
  return manifest


def damage(folder: pathlib.Path) -> str | None:
  """The first file of a step that is not what its manifest says, and how it differs; None if all are."""
  try:
    expected = read_manifest(folder)["files"]
  except CheckpointError as e:
    return str(e)
  found = _hash_all(folder, list(expected))
  bad = [name for name in expected if found[name] != expected[name]]
  if not bad:
    return None
  more = f"; {len(bad) - 1} more differ" if len(bad) > 1 else ""
  return f"{bad[0]}: expected {_told(expected[bad[0]])}, found {_told(found[bad[0]])}{more}"


def some(names: list[str], separator: str = ", ") -> str:
  """The first of the names, and how many more there are."""
  more = f"{separator}and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
  return separator.join(names[:_MAX_NAMED]) + more


def _told(size_and_hash: list) -> str:
  size, sha256 = size_and_hash
  return f"{size} bytes with sha256 {sha256[:12]}" if sha256 else "no file"


def _hash(path: pathlib.Path) -> list:
  """[bytes, SHA-256] of a file; [0, ""] if there is none. A symbolic link is none."""
  if path.is_symlink() or not path.is_file():
    return [0, ""]
  with open(path, "rb") as f:
    return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]


def _hash_all(folder: pathlib.Path, names: list[str]) -> dict[str, list]:
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing frees the GIL
    return dict(zip(names, pool.map(_hash, [folder / name for name in names]), strict=True))


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
