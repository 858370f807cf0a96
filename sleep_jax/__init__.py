"""Language models that sleep: context consolidated into fast weights before its cache is evicted.

    import jax
    import sleep_jax

    cfg = sleep_jax.ModelConfig(vocab_size=3, blocks=("attn", "gdn"), window=12)
    weights = sleep_jax.model.init(cfg, jax.random.key(0))

The names below are imported when they are first asked for, and so are the rooms (`sleep_jax.train`,
`sleep_jax.data`, ...): `import sleep_jax` alone imports no jax.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
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


class _OneModule(importlib.abc.MetaPathFinder):
  """Makes `experiments.cli` and `sleep_jax.experiments.cli` one module in a clone, where both are found.

  Executed twice, it would have two of each class and register its flags and rules twice. The name that is
  imported first decides nothing but the module's `__name__`.
  """

  def find_spec(
    self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
  ) -> importlib.machinery.ModuleSpec | None:
    """The spec of a file that has two names, if this is the short one or the other was imported before."""
    short = fullname.removeprefix(f"{__name__}.")
    if short.partition(".")[0] not in _BESIDE or target is not None:  # of a module that is executed again
      return None
    other = short if short != fullname else f"{__name__}.{short}"
    if other == short and not _is_ours(short, getattr(sys.modules.get(short), "__file__", None)):
      return None
    found = importlib.machinery.PathFinder.find_spec(fullname, path)
    if found is None or not _is_ours(short, found.origin):
      return None
    found.loader = _SameModule(found.loader, other)
    return found


def _is_ours(short: str, file: str | None) -> bool:
  """Whether a file is the one of this clone that a short name stands for: others may use the name, too."""
  place = _root.joinpath(*short.split("."))
  return file is not None and pathlib.Path(file).resolve() in (
    place.with_suffix(".py"),
    place / "__init__.py",
  )


class _SameModule(importlib.abc.Loader):
  """Gives a module a second name; what a program asks of its file (`python -m`), the file's loader
  answers.
  """

  def __init__(self, loader: Any, name: str):
    self._loader, self._name = loader, name

  def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
    """The module by its other name."""
    del spec
    module = importlib.import_module(self._name)
    self._spec = module.__spec__  # which importlib is about to replace
    return module

  def exec_module(self, module: ModuleType) -> None:
    """Leaves it as it is: it was executed under its other name, or is just being executed."""
    module.__spec__ = self._spec

  def __getattr__(self, name: str) -> Any:
    return getattr(self._loader, name)


if _clone:
  __path__.append(str(_root))
  sys.meta_path.insert(0, _OneModule())


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
