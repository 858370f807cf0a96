"""Safetensors in and out, one tensor at a time.

A header is checked against its file before anything of the size that it claims is allocated. Reading and
writing then take one tensor at a time.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from io import BufferedReader
from typing import Any

import jax.numpy as jnp
import numpy as np

from sleep_jax.pretrained import files, published
from sleep_jax.pretrained.fields import PretrainedError, listing, shown

# In the order in which the library stores tensors: by dtype as here, then by name.
DTYPES = {
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "BF16": np.dtype(jnp.bfloat16),
  "F16": np.dtype(np.float16),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
  "F8_E5M2": np.dtype(jnp.float8_e5m2),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
WEIGHTS = ("F32", "BF16", "F16")  # dtypes that weights may have; buffers may have any
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, the library's limit


class Tensors:
  """The tensors of one file or of an index with its shards. Opening reads headers alone.

  Attributes:
    files: tensor -> file name, in the order in which they are stored.
    shapes: tensor -> shape.
    dtypes: tensor -> dtype as safetensors names it.
    metadata: file name -> the `__metadata__` of its header; None where it has none.
    index: the index file's object; None for a single file.
    absent: tensors that the index names and no shard holds.

  Raises:
    PretrainedError: if there is no safetensors file, one is damaged, leaves the folder or is missing, or a
      weight is of an unknown dtype.
  """

  def __init__(self, folder: pathlib.Path, single: str = SINGLE):
    self.folder, self.index = folder, None
    self.files: dict[str, str] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self.metadata: dict[str, dict[str, str] | None] = {}
    self.absent: tuple[str, ...] = ()
    self._starts: dict[str, int] = {}
    self._opened: tuple[str, BufferedReader] | None = None
    listed = None
    if files.is_there(folder / single):
      names = [single]
    elif single == SINGLE and files.is_there(folder / INDEX):
      self.index = files.read_json(folder / INDEX)
      listed = _weight_map(self.index)
      names = sorted(set(listed.values()))
    else:
      raise PretrainedError(_nothing(folder, single))
    for file in names:
      _check_name(folder, file)
    for file in names:
      self._add(file)
    if listed is not None:
      self._compare(listed)
    strange = [
      f"{name} ({dtype})"
      for name, dtype in self.dtypes.items()
      if dtype not in WEIGHTS and not published.is_buffer(name, self.shapes[name])
    ]
    if strange:
      raise PretrainedError(f"{folder}: dtypes must be {', '.join(WEIGHTS)}, not those of {listing(strange)}")

  def read(self, name: str) -> np.ndarray:
    """One tensor, in its stored dtype. Only the file that was read last stays open.

    Raises:
      PretrainedError: if the file has become shorter since it was opened first, or cannot be read.
    """
    file, dtype, shape = self.files[name], DTYPES[self.dtypes[name]], self.shapes[name]
    if self._opened is None or self._opened[0] != file:
      self._opened = (file, files.open_regular(self.folder / file))
    opened = self._opened[1]
    data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    try:
      opened.seek(self._starts[name])
      count = opened.readinto(data.data)
    except OSError as e:
      raise PretrainedError(f"{file}: {e.strerror}") from e
    if count < data.size:
      raise PretrainedError(f"{file}: has become shorter while it was read")
    return data.view(dtype).reshape(shape)

  def _add(self, file: str) -> None:
    """Takes up the tensors of one file."""
    self.metadata[file], entries = read_header(self.folder / file)
    for name, (dtype, shape, start) in entries.items():
      if name in self.files:
        raise PretrainedError(f"{file}: {listing([name])} is in {self.files[name]} too")
      self.files[name], self.dtypes[name], self.shapes[name] = file, dtype, shape
      self._starts[name] = start

  def _compare(self, listed: dict[str, str]) -> None:
    """Refuses shards that hold other tensors than the index says. Buffers may be missing on either side.

    Whether the model can do without a tensor that the index alone names is for the caller to say.
    """
    self.absent = tuple(sorted(set(listed) - set(self.files)))
    wrong = [
      name
      for name, file in self.files.items()
      if listed.get(name) != file
      and not (name not in listed and published.is_buffer(name, self.shapes[name]))
    ]
    if wrong:
      raise PretrainedError(f"{INDEX}: weight_map and the shards disagree about {listing(sorted(wrong))}")


Entry = tuple[str, tuple[int, ...], int]  # dtype, shape, first byte in the file


def read_header(path: pathlib.Path) -> tuple[dict[str, str] | None, dict[str, Entry]]:
  """The `__metadata__` and the tensors that a file declares, in the order in which they are stored.

  Raises:
    PretrainedError: unless the tensors fill the file exactly, without gaps and without overlaps.
  """
  with files.open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    try:
      length = int.from_bytes(file.read(8), "little")
      room = min(size - 8, LARGEST_HEADER)
      if size < 8 or length > room:
        what = f"it has {size} bytes" if size < 8 else f"its header claims {length} bytes of at most {room}"
        raise PretrainedError(f"{path.name}: is damaged or no safetensors file ({what})")
      text = file.read(length)
    except OSError as e:
      raise PretrainedError(f"{path.name}: {e.strerror}") from e
  header = files.parse_json(text, f"{path.name}: header")
  metadata = header.pop("__metadata__", None)
  if metadata is not None and not (
    isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
  ):
    raise PretrainedError(f"{path.name}: __metadata__ must map names to texts")
  entries = {name: _entry(path.name, name, value) for name, value in header.items()}
  at = 0
  ordered = sorted(entries, key=lambda name: entries[name][2:])
  for name in ordered:
    _, _, start, end = entries[name]
    if start != at:
      problem = (
        "overlaps with the tensor before" if start < at else f"leaves {start - at} bytes before it unused"
      )
      raise PretrainedError(f"{path.name}: is damaged: {listing([name])} {problem}")
    at = end
  if 8 + length + at != size:
    raise PretrainedError(
      f"{path.name}: is damaged or no safetensors file ({size} bytes instead of {8 + length + at})"
    )
  return metadata, {name: (*entries[name][:2], 8 + length + entries[name][2]) for name in ordered}


def in_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Tensors, name -> (dtype, shape), in the library's order: by dtype, the widest first, then by name."""
  rank = list(DTYPES)
  return {name: tensors[name] for name in sorted(tensors, key=lambda n: (rank.index(tensors[n][0]), n))}


