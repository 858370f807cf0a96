"""The only place a run writes to, taken by one run at a time.

config.json   the whole configuration; a run that resumes must bring the same one
env.json      what ran: versions, commit, devices, command; earlier starts below `earlier`
metrics.jsonl, tb/, checkpoints/, figures/
lock          held while the run lives; its text says who holds it
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping
from typing import Any, Self

import jax

from sleep_jax.runtime import metrics, processes
from sleep_jax.runtime.files import (
  Folder,
  WriteError,
  create,
  is_mistake,
  is_open_at,
  open_file,
  read_json,
  shown,
  why,
  write_file,
)
from sleep_jax.runtime.run_config import RunConfig

_CONFIG, _ENV, _METRICS, _LOCK = "config.json", "env.json", "metrics.jsonl", "lock"
_FOLDERS = ("checkpoints", "figures", "tb")
_MAX_EARLIER = 1000  # starts that env.json remembers
_ROOM = 256  # bytes that the longest path below a workdir adds to it
_MAX_PATH = 4096
_SECRET = re.compile(r"((?:^|[-_.])(?:token|secret|password|api_?key)=).*", re.IGNORECASE)


class WorkdirError(ValueError):
  """The directory cannot serve this run; the message is one line and nothing in it was overwritten."""


@dataclasses.dataclass
class Workdir:
  """A directory that belongs to this process until it is closed. A context manager.

  Attributes:
    path: its absolute name.
    config: of the run; None in one that was not prepared.
    taken: another run has it now, so that nothing more may be written.
  """

  path: pathlib.Path
  config: RunConfig | None = None
  taken: bool = False
  _folder: Folder | None = None
  _lock: int | None = None  # file descriptor

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.path / "checkpoints"

  @property
  def figures(self) -> pathlib.Path:
    return self.path / "figures"

  @property
  def metrics(self) -> pathlib.Path:
    return self.path / _METRICS

  @property
  def done_step(self) -> int | None:
    """The step at which a run here ended by itself, None if none did (yet).

    Raises:
      MetricsError: if metrics.jsonl is damaged.
    """
    if not os.path.lexists(self.metrics):
      return None
    return max((row["step"] for row in metrics.read(self.metrics) if row["kind"] == "done"), default=None)

  def lost(self) -> str | None:
    """What became of the directory, in one clause; None while it is this process's.

    A lock that was deleted is made anew, unless another run was faster: then `taken` is true from here on.
    """
    if self._lock is None or self._folder is None:
      return None
    fate = self._folder.lost()
    if fate is not None:
      return f"the workdir {shown(self.path)} {fate} while its run was going on"
    if not is_open_at(self._lock, self._folder.base / _LOCK):
      try:
        again = _take_lock(self._folder)
      except (WorkdirError, WriteError) as e:
        self.taken = True
        return f"the lock of the workdir was deleted or replaced while its run was going on, and {e}"
      os.close(self._lock)
      self._lock = again
    return None

  def close(self) -> None:
    """Lets the next run in. The file stays: to delete a lock is to hand it to two."""
    if self._lock is not None:
      os.close(self._lock)
      self._lock = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def prepare(
  path: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  may_change: Collection[str] = (),
  may_grow: Collection[str] = (),
  defaults: Mapping[str, Any] | None = None,
) -> Workdir:
  """Makes a directory ready for a run, or for the resumption of the run that it holds.

  Of several processes in one run, which all call this, the first one writes and locks. They share the file
  system.

  Args:
    path: the directory, made if absent. A relative one is taken from the current directory.
    config: the configuration as nested mappings, sequences, strings, numbers, booleans and None.
    may_change: dotted keys that may differ from config.json, which then takes the new values.
    may_grow: dotted keys of numbers that may be larger than in config.json, likewise.
    defaults: values for fields added after a run began, nested like `config`. A config.json that lacks such
      a field is read as if it had this value. None: every field must be there.

  Raises:
    WorkdirError: if the path is a file, cannot be written, is in use, holds another configuration (every
      difference is named, by dotted key), an unreadable one, files without any, or links to other folders.
    WriteError: if the disk is full or does not work.
  """
  try:
    text = os.fspath(path)
    wanted = RunConfig(config, may_change=may_change, may_grow=may_grow, defaults=defaults)
  except (TypeError, ValueError) as e:
    raise WorkdirError(str(e)) from e
  if "://" in text:
    raise WorkdirError(f"{shown(text)}: a workdir is a directory of a mounted file system, not a URL")
  if not text:
    raise WorkdirError("the workdir is an empty path")
  if "\0" in text:
    raise WorkdirError(f"{shown(text)}: the name of a workdir holds no NUL")
  try:
    workdir = Workdir(pathlib.Path(os.path.abspath(os.path.expanduser(text))), wanted)
  except OSError as e:
    raise WorkdirError(f"{shown(text)}: the current directory was deleted, name the whole path") from e
  length = len(os.fsencode(workdir.path))
  if length > _MAX_PATH - _ROOM:
    raise WorkdirError(
      f"the workdir's path has {length} bytes, too many for the files in it: at most {_MAX_PATH - _ROOM}"
    )
  processes.agree(lambda: _take(workdir), WorkdirError, WriteError)
  return workdir


def _take(workdir: Workdir) -> None:
  """Makes the directory, checks what it holds, locks it and writes what runs there."""
  name = shown(workdir.path)
  if os.path.lexists(workdir.path) and not workdir.path.is_dir():
    kind = "a link to nothing" if not workdir.path.exists() else "a file"
    raise WorkdirError(f"{name} is {kind}, a workdir is a directory")
  try:
    workdir.path.mkdir(parents=True, exist_ok=True)
    workdir._folder = folder = Folder(workdir.path)
    _check_contents(folder)
    workdir._lock = _take_lock(folder)
    if workdir.config is not None and _resolve_config(folder, workdir.config):
      write_file(folder.base / _CONFIG, json.dumps(workdir.config.values, indent=2) + "\n")
    write_file(folder.base / _ENV, json.dumps(_env(folder.base / _ENV), indent=2) + "\n")
    for inner in _FOLDERS:
      (folder.base / inner).mkdir(exist_ok=True)
  except OSError as e:
    workdir.close()
    kind = WorkdirError if is_mistake(e) else WriteError
    raise kind(f"{name} cannot be written: {why(e)}") from e
  except BaseException:
    workdir.close()
    raise


def _check_contents(folder: Folder) -> None:
  """Refuses links to other folders, and files without a configuration: nobody knows of which run they are."""
  for name in _FOLDERS:
    path = folder.base / name
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
      kind = "a symbolic link" if path.is_symlink() else "a file"
      raise WorkdirError(f"{shown(folder.path / name)} is {kind}; a workdir holds this folder itself")
  if os.path.lexists(folder.base / _CONFIG):
    return
  harmless = {_LOCK, _ENV, f".{_CONFIG}.tmp", f".{_ENV}.tmp"}  # all that a run killed at its start leaves
  for entry in sorted(folder.base.iterdir()):
    if entry.name in harmless or (entry.name in _FOLDERS and entry.is_dir() and not any(entry.iterdir())):
      continue
    raise WorkdirError(
      f"{shown(folder.path)} holds {shown(entry.name)} but no {_CONFIG}, so it is no workdir; name an empty"
      " directory"
    )


def _take_lock(folder: Folder) -> int:
  """The lock, held: the kernel drops it with the process, so what a dead run leaves does no harm.

  A lock that has another name elsewhere (of a copy made with hard links, say) is replaced by one of its own
  before anything is written to it.
  """
  path, name = folder.base / _LOCK, shown(folder.path / _LOCK)
  while True:
    lock = -1
    try:
      lock = open_file(path, os.O_RDWR | os.O_CREAT)
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if is_open_at(lock, path):
        if os.fstat(lock).st_nlink == 1:
          os.ftruncate(lock, 0)
          holder = f"process {os.getpid()} on {socket.gethostname()}, started {_now()}\n"
          os.pwrite(lock, holder.encode(), 0)
          return lock
        temporary = path.with_name(f".{_LOCK}.tmp")
        os.close(create(temporary))
        os.replace(temporary, path)
      os.close(lock)  # replaced, by us or by somebody else: the next one under its name counts
    except BlockingIOError as e:
      holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
      os.close(lock)
      by = shown(holder) or "another run"
      raise WorkdirError(f"{shown(folder.path)} is in use by {by}; one run at a time") from e
    except OSError as e:
      if lock >= 0:
        os.close(lock)
      kind = WorkdirError if is_mistake(e) or e.errno == errno.ENOLCK else WriteError
      raise kind(f"{name} cannot be opened and locked: {why(e)}") from e


def _resolve_config(folder: Folder, wanted: RunConfig) -> bool:
  """Whether config.json is to be written: it is absent, lacks defaults, or differs only where it may."""
  path = folder.base / _CONFIG
  if not os.path.lexists(path):
    return True
  name = shown(folder.path / _CONFIG)
  try:
    here = read_json(path)
    if not isinstance(here, dict):
      raise ValueError("it holds no object")
  except (OSError, ValueError) as e:
    told = why(e) if isinstance(e, OSError) else e
    raise WorkdirError(f"{name} cannot be read: {told}; nothing was overwritten") from e
  refused = wanted.differences(here, "workdir")
  if refused:
    raise WorkdirError(f"{shown(folder.path)} was made with another configuration: {refused}")
  return wanted.is_new_to(here)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _env(path: pathlib.Path) -> dict[str, Any]:
  """What is running here and now, above what env.json said of earlier starts."""
  versions = {"python": platform.python_version()}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  earlier = []
  with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # a damaged record stops no run
    last = read_json(path)
    starts = [*last.pop("earlier", []), last]
    earlier = [start for start in starts if isinstance(start, dict)][-_MAX_EARLIER:]
  return {
    "started": _now(),
    "command": [_SECRET.sub(r"\1***", word) for word in sys.argv],
    "versions": versions,
    "git": git_state(),
    "platform": platform.platform(),
    "host": socket.gethostname(),
    "backend": jax.default_backend(),
    "devices": [device.device_kind for device in jax.devices()],
    "processes": jax.process_count(),
    "earlier": earlier,
  }


def git_state() -> dict[str, Any] | None:
  """The commit this code is from and whether it was changed since; None outside of a repository."""

  def git(*command: str) -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
      ["git", "--no-optional-locks", "-C", here, *command],  # the user's own git is never in our way
      capture_output=True,
      text=True,
      timeout=20,
      check=True,
    )
    return done.stdout.strip()

  try:
    return {
      "commit": git("rev-parse", "HEAD"),
      "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
  except (OSError, subprocess.SubprocessError):
    return None
