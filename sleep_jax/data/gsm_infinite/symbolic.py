"""The symbolic subset: which variables equal a value, among assignments that form trees."""

from collections.abc import Callable, Sequence

from sleep_jax.data.gsm_infinite.draws import Draws

NUM_NAMES = 1_000_000
LARGEST_ROOT = 10
STEPS = (("", 0), (" + 1", 1), (" - 1", -1))


def draw_tree(op: int, draws: Draws) -> tuple[str, list[str], list[str], str, list[str]]:
  """Draws a random recursive tree of `op` variables whose root is a number.

  Returns:
    Question, statements, the answer (sorted), the solution, and all variables.
  """
  names = draw_names(op, [], draws)
  values = {names[0]: draws.between(0, LARGEST_ROOT)}
  statements = [f"assign {names[0]} = {values[names[0]]}"]
  work = [f"{names[0]} = {values[names[0]]}"]
  for i, name in enumerate(names[1:], 1):
    parent = names[draws.index(i)]
    sign, step = draws.choice(STEPS)
    values[name] = values[parent] + step
    statements.append(f"assign {name} = {parent}{sign}")
    work.append(f"{name} = {parent}{sign} = {values[name]}")
  asked = values[draws.choice(names)]
  answer = sorted(name for name in names if values[name] == asked)
  solution = f"{'. '.join(work)}. Answer: {', '.join(answer)}."
  return f"Which variables are equal to {asked}?", statements, answer, solution, names


def draw_filler(used: Sequence[str], count: Callable[[str], int], room: int, draws: Draws) -> list[str]:
  """Draws statements of a second tree, whose root has no value, in at most `room` tokens.

  Args:
    used: variables that are taken.
    count: tokens of a statement with its full stop and the space before it.
    room: tokens that are missing.
    draws: the stream.
  """
  names = draw_names(1, used, draws)
  taken = {*used, *names}
  statements: list[str] = []
  while True:
    name = f"V{draws.index(NUM_NAMES):06}"
    sign, _ = draws.choice(STEPS)
    statement = f"assign {name} = {draws.choice(names)}{sign}"
    if name in taken:
      continue
    room -= count(statement)
    if room < 0:
      return statements
    taken.add(name)
    names.append(name)
    statements.append(statement)


def draw_names(num: int, used: Sequence[str], draws: Draws) -> list[str]:
  """Draws `num` variables that differ from each other and from `used`."""
  names: list[str] = []
  while len(names) < num:
    name = f"V{draws.index(NUM_NAMES):06}"
    if name not in names and name not in used:
      names.append(name)
  return names
