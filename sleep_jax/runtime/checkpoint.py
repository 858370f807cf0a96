"""All of Orbax, behind one small interface.

Orbax writes arrays of any sharding asynchronously and commits a step with one rename. What it does not
do is done here: it restores flipped bits without a word, lists a step whose deletion was cut short, and
lets a failed save look like a success. So a step counts as saved only when it is committed *and* its
manifest, with a SHA-256 of every file, is on disk; a restore trusts the manifest alone and walks back to
the newest step that matches it; a step is retired by one rename before anything in it is deleted; and the
outcome of every save is looked at before the next one starts.

`checkpoint_files.py` holds the part that needs no JAX: the layout on disk, manifests, damage.

Nothing is ever unpickled: a checkpoint holds arrays and JSON. Several processes may save and restore
together if they share the directory; then every method but `poll` is collective.
"""

import contextlib
import dataclasses
import functools
import logging as python_logging
import os
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging

from sleep_jax.runtime import processes
from sleep_jax.runtime.checkpoint_files import TRASH, CheckpointFiles
from sleep_jax.runtime.files import LostError, RunFailedError, is_mistake, shown, why
from sleep_jax.runtime.manifest import (
  CheckpointError,
  SaveError,
  describe,
  differences,
  read_manifest,
  some,
)
from sleep_jax.runtime.run_config import RunConfig
from sleep_jax.runtime.state_tree import flatten, is_key, key_impl, non_finite, sharding