def write(
  path: pathlib.Path,
  tensors: Mapping[str, tuple[str, tuple[int, ...]]],
  get: Callable[[str], Any],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes one file, one tensor at a time, in the order given.

  Args:
    path: the file.
    tensors: name -> (dtype as safetensors names it, shape).
    get: name -> array of that shape; cast to the dtype.
    metadata: of the header. None: without.
  """
  header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
  at = 0
  for name, (dtype, shape) in tensors.items():
    size = math.prod(shape) * DTYPES[dtype].itemsize
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as out:
    out.write(len(text).to_bytes(8, "little") + text)
    for name, (dtype, shape) in tensors.items():
      array = np.asarray(get(name))
      if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, declared {shape}")
      out.write(np.ascontiguousarray(array, DTYPES[dtype]).reshape(-1).view(np.uint8).data)
    out.flush()
    os.fsync(out.fileno())


def _entry(file: str, name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
  """dtype, shape, first byte and the byte after the last one of a tensor, as its header declares it."""
  where = f"{file}: {listing([name])}"
  try:
    name.encode()
  except UnicodeEncodeError:
    raise PretrainedError(f"{where}: is no name in UTF-8") from None
  if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
    raise PretrainedError(f"{where}: must have dtype, shape and data_offsets, got {shown(value)}")
  dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise PretrainedError(f"{where}: dtypes must be {', '.join(WEIGHTS)}, got {shown(dtype)}")
  if not _whole_numbers(shape) or len(shape) > 32:
    raise PretrainedError(f"{where}: shape must be a list of whole numbers, got {shown(shape)}")
  if not _whole_numbers(offsets) or len(offsets) != 2:
    raise PretrainedError(f"{where}: data_offsets must be two whole numbers, got {shown(offsets)}")
  if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
    raise PretrainedError(f"{where}: {shown(offsets)} are not the bytes of {dtype} of shape {shown(shape)}")
  return dtype, tuple(shape), *offsets


def _whole_numbers(values: Any) -> bool:
  """Whether this is a list of numbers that can be sizes or places in a file."""
  return isinstance(values, list) and all(type(x) is int and 0 <= x < 1 << 62 for x in values)


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
  """The index's table of tensors and files."""
  listed = index.get("weight_map")
  if not isinstance(listed, dict) or not listed:
    raise PretrainedError(f"{INDEX}: weight_map must say which file holds which tensor")
  for name, file in listed.items():
    if not isinstance(file, str):
      raise PretrainedError(f"{INDEX}: weight_map: {listing([name])} must be in a file, got {shown(file)}")
  return listed


def _nothing(folder: pathlib.Path, single: str) -> str:
  """What to say where there is no safetensors file."""
  try:
    inside: Iterable[pathlib.Path] = sorted(folder.iterdir())
  except OSError:
    inside = ()
  others = [p.name for p in inside if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
  why = f"; {listing(others)} may execute code when read and is refused" if others else ""
  return f"{folder}: there is no {single}" + (f" and no {INDEX}{why}" if single == SINGLE else "")


def _check_name(folder: pathlib.Path, file: str) -> None:
  """Refuses a shard that is not a plain safetensors file of this folder."""
  if pathlib.PurePath(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
    raise PretrainedError(f"{INDEX}: {shown(file)} is not the name of a .safetensors file in this folder")
  if not files.is_there(folder / file):
    raise PretrainedError(f"{folder}: shard {listing([file])} is missing")
