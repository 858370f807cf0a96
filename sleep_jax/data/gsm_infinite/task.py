"""GSM-Infinite as a model meets it: shapes, tokenizer, training examples and held-out ones.

    tokens    question | line break | context | <answer> | answer ... | <eos>

The prompt ends with the request for the answer. The answer is a number, or for symbolic problems the sorted
variables with ", " between them.
"""

import dataclasses
import os
import pathlib
import socket
from typing import Annotated, Literal

import numpy as np

from sleep_jax.config import Bounds, at_least, check
from sleep_jax.data import batching
from sleep_jax.data.batching import CutConfig
from sleep_jax.data.gsm_infinite import problems, shortcut
from sleep_jax.data.gsm_infinite import tokenizer as tokens
from sleep_jax.data.gsm_infinite.config import MOST_VALUE, GsmInfiniteConfig
from sleep_jax.data.gsm_infinite.problems import HELD_OUT_KINDS, Problem, problem

TOKENIZER_SEED = 2_000_003  # of the problems that a tokenizer is trained on: the same for every run
MARGIN = 4  # tokens of a problem beside its text and its answer: the request for the answer
MOST_TEXTS = 100_000  # that a tokenizer is trained on
MOST_PROBLEMS = 10**8
MOST_MAKERS = 1024  # threads, and processes
MOST_HELD_OUT_SHARE = 64  # a held-out problem takes as many attempts


@dataclasses.dataclass(frozen=True)
class TaskConfig(GsmInfiniteConfig):
  """The problems, and how they are fed to a model.

  Attributes:
    cut: shapes of the batches.
    vocab_size: most tokens of the tokenizer that is trained if `tokenizer` names none.
    tokenizer_texts: problems that it is trained on.
    problems: different problems to train on; a longer run reads them again. 0: as many as the run takes.
    held_out: the evaluation's sets: `balanced` (each number of operations equally often) and `faithful`
      (drawn as in training). The first of them is the run's score, which figures show.
    threads: threads that make examples.
    workers: processes that make examples; 0 for none.
  """

  cut: CutConfig = CutConfig(max_tokens=3312, tails=(256, 512, 1024), bucket_batches=4)
  vocab_size: Annotated[int, Bounds(least=tokens.LEAST_VOCAB), Bounds(most=tokens.MOST_VOCAB)] = 1024
  tokenizer_texts: Annotated[int, Bounds(least=1), Bounds(most=MOST_TEXTS)] = 256
  problems: Annotated[int, Bounds(least=0), Bounds(most=MOST_PROBLEMS)] = 0
  held_out: tuple[Literal["balanced", "faithful"], ...] = HELD_OUT_KINDS
  threads: Annotated[int, Bounds(least=1), Bounds(most=MOST_MAKERS)] = 1
  workers: Annotated[int, Bounds(least=0), Bounds(most=MOST_MAKERS)] = 0

  def __post_init__(self):
    super().__post_init__()
    at_least(self.min_tokens, 1, "data.min_tokens")
    needed = self.max_tokens + MARGIN + self.cut.answer_tokens
    check(
      self.cut.max_tokens >= needed,
      "data.cut.max_tokens",
      f"must be at least {needed} (data.max_tokens, {MARGIN} and data.cut.answer_tokens), got"
      f" {self.cut.max_tokens}",
    )
    check(self.noise, "data.noise", "must be on: without noise the length of a problem has no bound")
    check(
      self.cut.answer_tokens >= self.answer_bound,
      "data.cut.answer_tokens",
      f"must be at least {self.answer_bound}, the tokens of the longest answer ({self.longest_answer!r}) and"
      f" its end, got {self.cut.answer_tokens}",
    )
    check(
      self.held_out_seed != TOKENIZER_SEED,
      "data.held_out_seed",
      f"must differ from {TOKENIZER_SEED}, the seed of the tokenizer's texts",
    )
    share, most = self.held_out_share, MOST_HELD_OUT_SHARE
    check(share <= most, "data.held_out_share", f"must be at most {most}, got {share}")
    check(len(self.held_out) > 0, "data.held_out", f"needs at least one of {', '.join(HELD_OUT_KINDS)}")
    check(
      len(set(self.held_out)) == len(self.held_out), "data.held_out", f"names a set twice: {self.held_out}"
    )

  @property
  def length(self) -> int:
    """T, tokens of the longest sequence."""
    return self.cut.max_tokens

  @property
  def longest_answer(self) -> str:
    """The longest text that an answer may be, as wide as any."""
    if self.subset == "symbolic":
      return ", ".join(["V000000"] * self.operations[1])
    return str(max(MOST_VALUE, self.modulus - 1))

  @property
  def answer_bound(self) -> int:
    """Tokens of the longest answer and its end, if every name, digit and mark is one token."""
    return len(tokens.pieces(self.longest_answer)) + 1


