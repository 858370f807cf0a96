"""What the commands that run whole series of measurements share: one-line errors, exit codes, results by
line.

Exit codes are those of the experiments: 0 done, 1 something failed, 2 the user's mistake, 3 stopped, start
again.
"""

import argparse
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sleep_jax.config import ConfigError, nearest, shown
from sleep_jax.experiments import cli
from sleep_jax.kernels.common import devices
from sleep_jax.runtime import files
from sleep_jax.runtime.files import RunFailedError


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
  """The exit code of `main`; a mistake, a failed measurement, a failed disk and Ctrl-C are one line."""
  try:
    return main(argv)
  except ConfigError as e:
    say(f"error: {e}")
    return cli.USER_MISTAKE
  except RunFailedError as e:
    say(f"failed: {e}")
    return cli.FAILED
  except OSError as e:
    if isinstance(e, BrokenPipeError) or e.errno is None:
      raise
    where = "" if e.filename is None else f"{files.shown(e.filename)}: "
    mistake = e.filename is not None and files.is_mistake(e)
    say(f"{'error' if mistake else 'failed'}: {where}{files.why(e)}")
    return cli.USER_MISTAKE if mistake else cli.FAILED
  except (RuntimeError, AssertionError) as e:
    if (found := devices.lacking(e)) is None:
      raise
    say(f"{'error' if found.mistake else 'failed'}: {found}")
    return cli.USER_MISTAKE if found.mistake else cli.FAILED
  except KeyboardInterrupt:
    say("interrupted")
    return cli.FAILED


def say(message: str) -> None:
  """A message on stderr, on one line whatever it holds."""
  line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
  print(line, file=sys.stderr, flush=True)


def folder(value: str) -> pathlib.Path:
  """The folder of `--out`, made if it is not there.

  Raises:
    ConfigError: if it is none, or cannot be written to.
  """
  path = cli.folder_to_write("out", value)
  trial = path / f".writable.{os.getpid()}"
  try:
    path.mkdir(parents=True, exist_ok=True)
    trial.touch()
    trial.unlink()
  except OSError as e:
    raise ConfigError(f"--out: cannot write to {files.shown(value)}: {files.why(e)}") from e
  return path


def choice(known: Sequence[str]) -> Callable[[str], str]:
  """One of `known`, of a flag; the nearest is named for another."""

  def read(text: str) -> str:
    if text not in known:
      raise argparse.ArgumentTypeError(f"unknown value {shown(text)}; {nearest(text, known)}")
    return text

  return read


def choices(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
  """Some of `known`, with commas, of a flag; in the order of `known`."""

  def read(text: str) -> tuple[str, ...]:
    asked = [choice(known)(part) for part in text.split(",")]
    return tuple(name for name in known if name in asked)

  return read


def out(text: str) -> pathlib.Path:
  """`folder` of a flag, so that nothing is measured that cannot be written down."""
  try:
    return folder(text)
  except ConfigError as e:
    raise argparse.ArgumentTypeError(str(e).removeprefix("--out: ")) from e


class Journal:
  """A file of JSON lines that a later start goes on with: each line is on the disk before the next one
  begins.

  A last line without its end, which a killed process leaves, is dropped.

  Args:
    path: of the file, which need not exist.
    needs: keys that every line has.

  Raises:
    ConfigError: if a line is none of this file's.
  """

  def __init__(self, path: pathlib.Path, needs: Sequence[str]):
    self.path = path
    data = path.read_bytes() if path.exists() else b""
    self._whole = data.rfind(b"\n") + 1
    self.rows: list[dict[str, Any]] = []
    for number, line in enumerate(data[: self._whole].splitlines(), 1):
      try:
        row = files.parse_json(line)
      except ValueError:
        row = None
      if not isinstance(row, dict) or not set(needs) <= row.keys():
        raise ConfigError(
          f"--out: {files.shown(path)}, line {number} is none of this command's results;"
          " move the file away or name another folder"
        )
      self.rows.append(row)

  def add(self, row: dict[str, Any]) -> None:
    """Appends a line. Numbers that are not finite become null."""
    row = _plain(row)
    with open(self.path, "r+b" if self.path.exists() else "xb") as file:
      file.truncate(self._whole)
      file.seek(self._whole)
      file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())
      self._whole = file.tell()
    self.rows.append(row)


def _plain(value: Any) -> Any:
  """What JSON can hold."""
  if isinstance(value, dict):
    return {str(key): _plain(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(x) for x in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value if value is None or isinstance(value, str | bool | int) else str(value)


def same_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows with the columns of all of them, None where one has no value; no text in them ends a cell."""

  def cell(x: Any) -> Any:
    return x.replace("|", "/") if isinstance(x, str) else x

  names = dict.fromkeys(name for row in rows for name in row)
  return [{name: cell(row.get(name)) for name in names} for row in rows]