__all__ = ["CheckpointError", "Checkpoints", "SaveError"]


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for the save in flight."""

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 3,
    read_only: bool = False,
    config: RunConfig | None = None,
    report: Callable[[str], None] = logging.warning,
  ):
    """Opens a directory of checkpoints, made if absent, and clears up what a killed run left behind.

    Args:
      directory: a local or shared file system path, of any name; one writer at a time.
      keep: how many of the newest steps stay; at least 1.
      read_only: restore only; nothing is made, moved or deleted, so a running trainer is not disturbed.
      config: of the run. Every step names it, and a step that names another one is refused. None: neither.
      report: takes one line about a damaged step or a failed save.

    Raises:
      CheckpointError: if `directory` cannot be used, or a step in it is a symbolic link.
      SaveError: if its disk is full or does not work.
    """
    if keep < 1:
      raise CheckpointError(f"keep must be at least 1, got {keep}")
    self.directory = pathlib.Path(os.path.abspath(directory))
    self._keep, self._read_only, self._report = keep, read_only, report
    self._pending: _Pending | None = None
    self._failed: str | None = None  # why the last save failed, until another one succeeds
    self._news: list[int] = []
    self._files = CheckpointFiles(self.directory, report, read_only=read_only, config=config)
    self._shared(self._files.make)
    self._guarded(self._files.open)
    self._shared(self._files.tidy)
    self._manager: Any = None if read_only else self._open_manager()  # an Orbax manager, unless read only
    self._saved = self._files.saved()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, exc_type, *_) -> None:
    try:
      self.wait()
    except CheckpointError as e:
      if exc_type is None:
        raise
      self._report(str(e))  # the exception on its way out matters more
    finally:
      if self._manager:
        self._forget_errors()
        self._manager.close()

  @property
  def latest_step(self) -> int | None:
    """The newest step that is committed and has its manifest; not yet verified, and None if there is none."""
    return self._saved[-1] if self._saved else None

  def steps(self) -> list[int]:
    """All saved steps, oldest first."""
    return list(self._saved)

  def save(self, step: int, state: Any, *, block: bool = False) -> bool:
    """Starts saving `state` as `step`; returns when the caller may donate or change it.

    The step is saved when `poll` or `wait` says so. If the save before this one failed, that is reported
    here and this one is the second attempt: it blocks, and a second failure is an error.

    Args:
      step: a step number above every saved one. Saving the latest step again does nothing.
      state: any pytree of jax.Array, of any dtype and sharding, typed PRNG keys among them.
      block: wait until the step is saved.

    Returns:
      Whether a save was started: False if `step` is the latest saved step.

    Raises:
      CheckpointError: if the state holds something that is no jax.Array, or `step` is older than the latest.
      SaveError: if the state holds NaN or infinity, or if two saves in a row failed.
      LostError: if the directory was deleted, moved or replaced; see `rescue`.
    """
    if self._read_only:
      raise CheckpointError(f"{self._name} was opened for reading only; step {step} cannot be saved")
    self._shared(self._files.look_after)
    return self._save(step, state, block)

  def _save(self, step: int, state: Any, block: bool) -> bool:
    flat = flatten(state)
    self._settle()
    if step == self.latest_step:
      return False
    if step < 0 or (self._saved and step < self._saved[-1]):
      raise CheckpointError(f"step {step} cannot be saved in {self._name}: it holds step {self.latest_step}")
    if os.path.lexists(self._files.path(step)):
      raise CheckpointError(f"{self._name}/{step} exists but is no finished checkpoint; restore first")
    bad = non_finite(flat)
    if bad:
      raise SaveError(
        f"step {step} is not saved, its state holds NaN or infinity in {some(bad)}; "
        f"the latest checkpoint remains step {self.latest_step}"
      )
    self._start(step, flat)
    if block or self._failed:
      self._settle()
    return True

  def lost(self) -> str | None:
    """What became of the directory, in one clause; None while it is where people look for it."""
    return self._files.lost()

  def rescue(self, step: int, state: Any) -> str:
    """Saves `state` wherever that still can be, after the run's folder was lost; waits for it.

    A folder that was moved is still held and can be written to; one that was deleted alone is made again in
    its parent. With several processes nothing is tried: the others know nothing of the loss.

    Returns:
      A clause that says which step is saved, and where; or that nothing more could be.
    """
    try:
      if jax.process_count() > 1:
        raise CheckpointError("the other processes are still at work")
      with contextlib.suppress(CheckpointError):
        self._settle()
      before = self._files.base
      where = self._guarded(self._files.recover)
      if self._files.base != before:
        self._saved, self._manager = [], self._open_manager()
      if step != self.latest_step:
        self._save(step, state, block=True)
      return f"step {step} is saved in {shown(where)}"
    except (CheckpointError, RunFailedError) as e:
      return f"nothing more can be saved: {e}"

  def poll(self) -> list[int]:
    """The steps saved since the last call, oldest first; never waits for a save that is still running."""
    thread = self._pending.thread if self._pending else None
    if thread is not None and not thread.is_alive() and jax.process_count() == 1:
      self._settle()
    news, self._news = self._news, []
    return news

  def wait(self) -> None:
    """Waits until the save in flight is saved.

    Raises:
      SaveError: if it failed, and so did the second attempt or the state was donated meanwhile.
    """
    self._settle()
    if self._failed:
      raise SaveError(self._failed)
    if not self._read_only and processes.primary():
      self._files.purge()

  def restore(
    self, abstract_state: Any, *, subset: bool = False, step: int | None = None
  ) -> tuple[int, Any] | None:
    """Restores the newest step whose files all match its manifest, bit for bit.

    Newer steps that do not match are reported, one line each, and moved to aside/, so that training on
    can save their numbers again.

    Args:
      abstract_state: the pytree to fill, with leaves that have `shape`, `dtype` and `sharding`
        (jax.ShapeDtypeStruct or jax.Array). Where the sharding is on an abstract mesh or None, the mesh of
        jax.set_mesh is used, or one device if there is none.
      subset: the tree asks for some of the saved arrays only (the weights without the optimizer, say).
      step: restore this step and no other; only where the directory was opened with `read_only`. None: the
        newest one.

    Returns:
      (step, state), or None if no step was ever saved here.

    Raises:
      CheckpointError: if all steps are damaged (then nothing is moved), if one is another run's, if `step` is
        damaged or was not saved, or if the saved arrays have other paths, shapes or dtypes than asked for.
    """
    self._settle()
    if step is not None and not self._read_only:
      raise CheckpointError(f"{self._name} goes on from its newest step; step {step} can only be read")
    choose = self._files.choose if step is None else functools.partial(self._files.chosen, step)
    step = self._shared(choose)
    if step is None:
      return None
    if self._manager:
      self._manager.reload()
    self._saved = [s for s in self._files.saved() if s <= step]
    wanted = flatten(abstract_state, abstract=True)
    misfit = differences(read_manifest(self._files.path(step))["tree"], describe(wanted), subset)
    if misfit:
      raise CheckpointError(f"step {step} in {self._name} does not fit: {misfit}")
    item, arguments = {}, {}
    for path, leaf in wanted.items():
      stored = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
      item[path] = jax.ShapeDtypeStruct(stored.shape, stored.dtype)
      arguments[path] = ocp.ArrayRestoreArgs(sharding=sharding(path, leaf), global_shape=stored.shape)
    try:
      self._open_again(step, item)
      asked = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=subset)
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        flat = reader.restore(self._files.path(step) / "default", args=asked)
    except Exception as e:  # TensorStore raises bare Exceptions
      raise CheckpointError(f"step {step} in {self._name} cannot be read: {self._one_line(e)}") from e
    leaves = [
      jax.random.wrap_key_data(flat[path], impl=key_impl(leaf.dtype)) if is_key(leaf) else flat[path]
      for path, leaf in wanted.items()
    ]
    return step, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

  # Saving: start, then a thread that waits for the commit and writes the manifest, then settle.

  def _start(self, step: int, flat: dict[str, jax.Array]) -> None:
    tree = describe(flat)
    pending = self._pending = _Pending(step, flat)
    data = {path: jax.random.key_data(x) if is_key(x) else x for path, x in flat.items()}
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data)
    try:
      if processes.primary():
        self._files.begin(step)
      with jax.transfer_guard("allow"):  # the one place where the whole state is meant to leave the device
        if not self._manager.save(step, args=ocp.args.PyTreeSave(data), force=True):
          raise RuntimeError("Orbax declined to save it")
    except Exception as e:
      pending.error = e

    def finish():
      try:
        if pending.error is None:
          if processes.primary():
            self._files.purge()
          self._manager.wait_until_finished()
          if processes.primary():
            self._open_again(step, types)
            self._files.finish(step, tree)
          pending.flat = {}  # nothing to try again
      except BaseException as e:  # nothing may end this thread and look like a success
        pending.error = e

    pending.thread = threading.Thread(target=finish, name=f"save-{step}")
    pending.thread.start()

  def _open_again(self, step: int, types: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Opens arrays of a committed step; raises if one is not there, or not as wide and long as it should be.

    What a reader has to allocate follows from the stored pieces: they are no larger than their arrays.
    """
    folder: Any = self._files.path(step) / "default"
    there = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    for path, wanted in types.items():
      if path not in there:
        raise ValueError(f"{path} was not found when it was opened again")
      found = there[path]
      pieces = found.storage.chunk_shape if found.storage else found.shape
      fits = all(piece <= max(size, 1) for piece, size in zip(pieces, wanted.shape, strict=True))
      if (tuple(found.shape), found.dtype) != (wanted.shape, wanted.dtype) or not fits:
        raise ValueError(f"{path} was opened again as {found.dtype}{list(found.shape)} in pieces {pieces}")

  def _settle(self) -> None:
    """Joins the save in flight, if any: books its success, or reports its failure and tries again."""
    pending = self._pending
    if pending is None:
      return
    if pending.thread is not None:
      pending.thread.join()
    self._pending = None
    step, flat = pending.step, pending.flat
    failed, gone = processes.any_process(
      pending.error is not None, any(x.is_deleted() for x in flat.values())
    )
    if not failed:
      self._failed = None
      self._saved.append(step)
      self._news.append(step)
      self._retire()
      return
    reason = self._one_line(pending.error) if pending.error else "it failed in another process"
    second, free = self._failed is not None, self._free()
    self._failed = f"step {step} was not saved: {reason} ({free} in {self._name})"
    self._forget_errors()
    if jax.process_count() == 1 and self.lost():
      return  # that is what has to be said
    self._shared(lambda: self._files.clear_failed(step))
    self._manager.reload()
    if second:
      raise SaveError(f"{self._failed}; it was the second attempt")
    if gone:
      self._report(f"{self._failed}; its arrays were donated, the next save is the second attempt")
      return
    self._report(f"{self._failed}; trying once more")
    self._start(step, flat)
    self._settle()

  def _forget_errors(self) -> None:
    # Orbax raises an error of its threads again in each thread that asks, and then skips the save asked for.
    for ask in (self._manager.wait_until_finished, self._manager.check_for_errors):
      with contextlib.suppress(Exception):
        ask()

  def _retire(self) -> None:
    """Renames all but the newest `keep` steps into the trash; one rename each, so none is ever half there."""
    for step in self._saved[: -self._keep]:
      try:
        self._manager.delete(step)
      except FileNotFoundError:  # somebody else deleted it
        pass
      except OSError as e:  # a full disk, say, that has no room for the trash
        self._report(f"step {step} is kept, it cannot be deleted: {why(e)}; tried again after the next save")
        continue
      self._saved.remove(step)

  def _open_manager(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(todelete_subdir=TRASH)
    try:
      handler = ocp.PyTreeCheckpointHandler()
      return ocp.CheckpointManager(self._files.base, options=options, item_handlers=handler)
    except OSError as e:
      kind = CheckpointError if is_mistake(e) else SaveError
      raise kind(f"cannot use {self._name} for checkpoints: {why(e)}") from e
    except ValueError as e:
      raise CheckpointError(f"cannot use {self._name} for checkpoints: {self._one_line(e)}") from e

  @property
  def _name(self) -> str:
    return shown(self.directory)

  def _free(self) -> str:
    try:
      return f"{shutil.disk_usage(self._files.base).free / 1e6:.0f} MB free"
    except OSError as e:
      return why(e)

  def _shared(self, decide: Callable[[], Any]) -> Any:
    """What process 0 decides; its errors are raised in every process."""
    return processes.agree(lambda: self._guarded(decide), SaveError, CheckpointError, LostError)

  def _guarded(self, do: Callable[[], Any]) -> Any:
    try:
      return do()
    except OSError as e:
      kind = CheckpointError if is_mistake(e) else SaveError
      raise kind(f"cannot use {self._name} for checkpoints: {why(e)}") from e

  def _one_line(self, error: BaseException) -> str:
    text = " ".join(str(error).replace(str(self._files.base), self._name).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _is_ours(record: python_logging.LogRecord) -> bool:
  """Whether a record is no traceback of Orbax's: what becomes of a failed save is said in one line, by us."""
  return not (record.exc_info and "/orbax/checkpoint/" in f"{record.pathname} {record.getMessage()}")


for _logger in (logging.get_absl_logger(), python_logging.getLogger("asyncio")):
  _logger.addFilter(_is_ours)


@dataclasses.dataclass
class _Pending:
  """A save in flight. Its arrays are held for a second attempt, until the save is settled."""

  step: int
  flat: dict[str, jax.Array]
  error: BaseException | None = None
  thread: threading.Thread | None = None
