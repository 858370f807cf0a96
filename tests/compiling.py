"""How tests compile: quickly, or as users do.

Four fifths of the suite's time would go into compiling programs that run once. Optimized less, they compute
the same to the tolerances of the tests and are ready two to four times sooner. `COMPILE_AS_USERS=1` leaves
XLA's options as they are for a user where numbers are compared: in the tests of the method, the kernels,
training, scoring and pretrained models, not in those of `ALWAYS_QUICKLY`. `.ci/run` sets it on one of the
Pythons.
"""

import os
import pathlib

import jaxlib

QUICKLY = os.environ.get("COMPILE_AS_USERS", "0") != "1"


ALWAYS_QUICKLY = ("benchmarks", "config", "cost", "data", "experiments", "launch", "report", "runtime")


def quickly(path: pathlib.Path) -> bool:
  """Whether the tests of a module compile quickly."""
  return QUICKLY or path.relative_to(pathlib.Path(__file__).parent).parts[0] in ALWAYS_QUICKLY


def flags(*more: str) -> str:
  """XLA_FLAGS for a child: `more`, and the options of XLA that no variable of JAX sets.

  A program is compiled in one piece: 32 pieces, for as many cores, take a third longer in all. What XLA does
  to loops alone pays in loops that run long. An option that a version of XLA does not know ends the process:
  that of the emitters went after jaxlib 0.10.
  """
  loops = ("simplify-while-loops", "while-loop-invariant-code-motion", "while-loop-constant-sinking")
  old = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11)
  emitters = ("--xla_cpu_use_fusion_emitters=false",) if old else ()
  without = f"--xla_disable_hlo_passes={','.join(loops)}"
  quickly = ("--xla_cpu_parallel_codegen_split_count=1", without, *emitters) if QUICKLY else ()
  return " ".join((*more, *quickly))


def environment() -> dict[str, str]:
  """Variables for this process, before its first computation, and for its children."""
  quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if QUICKLY else {}
  return quickly | {"XLA_FLAGS": flags(*os.environ.get("XLA_FLAGS", "").split())}
