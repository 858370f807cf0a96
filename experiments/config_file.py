"""Config files: which one `--config` means, what it says, and how a command line changes its fields.

A config file is Python and is executed, once a process. Changes on the command line are data.
"""

import ast
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import config_dict

from sleep_jax.config import ConfigError, check, nearest, shown

CONFIGS = pathlib.Path(__file__).parent / "configs"


def find(path: str) -> tuple[str, str | None]:
  """The file of a FILE.py:PRESET, and the preset (None without a colon).

  The files of this package are found from everywhere: `experiments/configs/rule110.py` where there is no such
  file, `rule110.py` and `rule110` mean the package's own.

  Raises:
    ConfigError: if there is no such file.
  """
  file, colon, preset = path.rpartition(":")
  if not colon or os.path.isfile(path):
    file, colon, preset = path, "", ""
  own = re.fullmatch(r"((sleep_jax/)?experiments/configs/)?(?P<name>\w+)(\.py)?", os.path.normpath(file))
  if own and not (file.endswith(".py") and os.path.isfile(file)):
    file = packaged if os.path.isfile(packaged := str(CONFIGS / f"{own['name']}.py")) else file
  known = ", ".join(sorted(p.stem for p in CONFIGS.glob("[a-z]*.py")))
  check(os.path.isfile(file), "--config", f"there is no file {shown(file)}; there are {known}, or FILE.py")
  check(file.endswith(".py"), "--config", f"{shown(file)} is no Python file, FILE.py")
  return file, preset if colon else None


def load(path: str) -> tuple[ModuleType, str | None]:
  """The module of a FILE.py:PRESET, executed, and the preset (None without a colon).

  Raises:
    ConfigError: if there is no such file, or executing it fails.
  """
  file, preset = find(path)
  return _executed(file), preset


def read(path: str) -> config_dict.ConfigDict:
  """What `get_config` of a FILE.py:PRESET returns.

  Raises:
    ConfigError: if there is no such file or preset, executing it fails, or it has no such function.
  """
  module, preset = load(path)
  file, get_config = module.__file__, getattr(module, "get_config", None)
  check(callable(get_config), "--config", f"{file} has no function get_config")
  arguments = () if preset is None else (preset,)
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    raise ConfigError(
      f"--config: {file} {'takes no' if arguments else 'needs a'} preset, FILE.py:PRESET"
    ) from None
  try:
    values = get_config(*arguments)
  except (Exception, SystemExit) as e:
    raise _failed(file, e) from e
  kind = type(values).__name__
  right = isinstance(values, config_dict.ConfigDict)
  check(right, "--config", f"get_config of {file} must return a ConfigDict, got {kind}")
  return values


@functools.cache
def _executed(file: str) -> ModuleType:
  name = f"config_file_{len(sys.modules)}"  # of its own: it may be called as a module that there is
  found = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(found)
  sys.modules[name] = module  # where dataclasses that it defines look for it
  try:
    found.loader.exec_module(module)
  except SyntaxError as e:
    line = f", line {e.lineno}" if e.lineno else ""
    raise ConfigError(f"--config: {e.filename or file}{line}: {e.msg}") from e
  except OSError as e:
    raise ConfigError(f"--config: {file} cannot be read: {e.strerror or e}") from e
  except (Exception, SystemExit) as e:
    raise _failed(file, e) from e
  return module


def _failed(file: str, error: BaseException) -> ConfigError:
  """One line for what code of a config file raised; a `ValueError` speaks for itself."""
  said = " ".join(str(error).split())
  if isinstance(error, ConfigError):
    return ConfigError(said)
  if isinstance(error, ValueError):
    return ConfigError(f"--config: {said}")
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
  line = f", line {lines[-1]}" if lines else ""
  return ConfigError(f"--config: {file}{line}: {type(error).__name__}: {said}")


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
  """Parts a command line into its other words and the changes --config.GROUP.FIELD=VALUE.

  Returns:
    The words that are no changes; and by dotted key what each field is to be, as text; None without a value.

  Raises:
    ConfigError: if a field is changed twice.
  """
  others, changes, words = [], {}, list(argv)
  while words:
    word = words.pop(0)
    if word == "--":
      return [*others, word, *words], changes
    found = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL)
    if not found:
      others.append(word)
      continue
    off, key, text = found.groups()
    if text is None and not off and words and re.match(r"[^-]|-[.\d]", words[0]):
      text = words.pop(0)
    if key in changes:
      raise ConfigError(f"--config.{_short(key)} is given twice; give it once")
    changes[key] = "false" if off and text is None else text
  return others, changes


