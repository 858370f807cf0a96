"""How the tests read as text: names of words, and a sentence for each statement and question."""

import random
import string
from collections.abc import Callable, Iterable, Mapping, Sequence

# Five sentences that hold nothing, the haystack of RULER's plain needles.
NOISE = (
  "The grass is green.",
  "The sky is blue.",
  "The sun is yellow.",
  "Here we go.",
  "There and back again.",
)
ADJECTIVES = tuple(
  "amber brisk calm candid coastal crimson dusty eager fabled faint gentle golden hidden humble icy jolly"
  " keen lively marble mellow narrow noble northern patient plain polished quiet rapid rustic sandy silent"
  " silver slender sturdy subtle sunny timber vivid warm woven".split()
)
NOUNS = tuple(
  "acorn anchor arrow basket beacon bridge candle canyon castle cedar cobble copper dagger falcon feather"
  " ferry garnet glacier hammer harbor hollow island kettle ladder lantern meadow mirror needle orchard"
  " otter paddle parcel pebble pepper quarry ribbon saddle thistle tunnel walnut".split()
)
PERSONS = tuple(
  "Alma Boris Clara Dario Edith Felix Greta Hugo Irma Jonas Klara Lukas Marta Nils Olga Pavel".split()
)
PLACES = tuple(
  "attic balcony bathroom bedroom cellar garage garden hallway kitchen laundry library office pantry porch"
  " shed workshop".split()
)
OBJECTS = tuple(
  "apple book bottle candle coin cup football hat key lamp letter milk pen ring spoon towel".split()
)


def _digits(draw: random.Random, count: int) -> str:
  return str(draw.randrange(10 ** (count - 1), 10**count))


def _letters(draw: random.Random, letters: str, count: int) -> str:
  return "".join(draw.choice(letters) for _ in range(count))


# Kind of word -> all its names, or how to draw one.
POOLS: dict[str, Sequence[str] | Callable[[random.Random], str]] = {
  "key": [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS],
  "word": [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS],
  "person": PERSONS,
  "place": PLACES,
  "object": OBJECTS,
  "value": lambda draw: _digits(draw, 7),
  "number": lambda draw: _digits(draw, 5),
  "variable": lambda draw: _letters(draw, string.ascii_uppercase, 5),
  "coded": lambda draw: _letters(draw, string.ascii_lowercase, 6),
}
# How many names a kind has that is drawn.
DRAWN = {"value": 9 * 10**6, "number": 9 * 10**4, "variable": 26**5, "coded": 26**6}


def pool_size(kind: str) -> int:
  """How many different names there are for a kind of word."""
  pool = POOLS[kind]
  return DRAWN[kind] if callable(pool) else len(pool)


def names(draw: random.Random, kind: str, count: int) -> list[str]:
  """`count` different names of a kind, at most half of those that are drawn, all of the others."""
  pool = POOLS[kind]
  if not callable(pool):
    return draw.sample(pool, count)
  found: dict[str, None] = {}
  while len(found) < count:
    found[pool(draw)] = None
  return list(found)


def _fact(words: Sequence[str]) -> str:
  person, verb, word = words
  done = {"move": "went to", "get": "took", "drop": "put down"}[verb]
  return f"{person} {done} the {word}."


# Task -> the sentence of a statement, given the names of its words.
TELL: Mapping[str, Callable[[Sequence[str]], str]] = {
  "needle": lambda w: f"One of the special magic numbers for {w[0]} is: {w[1]}.",
  "recall": lambda w: f"The number of {w[0]} is {w[1]}.",
  "overwriting": lambda w: f"The number of {w[0]} is now {w[1]}.",
  "tracking": lambda w: f"VAR {w[0]} = {w[1] if w[1].isdigit() else f'VAR {w[1]}'}.",
  "babi1": lambda w: f"{w[0]} went to the {w[1]}.",
  "babi2": _fact,
  "babi3": _fact,
  "babi4": lambda w: f"The {w[0]} is {w[1]} of the {w[2]}.",
  "babi5": lambda w: f"{w[0]} gave the {w[1]} to {w[2]}.",
}


def _joined(words: Iterable[str]) -> str:
  """
  >>> _joined(["a", "b", "c"])
  'a, b and c'
  """
  *first, last = words
  return f"{', '.join(first)} and {last}" if first else last


def _tracked(words: Sequence[str]) -> str:
  if words[0].isdigit():
    return (
      f"Which variables have the value {words[0]}, given directly or by a chain of others? Name them in the"
      " order of the text."
    )
  return f"What is the value of the variable {words[0]}?"


def _beside(words: Sequence[str]) -> str:
  if words[0] == "ask":
    return f"What is {words[1]} of the {words[2]}?"
  return f"What is the {words[0]} {words[1]} of?"


def _given(words: Sequence[str]) -> str:
  mark, *given = words
  return {
    "to_whom": "To whom did {0} give the {1} last?",
    "by_whom": "Who gave the {0} to {1} last?",
    "what": "What did {0} give to {1} last?",
    "giver": "Who gave the {0} away last?",
    "receiver": "Who was given the {0} last?",
  }[mark].format(*given)


# Task -> the question, given the names of its words.
ASK: Mapping[str, Callable[[Sequence[str]], str]] = {
  "needle": lambda w: (
    f"What are all the special magic numbers for {_joined(w)} in the text? Name them key by key, those of a"
    " key in the order of the text."
  ),
  "recall": lambda w: f"What is the number of {w[0]}?",
  "overwriting": lambda w: f"What was the last number of {w[0]}?",
  "tracking": _tracked,
  "babi1": lambda w: f"Where is {w[1]}?",
  "babi2": lambda w: f"Where is the {w[1]}?",
  "babi3": lambda w: f"Where was the {w[1]} before it came to the {w[2]} for the last time?",
  "babi4": _beside,
  "babi5": _given,
}
