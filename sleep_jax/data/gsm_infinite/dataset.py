"""Problems as token sequences: a source for grain, held-out sets, and the proof that they share no text.

    tokens    question | line break | context | <answer> | answer ... | <eos>

`inputs` are all tokens but the last, `targets` all but the first; the loss is on the answer and its end, that
one forward pass each predicts from what is before. A symbolic answer is its variables, sorted, with ", "
between them. Sequences have no pads and differ in length.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from sleep_jax.config import at_least, check, one_of
from sleep_jax.data.gsm_infinite import tokenizer as tokens
from sleep_jax.data.gsm_infinite.config import GsmInfiniteConfig
from sleep_jax.data.gsm_infinite.problems import Problem, fingerprint, problem

KINDS = ("balanced", "faithful")


def answer_text(answer: int | Sequence[str]) -> str:
  """The answer as it is written and compared."""
  return str(answer) if isinstance(answer, int) else ", ".join(answer)


def example(made: Problem, tokenizer: tokens.Tokenizer) -> dict[str, np.ndarray]:
  """A problem as NumPy arrays.

  Returns:
    inputs, targets: [T] int32; loss_mask: [T] float32, 1 where the target is of the answer or its end; op and
    answer_start (index in `inputs` of the last token before the answer): int32 scalars.
  """
  context = [*tokenizer.encode_problem(made.text), *tokenizer.answer_prompt]
  ids = np.asarray([*context, *tokenizer.encode(answer_text(made.answer)), tokenizer.eos], np.int32)
  start = len(context) - 1
  mask = (np.arange(len(ids) - 1) >= start).astype(np.float32)
  return {
    "inputs": ids[:-1],
    "targets": ids[1:],
    "loss_mask": mask,
    "op": np.int32(made.op),
    "answer_start": np.int32(start),
  }


def source(cfg: GsmInfiniteConfig, seed: int, num: int) -> "Source":
  """Random access to the first `num` examples of a stream, for `grain.MapDataset.source`.

  Raises:
    ConfigError: without a tokenizer, or where a seed for training is the held-out one.
  """
  check(bool(cfg.tokenizer), "data.tokenizer", "must name a tokenizer.json to make tokens, got nothing")
  check(
    seed != cfg.held_out_seed,
    "seed",
    f"must differ from data.held_out_seed, got {seed}; held-out problems come from held_out()",
  )
  at_least(num, 1, "num")
  return Source(cfg, seed, num)


@dataclasses.dataclass(frozen=True)
class Source:
  """Examples of a stream; holds no state but its arguments, so that any process may have its own."""

  cfg: GsmInfiniteConfig
  seed: int
  num: int

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < self.num:
      raise IndexError(f"example {index} of {self.num}")
    return example(problem(self.cfg, self.seed, int(index)), tokens.load(self.cfg.tokenizer))


def held_out(cfg: GsmInfiniteConfig, kind: str = "balanced", num: int = 1600) -> list[Problem]:
  """The held-out problems, the same for every run.

  Args:
    kind: `balanced`: every number of operations as often, in turn; `faithful`: drawn as in training.

  Raises:
    ConfigError: for an unknown kind, or a number that cannot be balanced.
  """
  one_of(kind, KINDS, "kind")
  at_least(num, 1, "num")
  low, high = cfg.operations
  levels = high - low + 1
  if kind == "faithful":
    return [problem(cfg, cfg.held_out_seed, i) for i in range(num)]
  check(num % levels == 0, "num", f"must be a multiple of the {levels} numbers of operations, got {num}")
  return [problem(cfg, cfg.held_out_seed, i, op=low + i % levels) for i in range(num)]


def overlap(train: Iterable[Problem], test: Iterable[Problem]) -> int:
  """How many of `test` also occur in `train`, whatever the order of their sentences; compares hashes."""
  seen = {fingerprint(p.question, p.context) for p in train}
  return sum(fingerprint(p.question, p.context) in seen for p in test)


def digest(problems: Iterable[Problem]) -> str:
  """SHA-256 of the texts and answers, in order."""
  whole = hashlib.sha256()
  for p in problems:
    whole.update(f"{p.text}\n{answer_text(p.answer)}\n".encode())
  return whole.hexdigest()
