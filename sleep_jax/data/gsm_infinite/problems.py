"""One problem, from its number: a pure function of (config, seed, index)."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable

from sleep_jax.config import ConfigError, at_least, check, one_of
from sleep_jax.data.gsm_infinite import cores, noise, symbolic, tokenizer
from sleep_jax.data.gsm_infinite.config import MOST_VALUE, GsmInfiniteConfig
from sleep_jax.data.gsm_infinite.cores import Core
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.words import TEMPLATES

HELD_OUT_KINDS = ("balanced", "faithful")
MOST_CORES = 20_000  # attempts in a row at a core; the rarest that `check_possible` accepts takes about 1,000
MOST_TEXTS = 2_000  # cores with noise that have the wrong length or are of the other side
TEXTS_PER_CORE = 60
TRIED_CORES = 1_000  # attempts in a row after which `check_possible` calls a core too rare
TRIED_PROBLEMS = 4


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem as text.

  Attributes:
    op: operations, as the README of this package counts them.
    depth: d, 2 or 3; 0 for symbolic.
    mode: forward, reverse or symbolic.
    template: key of `words.TEMPLATES`, or symbolic.
    question, context, solution: the texts; the solution is worked out step by step.
    sentence_roles: a letter for each sentence of the context: S needed, R the revealed value (needed too), U
      of the core but not needed, N noise.
    answer: a whole number, or the sorted variables of a symbolic problem.
    num_tokens: tokens of question, line break and context.
    attempts: cores that were drawn until one was right.
  """

  op: int
  depth: int
  mode: str
  template: str
  question: str
  context: str
  sentence_roles: str
  solution: str
  answer: int | tuple[str, ...]
  num_tokens: int
  attempts: int

  @property
  def text(self) -> str:
    """Question, line break, context."""
    return f"{self.question}\n{self.context}"

  @property
  def written_answer(self) -> str:
    """The answer as it is written and compared."""
    return str(self.answer) if isinstance(self.answer, int) else ", ".join(self.answer)


def problem(cfg: GsmInfiniteConfig, seed: int, index: int, op: int | None = None) -> Problem:
  """Returns problem number `index` of the stream that `seed` names.

  Args:
    cfg: the task.
    seed: a stream; `cfg.held_out_seed` names the held-out problems.
    index: any whole number from 0.
    op: operations, instead of a draw from `cfg.operations`.

  Raises:
    ConfigError: if none is found after many attempts; it names the setting that refused them.
  """
  draws = Draws("gsm_infinite", seed, index, -1 if op is None else op)
  drawn = draws.between(*cfg.operations)
  op = drawn if op is None else op
  depth = draws.choice(cfg.depths(op))
  mode = "symbolic" if not depth else cfg.mode
  if mode == "both":
    mode = "reverse" if draws.coin() else "forward"
  template = draws.weighted(tuple(TEMPLATES), cfg.templates) if depth else "symbolic"
  count = tokenizer.counter(cfg.tokenizer)
  attempts = 0
  refused: collections.Counter[str] = collections.Counter()
  while refused.total() < MOST_TEXTS:
    core, tried = _find_core(cfg, op, depth, mode, template, draws, MOST_CORES)
    attempts += tried
    for _ in range(TEXTS_PER_CORE if cfg.noise else 1):
      finished = _finish(cfg, core, depth, template, count, draws)
      if finished is None:
        refused["the core alone is too long"] += 1
        break
      context, roles, size = finished
      if cfg.noise and not cfg.min_tokens <= size <= cfg.max_tokens:
        refused["length"] += 1
      elif _may_be_held_out(cfg, core.question, context) != (seed == cfg.held_out_seed):
        refused["side"] += 1
      else:
        return Problem(
          op, depth, mode, template, core.question, context, roles, core.solution, core.answer, size, attempts
        )
  if refused.most_common(1)[0][0] == "side":
    raise ConfigError(
      f"data.held_out_share: found no problem of this side among {MOST_TEXTS}, got {cfg.held_out_share}; a"
      " held-out one is 1 in so many"
    )
  raise ConfigError(
    f"data.max_tokens: found no problem of {op} operations with {cfg.min_tokens}..{cfg.max_tokens} tokens"
    f" among {MOST_TEXTS}; allow longer ones"
  )


def check_possible(cfg: GsmInfiniteConfig, seed: int) -> None:
  """Makes some problems of each number of operations, with other draws than `problem` makes.

  Args:
    cfg: the task.
    seed: names the draws.

  Raises:
    ConfigError: if cores of some number of operations are so rare that making them might fail later, or
      problems never have the lengths.
  """
  low, high = cfg.operations
  modes = ("forward", "reverse") if cfg.mode == "both" else (cfg.mode,)
  for op in range(low, high + 1):
    for depth in cfg.depths(op):
      for mode in modes if depth else ("symbolic",):
        draws = Draws("gsm_infinite possible", seed, op, depth, mode)
        template = draws.weighted(tuple(TEMPLATES), cfg.templates) if depth else "symbolic"
        for _ in range(TRIED_PROBLEMS):
          _find_core(cfg, op, depth, mode, template, draws, TRIED_CORES)
    problem(cfg, seed, 0, op=op)


