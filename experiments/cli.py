"""What every experiment's command line shares: configs, one-line errors, exit codes.

0 done, 1 failed, 2 the user's mistake, 3 stopped and saved. A config file is Python and is executed;
overrides on the command line are data.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import select
import stat
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict

from sleep_jax import train
from sleep_jax.config import Config, ConfigError, check, defaults_of, shown, to_dict
from sleep_jax.data.batching import WorkerError
from sleep_jax.experiments import config_file, fine_tuning, usage
from sleep_jax.kernels.common import devices
from sleep_jax.runtime import files, heap, joining, peers, processes, progress, signals, workdir
from sleep_jax.runtime.checkpoint import CheckpointError
from sleep_jax.runtime.files import RunFailedError
from sleep_jax.runtime.metrics import MetricsError
from sleep_jax.runtime.workdir import WorkdirError
from sleep_jax.train import NotFiniteError, PreemptedError

DONE, FAILED, USER_MISTAKE, STOPPED = 0, 1, 2, 3


class ConfigFlag:
  """The flag --config=FILE.py:PRESET, and what --config.GROUP.FIELD=VALUE changes of it.

  Attributes:
    value: what the file says, changed; None where the flag was not given.
    changes: what was changed, by dotted key.
    texts: the same as it was typed, known also where the flag was not given.
  """

  def __init__(self):
    self.value: config_dict.ConfigDict | None = None
    self.changes: dict[str, Any] = {}
    self.texts: dict[str, str | None] = {}
    flags.DEFINE_string(
      "config", None, "FILE.py:PRESET, executed; change fields with --config.GROUP.FIELD=VALUE"
    )

  @property
  def path(self) -> str | None:
    """FILE.py:PRESET as it was typed."""
    return flags.FLAGS["config"].value

  def read(self, texts: dict[str, str | None]) -> None:
    """Executes the file, if one was named, and changes its fields."""
    self.value, self.changes, self.texts = None, {}, texts
    if self.path is not None:
      self.value = config_file.read(self.path)
      self.changes = config_file.change(self.value, texts)


@functools.cache
def define_config_flag() -> ConfigFlag:
  """The flag --config; one for all mains of a process."""
  return ConfigFlag()


@functools.cache
def define_folder_flag() -> flags.FlagHolder:
  """The flag --workdir alone; one for all mains of a process."""
  return flags.DEFINE_string("workdir", None, "the only place written to")


@functools.cache
def define_checkpoint_flag() -> flags.FlagHolder:
  """The flag --checkpoint of what tests one; one for all mains of a process."""
  return flags.DEFINE_string("checkpoint", None, "a checkpoint's folder, or the workdir of a run")


@functools.cache
def define_workdir_flag() -> flags.FlagHolder:
  """The flag --workdir of a single run, and those of what is written there."""
  flags.DEFINE_integer(
    "profile", 0, "steps that are traced into the workdir's folder `profile`", lower_bound=0
  )
  flags.DEFINE_bool(
    "tensorboard", True, "write the workdir's folder `tb` beside metrics.jsonl, which has it all"
  )
  return define_folder_flag()


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


def _join() -> peers.Peers | None:
  """Meets the other processes, where the flags say that there are some; before any device is touched."""
  if "distributed" not in flags.FLAGS:
    return None
  names = ("coordinator_address", "num_processes", "process_id")
  asked = {name: flags.FLAGS[name].value for name in names}
  given = [name for name, value in asked.items() if value is not None]
  if not flags.FLAGS["distributed"].value:
    if given:
      raise ConfigError(f"--{given[0]} says nothing without --distributed")
    return None
  if given and len(given) < len(names):
    lacking = next(name for name in names if name not in given)
    raise ConfigError(f"--{lacking} is required beside --{given[0]}; only a cluster needs none of them")
  if given:
    count, index = asked["num_processes"], asked["process_id"]
    check(count >= 1, "--num_processes", f"must be at least 1, got {count}")
    check(0 <= index < count, "--process_id", f"must lie in 0..{count - 1}, got {index}")
  try:
    met = joining.join(*asked.values(), report=progress.say)
  except peers.PeerError as e:
    raise ConfigError(str(e)) from e
  if not processes.primary():
    sys.stdout = open(os.devnull, "w")  # the first one talks
  return met


def run(main: Callable[[], int | None]) -> NoReturn:
  """Parses flags, runs `main`, and ends the process with the exit code of what happened."""

  def parse(argv: list[str]) -> list[str]:
    logging.set_verbosity(logging.WARNING)  # unless --verbosity says otherwise
    try:
      check(not any("\0" in word for word in argv), "the command line", "must not hold NUL")
      words, changes = config_file.split(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
      if usage.asked(words):
        sys.exit(_help(usage.text(sys.modules[main.__module__], words)))
      _refuse_repeated(words)
      left = flags.FLAGS(words)
      if "config" in flags.FLAGS:
        define_config_flag().read(changes)
      elif changes:
        raise ConfigError(f"--config.{next(iter(changes))}: this command has no config")
    except ConfigError as e:
      sys.exit(_say(f"error: {e}", USER_MISTAKE))
    except flags.Error as e:
      said = str(e).strip().splitlines()[0]
      if isinstance(e, flags.UnrecognizedFlagError):
        meant = usage.fields_named(sys.modules[main.__module__], e.flagname)
        said += f"; did you mean {' or '.join(f'--config.{field}' for field in meant)}?" if meant else ""
      sys.exit(_say(f"error: {said}", USER_MISTAKE))
    return left

  def beside_others() -> int:
    met = _join()
    if met is None:
      return main() or DONE
    code = FAILED
    try:
      code = main() or DONE
    except (ConfigError, WorkdirError, PreemptedError) as e:  # in all processes alike
      code = STOPPED if isinstance(e, PreemptedError) else USER_MISTAKE
      raise
    except Exception:
      met.wait_for_news()
      raise
    finally:
      met.leave(code)
    return code

  def guarded(argv: list[str]) -> int:
    try:
      if len(argv) > 1:
        raise ConfigError(f"unexpected argument {shown(argv[1])}: every option is a flag, --name=value")
      return beside_others()
    except (NotFiniteError, WorkerError, RunFailedError) as e:
      return _say(f"failed: {e}", FAILED)
    except (ConfigError, WorkdirError, CheckpointError, MetricsError) as e:
      return _say(f"error: {e}", USER_MISTAKE)
    except PreemptedError as e:  # in all processes alike, so one says it
      return _say(str(e), STOPPED) if processes.primary() else STOPPED
    except BrokenPipeError:
      return _unread()
    except OSError as e:  # a disk that is full or does not work, which may be that of stdout
      _unread_if_full()
      if e.filename is not None and files.is_mistake(e):  # a path that somebody gave
        return _say(f"error: {e.filename}: {files.why(e)}", USER_MISTAKE)
      where = "" if e.filename is None else f"{e.filename}: "
      return _say(f"failed: {where}{files.why(e)}", FAILED)
    except (RuntimeError, AssertionError) as e:
      if (found := devices.lacking(e)) is None:
        raise
      return _say(f"error: {found}", USER_MISTAKE) if found.mistake else _say(f"failed: {found}", FAILED)
    except KeyboardInterrupt:
      return _say(signals.AT_ONCE, FAILED)

  if sys.stdout is not None and sys.stdout.errors == "strict":
    sys.stdout.reconfigure(errors="surrogateescape")  # a path is printed as it is, whatever its bytes mean
  listener = signals.own_process()
  sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
  try:
    app.run(guarded, flags_parser=parse)
  finally:
    _unread_if_full()
    if listener:
      listener.leave()
      if main.__module__ != "__main__":  # called by a program that may go on
        listener.close()
  raise AssertionError("app.run ends the process")


def train_in_workdir(
  cfg: Config,
  make_task: Callable[[workdir.Workdir], train.Task],
  check_task: Callable[[Config], None],
) -> dict[str, Any] | None:
  """Trains, or goes on training, in the folder of --workdir, which is left alone where a run is complete.

  A complete run is made longer by a larger `train.steps`: it goes on where it ended. It cannot be where the
  learning rate depends on the run's length (`OptimConfig.bound_to_length`).

  Args:
    cfg: of the run.
    make_task: called once the folder is taken.
    check_task: raises `ConfigError` where the config does not fit the task, before anything is written.

  Returns:
    The last evaluation's row; None, and a line is printed, if there was nothing left to do.

  Raises:
    BrokenPipeError: nobody reads stdout any more. A sweep that was killed leaves such runs behind, and its
      next start wants their folders.
    What `train.check_fits`, `check_task`, `workdir.prepare`, `make_task` and `train.train` raise.
  """
  folder = required("workdir", define_workdir_flag().value)
  heap.share_arena()
  train.check_fits(cfg)
  check_task(cfg)
  cfg, movable = fine_tuning.identified(cfg, folder)
  if _is_unread_pipe(sys.stdout):
    raise BrokenPipeError
  may_grow = () if cfg.optim.bound_to_length else ("train.steps",)
  with workdir.prepare(
    folder, to_dict(cfg), may_change=movable, may_grow=may_grow, defaults=defaults_of(cfg)
  ) as run:
    if run.done_step is not None and run.done_step >= cfg.train.steps:
      print(f"{files.shown(run.path)} is complete: {run.done_step} steps")
      return None
    options = {"profile_steps": flags.FLAGS["profile"].value, "tensorboard": flags.FLAGS["tensorboard"].value}
    return train.train(cfg, make_task(run), run, **options)


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


def whole_numbers(name: str, texts: Sequence[str]) -> list[int]:
  """The values of a flag that takes several numbers from 1 on.

  Raises:
    ConfigError: if one is no such number.
  """
  for text in texts:
    check(
      text.strip().isdecimal() and int(text) >= 1,
      f"--{name}",
      f"must be numbers from 1 on, got {shown(text)}",
    )
  return [int(text) for text in texts]


def required(name: str, value: Any) -> Any:
  """The flag's value.

  Raises:
    ConfigError: if it was not given.
  """
  if value is None:
    raise ConfigError(f"--{name} is required")
  return value


def folder_to_write(name: str, value: str) -> pathlib.Path:
  """The folder of a flag, which is there or can be made; nothing is made yet.

  Raises:
    ConfigError: if it is none, or may not be written to.
  """
  path = pathlib.Path(value)
  check(bool(value), f"--{name}", "is an empty path, the results need a folder")
  for there in (path, *path.parents):
    try:
      kind = os.stat(there).st_mode
    except FileNotFoundError:
      check(not there.is_symlink(), f"--{name}", f"{files.shown(there)} is a link to nothing")
      continue
    except OSError as e:
      raise ConfigError(f"--{name}: cannot write to {files.shown(value)}: {files.why(e)}") from e
    check(stat.S_ISDIR(kind), f"--{name}", f"{files.shown(there)} is a file, the results need a folder")
    usable = os.access(there, os.W_OK | os.X_OK)
    check(usable, f"--{name}", f"cannot write to {files.shown(value)}: Permission denied")
    break
  return path


def _refuse_repeated(words: Sequence[str]) -> None:
  """Raises `ConfigError` where a flag is given twice: one of the two would have no effect."""
  seen = set()
  for word in itertools.takewhile(lambda w: w != "--", words[1:]):
    name = word.lstrip("-").partition("=")[0]
    name = name if name in flags.FLAGS else name.removeprefix("no")
    if word.startswith("-") and name in flags.FLAGS:
      check(name not in seen, f"--{name}", "is given twice; give it once")
      seen.add(name)


def _help(text: str) -> int:
  """Prints it; the exit code."""
  try:
    print(text, flush=True)
  except BrokenPipeError:  # whoever reads it has seen enough
    _unread()
  return DONE


def _unread() -> int:
  """Nobody reads stdout any more: what is still to come goes nowhere, without a traceback; the exit code."""
  sys.stdout = open(os.devnull, "w")
  return FAILED


def _is_unread_pipe(stream: Any) -> bool:
  """Whether what is written there reaches nobody. False where the system does not say so."""
  try:
    number = stream.fileno()
    if not stat.S_ISFIFO(os.fstat(number).st_mode):
      return False
    poll = select.poll()
  except (AttributeError, OSError, ValueError):  # no stream, no file behind it, or no such call
    return False
  poll.register(number, 0)
  return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _unraisable(before: Callable[[Any], None], unraisable: Any) -> None:
  """Drops what TensorStore prints when a save failed and nobody waits for its other parts any more."""
  if str(unraisable.exc_value) != "Event loop is closed":
    before(unraisable)


def _unread_if_full() -> None:
  """What stdout cannot take is given up here, not by the interpreter at its end, with another exit code."""
  try:
    sys.stdout.flush()
  except (OSError, ValueError):
    _unread()


def _say(message: str, code: int) -> int:
  """A message to stderr, on one line; gives the exit code back."""
  line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
  if sys.stderr is not None:  # and if that can still be written to
    with contextlib.suppress(OSError, ValueError):
      print(line, file=sys.stderr, flush=True)
  return code
