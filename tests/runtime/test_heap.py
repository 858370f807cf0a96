"""What a process keeps of the memory that it frees, counted in pages that the system has to give it again."""

import json
import os
import platform
import subprocess
import sys

import pytest

GNU = platform.libc_ver()[0] == "glibc"
PROGRAM = """
import json, resource, sys
import numpy as np
from sleep_jax.runtime import heap

shared, size = sys.argv[1] == "shared", int(sys.argv[2])
said = [heap.share_arena()] if shared else []
said.append(heap.keep(size))
for turn in range(4):
  if turn == 2:  # the first turns fill the heap
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  big = np.ones(2**25, np.uint8)
  del big
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"said": said, "faults": faults}))
"""


def run(shared, size):
  """What a process of its own says, and its page faults in taking 32 MiB twice."""
  env = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
  command = [sys.executable, "-c", PROGRAM, "shared" if shared else "alone", str(size)]
  return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not GNU, reason="only the GNU C library can be told to keep memory")
@pytest.mark.parametrize(("shared", "size"), [(True, 2**25), (False, 2**25), (True, 2**60)])
def test_freed_memory_is_kept_if_asked_for_and_affordable(shared, size):
  found = run(shared, size)
  kept = shared and size < 2**60
  assert found["said"] == ([True] if shared else []) + [kept]
  pages = 2 * 2**25 // os.sysconf("SC_PAGE_SIZE")
  # Large pages, where the system gives them unasked, are 512 times fewer; a kept heap needs next to none.
  assert (found["faults"] < pages // 1024) == kept, found


def test_elsewhere_nothing_happens(monkeypatch):
  from sleep_jax.runtime import heap

  monkeypatch.setattr(heap.sys, "platform", "darwin")
  monkeypatch.setattr(heap, "_largest", None)
  assert not heap.share_arena()
  assert not heap.keep(1)


@pytest.mark.parametrize(("text", "bounded"), [("4096\n", True), ("max\n", False), (None, False)])
def test_a_container_may_have_less_memory_than_its_machine(tmp_path, monkeypatch, text, bounded):
  from sleep_jax.runtime import heap

  monkeypatch.setattr(heap, "CONTAINER", tmp_path / "memory.max")
  if text is not None:
    heap.CONTAINER.write_text(text)
  assert heap._physical() == (4096 if bounded else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
