"""The only place a run writes to, taken by one run at a time.

config.json   the whole configuration; a run that resumes must bring the same one
env.json      what ran: versions, commit, devices, command; earlier starts below `earlier`
metrics.jsonl, tb/, checkpoints/, figures/
lock          held while the run lives; its text says who holds it
"""

import contextlib
import dataclasses
import datetime
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
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self

import jax

from sleep_jax.runtime import metrics, processes

_CONFIG, _ENV, _METRICS, _LOCK = "config.json", "env.json", "metrics.jsonl", "lock"
_FOLDERS = ("checkpoints", "figures", "tb")
_ABSENT = object()
_MAX_NAMED = 10  # keys named in one message
_SECRET = re.compile(r"((?:^|[-_.])(?:token|secret|password|api_?key)=).*", re.IGNORECASE)


class WorkdirError(ValueError):
  """The directory cannot serve this run; the message is one line and nothing in it was overwritten."""


@dataclasses.dataclass
class Workdir:
  """A directory that belongs to this process until it is closed. A context manager."""

  path: pathlib.Path
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
    """The step at which a run here ended by itself, None if none did (yet)."""
    if not self.metrics.exists():
      return None
    return max((row["step"] for row in metrics.read(self.metrics) if row["kind"] == "done"), default=None)

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
  defaults: Mapping[str, Any] | None = None,
) -> Workdir:
  """Makes a directory ready for a run, or for the resumption of the run that it holds.

  Of several processes in one run, which all call this, the first one writes and locks. They share the file
  system.

  Args:
    path: the directory, made if absent. A relative one is taken from the current directory.
    config: the configuration as nested mappings, sequences, strings, numbers, booleans and None.
    may_change: dotted keys that may differ from config.json; it then takes the new values.
    defaults: values, nested like `config`, that fields had before there was such a field: a config.json which
      lacks one of them is of that time, and counts as if it had it. None: every field must be there.

  Raises:
    WorkdirError: if the path is a file, cannot be written, is in use, holds another configuration (every
      difference is named, by dotted key), an unreadable one, or files without any.
  """
  if "://" in os.fspath(path):
    raise WorkdirError(f"{os.fspath(path)}: a workdir is a directory of a mounted file system, not a URL")
  if not os.fspath(path):
    raise WorkdirError("the workdir is an empty path")
  workdir = Workdir(pathlib.Path(os.path.abspath(os.path.expanduser(path))))
  processes.agree(lambda: _take(workdir, config, may_change, defaults), WorkdirError)
  return workdir


def _take(
  workdir: Workdir,
  config: Mapping[str, Any],
  may_change: Collection[str],
  defaults: Mapping[str, Any] | None,
) -> None:
  """Makes the directory, checks what it holds, locks it and writes what runs there."""
  wanted = _as_json(config)
  if workdir.path.exists() and not workdir.path.is_dir():
    raise WorkdirError(f"{workdir.path} is a file, a workdir is a directory")
  try:
    workdir.path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir.path):
      pass
  except OSError as e:
    raise WorkdirError(f"{workdir.path} cannot be written: {e.strerror}") from e
  _check_foreign(workdir.path)
  workdir._lock = _take_lock(workdir.path / _LOCK)
  try:
    if _resolve_config(workdir.path / _CONFIG, wanted, may_change, _as_json(defaults or {})):
      write_file(workdir.path / _CONFIG, json.dumps(wanted, indent=2) + "\n")
    write_file(workdir.path / _ENV, json.dumps(_env(workdir.path / _ENV), indent=2) + "\n")
    for folder in _FOLDERS:
      (workdir.path / folder).mkdir(exist_ok=True)
  except OSError as e:
    workdir.close()
    raise WorkdirError(f"{workdir.path} cannot be written: {e}") from e
  except BaseException:
    workdir.close()
    raise


def write_file(path: pathlib.Path, text: str) -> None:
  """Writes a file that after a crash is the new one, whole, or still the old one."""
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "w", encoding="utf-8") as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)  # the rename itself
  finally:
    os.close(folder)


def _check_foreign(path: pathlib.Path) -> None:
  """Refuses files without a configuration: they are not ours, or nobody knows of which run."""
  if (path / _CONFIG).exists():
    return
  harmless = {_LOCK, _ENV, f".{_CONFIG}.tmp", f".{_ENV}.tmp"}  # all that a run killed at its start leaves
  for entry in sorted(path.iterdir()):
    if entry.name in harmless or (entry.name in _FOLDERS and entry.is_dir() and not any(entry.iterdir())):
      continue
    raise WorkdirError(
      f"{path} holds {entry.name} but no {_CONFIG}, so it is no workdir; name an empty directory"
    )


def _take_lock(path: pathlib.Path) -> int:
  # The kernel drops the lock with the process, however that ends, so what a dead run leaves does no harm.
  lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
    os.close(lock)
    if not isinstance(e, BlockingIOError):
      raise WorkdirError(f"{path} cannot be locked: {e.strerror}") from e
    raise WorkdirError(f"{path.parent} is in use by {holder or 'another run'}; one run at a time") from e
  os.ftruncate(lock, 0)
  os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}, started {_now()}\n".encode(), 0)
  return lock


def _resolve_config(
  path: pathlib.Path, wanted: dict[str, Any], may_change: Collection[str], defaults: dict[str, Any]
) -> bool:
  """Whether config.json is to be written: it is absent, lacks defaults, or differs only where it may."""
  if not path.exists():
    return True
  try:
    here = json.loads(path.read_bytes())
    if not isinstance(here, dict):
      raise ValueError("it holds no object")
  except (OSError, ValueError) as e:
    raise WorkdirError(f"{path} cannot be read: {e}; nothing was overwritten") from e
  old, new = dict(_dotted(here)), dict(_dotted(wanted))
  lacking = {key: value for key, value in _dotted(defaults) if key in new and key not in old}
  old |= lacking
  changed = [key for key in {**old, **new} if not _same(old.get(key, _ABSENT), new.get(key, _ABSENT))]
  refused = [key for key in changed if key not in may_change]
  if refused:
    told = "; ".join(
      f"{key}: {_told(old.get(key, _ABSENT))} in the workdir, {_told(new.get(key, _ABSENT))} asked for"
      for key in refused[:_MAX_NAMED]
    )
    more = f"; and {len(refused) - _MAX_NAMED} more" if len(refused) > _MAX_NAMED else ""
    raise WorkdirError(f"{path.parent} was made with another configuration: {told}{more}")
  return bool(changed or lacking)


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """The configuration as it reads back from JSON; NaN and infinity as the strings that `metrics` uses."""
  try:
    return json.loads(metrics.dumps(config))
  except (TypeError, ValueError) as e:
    raise WorkdirError(f"the configuration cannot be written as JSON: {e}") from e


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _dotted(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _same(a: Any, b: Any) -> bool:
  return a == b and isinstance(a, bool) == isinstance(b, bool)  # 1 == True, but they are not one setting


def _told(value: Any) -> str:
  return "absent" if value is _ABSENT else json.dumps(value)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _env(path: pathlib.Path) -> dict[str, Any]:
  """What is running here and now, above what env.json said of earlier starts."""
  versions = {"python": platform.python_version()}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  earlier = []
  with contextlib.suppress(OSError, ValueError, AttributeError):  # a damaged record stops no run
    last = json.loads(path.read_bytes())
    earlier = [*last.pop("earlier", []), last]
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
      ["git", "-C", here, *command], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()

  try:
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
  except (OSError, subprocess.SubprocessError):
    return None
