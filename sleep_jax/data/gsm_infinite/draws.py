"""Random draws that are the same in every process, on every platform and in every version of Python.

Python promises that the numbers of `random.Random(n).random()` will not change, and promises it for nothing
else in that module. All draws are therefore made of these numbers and of exact arithmetic.
"""

import bisect
import hashlib
import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Draws:
  """A stream of random draws.

  Args:
    key: numbers and strings that name the stream; different keys give independent streams.
  """

  def __init__(self, *key: int | str):
    digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
    self.uniform = random.Random(int.from_bytes(digest, "little")).random  # [0, 1), 53 bits

  def index(self, size: int) -> int:
    """Draws a whole number in 0 .. size - 1."""
    return int(self.uniform() * size)

  def between(self, low: int, high: int) -> int:
    """Draws a whole number in low .. high, both included."""
    return low + int(self.uniform() * (high - low + 1))

  def coin(self) -> bool:
    """Returns True with probability 1/2."""
    return self.uniform() < 0.5

  def choice(self, items: Sequence[T]) -> T:
    """Draws one of the items, each as likely."""
    return items[int(self.uniform() * len(items))]

  def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
    """Draws one of the items with a probability proportional to its weight."""
    ends = list(itertools.accumulate(weights))
    return items[min(bisect.bisect_right(ends, self.uniform() * ends[-1]), len(items) - 1)]

  def pop(self, items: list[T]) -> T:
    """Removes a random item from the list and returns it; the order of the others changes."""
    i = int(self.uniform() * len(items))
    items[i], items[-1] = items[-1], items[i]
    return items.pop()

  def sample(self, items: Sequence[T], k: int) -> list[T]:
    """Draws k items without replacement, in random order."""
    remaining = list(items)
    return [self.pop(remaining) for _ in range(k)]

  def shuffle(self, items: list[Any]) -> None:
    """Puts a list into a uniformly random order, in place."""
    uniform = self.uniform
    for i in range(len(items) - 1, 0, -1):
      j = int(uniform() * (i + 1))
      items[i], items[j] = items[j], items[i]

  def magnitude(self) -> float:
    """Draws |g| of a standard normal g, to three decimals.

    It comes from a table, since log and cos differ in the last digit between mathematical libraries.
    """
    return _MAGNITUDES[int(self.uniform() * len(_MAGNITUDES))]


_MAGNITUDES = [round(statistics.NormalDist().inv_cdf(0.5 + (i + 0.5) / 4096), 3) for i in range(2048)]
