"""95 % intervals of a mean over seeds, after Student."""

import math
import statistics
from collections.abc import Sequence

# The 97.5 % quantile of Student's t for 1 .. 30 degrees of freedom; beyond, a formula is close enough.
QUANTILES = (
  *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
  *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
  *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)  # fmt: skip
NORMAL = 1.959964


def quantile(freedom: int) -> float:
  """The 97.5 % quantile of Student's t.

  Raises:
    ValueError: if there are no degrees of freedom.
  """
  if freedom < 1:
    raise ValueError(f"needs at least one degree of freedom, got {freedom}")
  if freedom <= len(QUANTILES):
    return QUANTILES[freedom - 1]
  return NORMAL + (NORMAL**3 + NORMAL) / (4 * freedom)  # first term of the Cornish-Fisher expansion


def of_mean(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
  """The 95 % interval of the mean of independent values, cut to the range that a mean can have.

  >>> low, high = of_mean([80.0, 84.0, 88.0], least=0, most=100)
  >>> print(f"{low:.1f} {high:.1f}")
  74.1 93.9

  Args:
    values: one a seed.
    least, most: bounds of the quantity, such as 0 and 100 for per cent.

  Returns:
    (low, high); NaN for fewer than two values, which say nothing about their spread.
  """
  if len(values) < 2:
    return math.nan, math.nan
  mean = statistics.fmean(values)
  reach = quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
  return max(least, mean - reach), min(most, mean + reach)
