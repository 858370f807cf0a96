"""What --help prints: an experiment's flags, its presets, and every field of its config.

Nothing of it is written here: presets are described by the docstring of their config file, fields by those of
the dataclasses, flags where they are defined.
"""

import dataclasses
import inspect
import itertools
import pathlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags

from sleep_jax.config import annotations, documentation
from sleep_jax.experiments import config_file

WORDS = ("-h", "-?", "-help", "--help", "--helpshort", "--helpfull")
COLUMN = 30  # where the second column begins
NARROW = 70  # a narrower terminal has room for one column only
VERBOSITY = "how much is logged on stderr: -1 warnings, 0 and 1 more"
HOW = (
  "Change one with --config.GROUP.FIELD=VALUE, a list with --config.model.blocks=attn,gdn or"
  " --config.model.blocks=\"('attn','gdn')\"; None stands for nothing."
)


def asked(words: Sequence[str]) -> bool:
  """Whether a command line asks for help."""
  return any(word in WORDS for word in itertools.takewhile(lambda w: w != "--", words[1:]))


def text(main: ModuleType, words: Sequence[str] = (), width: int | None = None) -> str:
  """The help of an experiment.

  Args:
    main: its module. `FIELDS`, if it has that, has the dataclass of its config, and of each group in it that
      the annotations do not say.
    words: the command line. A --config in it says whose presets and values are shown.
    width: columns. None: those of the terminal.

  Raises:
    ConfigError: if the config file that the command line names cannot be read.
  """
  width = width or min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120)
  parts = [_prose(main.__doc__ or "", width), "\n".join(["Flags", *_flags(main, width)])]
  kinds = getattr(main, "FIELDS", None)
  if kinds is None:
    return "\n\n".join(parts)
  named = _config_of(words)
  path = named or pathlib.Path(main.__file__).stem
  module, values = config_file.load(path)[0], config_file.read(path).to_dict() if named else None
  file = named.rpartition(":")[0] or named if named else path
  rows = [row for name, line in presets(module).items() for row in _row(name, line, width)]
  parts.append("\n".join([f"Presets, --config={file}:PRESET", *rows]))
  which = (
    f"as {named} has them"
    if named
    else "with their defaults; those of a preset: --config=FILE.py:PRESET --help"
  )
  parts.append(textwrap.fill(f"Fields, {which}. {HOW}", width))
  parts += ["\n".join(lines) for lines in _groups("", kinds[""], dataclasses.MISSING, values, kinds, width)]
  return "\n\n".join(parts)


def presets(module: ModuleType) -> dict[str, str]:
  """Preset -> a line about it: the first sentence of its entry in the docstring of the config file."""
  doc, found = inspect.cleandoc(module.__doc__ or ""), {}
  for name in getattr(module, "PRESETS", ()):
    entry = re.search(rf"^( *){re.escape(name)}  +(.*(?:\n\1 +.*)*)", doc, re.MULTILINE)
    sentence = "" if entry is None else re.split(r"\.\s", " ".join(entry[2].split()))[0]
    found[name] = sentence.removesuffix(".")
  return found


def fields_named(main: ModuleType, flag: str) -> list[str]:
  """Fields of an experiment's config that a wrong flag may have meant, with their dots.

  Args:
    main: as for `text`; a module without `FIELDS` has none.
    flag: `steps`, `train.steps` or `confg.train.steps`: the fields that end with most of its words.
  """
  kinds, words = getattr(main, "FIELDS", {}), flag.split(".")
  fields = list(_fields("", kinds[""], kinds)) if kinds else []
  for first in range(len(words)):
    end = words[first:]
    if found := [field for field in fields if field.split(".")[-len(end) :] == end]:
      return found
  return []


def _fields(path: str, kind: type, kinds: Mapping[str, type]) -> Iterator[str]:
  """Dotted names of all fields of a group that are no groups; arguments as for `_groups`."""
  hints = annotations(kind)
  inner = {
    f.name: kinds.get(f"{path}.{f.name}" if path else f.name, hints[f.name]) for f in dataclasses.fields(kind)
  }
  if not path:
    inner |= {name: kinds[name] for name in kinds if name}
  for name, hint in inner.items():
    here = f"{path}.{name}" if path else name
    if dataclasses.is_dataclass(hint):
      yield from _fields(here, hint, kinds)
    else:
      yield here


def _config_of(words: Sequence[str]) -> str | None:
  """FILE.py:PRESET of a command line."""
  for word, following in zip(words, [*words[1:], None], strict=False):
    name, equals, value = word.partition("=")
    if name in ("-config", "--config"):
      return value if equals else following
  return None


def _flags(main: ModuleType, width: int) -> Iterator[str]:
  """A row for each flag of the experiment, and for absl's --verbosity."""
  of_module = flags.FLAGS.flags_by_module_dict()
  names = [
    m for m in of_module if m in (main.__name__, sys.argv[0]) or m.startswith("sleep_jax.experiments.")
  ]
  ours = [flag for name in names for flag in of_module[name]]
  for flag in [*ours, flags.FLAGS["verbosity"]]:
    if isinstance(flag.default, bool):
      left = f"--{'no' if flag.default else ''}{flag.name}"
    else:
      left = f"--{flag.name}={'...' if flag.default is None else config_file.typed(flag.default)}"
    yield from _row(left, VERBOSITY if flag.name == "verbosity" else flag.help, width)


def _groups(
  path: str, kind: type, default: Any, values: Mapping[str, Any] | None, kinds: Mapping[str, type], width: int
) -> Iterator[list[str]]:
  """The lines of a group of fields and of all groups in it, the outermost first.

  Args:
    path: of the group in the whole, "" for the whole.
    kind: its dataclass.
    default: what it is where nothing is said; `MISSING` if something must be.
    values: the values to be shown, of these fields alone. None: the defaults, of all fields.
    kinds: the dataclasses of groups by path, as far as the annotation of a field does not say them.
  """
  said = documentation(kind)
  title = f"{path or 'config'}: {inspect.cleandoc(kind.__doc__).splitlines()[0]}"
  lines, inner = textwrap.wrap(title, width), []
  for field in dataclasses.fields(kind):
    if values is not None and field.name not in values:
      continue
    here = f"{path}.{field.name}" if path else field.name
    usual = field.default if default is dataclasses.MISSING else getattr(default, field.name)
    value = usual if values is None else values[field.name]
    hint = kinds.get(here, annotations(kind)[field.name])
    if dataclasses.is_dataclass(hint):
      inner.append((here, hint, usual, None if values is None else value))
      continue
    shown = "..." if value is dataclasses.MISSING else config_file.typed(value)
    lines += _row(f"{field.name}={shown}", said.get(field.name, ""), width)
  for here in kinds if not path else ():
    if here and here not in annotations(kind) and (values is None or here in values):
      inner.append((here, kinds[here], dataclasses.MISSING, None if values is None else values[here]))
  yield lines
  for group in inner:
    yield from _groups(*group, kinds, width)


def _prose(doc: str, width: int) -> str:
  """A docstring with its paragraphs filled anew; what is indented stays as it is."""
  parts = inspect.cleandoc(doc).split("\n\n")
  return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in parts)


def _row(left: str, right: str, width: int) -> list[str]:
  """Two columns; one below the other where the first has no room beside the second."""
  beside = width >= NARROW
  indent = " " * (COLUMN if beside else 6)
  lines = textwrap.wrap(right, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
  if beside and lines and len(left) + 4 <= COLUMN:
    return [f"  {left:{COLUMN - 2}}{lines[0].lstrip()}", *lines[1:]]
  return [f"  {left}", *lines]
