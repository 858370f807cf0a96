"""Noise: sentences about new places that refer to the core, hold no numbers, and on which nothing depends."""

from collections.abc import Callable, Sequence

from sleep_jax.config import ConfigError
from sleep_jax.data.gsm_infinite import sentences
from sleep_jax.data.gsm_infinite.draws import Draws
from sleep_jax.data.gsm_infinite.sentences import Expression
from sleep_jax.data.gsm_infinite.words import Template

PER_PLACE = 20  # wanted statements for each place


def draw_noise(template: Template, core: Sequence[str], wanted: int, depth: int, draws: Draws) -> list[str]:
  """Draws noise sentences, at least `wanted`, without their full stops.

  Each is a copy (half of them), a sum or a difference of core quantities. The total of each noise place but
  the last is an operand of one sentence about another place.

  Args:
    template: whose names are used.
    core: references to all core quantities; one that stands there twice is drawn twice as often.
    wanted: number of sentences.
    depth: d; with 3 each count comes with its average.
    draws: the stream.

  Raises:
    ConfigError: if there are not enough names of places for so many sentences.
  """
  num_places = wanted // PER_PLACE + 1
  num_groups = num_places // len(template.noise_places[0]) + 1
  if num_groups > len(template.noise_places):
    most = len(template.noise_places) * len(template.noise_places[0]) * PER_PLACE
    raise ConfigError(
      f"data.max_tokens: is too long: {wanted} noise sentences are needed, names suffice for {most}"
    )
  groups = draws.sample(template.noise_places, num_groups)
  places = [place for group in groups for place in group][:num_places]
  names: list[str] = []
  place_of: list[int] = []
  counts = 0
  for i, place in enumerate(places):
    for kind in (kind for group in draws.sample(template.noise_kinds, 2) for kind in group):
      names.append(f"the number of {kind} in {place}")
      place_of.append(i)
      if depth == 3:
        names.append(f"the {template.average} per {kind} in {place}")
        place_of.append(i)
      counts += 1
      if counts * (depth - 1) >= wanted:
        break

  refs = [draws.sample(range(len(core)), 2 if draws.coin() and len(core) > 1 else 1) for _ in names]
  texts = list(core)
  phrase = template.total if depth == 2 else template.product
  used_totals: set[int] = set()
  for i, place in enumerate(places):
    used_totals.add(i)
    single = [j for j in range(len(names)) if len(refs[j]) == 1 and place_of[j] not in used_totals]
    if single:
      refs[draws.choice(single)].append(len(texts))
      texts.append(f"the {phrase} in {place}")
  made = []
  for name, chosen in zip(names, refs, strict=True):
    e = Expression(None, False, tuple(chosen), len(chosen) == 2 and draws.coin())
    made.append(sentences.statement(name, sentences.right_side(e, texts)))
  return made


def fill_room(
  make: Callable[[int], list[str]],
  count: Callable[[str], int],
  room: int,
  typical: float,
  draws: Draws,
) -> list[str]:
  """Draws noise that takes at most `room` tokens, and nearly as many.

  Args:
    make: so many noise sentences or more.
    count: tokens of a sentence with its full stop and the space before it.
    room: tokens that are missing.
    typical: tokens of a noise sentence, roughly.
    draws: the stream.

  Returns:
    Sentences in random order.
  """
  made = make(int(1.15 * room / typical) + 2) if room >= 1 else []
  draws.shuffle(made)
  chosen = []
  for sentence in made:
    size = count(sentence)
    if size <= room:
      chosen.append(sentence)
      room -= size
  return chosen


def typical_length(template: Template, core: Sequence[str], depth: int, count: Callable[[str], int]) -> float:
  """Estimates the tokens of a noise sentence: a left side and three halves of a reference."""
  place, kind = template.noise_places[0][0], template.noise_kinds[0][0]
  left_side = count(f"The number of {kind} in {place} equals")
  if depth == 3:
    left_side = (left_side + count(f"The {template.average} per {kind} in {place} equals")) / 2
  refs = sum(count(f"{ref} and") for ref in core) / len(core)
  return left_side + 1.5 * refs
