"""Statistics of problems, read from their text and roles, and the same of the original generator.

The original's are measured facts, kept in `reference.json`: 400 problems a row without noise, and 40 with.
"""

import collections
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from sleep_jax.data.gsm_infinite import solver
from sleep_jax.data.gsm_infinite.dataset import answer_text
from sleep_jax.data.gsm_infinite.problems import Problem

REFERENCE = pathlib.Path(__file__).with_name("reference.json")


def reference() -> dict:
  """The original's numbers: `core` (without noise; by subset and mode, then op) and `noisy` (by op)."""
  return json.loads(REFERENCE.read_text(encoding="utf-8"))


def summary(problems: Sequence[Problem]) -> dict[str, float]:
  """Means over problems of one kind.

  Returns:
    tokens, sentences, needed (S), unneeded (U), noise (N): means; noise_share: of all sentences; majority:
    share of the most frequent answer, what a constant scores; attempts: cores drawn for one.
  """
  roles = [collections.Counter(p.sentence_roles) for p in problems]
  sentences = np.mean([len(p.sentence_roles) for p in problems])
  answers = collections.Counter(answer_text(p.answer) for p in problems)
  return {
    "problems": len(problems),
    "tokens": float(np.mean([p.num_tokens for p in problems])),
    "sentences": float(sentences),
    "S": float(np.mean([r["S"] for r in roles])),
    "U": float(np.mean([r["U"] for r in roles])),
    "N": float(np.mean([r["N"] for r in roles])),
    "noise_share": float(np.mean([r["N"] for r in roles]) / sentences),
    "majority": answers.most_common(1)[0][1] / len(problems),
    "attempts": float(np.mean([p.attempts for p in problems])),
  }


def by_op(problems: Sequence[Problem]) -> dict[int, dict[str, float]]:
  """`summary` for each number of operations."""
  groups: dict[int, list[Problem]] = {}
  for p in problems:
    groups.setdefault(p.op, []).append(p)
  return {op: summary(groups[op]) for op in sorted(groups)}


def answers(problems: Sequence[Problem], most: int = 5) -> list[tuple[str, float]]:
  """The most frequent answers with their shares."""
  counted = collections.Counter(answer_text(p.answer) for p in problems)
  return [(answer, n / len(problems)) for answer, n in counted.most_common(most)]


def forms(problems: Sequence[Problem], role: str) -> dict[str, float]:
  """Shares of sentence forms among the sentences of one role."""
  counted: collections.Counter[str] = collections.Counter()
  for p in problems:
    for sentence, r in zip(solver.split_sentences(p.context), p.sentence_roles, strict=True):
      if r == role:
        counted[form(sentence)] += 1
  total = sum(counted.values())
  return {name: n / total for name, n in sorted(counted.items())}


def form(sentence: str) -> str:
  """The form: literal, copy, times one, plus one, sum, difference, literal with two, many, hidden."""
  _, equals, right = sentence.partition(" equals ")
  if not equals:
    return "hidden"
  if right.isdigit():
    return "literal"
  number, _, rest = right.partition(" ")
  operator, _, rest = rest.partition(" ") if number.isdigit() else ("", "", right)
  if ", and the " in rest:
    return "many"
  if rest.startswith(("the sum of ", "the difference between ")):
    if operator:
      return "literal with two"
    return "sum" if rest.startswith("the sum") else "difference"
  return f"{operator} one" if operator else "copy"
