"""Command lines of measurements: a mistake is one line, and numbers are checked where they are read."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NoReturn

import jax

from sleep_jax.kernels.common import devices

FAILED, USER_MISTAKE = 1, 2  # exit codes
DIGITS = 8  # a longer number is a slip
LONGEST = 60  # characters of a value that a message shows


class Parser(argparse.ArgumentParser):
  """A parser that says a mistake on one line, without the usage before it.

  Args:
    module: what is run with `python -m`.
    doc: the module's docstring, whose first line says what it is for.
  """

  def __init__(self, module: str, doc: str | None):
    about = (doc or "").partition("\n")[0]
    super().__init__(prog=f"python -m {module}", description=about, allow_abbrev=False)

  def error(self, message: str) -> NoReturn:
    """Ends the process with exit code 2."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(USER_MISTAKE)

  def backend(self) -> str:
    """JAX's platform. Where it has no device that is said on one line, and the process ends with 2 or 1."""
    try:
      return jax.default_backend()
    except (RuntimeError, AssertionError) as e:
      if (found := devices.lacking(e)) is None:
        raise
      if found.mistake:
        self.error(str(found))
      print(f"failed: {found}", file=sys.stderr, flush=True)
      sys.exit(FAILED)


def natural(text: str) -> int:
  """A whole number from 0 on."""
  return _whole(text, 0)


def count(text: str) -> int:
  """A whole number from 1 on."""
  return _whole(text, 1)


def naturals(text: str) -> tuple[int, ...]:
  """`0,4,32`: whole numbers from 0 on, each once."""
  return tuple(dict.fromkeys(_whole(part, 0, text) for part in text.split(",")))


def counts(text: str) -> tuple[int, ...]:
  """`1,2,4`: whole numbers from 1 on, each once."""
  return tuple(dict.fromkeys(_whole(part, 1, text) for part in text.split(",")))


def above_zero(text: str) -> float:
  """A finite number above 0."""
  return _number(text, math.ulp(0.0), "above 0")


def from_zero(text: str) -> float:
  """A finite number from 0 on."""
  return _number(text, 0.0, "from 0 on")


def stem(text: str) -> Path:
  """A path without suffix of files to write; its folder is made, so that what is measured can be kept."""
  path = Path(text)
  try:
    if not path.name or "\0" in text or path.is_dir():
      raise argparse.ArgumentTypeError(f"must be the name of a file without suffix, got {_shown(text)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = path.parent / f".writable.{os.getpid()}"
    trial.touch()
    trial.unlink()
  except (OSError, ValueError) as e:
    why = (e.strerror if isinstance(e, OSError) else None) or str(e)
    raise argparse.ArgumentTypeError(f"cannot write to {_shown(text)}: {why}") from e
  return path


def _number(text: str, least: float, what: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not least <= value < math.inf:
    raise argparse.ArgumentTypeError(f"must be a number {what}, got {_shown(text)}")
  return value


def _whole(part: str, least: int, given: str | None = None) -> int:
  """The number in `part`; `given` is all of a list."""
  if part.isascii() and part.isdecimal() and len(part) <= DIGITS and int(part) >= least:
    return int(part)
  what = "a whole number" if given is None else "whole numbers"
  example = "" if given is None else f", as {least},2,4"
  raise argparse.ArgumentTypeError(f"must be {what} from {least} on{example}, got {_shown(given or part)}")


def _shown(text: str) -> str:
  return repr(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")
