"""The job files' templates, and the time that they leave for a save."""

import math
import pathlib
import re
from collections.abc import Mapping

FOLDER = pathlib.Path(__file__).parent
MARGIN_S = 60  # of grace beside twice the time of a save: a step is finished first


def fill(template: str, values: Mapping[str, object]) -> str:
  """A template of this folder with its {{names}} filled in."""
  text = (FOLDER / template).read_text(encoding="utf-8")
  return re.sub(r"\{\{(\w+)\}\}", lambda found: str(values[found[1]]), text)


def grace(save_seconds: float) -> int:
  """Seconds between TERM and KILL, longer than a save of `save_seconds` takes."""
  return math.ceil(2 * save_seconds) + MARGIN_S
