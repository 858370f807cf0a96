"""Permissions that hold for root too: what a file's mode forbids is forbidden, as it is for a user.

On Linux root reads and writes everything by two capabilities. A thread can lay them down and take them up
again; processes that it forks, and threads that it starts, are without them too.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator

# linux/capability.h: version 3 of the structures, and the bits of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
_VERSION, _OVERRIDES = 0x20080522, 1 << 1 | 1 << 2


class _Header(ctypes.Structure):
  _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
  _fields_ = (
    ("effective", ctypes.c_uint32),
    ("permitted", ctypes.c_uint32),
    ("inheritable", ctypes.c_uint32),
  )


def _call(name: str, header: _Header, sets: ctypes.Array) -> None:
  libc = ctypes.CDLL(None, use_errno=True)
  if getattr(libc, name)(ctypes.byref(header), sets):
    raise OSError(ctypes.get_errno(), f"{name} failed")


def drop(*, forever: bool) -> ctypes.Array | None:
  """Lays the two capabilities down in this thread; what was before, None if there was nothing to lay down.

  Args:
    forever: they cannot be taken up again. Only then does `os.access` know of it: Linux answers for the real
      user with all that it may take up.
  """
  if not hasattr(os, "geteuid") or os.geteuid() != 0:
    return None
  header, sets = _Header(_VERSION, 0), (_Sets * 2)()
  _call("capget", header, sets)
  before = (_Sets * 2).from_buffer_copy(sets)
  sets[0].effective &= ~_OVERRIDES
  if forever:
    sets[0].permitted &= ~_OVERRIDES
  _call("capset", header, sets)
  return before


@contextlib.contextmanager
def user() -> Iterator[None]:
  """Inside, modes of files bind this thread."""
  before = drop(forever=False)
  try:
    yield
  finally:
    if before is not None:
      _call("capset", _Header(_VERSION, 0), before)
