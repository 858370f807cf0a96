"""What every experiment's command line shares: configs, one-line errors, exit codes.

0 done, 1 failed, 2 the user's mistake, 3 stopped and saved. A config file is Python and is executed;
overrides on the command line are data.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import sys
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from sleep_jax.checkpoint import CheckpointError
from sleep_jax.config import ConfigError, nearest
from sleep_jax.data.pipeline import WorkerError
from sleep_jax.metrics import MetricsError
from sleep_jax.train import NotFiniteError, PreemptedError
from sleep_jax.workdir import WorkdirError

DONE, FAILED, USER_MISTAKE, STOPPED = 0, 1, 2, 3
CONFIGS = pathlib.Path(__file__).parent / "configs"


@functools.cache
def define_config_flag() -> flags.FlagHolder:
  """The flag --config=FILE.py:PRESET, with --config.GROUP.FIELD=VALUE; one for all mains of a process."""
  return config_flags.DEFINE_config_file(
    "config", None, "FILE.py:PRESET, executed; change fields with --config.GROUP.FIELD=VALUE"
  )


@functools.cache
def define_workdir_flag() -> flags.FlagHolder:
  """The flag --workdir of a single run; one for all mains of a process."""
  return flags.DEFINE_string("workdir", None, "the only place written to")


def run(main: Callable[[], int | None]) -> NoReturn:
  """Parses flags, runs `main`, and ends the process with the exit code of what happened."""

  def parse(argv: list[str]) -> list[str]:
    logging.set_verbosity(logging.WARNING)  # unless --verbosity says otherwise
    try:
      for name, value in _flags_of(argv):
        if name == "config":
          _existing(value)
      return flags.FLAGS(argv)
    except ConfigError as e:
      sys.exit(_say(f"error: {e}", USER_MISTAKE))
    except (
      flags.Error,
      KeyError,
      AttributeError,
      ValueError,
      TypeError,
      OSError,
      ImportError,
      SyntaxError,
    ) as e:
      sys.exit(_say(f"error: {_explain(argv, e)}", USER_MISTAKE))

  def guarded(argv: list[str]) -> int:
    try:
      if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}: every option is a flag, --name=value")
      return main() or DONE
    except (ConfigError, WorkdirError, CheckpointError, MetricsError) as e:
      return _say(f"error: {e}", USER_MISTAKE)
    except (NotFiniteError, WorkerError) as e:
      return _say(f"failed: {e}", FAILED)
    except PreemptedError as e:
      return _say(str(e), STOPPED)
    except KeyboardInterrupt:
      return _say("stopped at once; what was saved before stays", FAILED)

  app.run(guarded, flags_parser=parse)
  raise AssertionError("app.run ends the process")


def defaults(value: Any) -> config_dict.ConfigDict:
  """A config dataclass as the `ConfigDict` that a config file starts from: all fields, with their types."""
  fields = config_dict.ConfigDict()
  hints = typing.get_type_hints(type(value))
  for field in dataclasses.fields(value):
    content = getattr(value, field.name)
    if dataclasses.is_dataclass(content):
      content = defaults(content)
    elif content is None:
      content = config_dict.placeholder(
        next(t for t in typing.get_args(hints[field.name]) if t is not type(None))
      )
    fields[field.name] = content
  return fields


def required(name: str, value: Any) -> Any:
  """The flag's value.

  Raises:
    ConfigError: if it was not given.
  """
  if value is None:
    raise ConfigError(f"--{name} is required")
  return value


def load(path: str) -> tuple[ModuleType, str | None]:
  """The module of a `FILE.py:PRESET`, executed, and the preset (None if there is none).

  Raises:
    ConfigError: if there is no such file.
  """
  file, preset = _existing(path)
  found = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
  if found is None:
    raise ConfigError(f"--config: {file!r} is no Python file")
  module = importlib.util.module_from_spec(found)
  try:
    found.loader.exec_module(module)
  except SyntaxError as e:
    raise ConfigError(f"--config: {file}, line {e.lineno}: {e.msg}") from e
  return module, preset or None


def _existing(path: str) -> tuple[str, str]:
  """The two parts of FILE.py:PRESET, or `ConfigError` if there is no such file."""
  file, _, preset = path.partition(":")
  if not pathlib.Path(file).is_file():
    there = sorted(f"{CONFIGS.parent.name}/{CONFIGS.name}/{p.name}" for p in CONFIGS.glob("[a-z]*.py"))
    raise ConfigError(f"--config: there is no file {file!r}; there are {', '.join(there)}")
  return file, preset


def _flags_of(argv: list[str]) -> list[tuple[str, str]]:
  """(name, value) of every --name=value and --name value."""
  given = []
  for word, after in zip(argv[1:], [*argv[2:], "-"], strict=False):
    name, equals, value = word.lstrip("-").partition("=")
    if word.startswith("-") and (equals or not after.startswith("-")):
      given.append((name, value if equals else after))
  return given


def _explain(argv: list[str], error: Exception) -> str:
  """One line for what went wrong while flags were parsed, with the nearest right name."""
  given = _flags_of(argv)
  files = [value for name, value in given if name == "config"]
  try:
    if files:
      module, _ = load(files[-1])
      _, *preset = files[-1].split(":", 1)
      values = module.get_config(*preset)
      for name, _ in given:
        if name.startswith("config."):
          _find(values, name)
  except (ConfigError, ValueError) as e:
    return str(e)
  text = error.args[0] if isinstance(error, KeyError) and error.args else error
  return str(text).strip().splitlines()[0]


def _find(values: Mapping[str, Any], name: str) -> None:
  """Raises `ConfigError` with the nearest name unless the dotted `name` is a field of the config."""
  seen, keys = "config", name.split(".")[1:]
  for key in keys:
    if not isinstance(values, config_dict.ConfigDict):
      raise ConfigError(f"--{name}: {seen} is a single value, not a group")
    key = key.partition("[")[0]
    if key not in values:
      raise ConfigError(f"--{name}: {seen} has no field {key!r}; {nearest(key, values.keys())}")
    seen, values = f"{seen}.{key}", values.get_ref(key).get()


def _say(message: str, code: int) -> int:
  """A message to stderr; gives the exit code back."""
  print(message, file=sys.stderr)
  return code
