"""Language models that sleep: context consolidated into fast weights before its cache is evicted.

    import jax
    import sleep_jax

    cfg = sleep_jax.ModelConfig(vocab_size=3, blocks=("attn", "gdn"), window=12)
    weights = sleep_jax.model.init(cfg, jax.random.key(0))

The names below are imported when they are first asked for, and so are the rooms (`sleep_jax.train`,
`sleep_jax.data`, ...): `import sleep_jax` alone imports no jax.
"""

import importlib
import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sleep_jax.config import Config as Config
  from sleep_jax.config import ConfigError as ConfigError
  from sleep_jax.config import ModelConfig as ModelConfig
  from sleep_jax.config import SleepConfig as SleepConfig
  from sleep_jax.flax_module import SleepingHybrid as SleepingHybrid
  from sleep_jax.pretrained import load_run as load_run
  from sleep_jax.rules import Rule as Rule

_HOMES = {  # name -> the module that has it
  "Config": "config",
  "ConfigError": "config",
  "ModelConfig": "config",
  "Rule": "rules",
  "SleepConfig": "config",
  "SleepingHybrid": "flax_module",
  "load_run": "pretrained",
}
_MODULES = "config data generate model optim pretrained rules sharding sleep train windows".split()

# In a clone these folders stand beside this one; installed, they lie in it. Either way they are imported as
# `sleep_jax.kernels` and so on, and no other top-level name is taken.
_BESIDE = ("kernels", "experiments", "launch", "benchmarks")
_root = pathlib.Path(__file__).resolve().parent.parent
_clone = (_root / "setup.cfg").is_file() and (_root / "kernels" / "gated_delta").is_dir()
if _clone:
  __path__.append(str(_root))


def require(extra: str, *modules: str) -> None:
  """Checks that the modules which an extra of this package installs can be imported.

  Raises:
    ImportError: if one cannot; its message names the extra. A program of this package (`python -m
      sleep_jax...`) prints that message and ends with exit code 2 instead.
  """
  missing = [module for module in modules if importlib.util.find_spec(module) is None]
  if not missing:
    return
  message = f"{missing[0]} is not installed; it comes with: pip install 'sleep_jax[{extra}]'"
  main = getattr(sys.modules["__main__"], "__spec__", None)
  # While `python -m` imports the packages around its module, argv[0] is "-m".
  if sys.argv[:1] == ["-m"] or (main and main.name.partition(".")[0] in (__name__, *_BESIDE)):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
  raise ImportError(message, name=missing[0])


def _version() -> str:
  """A clone's is in its setup.cfg; what was once installed from it may be older."""
  if _clone:
    import configparser

    setup = configparser.ConfigParser()
    setup.read(_root / "setup.cfg", encoding="utf-8")
    return setup["metadata"]["version"]
  import importlib.metadata

  return importlib.metadata.version(__name__)


def __getattr__(name: str) -> Any:
  if name == "__version__":
    return _version()
  if name in _MODULES:
    return importlib.import_module(f"{__name__}.{name}")
  if name in _HOMES:
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted(["__version__", "require", *_MODULES, *_HOMES])