def groups(cfg: GsmInfiniteConfig) -> list[str]:
  """Returns the names of the groups that answers are scored in: `op1`, `op2`, ..."""
  low, high = cfg.operations
  return [f"op{op}" for op in range(low, high + 1)]


def check_window(cfg: TaskConfig, window: int) -> None:
  """Raises `ConfigError` unless windows of this length fit the sequences, and answers fit into one."""
  batching.check_window(cfg.cut, window)


def check_possible(cfg: TaskConfig) -> None:
  """Raises `ConfigError` if problems of some number of operations cannot be made, or are too rare."""
  problems.check_possible(cfg, TOKENIZER_SEED)


def check_answers(cfg: TaskConfig) -> None:
  """Raises `ConfigError` if the longest answer has more tokens, by the named tokenizer, than `cut` allows."""
  longest = len(tokens.load(cfg.tokenizer).encode(cfg.longest_answer)) + 1
  check(
    longest <= cfg.cut.answer_tokens,
    "data.cut.answer_tokens",
    f"must be at least {longest}, the longest answer and its end by {cfg.tokenizer}, got"
    f" {cfg.cut.answer_tokens}",
  )


def with_tokenizer(cfg: TaskConfig, folder: str | os.PathLike) -> TaskConfig:
  """Returns the config with a tokenizer: its own, or one that is trained and written to `folder`.

  The trained one is a function of the config alone and is written as tokenizer.json. One that an earlier run
  wrote there is made again and replaced, so that a damaged file does no harm.

  Raises:
    ConfigError: if the named file is no tokenizer, its digits are not tokens of their own, or it makes
      answers longer than `cut` allows.
  """
  if not cfg.tokenizer:
    texts = (problem(cfg, TOKENIZER_SEED, i).text for i in range(cfg.tokenizer_texts))
    path = pathlib.Path(folder, "tokenizer.json")
    trained = tokens.train(texts, cfg.vocab_size)
    temporary = path.with_name(
      f".tokenizer.json.{socket.gethostname()}.{os.getpid()}.tmp"
    )  # several processes may write it
    trained.save(temporary)
    os.replace(temporary, path)
    cfg = dataclasses.replace(cfg, tokenizer=str(path.resolve()))
  check_answers(cfg)
  return cfg


def to_example(made: Problem, cfg: GsmInfiniteConfig) -> batching.Example:
  """Returns the tokens of a problem: text and request for the answer; answer and its end; and its group."""
  known = tokens.load(cfg.tokenizer)
  return batching.Example(
    np.asarray([*known.encode_problem(made.text), *known.answer_prompt], np.int32),
    np.asarray([*known.encode(made.written_answer), known.eos], np.int32),
    made.op - cfg.operations[0],
  )


@dataclasses.dataclass(frozen=True)
class Examples:
  """The first `num` training examples of a seed.

  It holds nothing but its arguments, so that any worker process can have a copy.
  """

  cfg: TaskConfig
  seed: int
  num: int

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, index: int) -> batching.Example:
    if not 0 <= index < self.num:
      raise IndexError(f"example {index} of {self.num}")
    return to_example(problem(self.cfg, self.seed, int(index)), self.cfg)


def training(cfg: TaskConfig, seed: int, num: int) -> batching.Source:
  """Returns the first `num` training examples of a run; with `cfg.problems`, those problems in epochs.

  Raises:
    ConfigError: without a tokenizer, or if the seed is the held-out one.
  """
  check(bool(cfg.tokenizer), "data.tokenizer", "must name a tokenizer.json to make tokens, got nothing")
  check(
    seed != cfg.held_out_seed,
    "seed",
    f"must differ from data.held_out_seed, got {seed}; held-out problems come from held_out()",
  )
  at_least(num, 1, "num")
  if cfg.problems:
    return batching.Epochs(Examples(cfg, seed, cfg.problems), num, seed)
  return Examples(cfg, seed, num)


def held_out(cfg: TaskConfig, num: int) -> dict[str, batching.HeldOut]:
  """Returns the held-out sets, of `num` examples each, the same for every run, with the `shortcut`'s score.

  Raises:
    ConfigError: if `num` cannot be balanced, or an answer is longer than `cut` allows.
  """
  sets = {}
  for kind in cfg.held_out:
    made = problems.held_out(cfg, kind, num)
    right = [shortcut.guess(p.context) == p.answer for p in made]
    sets[kind] = batching.HeldOut([to_example(p, cfg) for p in made], {"shortcut": right})
  longest = max(len(e.answer) for held in sets.values() for e in held.examples)
  check(
    longest <= cfg.cut.answer_tokens,
    "data.cut.answer_tokens",
    f"must be at least {longest}, the longest held-out answer and its end, got {cfg.cut.answer_tokens}",
  )
  return sets
