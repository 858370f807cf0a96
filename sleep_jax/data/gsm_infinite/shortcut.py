"""An answer without reading the question: the number that the text gives most often."""

import collections
import re

_GIVEN = re.compile(r" equals (\d+)\.")
_WRITTEN = re.compile(r"(?<!\w)\d+")


def guess(context: str) -> int | None:
  """Returns the number that is the whole right side of most sentences; of several, the first in the text.

  If no sentence is only a number, it is the number that is written most often; if none is written, None. In
  short texts this is right far more often than the commonest answer, and a model soon finds it.
  """
  for pattern in (_GIVEN, _WRITTEN):
    numbers = pattern.findall(context)
    if numbers:
      return int(collections.Counter(numbers).most_common(1)[0][0])
  return None
