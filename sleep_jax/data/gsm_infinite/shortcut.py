"""An answer without reading: the number that is given most often, whatever the question."""

import collections
import re

_GIVEN = re.compile(r" equals (\d+)\.")
_WRITTEN = re.compile(r"(?<!\w)\d+")


def guess(context: str) -> int | None:
  """The number that the most sentences give, and nothing else; of several, the one given first.

  Where no sentence gives a number: the one that is written most often. Where none is written: None. In short
  texts this is right far more often than the commonest answer, and a model soon finds it.
  """
  for pattern in (_GIVEN, _WRITTEN):
    numbers = pattern.findall(context)
    if numbers:
      return int(collections.Counter(numbers).most_common(1)[0][0])
  return None
