"""GSM-Infinite as what a model is trained on: shapes, tokenizer, training examples and held-out ones."""

import dataclasses
import os
import pathlib
import socket
from typing import Annotated, Literal

from sleep_jax.config import Bounds, Natural, check
from sleep_jax.data import batching
from sleep_jax.data.batching import CutConfig
from sleep_jax.data.gsm_infinite import dataset, problems, shortcut
from sleep_jax.data.gsm_infinite import tokenizer as tokens
from sleep_jax.data.gsm_infinite.config import GsmInfiniteConfig
from sleep_jax.data.gsm_infinite.values import LARGEST

TOKENIZER_SEED = 2_000_003  # of the problems that a tokenizer is trained on: the same for every run
MOST_TEXTS = 100_000  # that a tokenizer is trained on: they are made before the run begins
MOST_WORKERS = 256  # threads, and processes, that make examples
MARGIN = 4  # tokens that a problem has beside its text and its answer: the request for the answer


@dataclasses.dataclass(frozen=True)
class TaskConfig(GsmInfiniteConfig):
  """The problems, and how they are fed to a model.

  Attributes:
    cut: shapes of the batches.
    vocab_size: tokens at most, of the tokenizer that is trained where `tokenizer` names none.
    tokenizer_texts: problems that it is trained on.
    problems: that there are to train on; a longer run reads them again. 0: as many as it takes.
    held_out: the evaluation's sets: `balanced` (each number of operations as often) and `faithful` (drawn as
      in training). The first of them is the run's score, which figures show.
    threads: threads that make examples.
    workers: processes that make examples beside the run; 0 for none.
  """

  cut: CutConfig = CutConfig(max_tokens=3312, tails=(256, 512, 1024), bucket_batches=4)
  vocab_size: Annotated[int, Bounds(least=tokens.LEAST_VOCAB)] = 1024
  tokenizer_texts: Annotated[int, Bounds(least=1), Bounds(most=MOST_TEXTS)] = 256
  problems: Natural = 0
  held_out: tuple[Literal["balanced", "faithful"], ...] = dataset.KINDS
  threads: Annotated[int, Bounds(least=1), Bounds(most=MOST_WORKERS)] = 1
  workers: Annotated[int, Bounds(least=0), Bounds(most=MOST_WORKERS)] = 0

  def __post_init__(self):
    super().__post_init__()
    least = self.max_tokens + MARGIN + self.cut.answer_tokens
    check(
      self.cut.max_tokens >= least,
      "data.cut.max_tokens",
      f"must be at least {least} (data.max_tokens, {MARGIN} and data.cut.answer_tokens), got"
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
    check(len(self.held_out) > 0, "data.held_out", f"needs at least one of {', '.join(dataset.KINDS)}")
    check(
      len(set(self.held_out)) == len(self.held_out), "data.held_out", f"names a set twice: {self.held_out}"
    )

  @property
  def longest_answer(self) -> str:
    """The longest text that an answer may be, as wide as any."""
    if self.subset == "symbolic":
      return ", ".join(["V000000"] * self.operations[1])
    return str(max(LARGEST, self.modulus - 1))

  @property
  def answer_bound(self) -> int:
    """Tokens of the longest answer and its end, where names, digits and marks are tokens of their own."""
    return len(tokens.pieces(self.longest_answer)) + 1


def groups(cfg: GsmInfiniteConfig) -> list[str]:
  """Names of the groups that answers are scored in: `op1`, `op2`, ..."""
  low, high = cfg.operations
  return [f"op{op}" for op in range(low, high + 1)]


def with_tokenizer(cfg: TaskConfig, folder: str | os.PathLike) -> TaskConfig:
  """The config with a tokenizer: its own, or one that is trained and written to `folder`/tokenizer.json.

  It is a function of the config alone. One that a run before has left there is made again and replaced, so
  that a damaged file harms nobody.

  Raises:
    ConfigError: if the tokenizer that it names is none, its digits are not tokens of their own, or it makes
      answers longer than `cut` allows.
  """
  if not cfg.tokenizer:
    texts = (problems.problem(cfg, TOKENIZER_SEED, i).text for i in range(cfg.tokenizer_texts))
    path = pathlib.Path(folder, "tokenizer.json")
    made = tokens.train(texts, cfg.vocab_size)
    temporary = path.with_name(
      f".tokenizer.json.{socket.gethostname()}.{os.getpid()}.tmp"
    )  # several may do it
    made.save(temporary)
    os.replace(temporary, path)
    cfg = dataclasses.replace(cfg, tokenizer=str(path.resolve()))
  check_answers(cfg)
  return cfg


def check_answers(cfg: TaskConfig) -> None:
  """Raises `ConfigError` if the longest answer has more tokens, by the named tokenizer, than `cut` allows."""
  longest = len(tokens.load(cfg.tokenizer).encode(cfg.longest_answer)) + 1
  check(
    longest <= cfg.cut.answer_tokens,
    "data.cut.answer_tokens",
    f"must be at least {longest}, the longest answer and its end by {cfg.tokenizer}, got"
    f" {cfg.cut.answer_tokens}",
  )


def check_lengths(cfg: TaskConfig) -> None:
  """Raises `ConfigError` if problems of some number of operations never have the lengths."""
  low, high = cfg.operations
  for op in range(low, high + 1):
    problems.problem(cfg, TOKENIZER_SEED, 0, op=op)


def to_example(made: problems.Problem, cfg: GsmInfiniteConfig) -> batching.Example:
  """A problem: text and request for the answer; answer and its end; the group of its operations."""
  arrays = dataset.example(made, tokens.load(cfg.tokenizer))
  start = int(arrays["answer_start"])
  return batching.Example(
    arrays["inputs"][: start + 1], arrays["targets"][start:], made.op - cfg.operations[0]
  )


@dataclasses.dataclass(frozen=True)
class Examples:
  """The first `num` training examples of a seed; holds nothing but its arguments, for worker processes."""

  cfg: TaskConfig
  seed: int
  num: int

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, index: int) -> batching.Example:
    if not 0 <= index < self.num:
      raise IndexError(f"example {index} of {self.num}")
    return to_example(problems.problem(self.cfg, self.seed, int(index)), self.cfg)


def training(cfg: TaskConfig, seed: int, num: int) -> batching.Source:
  """The first `num` training examples of a run; those of `cfg.problems` problems, again and again.

  Raises:
    ConfigError: if the seed is the held-out one.
  """
  dataset.source(cfg, seed, num)  # refuses what is no source
  if cfg.problems:
    return batching.Epochs(Examples(cfg, seed, cfg.problems), num, seed)
  return Examples(cfg, seed, num)


def held_out(cfg: TaskConfig, num: int) -> dict[str, batching.HeldOut]:
  """The held-out sets, of `num` examples each, the same for every run; each with its `shortcut`'s score.

  Raises:
    ConfigError: if `num` cannot be balanced, or an answer is longer than `cut` allows.
  """
  sets = {}
  for kind in cfg.held_out:
    made = dataset.held_out(cfg, kind, num)
    right = [shortcut.guess(p.context) == p.answer for p in made]
    sets[kind] = batching.HeldOut([to_example(p, cfg) for p in made], {"shortcut": right})
  longest = max(len(e.answer) for held in sets.values() for e in held.examples)
  check(
    longest <= cfg.cut.answer_tokens,
    "data.cut.answer_tokens",
    f"must be at least {longest}, the longest held-out answer and its end, got {cfg.cut.answer_tokens}",
  )
  return sets
