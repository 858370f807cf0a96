"""A run's folder and the files in it: always the folder that was opened, always whole files, never a link.

Paths come from users, and what lies in a folder may have been put there by anybody. So a folder is held open
by its inode, and everything below it is reached through that: whatever its name holds (a library may read
`[` as a pattern and `gs:/` as a bucket) and whatever becomes of the name while a run goes on. Symbolic links
are not followed, pipes and devices not opened, and a file that other names share is not written to.
"""

import errno
import json
import os
import pathlib
import re
import stat
import weakref
from typing import Any

MOST = 1 << 28  # bytes read as one piece of JSON: no manifest or config comes near it
_HELD = "/proc/self/fd/{}"  # a path to what a process holds open, on Linux
_DEEP = 50  # of JSON: nothing that a run writes is nested half as deeply
_ORDINARY = re.compile(r"[\w./ ~@%+=,#-]*")  # names that no library takes for anything else
# Whoever named the path, or made the folder, can mend these; all others are the machine's.
_MISTAKES = {
  getattr(errno, name)
  for name in "EACCES EPERM EROFS ENOENT ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP EINVAL EILSEQ".split()
}


_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class RunFailedError(RuntimeError):
  """A run cannot go on for a reason outside of it, such as its disk; the message is one line."""


class WriteError(RunFailedError):
  """A file cannot be written although its folder could be used before: a full disk, most of the time."""


class LostError(RunFailedError):
  """A run's folder is no longer where it was: deleted, moved, replaced or unmounted."""


class Folder:
  """A directory held by its inode.

  Attributes:
    path: its absolute name, for people.
    base: another path to it, for programs: it holds no character that has a second meaning, and leads to
      this directory even after its name has changed. Only Linux has such paths; elsewhere it is `path`.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens a directory.

    Raises:
      OSError: if there is none, or if its name cannot be given to every library and there is no other.
    """
    self.path = pathlib.Path(os.path.abspath(path))
    self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    weakref.finalize(self, os.close, self._fd)
    self.base = pathlib.Path(_HELD.format(self._fd))
    if not self._is_at(self.base):
      self.base = self.path
      if not _ORDINARY.fullmatch(str(self.path)):
        raise OSError(errno.EINVAL, "its name holds characters that have another meaning to a library")

  def lost(self) -> str | None:
    """What became of the directory, in words that follow its name; None if it is where it was."""
    if self._is_at(self.path):
      return None
    moved = self.moved_to()
    if moved is not None:
      return f"was moved to {shown(moved)}"
    return "was replaced or unmounted" if os.path.lexists(self.path) else "was deleted"

  def moved_to(self) -> pathlib.Path | None:
    """Where the directory is now, if it was moved and the system says so."""
    try:
      now = pathlib.Path(os.readlink(_HELD.format(self._fd)))
    except OSError:
      return None
    return now if self._is_at(now) and now != self.path else None

  def exists(self) -> bool:
    """Whether there still is such a directory, wherever it may be."""
    return os.fstat(self._fd).st_nlink > 0

  def _is_at(self, path: pathlib.Path) -> bool:
    try:
      return os.path.samestat(os.stat(path), os.fstat(self._fd))
    except OSError as e:
      return e.errno not in _GONE  # a disk that does not answer now has lost nothing yet


def shown(path: str | os.PathLike) -> str:
  """A path as a message shows it, in one line: what cannot be printed is escaped."""
  text = os.fsdecode(os.fspath(path))
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def why(error: OSError) -> str:
  """The system's words for an error, without the path."""
  return error.strerror or str(error)


def is_mistake(error: OSError) -> bool:
  """Whether the user, rather than the machine, can be asked to mend an error."""
  return error.errno in _MISTAKES


def write_file(path: pathlib.Path, text: str) -> None:
  """Writes a file that after a crash is the new one, whole, or still the old one.

  What stands under its name, or under that of its temporary file, is replaced and never written through.

  Raises:
    OSError: whose words name the file.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with open(create(temporary), "wb") as f:
      f.write(text.encode())
      f.flush()
      os.fsync(f.fileno())
    put_in_place(temporary, path)
  except OSError as e:
    raise OSError(e.errno, f"{path.name}: {why(e)}") from e


def create(path: pathlib.Path) -> int:
  """A new file, open for writing, in place of what has its name."""
  path.unlink(missing_ok=True)
  return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def put_in_place(temporary: pathlib.Path, path: pathlib.Path) -> None:
  """Renames a finished temporary file, durably."""
  os.replace(temporary, path)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)  # the rename itself
  finally:
    os.close(folder)


def open_file(path: pathlib.Path, flags: int = os.O_RDONLY) -> int:
  """Opens a regular file; waits for nothing.

  Raises:
    OSError: if there is none, or if it is a link, a folder, a pipe or a device.
  """
  try:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as e:
    if path.is_symlink() or e.errno in (errno.EISDIR, errno.ENXIO):
      raise OSError(errno.EINVAL, _no_file(os.lstat(path))) from e
    raise
  info = os.fstat(fd)
  if not stat.S_ISREG(info.st_mode):
    os.close(fd)
    raise OSError(errno.EINVAL, _no_file(info))
  return fd


def is_open_at(fd: int, path: pathlib.Path) -> bool:
  """Whether a path, itself and not as a link, leads to an open file."""
  try:
    return os.path.samestat(os.lstat(path), os.fstat(fd))
  except OSError as e:
    return e.errno not in _GONE


def read_json(path: pathlib.Path) -> Any:
  """What a file of JSON holds.

  Raises:
    OSError: if it cannot be read.
    ValueError: if it is no JSON in UTF-8, or too long.
  """
  with open(open_file(path), "rb") as f:
    data = f.read(MOST + 1)
  if len(data) > MOST:
    raise ValueError(f"it is longer than {MOST >> 20} MiB")
  return parse_json(data)


def parse_json(data: bytes) -> Any:
  """The value of a piece of JSON in UTF-8.

  Raises:
    ValueError: if it is none, or nested too deeply.
  """
  try:
    value = json.loads(data.decode())
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  if data.count(b"[") + data.count(b"{") > _DEEP and _is_deep(value):
    raise ValueError("it is nested too deeply")
  return value


def _is_deep(value: Any) -> bool:
  """Whether a value is nested more than `_DEEP` times: whoever walks it may then do so by recursion."""
  level = [value]
  for _ in range(_DEEP):
    inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
    level = [x for xs in inner for x in xs]
  return bool(level)


def _no_file(info: os.stat_result) -> str:
  kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
  return f"it is {kinds.get(stat.S_IFMT(info.st_mode), 'a device or a socket')}, not a file"
