"""The settings of the task."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from sleep_jax.config import Bounds, Natural, Seed, check, check_fields
from sleep_jax.data.gsm_infinite.words import TEMPLATES

# Operation budget of an attempt at `op` operations, the benchmark's own; it decides how large the core is.
BUDGETS = {1: 3, 2: 3, 3: 4, 4: 4, 5: 6, 6: 6, 7: 10, 8: 10, 9: 10, 10: 15, 11: 15}
BUDGETS |= dict.fromkeys(range(12, 16), 20) | dict.fromkeys(range(16, 19), 25) | {19: 30, 20: 30}
MOST_SYMBOLIC = 30  # operations of a symbolic problem
MOST_TOKENS = 1 << 18  # of a problem: there are names for so much noise
MOST_VALUE = 1000  # of a needed quantity
MOST_SHARE = 10**6
SENTENCE = 40  # tokens of a long sentence of noise


@dataclasses.dataclass(frozen=True)
class GsmInfiniteConfig:
  """The task.

  Attributes:
    subset: `medium` (d = 2), `hard` (d = 3, with averages and products), `both` (a coin decides between
      them), `mixed` (medium), or `symbolic` (assignments; which variables have a value). Medium cannot have
      one operation; `both` and `mixed` take such problems from hard.
    operations: lowest and highest number of operations, each equally likely. A symbolic problem has one for
      each variable that its numbers determine.
    mode: `forward` asks for a result of given numbers, `reverse` for a number that a given result
      determines, `both` tosses a coin.
    templates: weights of zoo, school and film.
    number_range: R; numbers in sentences are 1 .. R - 1.
    modulus: every value is taken modulo this (forward mode; at least R, so that the numbers in sentences are
      values). -1, the authors' own setting, is none. No text mentions it: a reader has to know.
    noise: fill up with sentences that nothing depends on. Without noise a text is as long as its core.
    min_tokens: the fewest tokens of question, line break and context.
    max_tokens: the most of them. Lengths are even between the two, whatever the number of operations.
    tokenizer: path of a tokenizer.json, which counts the tokens. Empty: Qwen2.5's counts, without a file.
    held_out_seed: the seed whose problems are held out. The hash of a problem's text decides whether it may
      be held out or trained on, so that no text is ever on both sides.
    held_out_share: 1 in so many texts may be held out.
  """

  PATH: ClassVar[str] = "data"

  subset: Literal["medium", "hard", "both", "mixed", "symbolic"] = "mixed"
  operations: tuple[int, int] = (1, 8)
  mode: Literal["forward", "reverse", "both"] = "forward"
  templates: tuple[float, float, float] = (0.5, 0.25, 0.25)
  number_range: Annotated[int, Bounds(least=3), Bounds(most=MOST_VALUE)] = 5
  modulus: int = -1
  noise: bool = True
  min_tokens: Natural = 2000
  max_tokens: Annotated[int, Bounds(least=1), Bounds(most=MOST_TOKENS)] = 3300
  tokenizer: str = ""
  held_out_seed: Seed = 1_000_003
  held_out_share: Annotated[int, Bounds(least=2), Bounds(most=MOST_SHARE)] = 8

  def __post_init__(self):
    check_fields(self)
    self._check_problems()
    self._check_lengths()

  def _check_problems(self) -> None:
    low, high = self.operations
    most = MOST_SYMBOLIC if self.subset == "symbolic" else max(BUDGETS)
    check(
      1 <= low <= high <= most,
      "data.operations",
      f"needs 1 <= lowest <= highest <= {most}, got ({low}, {high})",
    )
    check(
      low > 1 or self.subset != "medium",
      "data.operations",
      "no medium problem (d = 2) has 1 operation; start at 2, or take data.subset = mixed or hard",
    )
    check(
      len(self.templates) == len(TEMPLATES)
      and min(self.templates) >= 0
      and 0 < sum(self.templates) < math.inf,  # which NaN is not
      "data.templates",
      f"needs three weights that are finite, not negative and not all 0, got {self.templates}",
    )
    if self.modulus != -1:
      check(
        self.modulus >= self.number_range,
        "data.modulus",
        f"must be -1 (none) or at least data.number_range = {self.number_range}, got {self.modulus}",
      )
      check(
        self.mode == "forward" and self.subset != "symbolic",
        "data.modulus",
        f"needs data.mode = forward and word problems, got {self.mode} and {self.subset}; -1 is none",
      )
      most = MOST_VALUE + 1
      check(self.modulus <= most, "data.modulus", f"must be at most {most}, got {self.modulus}")

  def _check_lengths(self) -> None:
    high, shortest = self.operations[1], self.shortest
    check(
      self.max_tokens >= self.min_tokens + SENTENCE or not self.noise,
      "data.max_tokens",
      f"must exceed data.min_tokens = {self.min_tokens} by at least {SENTENCE}, a sentence, got"
      f" {self.max_tokens}",
    )
    check(
      self.max_tokens >= shortest or not self.noise,
      "data.max_tokens",
      f"must be at least {shortest}, the length of a short problem of up to {high} operations without noise,"
      f" got {self.max_tokens}",
    )

  @property
  def shortest(self) -> int:
    """Tokens below which problems of the highest number of operations would be too rare."""
    high = self.operations[1]
    per_operation, least = {"symbolic": (19, 30), "hard": (14, 140)}.get(self.subset, (10, 70))
    if self.subset in ("mixed", "both") and self.operations[0] == 1:
      least = 140
    return least + per_operation * high

  def depths(self, op: int) -> tuple[int, ...]:
    """Returns each d that a problem with `op` operations may have, equally likely; 0 is symbolic."""
    if self.subset == "symbolic":
      return (0,)
    if self.subset == "hard" or op == 1:
      return (3,)
    return (2, 3) if self.subset == "both" else (2,)
