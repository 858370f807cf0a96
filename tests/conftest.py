"""Eight simulated CPU devices for every test, set before anything touches a backend."""

import gc
import os
import pathlib
import resource

import hypothesis
import jax
import pytest

from tests import compiling

# Time is never asserted: on a busy machine an example that took milliseconds before takes a second.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

os.environ.update(compiling.environment())  # children that tests start inherit it
jax.config.update("jax_disable_most_optimizations", compiling.QUICKLY)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Tracing makes many objects and little garbage, and what was imported stays: looking through all of it again
# and again took a tenth of the time of tracing and compiling.
gc.freeze()
gc.set_threshold(200_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def compiled(request):
  """How the module's programs are compiled, and those of its children."""
  quickly = compiling.quickly(request.path)
  jax.config.update("jax_disable_most_optimizations", quickly)
  with pytest.MonkeyPatch.context() as patch:
    if quickly:
      patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    yield
  jax.config.update("jax_disable_most_optimizations", compiling.QUICKLY)


PROCESS = pathlib.Path("/proc/self")
MOST_MAPS, MOST_BYTES = 20_000, 3e9


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
  """Drops compiled programs before they are too many for one process, or take too much of its memory.

  A program is several pieces of mapped memory, of which Linux allows a process 65,530. One more, and the
  compiler ends the process with a segmentation fault.
  """
  yield
  if not PROCESS.exists():
    return
  held = int((PROCESS / "statm").read_text().split()[1]) * resource.getpagesize()
  if held > MOST_BYTES or (PROCESS / "maps").read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def mesh_of_eight():
  """Sets the explicit mesh data = 4 x model = 2 for one test."""
  from sleep_jax import sharding
  from sleep_jax.config import MeshConfig

  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=4, model=2))) as mesh:
    yield mesh
