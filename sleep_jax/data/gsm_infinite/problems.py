"""One problem, from its number: a pure function of (config, seed, index)."""

import dataclasses
import hashlib
from collections.abc import Sequence

from sleep_jax.config import ConfigError
from sleep_jax.data.gsm_infinite import dependencies, noise, sentences, structure, symbolic, tokenizer, values
from sleep_jax.data.gsm_infinite.config import BUDGETS, GsmInfiniteConfig
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.sentences import Expression
from sleep_jax.data.gsm_infinite.words import TEMPLATES, Template

MOST_ATTEMPTS = 20_000  # at cores; the rarest that is allowed takes about 100
NOISE_ATTEMPTS = 60


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
    num_tokens: of question, line break and context.
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


@dataclasses.dataclass(frozen=True)
class _Core:
  """What noise is added to."""

  question: str
  statements: tuple[tuple[str, str], ...]  # (sentence, role)
  references: tuple[str, ...]  # to all quantities that noise may mention
  solution: str
  answer: int | tuple[str, ...]


def problem(cfg: GsmInfiniteConfig, seed: int, index: int, op: int | None = None) -> Problem:
  """Problem number `index` of the stream that `seed` names.

  Args:
    cfg: the task.
    seed: a stream; `cfg.held_out_seed` is that of the held-out problems.
    index: any whole number from 0.
    op: operations, instead of a draw from `cfg.operations`.

  Raises:
    ConfigError: if the lengths leave (nearly) no problem.
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
  while attempts < MOST_ATTEMPTS:
    attempts += 1
    core = (
      _core(cfg, TEMPLATES[template], op, depth, mode == "reverse", draws) if depth else _symbolic(op, draws)
    )
    if core is None:
      continue
    for _ in range(NOISE_ATTEMPTS if cfg.noise else 1):
      found = _finish(cfg, core, depth, template, count, draws)
      if found is None:  # the core alone is too long
        break
      context, roles, size = found
      if cfg.noise and not cfg.min_tokens <= size <= cfg.max_tokens:
        continue
      if _may_be_held_out(cfg, core.question, context) == (seed == cfg.held_out_seed):
        return Problem(
          op, depth, mode, template, core.question, context, roles, core.solution, core.answer, size, attempts
        )
  raise ConfigError(
    f"data.max_tokens: found no problem of {op} operations with {cfg.min_tokens}..{cfg.max_tokens} tokens in"
    f" {MOST_ATTEMPTS} attempts; allow longer ones"
  )


def fingerprint(question: str, context: str) -> bytes:
  """16 bytes that a problem's content decides: question and sentences, in whatever order they stand."""
  ordered = sorted(f"{context.removesuffix('.')}. ".split(". "))
  return hashlib.blake2b("\n".join([question, *ordered]).encode(), digest_size=16).digest()


def _may_be_held_out(cfg: GsmInfiniteConfig, question: str, context: str) -> bool:
  """Whether the hash of a problem puts it on the held-out side."""
  return int.from_bytes(fingerprint(question, context)[:8], "little") % cfg.held_out_share == 0


def _core(
  cfg: GsmInfiniteConfig, template: Template, op: int, depth: int, reverse: bool, draws: Draws
) -> _Core | None:
  """One attempt at a core with `op` operations."""
  size = (BUDGETS[op] + 1) // 2
  made = structure.draw(draws, size, depth, reverse)
  graph = made and dependencies.needed(made, size, reverse, draws)
  if not graph or dependencies.operations(made, graph) != op:
    return None
  expressions = {
    q: sentences.expression(graph.parents[q], cfg.number_range, draws)
    for q in graph.order
    if not made.implicit(q)
  }
  unknown = values.hidden(graph.order, expressions) if reverse else None
  if reverse and unknown is None:
    return None
  lines = values.of_order(made, graph.order, expressions, unknown, cfg.modulus)
  x = 0 if unknown is None else expressions[unknown].literal
  if lines is None or not values.acceptable(made, lines, x) or (reverse and not lines[graph.order[-1]][1]):
    return None
  dependencies.unneeded(made, graph, draws)
  return _write(cfg, template, made, graph, expressions, lines, unknown, x, draws)


def _write(
  cfg: GsmInfiniteConfig,
  template: Template,
  made: structure.Structure,
  graph: dependencies.Graph,
  expressions: dict[int, Expression],
  lines: dict[int, values.Line],
  unknown: int | None,
  x: int,
  draws: Draws,
) -> _Core:
  """The texts of a core."""
  places = draws.sample(draws.choice(template.places), max(made.place) + 1)
  kinds = draws.sample(draws.choice(template.kinds), max(made.kind) + 1)
  names = [sentences.name(made, template, places, kinds, q) for q in range(len(made.roles))]
  references = [sentences.reference(name) for name in names]
  statements = []
  for q in graph.present:
    if made.implicit(q):
      continue
    if q == unknown:
      text = sentences.hidden(references[q])
    else:
      e = expressions.get(q) or sentences.expression(graph.parents[q], cfg.number_range, draws)
      text = sentences.statement(references[q], sentences.right_side(e, references))
    statements.append((text, "S" if q in expressions else "U"))
  terminal = graph.order[-1]
  a, b = lines[terminal]
  if unknown is not None:
    statements.append((sentences.statement(references[terminal], str(a + b * x)), "R"))
  solved = values.solution(
    made, graph.order, expressions, lines, names.__getitem__, unknown, x, draws, cfg.modulus
  )
  return _Core(
    question=sentences.question(names[terminal if unknown is None else unknown]),
    statements=tuple(statements),
    references=tuple(references[q] for q in graph.present),
    solution=solved,
    answer=a if unknown is None else x,
  )


def _symbolic(op: int, draws: Draws) -> _Core:
  question, statements, answer, solution, names = symbolic.core(op, draws)
  return _Core(question, tuple((s, "S") for s in statements), tuple(names), solution, tuple(answer))


def _finish(
  cfg: GsmInfiniteConfig, core: _Core, depth: int, template: str, count: tokenizer.Counter, draws: Draws
) -> tuple[str, str, int] | None:
  """Context, roles and tokens of a core with noise; None if the core alone is too long."""
  statements = list(core.statements)

  def size_of(sentence: str) -> int:
    return count(f" {sentence}.")

  if cfg.noise:
    first = statements[0][0].split()[0]
    size = count(f"{core.question}\n{first}") - count(f" {first}") + sum(size_of(s) for s, _ in statements)
    if size > cfg.max_tokens:
      return None
    room = draws.between(min(max(cfg.min_tokens, size), cfg.max_tokens), cfg.max_tokens) - size
    statements += [(s, "N") for s in _noise(core, depth, template, size_of, room, draws)]
  draws.shuffle(statements)
  context = f"{'. '.join(s for s, _ in statements)}."
  text = f"{core.question}\n{context}"
  return context, "".join(role for _, role in statements), count(text) if count.exact else count.whole(text)


def _noise(core: _Core, depth: int, template: str, size_of, room: int, draws: Draws) -> Sequence[str]:
  if not depth:
    return symbolic.filler(core.references, size_of, room, draws)
  theme = TEMPLATES[template]
  typical = noise.typical(theme, core.references, depth, size_of)
  return noise.fill(
    lambda n: noise.draw(theme, core.references, n, depth, draws), size_of, room, typical, draws
  )
