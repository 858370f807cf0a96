"""A manifest: what a step of a checkpoint holds, file by file and array by array, and which run it is of.

It carries a hash of itself, so that damage to it reads as damage and not as a model of another shape.
"""

import concurrent.futures
import difflib
import hashlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Mapping
from typing import Any

from sleep_jax.runtime.files import RunFailedError, open_file, read_json, shown, why, write_file
from sleep_jax.runtime.run_config import RunConfig

NAME = "manifest.json"
MAX_NAMED = 10  # steps or paths named in one message
_FORMAT = 1
_TYPE = re.compile(r"[\w<>]+\[[0-9,]*\]", re.ASCII)  # as `describe` writes it
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class CheckpointError(ValueError):
  """A checkpoint cannot be saved or restored; the message is one line and says which and why."""


class SaveError(CheckpointError, RunFailedError):
  """A checkpoint cannot be saved through no fault of the caller, such as a full disk."""


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


def write_manifest(folder: pathlib.Path, tree: Mapping[str, str], config: RunConfig | None = None) -> None:
  """Hashes all files below a step's folder and writes its manifest, durably and whole or not at all.

  Raises:
    OSError: if a file cannot be read, or is none.
  """
  files = _hash_all(folder, sorted(_names(folder)))
  bad = [f"{name}: {found}" for name, found in files.items() if isinstance(found, str)]
  if bad:
    raise OSError(some(bad, "; "))
  manifest = {"format": _FORMAT, "step": int(folder.name), "tree": dict(tree), "files": files}
  if config is not None:
    manifest["config"] = config.values
  write_file(folder / NAME, json.dumps(manifest | {"sha256": _digest(manifest)}))


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a step: `step`, `tree` (as `describe` gives it), `files` (name: [bytes, SHA-256]).

  Newer ones have the `config` of their run. Nothing in it is believed before its type is checked: a digest
  that fits says who changed it last, not that it is right.

  Raises:
    CheckpointError: if it is missing, not what was written, or of another step.
  """
  try:
    manifest = read_json(folder / NAME)
    written = manifest.pop("sha256")
  except FileNotFoundError:
    raise CheckpointError(f"{NAME}: found no file") from None
  except OSError as e:
    raise CheckpointError(f"{NAME}: unreadable, {why(e)}") from e
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise CheckpointError(f"{NAME}: unreadable, {type(e).__name__}") from e
  found = _digest(manifest)
  if written != found:
    raise CheckpointError(f"{NAME}: expected sha256 {str(written)[:12]} of its text, found {found[:12]}")
  version, step = manifest.get("format"), manifest.get("step")
  if version != _FORMAT or not isinstance(step, int) or str(step) != folder.name:
    raise CheckpointError(f"{NAME}: is in format {version!r:.20} and of step {step!r:.20}")
  fault = _fault(manifest)
  if fault:
    raise CheckpointError(f"{NAME}: {fault}")
  return manifest


def _fault(manifest: Mapping[str, Any]) -> str | None:
  """What in a manifest is not what `write_manifest` could have written."""
  tree, files = manifest.get("tree"), manifest.get("files")
  if not isinstance(manifest.get("config", {}), dict):
    return "config is no object"
  if not isinstance(tree, dict) or not all(isinstance(x, str) and _TYPE.fullmatch(x) for x in tree.values()):
    return "tree does not give a type for every array"
  if not all(path.isprintable() for path in tree):
    return "tree has the name of no array"
  if not isinstance(files, dict) or not files:
    return "files is no table of files"
  for name, told in files.items():
    path = pathlib.PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", NAME)
    if outside or "\0" in name:
      return f"{name!r:.80} is no name of a file of this step"
    if not isinstance(told, list) or [type(x) for x in told] != [int, str] or not _SHA256.fullmatch(told[1]):
      return f"{name!r:.80} has no size and SHA-256"
  return None


def damage(folder: pathlib.Path) -> str | None:
  """The first file of a step that is not what its manifest says, and how it differs; None if all are."""
  try:
    expected = read_manifest(folder)["files"]
  except CheckpointError as e:
    return str(e)
  found = _hash_all(folder, list(expected), {name: size for name, (size, _) in expected.items()})
  bad = [name for name in expected if found[name] != expected[name]]
  if not bad:
    return None
  more = f"; {len(bad) - 1} more differ" if len(bad) > 1 else ""
  return f"{shown(bad[0])}: expected {_told(expected[bad[0]])}, found {_told(found[bad[0]])}{more}"


def some(names: list[str], separator: str = ", ") -> str:
  """The first of the names, and how many more there are."""
  more = f"{separator}and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
  return separator.join(names[:MAX_NAMED]) + more


def _told(found: list | str) -> str:
  if isinstance(found, str):
    return found
  size, sha256 = found
  return f"{size} bytes" + (f" with sha256 {sha256[:12]}" if sha256 else "")


def _names(folder: pathlib.Path, below: str = "") -> list[str]:
  """All names below a step's folder, but those of folders and of its manifest; links are not followed."""
  names = []
  with os.scandir(folder / below) as entries:
    for entry in entries:
      name = f"{below}{entry.name}"
      if entry.is_dir(follow_symlinks=False):
        names += _names(folder, f"{name}/")
      elif name not in (NAME, f".{NAME}.tmp"):
        names.append(name)
  return names


def _hash(folder: pathlib.Path, name: str, size: int | None) -> list | str:
  """[bytes, SHA-256] of a file; without the hash if it is larger than `size`; or why it cannot be read."""
  try:
    for parent in pathlib.PurePosixPath(name).parents:
      if not stat.S_ISDIR(os.lstat(folder / parent).st_mode):
        return f"no file, since {shown(str(parent))} is a link or no folder"
    with open(open_file(folder / name), "rb") as f:
      there = os.fstat(f.fileno()).st_size
      if size is not None and there > size:
        return [there, ""]
      return [there, hashlib.file_digest(f, "sha256").hexdigest()]
  except FileNotFoundError:
    return "no file"
  except OSError as e:
    return f"no file that can be read: {why(e)}"


def _hash_all(
  folder: pathlib.Path, names: list[str], sizes: Mapping[str, int] | None = None
) -> dict[str, list | str]:
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing frees the GIL
    found = pool.map(lambda name: _hash(folder, name, None if sizes is None else sizes[name]), names)
    return dict(zip(names, found, strict=True))


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
