"""What every experiment's command line shares: configs, one-line errors, exit codes.

0 done, 1 failed, 2 the user's mistake, 3 stopped and saved. A config file is Python and is executed;
overrides on the command line are data.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from sleep_jax import train
from sleep_jax.config import Config, ConfigError, check, defaults_of, nearest, to_dict
from sleep_jax.data.batching import WorkerError
from sleep_jax.runtime import processes, workdir
from sleep_jax.runtime.checkpoint import CheckpointError
from sleep_jax.runtime.metrics import MetricsError
from sleep_jax.runtime.workdir import WorkdirError
from sleep_jax.train import NotFiniteError, PreemptedError

DONE, FAILED, USER_MISTAKE, STOPPED = 0, 1, 2, 3
CONFIGS = pathlib.Path(__file__).parent / "configs"


class FailedError(RuntimeError):
  """Something failed that is nobody's mistake: one line, exit code 1."""


@functools.cache
def define_config_flag() -> flags.FlagHolder:
  """The flag --config=FILE.py:PRESET, with --config.GROUP.FIELD=VALUE; one for all mains of a process."""
  return config_flags.DEFINE_config_file(
    "config", None, "FILE.py:PRESET, executed; change fields with --config.GROUP.FIELD=VALUE"
  )


def config_as_given() -> tuple[str, dict[str, Any]]:
  """FILE.py:PRESET of the flag --config, and the fields that the command line changes, by dotted key."""
  flag = flags.FLAGS["config"]
  return config_flags.get_config_filename(flag), config_flags.get_override_values(flag)


@functools.cache
def define_workdir_flag() -> flags.FlagHolder:
  """The flag --workdir of a single run; one for all mains of a process."""
  flags.DEFINE_integer(
    "profile", 0, "steps that are traced into the workdir's folder `profile`", lower_bound=0
  )
  return flags.DEFINE_string("workdir", None, "the only place written to")


@functools.cache
def define_process_flags() -> None:
  """The flags of a run that is spread over several processes, --distributed and those that name it."""
  flags.DEFINE_bool(
    "distributed",
    False,
    "this is one of several processes of one run, that share a file system; which one is found out on Slurm,"
    " Cloud TPU, Kubernetes and under MPI",
  )
  flags.DEFINE_string("coordinator_address", None, "elsewhere: HOST:PORT of the first process")
  flags.DEFINE_integer("num_processes", None, "elsewhere: how many there are")
  flags.DEFINE_integer("process_id", None, "elsewhere: which one this is, 0 .. num_processes - 1")


def _join() -> None:
  """Meets the other processes, where the flags say that there are some; before any device is touched."""
  if "distributed" not in flags.FLAGS:
    return
  names = ("coordinator_address", "num_processes", "process_id")
  asked = {name: flags.FLAGS[name].value for name in names}
  given = [name for name, value in asked.items() if value is not None]
  if not flags.FLAGS["distributed"].value:
    if given:
      raise ConfigError(f"--{given[0]} says nothing without --distributed")
    return
  if given and len(given) < len(names):
    lacking = next(name for name in names if name not in given)
    raise ConfigError(f"--{lacking} is required beside --{given[0]}; only a cluster needs none of them")
  if given:
    count, index = asked["num_processes"], asked["process_id"]
    check(count >= 1, "--num_processes", f"must be at least 1, got {count}")
    check(0 <= index < count, "--process_id", f"must lie in 0..{count - 1}, got {index}")
    if asked["coordinator_address"].startswith(("127.0.0.1:", "localhost:")):
      asked["coordinator_bind_address"] = asked["coordinator_address"]  # JAX would listen on all interfaces
  try:
    jax.distributed.initialize(**asked)
  except ValueError as e:
    told = str(e).splitlines()[0] if given else f"no cluster was found here; give {', '.join(names)}"
    raise ConfigError(f"--distributed: {told}") from e
  if not processes.primary():
    sys.stdout = open(os.devnull, "w")  # the first one talks


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
      _join()
      return main() or DONE
    except (ConfigError, WorkdirError, CheckpointError, MetricsError) as e:
      return _say(f"error: {e}", USER_MISTAKE)
    except (FailedError, NotFiniteError, WorkerError) as e:
      return _say(f"failed: {e}", FAILED)
    except PreemptedError as e:
      return _say(str(e), STOPPED)
    except KeyboardInterrupt:
      return _say("stopped at once; what was saved before stays", FAILED)

  app.run(guarded, flags_parser=parse)
  raise AssertionError("app.run ends the process")


def train_in_workdir(
  cfg: Config, make_task: Callable[[workdir.Workdir], train.Task]
) -> dict[str, Any] | None:
  """Trains, or goes on training, in the folder of --workdir, which is left alone where a run is complete.

  Args:
    cfg: of the run.
    make_task: called once the folder is taken.

  Returns:
    The last evaluation's row; None, and a line is printed, if there was nothing left to do.

  Raises:
    What `train.check_fits`, `workdir.prepare`, `make_task` and `train.train` raise.
  """
  folder = required("workdir", define_workdir_flag().value)
  train.check_fits(cfg)
  with workdir.prepare(folder, to_dict(cfg), defaults=defaults_of(cfg)) as run:
    if run.done_step is not None:
      print(f"{run.path} is complete: {run.done_step} steps")
      return None
    return train.train(cfg, make_task(run), run, profile_steps=flags.FLAGS["profile"].value)


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
  """A message to stderr, if that can still be written to; gives the exit code back."""
  if sys.stderr is not None:
    with contextlib.suppress(OSError, ValueError):
      print(message, file=sys.stderr, flush=True)
  return code
