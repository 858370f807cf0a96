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

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import threading
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from sleep_jax.runtime import processes
from sleep_jax.runtime.checkpoint_files import (
  TRASH,
  CheckpointError,
  CheckpointFiles,
  describe,
  differences,
  read_manifest,
  some,
)

__all__ = ["CheckpointError", "Checkpoints"]


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for the save in flight."""

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 3,
    read_only: bool = False,
    report: Callable[[str], None] = logging.warning,
  ):
    """Opens a directory of checkpoints, made if absent, and clears up what a killed run left behind.

    Args:
      directory: a local or shared file system path; one writer at a time.
      keep: how many of the newest steps stay; at least 1.
      read_only: restore only; nothing is made, moved or deleted, so a running trainer is not disturbed.
      report: takes one line about a damaged step or a failed save.

    Raises:
      CheckpointError: if `directory` cannot be used, or a step in it is a symbolic link.
    """
    if keep < 1:
      raise CheckpointError(f"keep must be at least 1, got {keep}")
    self.directory = pathlib.Path(os.path.abspath(directory))
    self._keep, self._read_only, self._report = keep, read_only, report
    self._pending: _Pending | None = None
    self._failed: str | None = None  # why the last save failed, until another one succeeds
    self._news: list[int] = []
    self._files = CheckpointFiles(self.directory, report, read_only)
    self._shared(self._files.tidy)
    options = ocp.CheckpointManagerOptions(todelete_subdir=TRASH, cleanup_tmp_directories=True)
    try:
      handler = ocp.PyTreeCheckpointHandler()
      self._manager = (
        None if read_only else ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)
      )
    except (OSError, ValueError) as e:
      raise CheckpointError(f"cannot use {self.directory} for checkpoints: {_one_line(e)}") from e
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
      CheckpointError: if the state holds NaN, infinity or something that is no jax.Array; if `step` is older
        than the latest; if two saves in a row failed.
    """
    if self._read_only:
      raise CheckpointError(f"{self.directory} was opened for reading only; step {step} cannot be saved")
    flat = _flatten(state)
    self._settle()
    if step == self.latest_step:
      return False
    if step < 0 or (self._saved and step < self.latest_step):
      raise CheckpointError(
        f"step {step} cannot be saved in {self.directory}: it holds step {self.latest_step}"
      )
    if self._files.path(step).exists():
      raise CheckpointError(f"{self._files.path(step)} exists but is no finished checkpoint; restore first")
    bad = _non_finite(flat)
    if bad:
      raise CheckpointError(
        f"step {step} is not saved, its state holds NaN or infinity in {some(bad)}; "
        f"the latest checkpoint remains step {self.latest_step}"
      )
    self._start(step, flat)
    if block or self._failed:
      self._settle()
    return True

  def poll(self) -> list[int]:
    """The steps saved since the last call, oldest first; never waits for a save that is still running."""
    if self._pending and not self._pending.thread.is_alive() and jax.process_count() == 1:
      self._settle()
    news, self._news = self._news, []
    return news

  def wait(self) -> None:
    """Waits until the save in flight is saved.

    Raises:
      CheckpointError: if it failed, and so did the second attempt or the state was donated meanwhile.
    """
    self._settle()
    if self._failed:
      raise CheckpointError(self._failed)
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
      CheckpointError: if all steps are damaged (then nothing is moved), `step` is or was not saved, or the
        saved arrays have other paths, shapes or dtypes than asked for.
    """
    self._settle()
    if step is not None and not self._read_only:
      raise CheckpointError(f"{self.directory} goes on from its newest step; step {step} can only be read")
    choose = self._files.choose if step is None else functools.partial(self._files.chosen, step)
    step = self._shared(choose)
    if step is None:
      return None
    if self._manager:
      self._manager.reload()
    self._saved = [s for s in self._files.saved() if s <= step]
    wanted = _flatten(abstract_state, abstract=True)
    misfit = differences(read_manifest(self._files.path(step))["tree"], describe(wanted), subset)
    if misfit:
      raise CheckpointError(f"step {step} in {self.directory} does not fit: {misfit}")
    item, arguments = {}, {}
    for path, leaf in wanted.items():
      stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
      item[path] = jax.ShapeDtypeStruct(stored.shape, stored.dtype)
      arguments[path] = ocp.ArrayRestoreArgs(sharding=_sharding(path, leaf), global_shape=stored.shape)
    try:
      asked = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=subset)
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        flat = reader.restore(self._files.path(step) / "default", args=asked)
    except Exception as e:  # TensorStore raises bare Exceptions
      raise CheckpointError(f"step {step} in {self.directory} cannot be read: {_one_line(e)}") from e
    leaves = [
      jax.random.wrap_key_data(flat[path], impl=_key_impl(leaf.dtype)) if _is_key(leaf) else flat[path]
      for path, leaf in wanted.items()
    ]
    return step, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

  # Saving: start, then a thread that waits for the commit and writes the manifest, then settle.

  def _start(self, step: int, flat: dict[str, jax.Array]) -> None:
    tree = describe(flat)
    pending = self._pending = _Pending(step, flat)
    try:
      if processes.primary():
        self._files.begin(step)
      data = {path: jax.random.key_data(x) if _is_key(x) else x for path, x in flat.items()}
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
            self._files.finish(step, tree)
          pending.flat = {}  # nothing to try again
      except BaseException as e:  # nothing may end this thread and look like a success
        pending.error = e

    pending.thread = threading.Thread(target=finish, name=f"save-{step}")
    pending.thread.start()

  def _settle(self) -> None:
    """Joins the save in flight, if any: books its success, or reports its failure and tries again."""
    pending = self._pending
    if pending is None:
      return
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
    reason = _one_line(pending.error) if pending.error else "it failed in another process"
    second, free = self._failed is not None, shutil.disk_usage(self.directory).free
    self._failed = f"step {step} was not saved: {reason} ({free / 1e6:.0f} MB free in {self.directory})"
    self._forget_errors()
    self._shared(lambda: self._files.clear_failed(step))
    self._manager.reload()
    if second:
      raise CheckpointError(f"{self._failed}; it was the second attempt")
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
    retired, self._saved = self._saved[: -self._keep], self._saved[-self._keep :]
    for step in retired:
      with contextlib.suppress(FileNotFoundError):  # somebody else deleted it
        self._manager.delete(step)

  def _shared(self, decide: Callable[[], int | None]) -> int | None:
    """What process 0 decides; its CheckpointErrors are raised in every process."""

    def guarded() -> int | None:
      try:
        return decide()
      except OSError as e:
        raise CheckpointError(f"cannot use {self.directory} for checkpoints: {_one_line(e)}") from e

    return processes.agree(guarded, CheckpointError)


@dataclasses.dataclass
class _Pending:
  """A save in flight. Its arrays are held for a second attempt, until the save is settled."""

  step: int
  flat: dict[str, jax.Array]
  error: BaseException | None = None
  thread: threading.Thread | None = None


# Trees: a state is saved as a flat mapping from dotted path to array, so that restoring depends on no class.


def _flatten(tree: Any, *, abstract: bool = False) -> dict[str, Any]:
  flat = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = jax.tree_util.keystr(key_path, simple=True, separator=".") or "value"
    if path in flat:
      raise CheckpointError(f"two leaves of the state are both called {path}")
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype") if abstract else isinstance(leaf, jax.Array)):
      raise CheckpointError(f"{path} is a {type(leaf).__name__}, a state holds nothing but jax arrays")
    flat[path] = leaf
  if not flat:
    raise CheckpointError("the state holds no arrays")
  return flat


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(dtype: Any) -> str:
  for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
    if jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)).dtype == dtype:
      return impl
  raise CheckpointError(f"PRNG keys of type {dtype} cannot be restored")


def _sharding(path: str, leaf: Any) -> jax.sharding.Sharding:
  sharding, mesh = getattr(leaf, "sharding", None), jax.sharding.get_mesh()
  on_abstract_mesh = isinstance(sharding, NamedSharding) and isinstance(
    sharding.mesh, jax.sharding.AbstractMesh
  )
  if sharding is not None and not on_abstract_mesh:
    return sharding
  if not mesh.empty:
    return NamedSharding(mesh, sharding.spec if on_abstract_mesh else PartitionSpec())
  if jax.process_count() > 1 or (on_abstract_mesh and not sharding.mesh.empty):
    raise CheckpointError(f"{path} has no devices to be restored to; enter the mesh with jax.set_mesh first")
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def _non_finite(flat: dict[str, jax.Array]) -> list[str]:
  groups = collections.defaultdict(list)  # one compiled check takes arrays of one set of devices
  for path, x in flat.items():
    if x.size and jnp.issubdtype(x.dtype, jnp.inexact):
      groups[frozenset(x.sharding.device_set)].append(path)
  bad = []
  for paths in groups.values():
    finite = jax.device_get(_all_finite([flat[path] for path in paths]))
    bad += [path for path, ok in zip(paths, finite, strict=True) if not ok]
  return bad


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
