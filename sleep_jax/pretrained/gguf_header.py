"""The header of a GGUF file: metadata, and where each tensor lies.

Versions 2 and 3 of the format, little-endian. A header is checked against the size of its file as it is
read: nothing is allocated, and no loop runs, by a count that the file claims and does not hold.
"""

import dataclasses
import math
import os
import pathlib
import struct
from typing import Any, BinaryIO

import numpy as np

from sleep_jax.pretrained import files
from sleep_jax.pretrained.fields import PretrainedError, listing, shown

VERSIONS = (2, 3)
SCALARS = {
  0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
  5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
ALIGNMENT = "general.alignment"
MOST_TEXTS = 1 << 22  # in one array
MOST_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in the file.

  Attributes:
    kind: number of its GGML type.
    shape: rows first, as NumPy and safetensors have it; the file has it the other way round.
    start: its first byte in the file.
  """

  kind: int
  shape: tuple[int, ...]
  start: int


@dataclasses.dataclass(frozen=True)
class Header:
  """What a file says of itself.

  Attributes:
    path: the file.
    values: metadata: bool, int, float, str; arrays of numbers are NumPy's, those of texts are lists.
    tensors: by name, in the order in which they are stored.
    size: bytes of the file.
    alignment: bytes to whose multiples tensors begin.
  """

  path: pathlib.Path
  values: dict[str, Any]
  tensors: dict[str, Stored]
  size: int
  alignment: int

  def error(self, problem: str) -> PretrainedError:
    """An error about the file, in one line."""
    return PretrainedError(f"{self.path.name}: {problem}")


def read(path: str | os.PathLike) -> Header:
  """Reads the header.

  Raises:
    PretrainedError: if there is no such file, it is no GGUF file, of another version, damaged or cut off.
  """
  path = pathlib.Path(os.path.realpath(path))
  with files.open_regular(path) as file:
    try:
      return _Reader(path, file).header()
    except OSError as e:
      raise PretrainedError(f"{path.name}: {e.strerror}") from e


class _Reader:
  """Reads a file from its beginning to the first tensor."""

  def __init__(self, path: pathlib.Path, file: BinaryIO):
    self._path, self._file, self._at = path, file, 0
    self._size = os.fstat(file.fileno()).st_size

  def header(self) -> Header:
    if self._size < 24 or self._take(4, "its name") != b"GGUF":
      raise self._error("is no GGUF file")
    version = self._number("<I")
    if version not in VERSIONS:
      big = version & 0xFFFF == 0 and version >> 24 in VERSIONS
      what = "is big-endian" if big else f"has version {version} of the format"
      raise self._error(f"{what}; known: versions 2 and 3, little-endian")
    tensors = self._count("<Q", 8 + 4 + 8 + 4 + 8, "tensors")
    values: dict[str, Any] = {}
    for _ in range(self._count("<Q", 8 + 4 + 1, "fields")):
      name = self._text("the name of a field")
      if name in values:
        raise self._error(f"field {listing([name])} stands there twice")
      values[name] = self._value(self._number("<I"), name)
    alignment = values.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
      raise self._error(f"{ALIGNMENT} must be a power of two up to 65536, got {shown(alignment)}")
    found: dict[str, Stored] = {}
    for _ in range(tensors):
      name = self._text("the name of a tensor")
      if name in found:
        raise self._error(f"tensor {listing([name])} stands there twice")
      found[name] = self._tensor(name)
    data = -(-self._at // alignment) * alignment
    ordered = sorted(found, key=lambda name: found[name].start)
    if ordered and found[ordered[0]].start:
      raise self._error(f"is damaged: no tensor begins where the data do, at byte {data}")
    placed = {n: dataclasses.replace(found[n], start=data + found[n].start) for n in ordered}
    return Header(self._path, values, placed, self._size, alignment)

  def _tensor(self, name: str) -> Stored:
    """Kind, shape and place; the place is counted from the beginning of the data."""
    dimensions = self._number("<I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
      raise self._error(f"tensor {listing([name])} has {dimensions} dimensions of 1..{MOST_DIMENSIONS}")
    shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
    if math.prod(shape) == 0:
      raise self._error(f"tensor {listing([name])} of shape {list(shape)} is empty")
    return Stored(self._number("<I"), shape, self._number("<Q"))

  def _value(self, kind: int, name: str) -> Any:
    if kind == STRING:
      return self._text(f"field {listing([name])}")
    if kind != ARRAY:
      return self._array(kind, 1, name)[0].item()
    kind = self._number("<I")
    if kind != STRING:
      size = 1 if kind == BOOL else self._scalar(kind, name).itemsize
      return self._array(kind, self._count("<Q", size, f"entries of {listing([name])}"), name)
    count = self._count("<Q", 8, f"texts in {listing([name])}")
    if count > MOST_TEXTS:
      raise self._error(f"field {listing([name])} has {count} texts, of at most {MOST_TEXTS}")
    return [self._text(f"field {listing([name])}") for _ in range(count)]

  def _array(self, kind: int, count: int, name: str) -> np.ndarray:
    dtype = np.dtype("<u1") if kind == BOOL else self._scalar(kind, name)
    data = self._take(count * dtype.itemsize, f"field {listing([name])}")
    values = np.frombuffer(data, dtype)
    if kind == BOOL and np.any(values > 1):
      raise self._error(f"field {listing([name])} must be true or false")
    return values != 0 if kind == BOOL else values

  def _scalar(self, kind: int, name: str) -> np.dtype:
    if kind not in SCALARS:
      raise self._error(f"field {listing([name])} is of a kind that is not supported, {kind}")
    return SCALARS[kind]

  def _text(self, what: str) -> str:
    length = self._number("<Q")
    try:
      return self._take(length, what).decode("utf-8")
    except UnicodeDecodeError:
      raise self._error(f"{what} is no text in UTF-8") from None

  def _count(self, form: str, least: int, what: str) -> int:
    """A number of things that take `least` bytes each, at least."""
    count = self._number(form)
    if count * least > self._size - self._at:
      raise self._error(f"is damaged or cut off: it claims {count} {what}, and has {self._size} bytes")
    return count

  def _number(self, form: str) -> int:
    return struct.unpack(form, self._take(struct.calcsize(form), "a number"))[0]

  def _take(self, count: int, what: str) -> bytes:
    if count > self._size - self._at:
      problem = f"{what} takes {count} bytes from byte {self._at} on, and it has {self._size}"
      raise self._error(f"is damaged or cut off: {problem}")
    data = self._file.read(count)
    if len(data) < count:
      raise self._error("has become shorter while it was read")
    self._at += count
    return data

  def _error(self, problem: str) -> PretrainedError:
    return PretrainedError(f"{self._path.name}: {problem}")
