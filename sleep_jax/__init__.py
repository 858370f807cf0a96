"""Language models that sleep: context consolidated into fast weights before its cache is evicted."""

import pathlib

# In a clone the folders `kernels`, `experiments`, `launch` and `benchmarks` stand beside this one; installed,
# they lie in it. Either way they are imported as `sleep_jax.kernels` and so on, and no other top-level name
# is taken.
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "kernels" / "gated_delta").is_dir():
  __path__.append(str(_root))
