"""The core of a problem: question, sentences that matter or could, worked solution and answer; no noise."""

import dataclasses

from sleep_jax.data.gsm_infinite import dependencies, sentences, structure, symbolic, values
from sleep_jax.data.gsm_infinite.config import BUDGETS, GsmInfiniteConfig
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.sentences import Expression
from sleep_jax.data.gsm_infinite.words import Template

OPERATIONS, VALUES = "operations", "values"  # why an attempt at a core was refused


@dataclasses.dataclass(frozen=True)
class Core:
  """A problem without noise.

  Attributes:
    question: as text.
    statements: (sentence, role) in no particular order; roles as in `Problem`.
    references: texts that refer to the quantities that noise may mention.
    solution: worked out step by step.
    answer: as in `Problem`.
  """

  question: str
  statements: tuple[tuple[str, str], ...]
  references: tuple[str, ...]
  solution: str
  answer: int | tuple[str, ...]


def draw_core(
  cfg: GsmInfiniteConfig, template: Template, op: int, depth: int, reverse: bool, draws: Draws
) -> Core | str:
  """Makes one attempt at a core with `op` operations.

  Returns:
    The core, or why there is none: `OPERATIONS` if it would have another number of operations, `VALUES` if
    some needed value is out of range or the unknown cannot be solved for.
  """
  size = (BUDGETS[op] + 1) // 2
  made = structure.draw_structure(draws, size, depth, reverse)
  graph = made and dependencies.draw_needed(made, size, reverse, draws)
  if not made or not graph or dependencies.count_operations(made, graph) != op:
    return OPERATIONS
  expressions = {
    q: sentences.draw_expression(graph.parents[q], cfg.number_range, draws)
    for q in graph.order
    if not made.implicit(q)
  }
  unknown = values.hidden_leaf(graph.order, expressions) if reverse else None
  if reverse and unknown is None:
    return VALUES
  lines = values.evaluate(made, graph.order, expressions, unknown, cfg.modulus)
  x = 0 if unknown is None else expressions[unknown].literal or 0
  if lines is None or not values.acceptable(made, lines, x) or (reverse and not lines[graph.order[-1]][1]):
    return VALUES
  dependencies.add_unneeded(made, graph, draws)
  return _write(cfg, template, made, graph, expressions, lines, unknown, x, draws)


def draw_symbolic(op: int, draws: Draws) -> Core:
  """Draws the core of a symbolic problem."""
  question, statements, answer, solution, names = symbolic.draw_tree(op, draws)
  return Core(question, tuple((s, "S") for s in statements), tuple(names), solution, tuple(answer))


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
) -> Core:
  """Returns the texts of a core; names and the expressions of unneeded quantities are drawn here."""
  places = draws.sample(draws.choice(template.places), max(made.place) + 1)
  kinds = draws.sample(draws.choice(template.kinds), max(made.kind) + 1)
  names = [sentences.quantity_name(made, template, places, kinds, q) for q in range(len(made.roles))]
  references = [sentences.reference_to(name) for name in names]
  statements = []
  for q in graph.present:
    if made.implicit(q):
      continue
    if q == unknown:
      text = sentences.hidden_statement(references[q])
    else:
      e = expressions.get(q) or sentences.draw_expression(graph.parents[q], cfg.number_range, draws)
      text = sentences.statement(references[q], sentences.right_side(e, references))
    statements.append((text, "S" if q in expressions else "U"))
  terminal = graph.order[-1]
  a, b = lines[terminal]
  if unknown is not None:
    statements.append((sentences.statement(references[terminal], str(a + b * x)), "R"))
  solved = values.solution(
    made, graph.order, expressions, lines, names.__getitem__, unknown, x, draws, cfg.modulus
  )
  return Core(
    question=sentences.question_about(names[terminal if unknown is None else unknown]),
    statements=tuple(statements),
    references=tuple(references[q] for q in graph.present),
    solution=solved,
    answer=a if unknown is None else x,
  )
