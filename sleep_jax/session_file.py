"""A session in a file: safetensors, with what it belongs to as JSON in the header.

The file appears when it is complete, or not at all, and what is read back is equal to the bit. Its SHA-256 is
that of every byte of it, header included, the 64 digits of the checksum itself counted as zeros.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config, generate, model, params
from sleep_jax.config import ConfigError, ModelConfig, SleepConfig
from sleep_jax.session import like

FORMAT = 2  # before, the position was outside the checksum
HEADER, CHECKSUM = "sleep_jax_session", "sha256"
BLANK = f'"{CHECKSUM}":"{"0" * 64}"'.encode()
SAMPLED = 256  # entries of every tensor that `fingerprint` looks at
LONGEST = 1 << 24  # bytes of a header
CHUNK = 1 << 20  # bytes read at a time
DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "I32": np.int32, "BOOL": np.bool_}
KINDS = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
# What is wrong with the disk or its quota, not with the path.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class SessionError(RuntimeError):
  """A session could not be stored, though its path is right: the disk is full, say. One line."""


def fingerprint(weights: model.Params) -> str:
  """SHA-256 of the name, shape, dtype and first entries of every tensor: tells two trainings apart."""
  digest = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(weights):
    first = np.asarray(x[(0,) * (x.ndim - 1)][:SAMPLED])
    digest.update(f"{params.name_of(path)} {x.shape} {x.dtype}\n".encode() + first.tobytes())
  return digest.hexdigest()


def check_path(path: str | os.PathLike, cfg: ModelConfig, sleep_cfg: SleepConfig, batch: int = 1) -> None:
  """Checks that a session of B sequences could be stored now. What is there stays as it is.

  Raises:
    ConfigError: if the path is a folder, is in none, or may not be written to.
    SessionError: if there is no room for the file.
  """
  path = _resolved(path)
  _check_target(path)
  filled = max(0, (sleep_cfg.spread or 0) - 1)  # a session in the middle of a sleep is the largest
  wanted = jax.eval_shape(lambda: like(cfg, sleep_cfg, batch, filled, 1))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(wanted))
  with _writing(path) as (out, made):
    try:
      if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(out.fileno(), 0, size)
    except OSError as e:
      if e.errno in FULL:
        raise
    os.unlink(made)


def save(
  path: str | os.PathLike,
  session: generate.Session,
  weights: model.Params,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  text: Any = None,
) -> None:
  """Writes a session, over the file that is there; a symbolic link is followed.

  Args:
    text: plain data to keep with it; what was not shown yet of its text, say.

  Raises:
    ConfigError: if the path cannot be written to.
    SessionError: if the disk fails or is full; a file that was there stays. Or if the file cannot take the
      name `path`; it then has another one, which is told.
  """
  path = _resolved(path)
  _check_target(path)
  header = _belongs_to(weights, cfg, sleep_cfg) | {
    "format": FORMAT,
    "batch": session.tokens.shape[0],
    "filled": session.filled,
    "windows": session.windows,
    "text": text,
  }
  head, arrays = _serialized(header, _arrays(session))
  with _writing(path) as (out, made):
    out.write(head)
    for x in arrays:
      out.write(x)
    out.flush()
    os.fsync(out.fileno())
    try:
      os.replace(made, path)
    except OSError as e:
      os.link(made, kept := f"{made}.session")
      raise SessionError(f"session: {path} cannot be replaced: {e.strerror}; it is stored in {kept}") from e
    with contextlib.suppress(OSError):  # then the name, too, is on the disk; not every file system can
      folder = os.open(path.parent, os.O_RDONLY)
      try:
        os.fsync(folder)
      finally:
        os.close(folder)


def load(
  path: str | os.PathLike, weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> generate.Session:
  """Reads a session back.

  Args:
    path: the file.
    weights, cfg, sleep_cfg: what it is to go on with; the same that it was saved with, except for what
      changes no number but by rounding (`kernel`, `implementation`, `remat`, `loops`, `backprop_passes`).

  Raises:
    ConfigError: if there is no such file, it is damaged, or it is another model's.
  """
  return load_with_text(path, weights, cfg, sleep_cfg)[0]


def load_with_text(
  path: str | os.PathLike, weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> tuple[generate.Session, Any]:
  """As `load`, and the plain data that `save` was given as `text`."""
  path = pathlib.Path(path)
  try:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
      status = os.fstat(file.fileno())
      config.check(stat.S_ISREG(status.st_mode), "session", f"{path} is no regular file")
      return _load(path, file, status.st_size, weights, cfg, sleep_cfg)
  except FileNotFoundError as e:
    raise ConfigError(f"session: there is no file {path}") from e
  except ConfigError:
    raise
  except OSError as e:
    raise ConfigError(f"session: {path} cannot be read: {e.strerror}") from e
  except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as e:
    raise ConfigError(f"session: {path} is damaged or no session ({_line(str(e))})") from e


def _load(
  path: pathlib.Path,
  file: BufferedReader,
  size: int,
  weights: model.Params,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> tuple[generate.Session, Any]:
  """Reads an open file: header, checksum, what it belongs to, and only then arrays."""
  head = _head(file, size)
  entries = _object(head[8:].decode())
  metadata = entries.pop("__metadata__")
  told = _object(metadata[HEADER])
  version = told["format"]
  config.check(
    version == FORMAT,
    "session",
    f"{path} is of format {version!r:.20}, this program reads {FORMAT}: read the text again",
  )
  _check_places(entries, size - len(head))
  config.check(
    _digest(file, head, metadata[CHECKSUM]) == metadata[CHECKSUM],
    "session",
    f"{path} is damaged: its checksum is wrong",
  )
  defaults = json.loads(
    json.dumps({"model": config.defaults_of(cfg), "sleep": config.defaults_of(sleep_cfg)})
  )
  for name, now in _belongs_to(weights, cfg, sleep_cfg).items():
    _same(name, told.get(name), now, path, defaults.get(name))
  batch, filled, windows = (_whole(told[name]) for name in ("batch", "filled", "windows"))
  config.check(
    1 <= batch <= size // (4 * cfg.window)
    and 0 <= filled < cfg.window
    and 0 <= windows < (1 << 32) // cfg.window,
    "session",
    f"{path} is damaged: {batch} rows, {filled} tokens, {windows} windows",
  )
  wanted = jax.eval_shape(lambda: like(cfg, sleep_cfg, batch, filled, windows))
  leaves, treedef = jax.tree.flatten(wanted)
  expected = dict(zip(_arrays(wanted), leaves, strict=True))
  wrong = sorted(expected.keys() ^ entries.keys()) or [
    name
    for name, x in expected.items()
    if (entries[name]["dtype"], entries[name]["shape"]) != (KINDS[np.dtype(x.dtype)], list(x.shape))
  ]
  config.check(
    not wrong, "session", f"{path} is damaged: {_line(', '.join(wrong[:3]))} missing, unknown or misshapen"
  )
  arrays = [_array(file, len(head), entries[name], expected[name]) for name in expected]
  session = jax.tree.unflatten(treedef, arrays)
  read = [session.tokens, *([] if session.night is None else [session.night.tokens])]
  low, high = int(np.min(read)), int(np.max(read))
  config.check(
    0 <= low and high < cfg.vocab_size, "session", f"{path} is damaged: it has tokens in {low}..{high}"
  )
  on_host = {"tokens": session.tokens, "valid": session.valid, "night": session.night}
  if session.night is not None:
    on_host["night"] = session.night.replace(asleep=jax.device_put(session.night.asleep))
  on_device = jax.device_put(session.replace(**dict.fromkeys(on_host)))
  return on_device.replace(**on_host), told.get("text")


def _head(file: BinaryIO, size: int) -> bytes:
  """The bytes before the first array: the length of a JSON text, and the text.

  Raises:
    ValueError: if the file is shorter than it says, or the text too long.
  """
  first = file.read(8)
  length = int.from_bytes(first, "little")
  if len(first) < 8 or length > min(size - 8, LONGEST):
    raise ValueError(f"a header of {length} bytes in a file of {size}")
  return first + file.read(length)


def _check_places(entries: dict[str, Any], size: int) -> None:
  """Checks that the arrays lie one after the other in `size` bytes.

  Raises:
    ValueError, TypeError, KeyError: if not.
  """
  at = 0
  for name, entry in entries.items():
    shape = [_whole(n) for n in entry["shape"]]
    stop = at + math.prod(shape) * np.dtype(DTYPES[entry["dtype"]]).itemsize
    if min(shape, default=0) < 0 or [_whole(n) for n in entry["data_offsets"]] != [at, stop]:
      raise ValueError(f"{name:.40} is not where it must be")
    at = stop
  if at != size:
    raise ValueError(f"{at} bytes of arrays, and place for {size}")


def _array(
  file: BufferedReader, begin: int, entry: dict[str, Any], wanted: jax.ShapeDtypeStruct
) -> np.ndarray:
  """An array of the file, whose header agrees with what is wanted."""
  array = np.empty(wanted.shape, wanted.dtype)
  file.seek(begin + entry["data_offsets"][0])
  data = array.reshape(-1).view(np.uint8)
  if file.readinto(data.data) != data.size:
    raise ValueError("the file became shorter")
  if wanted.dtype == np.bool_ and data.size and data.max() > 1:
    raise ValueError("neither true nor false")
  return array


def _serialized(header: dict[str, Any], arrays: dict[str, Any]) -> tuple[bytes, list[memoryview]]:
  """The bytes before the first array, with the checksum in them, and the arrays' bytes."""
  entries: dict[str, Any] = {"__metadata__": {HEADER: json.dumps(header), CHECKSUM: "0" * 64}}
  at, data = 0, []
  for name, x in arrays.items():
    x = np.asarray(jax.device_get(x))
    entries[name] = {"dtype": KINDS[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
    at += x.nbytes
    data.append(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  head = len(text).to_bytes(8, "little") + text
  digest = hashlib.sha256(head)
  for part in data:
    digest.update(part)
  return head.replace(BLANK, BLANK.replace(b"0" * 64, digest.hexdigest().encode())), data


def _digest(file: BinaryIO, head: bytes, stored: Any) -> str:
  """SHA-256 of the whole file, its own digits counted as zeros."""
  digits = f'"{CHECKSUM}":"{stored}"'.encode()
  if head.count(digits) != 1:
    raise ValueError("it has no checksum")
  digest = hashlib.sha256(head.replace(digits, BLANK))
  file.seek(len(head))
  while part := file.read(CHUNK):
    digest.update(part)
  return digest.hexdigest()


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[tuple[BinaryIO, str]]:
  """A new file beside `path` and its name; it is gone in the end unless it was renamed.

  Raises:
    ConfigError, SessionError: in place of any `OSError` inside.
  """
  made = None
  try:
    handle, made = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
    with os.fdopen(handle, "wb") as out:
      yield out, made
  except (OSError, ValueError) as e:
    kind = SessionError if isinstance(e, OSError) and e.errno in FULL else ConfigError
    raise kind(f"session: {path} cannot be written: {getattr(e, 'strerror', None) or e}") from e
  finally:
    if made is not None:
      pathlib.Path(made).unlink(missing_ok=True)


def _resolved(path: str | os.PathLike) -> pathlib.Path:
  """Where a path leads, symbolic links followed."""
  try:
    return pathlib.Path(os.path.realpath(path))
  except (OSError, ValueError) as e:
    raise ConfigError(f"session: {os.fspath(path)!r:.80} is no path: {e}") from e


def _check_target(path: pathlib.Path) -> None:
  """Raises `ConfigError` if something is there that is not to be written over."""
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
      what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
      raise ConfigError(f"session: {path} cannot be written: it is {what}")
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
  except FileNotFoundError:
    pass
  except OSError as e:
    raise ConfigError(f"session: {path} cannot be written: {e.strerror}") from e


def _line(text: str) -> str:
  """A text of unknown origin on one line, and no longer than one."""
  return " ".join(text.split())[:200]


def _object(text: str) -> dict[str, Any]:
  """The object that a JSON text is.

  Raises:
    ValueError, TypeError, RecursionError: if it is none.
  """
  values = json.loads(text, object_pairs_hook=_unique)
  if not isinstance(values, dict):
    raise TypeError("its header is no object")
  return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of a JSON text, in which no name comes twice."""
  values = dict(pairs)
  if len(values) < len(pairs):
    raise ValueError("a name comes twice")
  return values


def _whole(value: Any) -> int:
  if type(value) is not int:
    raise TypeError(f"{value!r:.40} is no whole number")
  return value


def _belongs_to(weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig) -> dict[str, Any]:
  """What must be the same for a session to go on, as plain data."""
  architecture = config.replace(cfg, fast={"kernel": None}, attention={"implementation": None})
  same = SleepConfig()
  nights = dataclasses.replace(
    sleep_cfg, when=same.when, remat=same.remat, loops=same.loops, backprop_passes=same.backprop_passes
  )
  values = {"model": architecture, "sleep": nights}
  plain = json.loads(json.dumps({name: config.to_dict(value) for name, value in values.items()}))
  return plain | {"weights": fingerprint(weights)}


def _same(name: str, before: Any, now: Any, path: pathlib.Path, defaults: Any = None) -> None:
  """Raises `ConfigError` with the first field that differs; one that is not there had its default."""
  if isinstance(now, dict) and isinstance(before, dict):
    for key, value in now.items():
      usual = (defaults or {}).get(key)
      if key in before or usual is None or value != usual:
        _same(f"{name}.{key}", before.get(key), value, path, usual)
  elif name == "weights":
    config.check(before == now, "session", f"{path} is of other weights")
  else:
    config.check(
      before == now, "session", f"{path} is another model's: {name} was {before!r:.60}, is {now!r:.60}"
    )


def _arrays(session: generate.Session) -> dict[str, Any]:
  """Every array by its path in the session."""
  return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(session)}
