"""Safetensors in and out, one tensor at a time.

Reading goes through the `safetensors` library, which checks that a header fits its file. Writing is done
here: the library wants all tensors in memory at once.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from sleep_jax.pretrained.fields import PretrainedError

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensors:
  """The tensors of one file or of an index with its shards. Opening reads headers alone.

  Attributes:
    files: tensor -> file name, in the order of files.
    shapes: tensor -> shape.
    dtypes: tensor -> dtype as safetensors names it.
    index: the index file's object; None for a single file.

  Raises:
    PretrainedError: if there is no safetensors file, one is damaged, leaves the folder or is missing, or a
      tensor is of an unknown dtype.
  """

  def __init__(self, folder: pathlib.Path, single: str = SINGLE):
    self.folder, self.index = folder, None
    listed = None
    if (folder / single).exists():
      names = [single]
    elif single == SINGLE and (folder / INDEX).exists():
      self.index = read_json(folder / INDEX)
      listed = self.index.get("weight_map")
      if not isinstance(listed, dict) or not listed:
        raise PretrainedError(f"{INDEX}: weight_map must say which file holds which tensor")
      names = sorted(set(map(str, listed.values())))
    else:
      others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
      why = f"; {', '.join(others)} may execute code when read and is refused" if others else ""
      raise PretrainedError(f"{folder}: there is no {single} and no {INDEX}{why}")
    self.files: dict[str, str] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._opened: tuple[str, Any] | None = None
    for file in names:
      _check_name(folder, file)
    for file in names:
      with _open(folder / file) as opened:
        for name in opened.keys():
          if name in self.files:
            raise PretrainedError(f"{file}: {name} is in {self.files[name]} too")
          piece = opened.get_slice(name)
          self.files[name], self.shapes[name] = file, tuple(piece.get_shape())
          self.dtypes[name] = str(piece.get_dtype())
    strange = [f"{name} ({dtype})" for name, dtype in self.dtypes.items() if dtype not in DTYPES]
    if strange:
      raise PretrainedError(f"{folder}: dtypes must be {', '.join(DTYPES)}, not those of {listing(strange)}")
    if listed is not None:
      wrong = [name for name in {*listed, *self.files} if listed.get(name) != self.files.get(name)]
      if wrong:
        raise PretrainedError(f"{INDEX}: weight_map and the shards disagree about {listing(sorted(wrong))}")

  def read(self, name: str) -> np.ndarray:
    """One tensor, in its stored dtype. Only the file that was read last stays open."""
    file = self.files[name]
    if self._opened is None or self._opened[0] != file:
      self._opened = (file, _open(self.folder / file))
    return self._opened[1].get_tensor(name)


def write(
  path: pathlib.Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], get: Callable[[str], Any]
) -> None:
  """Writes one file, one tensor at a time, in the library's order: wide dtypes first, then by name.

  Args:
    path: the file.
    tensors: name -> (dtype as safetensors names it, shape).
    get: name -> array of that shape; cast to the dtype.
  """
  header, at = {"__metadata__": {"format": "pt"}}, 0
  order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name))
  for name in order:
    dtype, shape = tensors[name]
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as out:
    out.write(len(text).to_bytes(8, "little") + text)
    for name in order:
      dtype, shape = tensors[name]
      array = np.ascontiguousarray(get(name), DTYPES[dtype])
      if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, declared {shape}")
      out.write(array.reshape(-1).view(np.uint8).data)
    out.flush()
    os.fsync(out.fileno())


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file of at most 16 MB.

  Raises:
    PretrainedError: if there is none.
  """
  try:
    if path.stat().st_size > 1 << 24:
      raise PretrainedError(f"{path.name}: is larger than 16 MB")
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise PretrainedError(f"{path}: {e.strerror}") from e
  except (ValueError, RecursionError) as e:
    raise PretrainedError(f"{path.name}: is not JSON ({e})") from e
  if not isinstance(value, dict):
    raise PretrainedError(f"{path.name}: must be an object")
  return value


def _check_name(folder: pathlib.Path, file: str) -> None:
  """Refuses a shard that is not a plain safetensors file of this folder."""
  if pathlib.PurePath(file).name != file or "\\" in file or not file.endswith(".safetensors"):
    raise PretrainedError(f"{INDEX}: {file!r} is not the name of a .safetensors file in this folder")
  if not (folder / file).is_file():
    raise PretrainedError(f"{folder}: shard {file} is missing")


def _open(path: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(path, framework="numpy")
  except (safetensors.SafetensorError, OSError, ValueError) as e:
    raise PretrainedError(f"{path.name}: is damaged or no safetensors file ({e})") from e


def listing(names: list[str], most: int = 12) -> str:
  """Names as text, the first ones only if there are many."""
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
