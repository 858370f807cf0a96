"""Files in a folder that somebody else filled: regular files alone, and none outside of the folder."""

import json
import os
import pathlib
import stat
from io import BufferedReader
from typing import Any

from sleep_jax.pretrained.fields import PretrainedError, listing, shown

LARGEST_JSON = 1 << 24  # bytes


def is_folder(path: str | os.PathLike) -> bool:
  """Whether there is such a folder; False too for a path that no file system allows."""
  try:
    return stat.S_ISDIR(os.stat(path).st_mode)
  except (OSError, ValueError):
    return False


def is_there(path: str | os.PathLike) -> bool:
  """Whether there is anything of that name, a dangling link included."""
  try:
    os.lstat(path)
  except (OSError, ValueError):
    return False
  return True


def check_inside(path: pathlib.Path) -> None:
  """Refuses a symbolic link that leaves its folder.

  One case is allowed: a snapshot in the cache of `huggingface_hub` consists of links to `../../blobs`.

  Raises:
    PretrainedError: naming the file and where it leads.
  """
  try:
    folder = os.path.realpath(path.parent)
    real = os.path.realpath(path)
  except (OSError, ValueError) as e:
    raise PretrainedError(f"{listing([path.name])}: cannot be read ({e})") from e
  allowed = [folder]
  if os.path.basename(os.path.dirname(folder)) == "snapshots":
    allowed.append(os.path.join(os.path.dirname(os.path.dirname(folder)), "blobs"))
  if not any(real.startswith(parent + os.sep) for parent in allowed):
    raise PretrainedError(f"{listing([path.name])}: is a link to {shown(real)}, outside of its folder")


def open_regular(path: pathlib.Path) -> BufferedReader:
  """Opens a regular file of its folder for reading; never waits for a pipe.

  Raises:
    PretrainedError: if there is none, it is something else, or a link that leaves the folder.
  """
  if is_there(path):
    check_inside(path)
  try:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as e:
    raise PretrainedError(f"{path}: {e.strerror}") from e
  except ValueError as e:
    raise PretrainedError(f"{shown(str(path))}: {e}") from e
  try:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
      raise PretrainedError(f"{path}: is not a file")
    return os.fdopen(handle, "rb")
  except BaseException:
    os.close(handle)
    raise


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file of at most 16 MB.

  Raises:
    PretrainedError: if there is none, or a field of an object stands in it twice.
  """
  with open_regular(path) as file:
    try:
      data = file.read(min(os.fstat(file.fileno()).st_size, LARGEST_JSON) + 1)
    except OSError as e:
      raise PretrainedError(f"{path}: {e.strerror}") from e
  if len(data) > LARGEST_JSON:
    raise PretrainedError(f"{path.name}: is larger than 16 MB")
  return parse_json(data, path.name)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
  """A JSON object from bytes; `where` is its name in messages. Raises as `read_json`."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
      seen: set[str] = set()
      again = next(name for name, _ in pairs if name in seen or seen.add(name))
      raise PretrainedError(f"{where}: {shown(again)} stands there twice")
    return values

  try:
    value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
  except PretrainedError:
    raise
  except (ValueError, RecursionError) as e:
    raise PretrainedError(f"{where}: is not JSON ({e})") from e
  if not isinstance(value, dict):
    raise PretrainedError(f"{where}: must be an object")
  return value
