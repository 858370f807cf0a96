"""Random draws that are the same in every process, on every platform and in every Python.

Python promises that the numbers of `random.Random(n).random()` will not change; it promises so for nothing
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
  """A stream of draws that a key names.

  Args:
    key: numbers and strings; other keys give independent streams.
  """

  def __init__(self, *key: int | str):
    digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
    self.uniform = random.Random(int.from_bytes(digest, "little")).random  # [0, 1), 53 bits

  def below(self, n: int) -> int:
    """A whole number in 0 .. n - 1."""
    return int(self.uniform() * n)

  def between(self, low: int, high: int) -> int:
    """A whole number in low .. high."""
    return low + int(self.uniform() * (high - low + 1))

  def coin(self) -> bool:
    """True with probability 1/2."""
    return self.uniform() < 0.5

  def choice(self, items: Sequence[T]) -> T:
    """One of the items, each as likely."""
    return items[int(self.uniform() * len(items))]

  def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
    """One of the items, as likely as its weight says."""
    ends = list(itertools.accumulate(weights))
    return items[min(bisect.bisect_right(ends, self.uniform() * ends[-1]), len(items) - 1)]

  def pop(self, items: list[T]) -> T:
    """Takes one item out of the list, each as likely; the others change places."""
    i = int(self.uniform() * len(items))
    items[i], items[-1] = items[-1], items[i]
    return items.pop()

  def sample(self, items: Sequence[T], k: int) -> list[T]:
    """k items, without replacement, in random order."""
    left = list(items)
    return [self.pop(left) for _ in range(k)]

  def shuffle(self, items: list[Any]) -> None:
    """Puts a list into a uniformly random order, in place."""
    uniform = self.uniform
    for i in range(len(items) - 1, 0, -1):
      j = int(uniform() * (i + 1))
      items[i], items[j] = items[j], items[i]

  def magnitude(self) -> float:
    """|g| of a standard normal g, to three decimals: from a table, since log and cos differ between libms."""
    return _MAGNITUDES[int(self.uniform() * len(_MAGNITUDES))]


_MAGNITUDES = [round(statistics.NormalDist().inv_cdf(0.5 + (i + 0.5) / 4096), 3) for i in range(2048)]