def held_out(cfg: GsmInfiniteConfig, kind: str = "balanced", num: int = 1600) -> list[Problem]:
  """Returns the held-out problems, the same for every run.

  Args:
    cfg: the task.
    kind: `balanced`: every number of operations equally often, in turn; `faithful`: drawn as in training.
    num: problems.

  Raises:
    ConfigError: for an unknown kind, or a number that cannot be balanced.
  """
  one_of(kind, HELD_OUT_KINDS, "kind")
  at_least(num, 1, "num")
  low, high = cfg.operations
  levels = high - low + 1
  if kind == "faithful":
    return [problem(cfg, cfg.held_out_seed, i) for i in range(num)]
  check(num % levels == 0, "num", f"must be a multiple of the {levels} numbers of operations, got {num}")
  return [problem(cfg, cfg.held_out_seed, i, op=low + i % levels) for i in range(num)]


def fingerprint(question: str, context: str) -> bytes:
  """Returns 16 bytes that depend on question and sentences, not on the order of the sentences."""
  ordered = sorted(f"{context.removesuffix('.')}. ".split(". "))
  return hashlib.blake2b("\n".join([question, *ordered]).encode(), digest_size=16).digest()


def digest(problems: Iterable[Problem]) -> str:
  """Returns the SHA-256 of texts and answers, in order: whether two processes make the same problems."""
  sha256 = hashlib.sha256()
  for p in problems:
    sha256.update(f"{p.text}\n{p.written_answer}\n".encode())
  return sha256.hexdigest()


def _may_be_held_out(cfg: GsmInfiniteConfig, question: str, context: str) -> bool:
  """Returns whether the hash of a problem puts it on the held-out side."""
  return int.from_bytes(fingerprint(question, context)[:8], "little") % cfg.held_out_share == 0


def _find_core(
  cfg: GsmInfiniteConfig, op: int, depth: int, mode: str, template: str, draws: Draws, most: int
) -> tuple[Core, int]:
  """Draws cores until one is right, at most `most`; returns it and how many were drawn."""
  if not depth:
    return cores.draw_symbolic(op, draws), 1
  too_large = 0
  for attempt in range(1, most + 1):
    core = cores.draw_core(cfg, TEMPLATES[template], op, depth, mode == "reverse", draws)
    if isinstance(core, Core):
      return core, attempt
    too_large += core == cores.VALUES
  kind = f"problems of {op} operations (d = {depth}, {mode}, numbers below {cfg.number_range})"
  if too_large:
    raise ConfigError(
      f"data.number_range: {kind} are too rare: none in {most} attempts, of which {too_large} had values"
      f" outside 0..{MOST_VALUE}; take smaller numbers or fewer operations"
    )
  raise ConfigError(f"data.operations: {kind} are too rare: none in {most} attempts; take fewer operations")


def _finish(
  cfg: GsmInfiniteConfig, core: Core, depth: int, template: str, count: tokenizer.Counter, draws: Draws
) -> tuple[str, str, int] | None:
  """Returns context, roles and tokens of a core with noise; None if the core alone is too long."""
  statements = list(core.statements)

  def size_of(sentence: str) -> int:
    return count(f" {sentence}.")

  if cfg.noise:
    first = statements[0][0].split()[0]
    size = count(f"{core.question}\n{first}") - count(f" {first}") + sum(size_of(s) for s, _ in statements)
    if size > cfg.max_tokens:
      return None
    room = draws.between(min(max(cfg.min_tokens, size), cfg.max_tokens), cfg.max_tokens) - size
    statements += [(s, "N") for s in _draw_noise(core, depth, template, size_of, room, draws)]
  draws.shuffle(statements)
  context = f"{'. '.join(s for s, _ in statements)}."
  text = f"{core.question}\n{context}"
  return context, "".join(role for _, role in statements), count(text) if count.exact else count.whole(text)


def _draw_noise(core: Core, depth: int, template: str, size_of, room: int, draws: Draws) -> list[str]:
  if not depth:
    return symbolic.draw_filler(core.references, size_of, room, draws)
  names = TEMPLATES[template]
  typical = noise.typical_length(names, core.references, depth, size_of)
  return noise.fill_room(
    lambda n: noise.draw_noise(names, core.references, n, depth, draws), size_of, room, typical, draws
  )
