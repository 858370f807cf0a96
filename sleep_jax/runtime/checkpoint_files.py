"""A directory of checkpoints as files: which steps are whole, damaged, unfinished or on their way out.

    1200/manifest.json     size and SHA-256 of every file of the step; the type of every array
    1200/default/          the arrays; `checkpoint.py` has Orbax write and read them
    aside/1100             damaged or unfinished steps, kept for whoever wants to look
    .trash/                retired steps, renamed there in one go before anything of them is deleted
    in_flight.json         the step being saved, until its manifest is written

A manifest is written once its step is committed. It holds the configuration of its run, so that a step which
was copied here from another run is refused; one that is older than this is taken as this run's. Symbolic
links are followed nowhere. Nothing here knows of JAX.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from sleep_jax.runtime.files import Folder, LostError, read_json, shown, write_file
from sleep_jax.runtime.manifest import (
  MAX_NAMED,
  NAME,
  CheckpointError,
  damage,
  read_manifest,
  some,
  write_manifest,
)
from sleep_jax.runtime.run_config import RunConfig

ASIDE, TRASH = "aside", ".trash"
_IN_FLIGHT = "in_flight.json"
_STEP = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
_UNFINISHED = re.compile(r"[0-9]+\.orbax-checkpoint-tmp.*", re.ASCII | re.DOTALL)


class CheckpointFiles:
  """The steps below one directory. One process at a time may call what writes.

  Attributes:
    directory: its absolute name, for people.
    base: the same directory, for programs; see `files.Folder`.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    report: Callable[[str], None],
    *,
    read_only: bool = False,
    config: RunConfig | None = None,
  ):
    self.directory, self._report, self._read_only, self._config = directory, report, read_only, config
    self.base = directory
    self._folder: Any = None  # a Folder each, once opened
    self._parent: Any = None

  def make(self) -> None:
    """Makes the directory if absent."""
    if not self._read_only:
      self.directory.mkdir(parents=True, exist_ok=True)

  def open(self) -> None:
    """Holds the directory, in every process; what is done with it until `close` is done with this very one.

    Raises:
      OSError: if it cannot be opened.
    """
    if self._read_only and not self.directory.is_dir():
      return
    self._folder, self._parent = Folder(self.directory), Folder(self.directory.parent)
    self.base = self._folder.base

  def lost(self) -> str | None:
    """What became of the directory, in one clause; None while it is where people look for it."""
    fate = self._folder and self._folder.lost()
    return f"{shown(self.directory)} {fate} while its run was going on" if fate else None

  def look_after(self) -> None:
    """Raises LostError if the directory is lost."""
    lost = self.lost()
    if lost:
      raise LostError(lost)

  def recover(self) -> pathlib.Path:
    """Makes the directory again if it was deleted and its parent was not; where it is now.

    Raises:
      CheckpointError: if nothing is left of it.
    """
    if not self._folder.exists():
      if not self._parent.exists():
        raise CheckpointError("its folder is gone")
      again = self._parent.base / self.directory.name
      again.mkdir()
      self._folder = Folder(again)
      self.base = self._folder.base
      return (self._parent.moved_to() or self._parent.path) / self.directory.name
    return self._folder.moved_to() or self.directory

  def path(self, step: int) -> pathlib.Path:
    """The directory of a step, for programs."""
    return self.base / str(step)

  def saved(self) -> list[int]:
    """The steps that have a manifest, oldest first."""
    return [step for step in self._committed() if (self.path(step) / NAME).is_file()]

  def tidy(self) -> None:
    """Clears up after a run that was killed."""
    self._committed()
    if self._read_only:
      return
    unfinished = self._unfinished()
    if unfinished is not None:
      where = self._set_aside(str(unfinished))
      self._report(f"step {unfinished} was still being saved when its run ended; not used, see {where}")
    self._unlink_note()
    for path in self.base.iterdir():
      if _UNFINISHED.fullmatch(path.name):
        _delete(path)
    self.purge()

  def begin(self, step: int) -> None:
    """Notes that `step` is about to be written: without its manifest it is unfinished then, not damaged."""
    write_file(self.base / _IN_FLIGHT, json.dumps({"step": step}))

  def finish(self, step: int, tree: Mapping[str, str]) -> None:
    """Writes the manifest of a committed step; from here on the step is saved."""
    write_manifest(self.path(step), tree, self._config)
    self._unlink_note()

  def choose(self) -> int | None:
    """The newest step that is what its manifest says; None if nothing was ever saved.

    Newer ones are reported and moved aside, but only if there is something to fall back to: otherwise a
    second try would find an empty directory and start the run from the beginning.

    Raises:
      CheckpointError: if all are damaged, or if one is another run's.
    """
    damaged, good, unfinished = {}, None, self._unfinished()
    self._refuse_strangers()
    for step in reversed(self._committed()):
      if step == unfinished:  # another process is at it, and we only read
        continue
      problem = damage(self.path(step))
      if problem is None:
        good = step
        break
      damaged[step] = problem
    if damaged and good is None:
      told = "; ".join(f"step {step}: {problem}" for step, problem in list(damaged.items())[:MAX_NAMED])
      raise CheckpointError(
        f"all checkpoints in {shown(self.directory)} are damaged, nothing was changed: {told}"
      )
    for step, problem in damaged.items():
      kept = "" if self._read_only else f"; the damaged one is kept as {self._set_aside(str(step))}"
      self._report(f"step {step} is damaged ({problem}), falling back to step {good}{kept}")
    if good is not None and self._config and "config" not in read_manifest(self.path(good)):
      self._report(f"step {good} was saved before checkpoints named their run; it is taken as this run's")
    return good

  def _refuse_strangers(self) -> None:
    """Raises CheckpointError if a step was saved by a run with another configuration."""
    for step in reversed(self._committed() if self._config else []):
      try:
        stored = read_manifest(self.path(step)).get("config")
      except CheckpointError:  # damage is another matter
        continue
      told = (
        stored is not None and self._config is not None and self._config.differences(stored, "checkpoint")
      )
      if told:
        raise CheckpointError(f"step {step} in {shown(self.directory)} is of another run: {told}")

  def chosen(self, step: int) -> int:
    """The step itself, if it was saved and is what its manifest says; nothing is moved.

    Raises:
      CheckpointError: if it was not saved or is damaged, or if any step is another run's.
    """
    saved = self.saved()
    if step not in saved:
      known = some([str(s) for s in saved]) if saved else "none"
      raise CheckpointError(f"step {step} was not saved in {shown(self.directory)}; saved steps: {known}")
    self._refuse_strangers()
    problem = damage(self.path(step))
    if problem is not None:
      raise CheckpointError(f"step {step} in {shown(self.directory)} is damaged ({problem})")
    return step

  def purge(self) -> None:
    """Empties the trash. What cannot be deleted now is tried again next time."""
    trash = self.base / TRASH
    if trash.is_dir() and not trash.is_symlink():
      for path in trash.iterdir():
        if _STEP.fullmatch(path.name):
          _delete(path)

  def clear_failed(self, step: int) -> None:
    """Makes room for a second attempt at `step`: the trash, and whatever the first one wrote."""
    self.purge()
    for path in self.base.iterdir():
      if path.name == str(step) or path.name.startswith(f"{step}.orbax-checkpoint-tmp"):
        _delete(path)

  def _committed(self) -> list[int]:
    if not self.base.is_dir():
      return []
    paths = [p for p in self.base.iterdir() if _STEP.fullmatch(p.name) or p.name in (TRASH, ASIDE)]
    for path in paths:
      name = shown(self.directory / path.name)
      if path.is_symlink():
        raise CheckpointError(f"{name} is a symbolic link; a checkpoint directory must hold its files itself")
      if path.name in (TRASH, ASIDE) and not path.is_dir():
        raise CheckpointError(f"{name} is a file, but has the name of a directory of checkpoints")
    return sorted(int(p.name) for p in paths if p.name not in (TRASH, ASIDE))

  def _unfinished(self) -> int | None:
    """The step that was committed but has no manifest yet, if there is one."""
    try:
      step = read_json(self.base / _IN_FLIGHT)["step"]
    except (OSError, ValueError, KeyError, TypeError):
      return None
    if not isinstance(step, int) or not _STEP.fullmatch(str(step)):
      return None
    folder = self.path(step)
    return step if folder.is_dir() and not os.path.lexists(folder / NAME) else None

  def _unlink_note(self) -> None:
    note = self.base / _IN_FLIGHT
    if note.is_dir() and not note.is_symlink():
      self._set_aside(_IN_FLIGHT)
    note.unlink(missing_ok=True)

  def _set_aside(self, name: str) -> str:
    """Moves a step, or what has the name of another file, out of the way; where to, for people."""
    aside = self.base / ASIDE
    aside.mkdir(exist_ok=True)
    target, n = name, 1
    while os.path.lexists(aside / target):
      target, n = f"{name}.{n}", n + 1
    os.rename(self.base / name, aside / target)
    return shown(self.directory / ASIDE / target)


def _delete(path: pathlib.Path) -> None:
  """Deletes a folder, as far as that can be done; of a link only itself."""
  if path.is_symlink() or not path.is_dir():
    path.unlink(missing_ok=True)
  else:
    shutil.rmtree(path, ignore_errors=True)
