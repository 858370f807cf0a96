"""Sentences that nothing depends on: leaves that hang on the core, about new places, without numbers."""

from collections.abc import Callable, Sequence

from sleep_jax.data.gsm_infinite import sentences
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.sentences import Expression
from sleep_jax.data.gsm_infinite.words import Template

PER_PLACE = 20  # wanted statements that bring one more place


def draw(template: Template, core: Sequence[str], wanted: int, depth: int, draws: Draws) -> list[str]:
  """Noise sentences, at least `wanted`, without their full stops.

  Each is a copy (half of them), a sum or a difference of core quantities; the total of each noise place but
  the last is an operand of one of another place.

  Args:
    core: references to all core quantities; one that is there twice is drawn twice as often.
    wanted: number of sentences.
    depth: d; with 3 each count comes with its average.
  """
  num_places = wanted // PER_PLACE + 1
  groups = draws.sample(template.noise_places, num_places // len(template.noise_places[0]) + 1)
  places = [place for group in groups for place in group][:num_places]
  left: list[str] = []
  place_of: list[int] = []
  counts = 0
  for i, place in enumerate(places):
    for kind in (kind for group in draws.sample(template.noise_kinds, 2) for kind in group):
      left.append(f"the number of {kind} in {place}")
      place_of.append(i)
      if depth == 3:
        left.append(f"the {template.average} per {kind} in {place}")
        place_of.append(i)
      counts += 1
      if counts * (depth - 1) >= wanted:
        break

  refs = [draws.sample(range(len(core)), 2 if draws.coin() and len(core) > 1 else 1) for _ in left]
  texts = list(core)
  phrase = template.total if depth == 2 else template.product
  given: set[int] = set()
  for i, place in enumerate(places):
    given.add(i)
    single = [j for j in range(len(left)) if len(refs[j]) == 1 and place_of[j] not in given]
    if single:
      refs[draws.choice(single)].append(len(texts))
      texts.append(f"the {phrase} in {place}")
  made = []
  for name, chosen in zip(left, refs, strict=True):
    e = Expression(None, False, tuple(chosen), len(chosen) == 2 and draws.coin())
    made.append(sentences.statement(name, sentences.right_side(e, texts)))
  return made


def fill(
  make: Callable[[int], list[str]],
  count: Callable[[str], int],
  room: int,
  typical: float,
  draws: Draws,
) -> list[str]:
  """Noise that takes at most `room` tokens, and nearly as many.

  Args:
    make: so many noise sentences or more.
    count: tokens of a sentence with its full stop and the space before it.
    room: tokens that are missing.
    typical: tokens of a noise sentence, roughly.

  Returns:
    Sentences in random order.
  """
  made = make(int(1.15 * room / typical) + 2) if room >= 1 else []
  draws.shuffle(made)
  kept = []
  for sentence in made:
    size = count(sentence)
    if size <= room:
      kept.append(sentence)
      room -= size
  return kept


def typical(template: Template, core: Sequence[str], depth: int, count: Callable[[str], int]) -> float:
  """Tokens of a noise sentence, roughly: a left side and three halves of a reference."""
  place, kind = template.noise_places[0][0], template.noise_kinds[0][0]
  left = count(f"The number of {kind} in {place} equals")
  if depth == 3:
    left = (left + count(f"The {template.average} per {kind} in {place} equals")) / 2
  refs = sum(count(f"{ref} and") for ref in core) / len(core)
  return left + 1.5 * refs
