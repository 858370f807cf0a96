"""Reads a sequence of a test of memory from its tokens alone and answers its questions: the judge.

Nothing here is shared with the generators but which token is which word.
"""

import collections
import dataclasses

SIDES = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}


@dataclasses.dataclass(frozen=True)
class Read:
  """A sequence: words (kind, number) or marks.

  Attributes:
    pads: before the context.
    context: with its filler.
    asked: (question, answer) in order, pads left out; of those that are asked.
  """

  pads: int
  context: list
  asked: list


def word(cfg, token):
  """A token as (kind, number), or as the name of a mark."""
  for name, mark in cfg.vocabulary.marks.items():
    if token == mark:
      return name
  for kind, tokens in cfg.vocabulary.kinds.items():
    if token in tokens:
      return kind, token - tokens.start
  raise ValueError(f"{token} is no word")


def read(cfg, tokens):
  """Parses the tokens of one sequence."""
  tokens = [int(t) for t in tokens]
  context, rest = tokens[: max(cfg.lengths)], tokens[max(cfg.lengths) :]
  pads = next((i for i, t in enumerate(context) if t), len(context))
  size = len(rest) // cfg.queries
  asked = []
  for i in range(cfg.queries):
    part = rest[i * size : (i + 1) * size]
    question = [word(cfg, t) for t in part[: cfg.question] if t]
    answer = [word(cfg, t) for t in part[cfg.question :] if t]
    assert bool(question) == bool(answer), part
    if question:
      asked.append((tuple(question), tuple(answer)))
  return Read(pads, [word(cfg, t) for t in context[pads:]], asked)


def told(cfg, context):
  """The words of a context in groups of one statement each."""
  size = {"common": 1, "frequent": 1, "needle": 2, "recall": 2, "overwriting": 2, "tracking": 2, "babi1": 2}
  width, words = size.get(cfg.task, 3), [w for w in context if w[0] != "filler"]
  return [tuple(words[i : i + width]) for i in range(0, len(words), width)]


def solve(cfg, context, question):
  """The answer that the context gives to a question, as a tuple of words."""
  return SOLVERS[cfg.task](told(cfg, context), question)


def _pairs(facts, question):
  return tuple(value for key, value in facts if key == question[0])


def _last(facts, question):
  return _pairs(facts, question)[-1:]


def _tracked(facts, question):
  source = dict(facts)
  (asked,) = question

  def chain(variable):
    links = [variable]
    while links[-1] in source:
      links.append(source[links[-1]])
    return links

  if asked[0] == "variable":
    return (chain(asked)[-1],)
  found = [v for v in source if chain(v)[-1] == asked]
  return tuple(sorted(found, key=lambda v: len(chain(v))))


def _common(facts, question):
  counts = collections.Counter(w for (w,) in facts)
  most = max(counts.values())
  return tuple(sorted(w for w, n in counts.items() if n == most))


def _frequent(facts, question):
  ranked = collections.Counter(w for (w,) in facts).most_common()
  named = len(ranked)
  for i, (_, n) in enumerate(ranked):
    if i and n == ranked[i - 1][1]:
      named = i - 1
      break
  return tuple(w for w, _ in ranked[:named])


def _walked(facts, question):
  return next((place,) for person, place in reversed(facts) if person == question[1])


def trails(facts):
  """Object -> its places since it was first picked up, each once in a row; checks that all of it can be."""
  at, holder, lies, seen = {}, {}, {}, {}
  for person, verb, thing in facts:
    if verb == "move":
      assert at.get(person) != thing, "moves to where he is"
      at[person] = thing
    elif verb == "get":
      assert thing not in holder and at[person] == lies.get(thing, at[person]), "gets what is not there"
      holder[thing] = person
    else:
      assert holder.pop(thing) == person, "drops what he does not hold"
      lies[thing] = at[person]
    for carried, carrier in holder.items():
      trail = seen.setdefault(carried, [])
      if trail[-1:] != [at[carrier]]:
        trail.append(at[carrier])
  return seen


def _where(facts, question):
  return (trails(facts)[question[1]][-1],)


def _before(facts, question):
  _, thing, place = question
  trail = trails(facts)[thing]
  at = len(trail) - 1 - trail[::-1].index(place)
  assert at > 0
  return (trail[at - 1],)


def _beside(facts, question):
  spot = {facts[0][0]: (0, 0)}
  while len(spot) < len({place for fact in facts for place in fact[::2]}):
    for first, side, second in facts:
      dx, dy = SIDES[side]
      if second in spot:
        spot.setdefault(first, (spot[second][0] + dx, spot[second][1] + dy))
      elif first in spot:
        spot[second] = (spot[first][0] - dx, spot[first][1] - dy)
  assert len(set(spot.values())) == len(spot), "two places in one spot"
  for first, side, second in facts:
    assert spot[first] == tuple(a + b for a, b in zip(spot[second], SIDES[side], strict=True))
  dx, dy = SIDES[question[1]]
  if question[0] == "ask":
    x, y = spot[question[2]]
    wanted = (x + dx, y + dy)
  else:
    x, y = spot[question[0]]
    wanted = (x - dx, y - dy)
  return tuple(place for place, here in spot.items() if here == wanted)


def _gifts(facts, question):
  holder = {}
  for giver, thing, receiver in facts:
    assert giver != receiver and holder.get(thing, giver) == giver, "gives what he does not have"
    holder[thing] = receiver
  mark, *given = question
  for giver, thing, receiver in reversed(facts):
    known, wanted = {
      "to_whom": ([giver, thing], receiver),
      "by_whom": ([thing, receiver], giver),
      "what": ([giver, receiver], thing),
      "giver": ([thing], giver),
      "receiver": ([thing], receiver),
    }[mark]
    if known == given:
      return (wanted,)
  raise AssertionError("nothing of the kind happened")


SOLVERS = {
  "needle": _pairs,
  "recall": _pairs,
  "overwriting": _last,
  "tracking": _tracked,
  "common": _common,
  "frequent": _frequent,
  "babi1": _walked,
  "babi2": _where,
  "babi3": _before,
  "babi4": _beside,
  "babi5": _gifts,
}