def change(values: config_dict.ConfigDict, changes: Mapping[str, str | None]) -> dict[str, Any]:
  """Changes fields of a config in place.

  Args:
    values: as `read` gives them.
    changes: as `split` gives them.

  Returns:
    What each changed field is now, by dotted key.

  Raises:
    ConfigError: for a field that there is not, or a text that cannot be its value.
  """
  parsed = {}
  for name, text in changes.items():
    group, key = _place(values, name)
    parsed[name] = parse(f"config.{name}", text, group.get_type(key), group[key])
    group[key] = parsed[name]
  return parsed


def parse(name: str, text: str | None, kind: type, old: Any) -> Any:
  """The value of a field that a text on the command line stands for.

  `None` and `none` stand for None, but not in a field that holds text, where `from_dict` decides.

  Args:
    name: of the flag, for messages.
    text: behind the =. None: there was none, which turns a switch on.
    kind: type of the field.
    old: its value, an example for messages.

  Raises:
    ConfigError: if it stands for no value of this type.
  """
  flag = f"--{_short(name)}" if text is None else f"--{_short(name)}={_short(text)}"
  if kind is bool:
    try:
      return flags.BooleanParser().parse("true" if text is None else text)
    except ValueError:
      raise ConfigError(f"{flag}: must be true or false") from None
  check(text is not None, flag, f"needs a value, --{_short(name)}=VALUE")
  if issubclass(kind, config_dict.ConfigDict):
    raise ConfigError(f"{flag}: is a group of fields, --{_short(name)}.FIELD=VALUE with {', '.join(old)}")
  if kind is str:
    return text
  if text.strip() in ("None", "none"):
    return None
  if kind in (int, float):
    parser = flags.IntegerParser() if kind is int else flags.FloatParser()
    try:
      return parser.convert(text.strip())
    except ValueError:
      raise ConfigError(f"{flag}: must be a {'whole number' if kind is int else 'number'}") from None
  if kind in (tuple, list):
    items = _items(text)
    example = typed(old) if old else "('a','b')"
    check(items is not None, flag, f'is no list that can be read; write --{_short(name)}="{example}"')
    return kind(items)
  try:
    return ast.literal_eval(text)
  except _NOT_LITERAL:
    return text


def typed(value: Any) -> str:
  """A value as one would type it behind the =."""
  if isinstance(value, (tuple, list)):
    inner = ",".join(repr(x) for x in value)
    return f"({inner},)" if len(value) == 1 else f"({inner})"
  return str(value)


_NOT_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def _items(text: str) -> tuple[Any, ...] | None:
  """The values of a list: as Python writes it, or bare words between commas; None if it is neither."""
  try:
    value = ast.literal_eval(text.strip())
  except _NOT_LITERAL:
    inner = re.fullmatch(r"\s*(?:\((.*)\)|\[(.*)\]|(.*))\s*", text, re.DOTALL)
    words = next(x for x in inner.groups() if x is not None).split(",")
    words = [word.strip() for word in (words if words[-1].strip() else words[:-1])]
    return tuple(words) if words and all(re.fullmatch(r"[^\s'\"(){}\[\]]+", w) for w in words) else None
  if isinstance(value, (tuple, list)):
    return tuple(value)
  return None if isinstance(value, (dict, set)) else (value,)


def _place(values: config_dict.ConfigDict, name: str) -> tuple[config_dict.ConfigDict, str]:
  """The group and the key in it of a dotted name, or `ConfigError` with the nearest one that there is."""
  seen, keys = "config", name.split(".")
  for i, key in enumerate(keys):
    if not isinstance(values, config_dict.ConfigDict):
      raise ConfigError(f"--config.{_short(name)}: {seen} is a single value, not a group")
    if key not in values:
      known = nearest(key, values.keys())
      raise ConfigError(f"--config.{_short(name)}: {_short(seen)} has no field {shown(key)}; {known}")
    if i < len(keys) - 1:
      seen, values = f"{seen}.{key}", values[key]
  return values, keys[-1]


def _short(text: str) -> str:
  """A text of the command line as a message shows it: on one line, and not endless."""
  return shown(text)[1:-1] if not text.isprintable() or len(text) > 80 else text
