"""Intervals of measured rates."""

import math


def wilson(right: float, asked: float, z: float = 1.959964) -> tuple[float, float]:
  """Wilson's interval for a rate (95 % by default); (0, 1) if nothing was asked.

  >>> low, high = wilson(right=90, asked=100)
  >>> print(f"{low:.3f} {high:.3f}")
  0.826 0.945
  """
  if asked == 0:
    return 0.0, 1.0
  p, n = right / asked, asked
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return min(p, max(0.0, centre - reach)), max(p, min(1.0, centre + reach))
