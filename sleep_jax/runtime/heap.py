"""The C library's heap: a training step on a CPU gets the memory that the step before it gave back.

XLA takes the temporary memory of a step from the C library and gives it back behind the step. The GNU C
library returns what is large to the system at once, which clears it, page by page, when the next step asks
for it again: a tenth to a quarter of the time of a step.
"""

import ctypes
import os
import pathlib
import sys

# Of mallopt(3): the number of each parameter, as its C header has it.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1
# Freed memory is not always found whole again: up to twice of what a step takes was held. Of this share of
# the machine's memory twice can be afforded.
SHARE = 0.25
CONTAINER = pathlib.Path("/sys/fs/cgroup/memory.max")  # bytes, or "max"

_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 * 1024}

_largest: int | None = None  # bytes that a step takes; None: nobody asked to keep memory


def share_arena() -> bool:
  """From now on all threads of this process take memory from one place; before JAX starts its threads.

  For a process of one's own, as a command line is: it is a setting of the whole process.

  Returns:
    Whether the C library is the GNU one, which alone can be told so.
  """
  global _largest
  shared = _mallopt(_ARENA_MAX, 1)
  _largest = 0 if shared else None
  return shared


def keep(size: int) -> bool:
  """From now on this process keeps what it frees, if it called `share_arena`.

  Args:
    size: bytes of temporary memory that a step takes. If this or an earlier one is more than `SHARE` of the
      machine's memory nothing is kept.

  Returns:
    Whether memory is kept.
  """
  global _largest
  if _largest is None:
    return False
  _largest = max(_largest, size)
  kept = _largest <= SHARE * _physical()
  _mallopt(_MMAP_MAX, 0 if kept else _DEFAULTS[_MMAP_MAX])
  _mallopt(_TRIM_THRESHOLD, _NEVER if kept else _DEFAULTS[_TRIM_THRESHOLD])
  return kept


def _physical() -> int:
  """Bytes of memory of this machine, or of the container if it has less; 0 where the system does not say."""
  try:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (AttributeError, ValueError, OSError):
    return 0
  try:
    limit = CONTAINER.read_text().strip()
  except OSError:
    return total
  return min(total, int(limit)) if limit.isdecimal() else total


def _mallopt(parameter: int, value: int) -> bool:
  if not sys.platform.startswith("linux"):
    return False
  library = ctypes.CDLL(None)
  if not (hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")):
    return False
  return bool(library.mallopt(parameter, value))
