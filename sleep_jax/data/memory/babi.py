"""The questions 1 to 5 of bAbI, drawn anew: facts about persons, places and objects, among filler.

    babi1  person place             asked: where person              his last place
    babi2  person verb word         asked: where object              where its holder is, or it was dropped
    babi3  person verb word         asked: before object place       where it was before it came there last
    babi4  place side place         asked: ask side place, or place side ask    the other place
    babi5  giver object receiver    asked: which of the three, given the others or the object alone; last time

The worlds follow arXiv 1502.05698 in what can happen, not in how often. The verbs are move (to a place), get
and drop (an object).
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax.data.memory.story import (
  PAD,
  Shape,
  Story,
  Test,
  Words,
  ascending,
  below,
  choose,
  columns,
  ranks,
  shuffled,
)

if TYPE_CHECKING:
  from sleep_jax.data.memory.config import MemoryConfig

MOVE, GET, DROP = range(3)
VERBS = ("move", "get", "drop")
SIDES = ("north", "east", "south", "west")
NOWHERE = -1


def _other(key: jax.Array, size: int, than: jax.Array) -> jax.Array:
  """A number below `size`, evenly among those that are not `than`; among all if `than` is no such number."""
  drawn = below(key, jnp.where(than >= 0, size - 1, size))
  return drawn + ((than >= 0) & (drawn >= than))


def _some(key: jax.Array, known: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """`count` different places of [n] in random order, those that are `known` first; and whether each is."""
  place = ranks(jax.random.uniform(key, known.shape) + ~known)
  order = jnp.zeros_like(place).at[place].set(jnp.arange(len(place), dtype=place.dtype))[:count]
  return order, known[order]


def _blank(asked: jax.Array, story: Story) -> Story:
  """A story without the questions that are not to be asked."""
  pads = jnp.full_like(story.questions, PAD), jnp.full_like(story.answers, PAD)
  questions = jnp.where(asked[:, None], story.questions, pads[0])
  return Story(story.statements, questions, jnp.where(asked[:, None], story.answers, pads[1]))


def _moves(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """babi1: each fact, an even draw of a person and of a place where he is not."""
  del length
  step_key, ask_key = jax.random.split(key)

  def step(at, k):
    person_key, place_key = jax.random.split(k)
    person = below(person_key, cfg.persons)
    place = _other(place_key, cfg.places, at[person])
    return at.at[person].set(place), (person, place)

  at, facts = jax.lax.scan(step, jnp.full(cfg.persons, NOWHERE), jax.random.split(step_key, depth))
  person, known = _some(ask_key, at >= 0, cfg.queries)
  statements = columns(words.of("person", facts[0]), words.of("place", facts[1]))
  questions = columns(words.marks["where"], words.of("person", person))
  return _blank(known, Story(statements, questions, columns(words.of("place", at[person]))))


class _World(NamedTuple):
  """Persons and objects.

  Attributes:
    at: [persons], NOWHERE until a person has moved.
    lies: [objects], the place of each, seen or not.
    holder: [objects], NOWHERE where nobody has it.
    trail: [objects, facts], the places of each since it was first picked up.
    visited: [objects], how many those are.
  """

  at: jax.Array
  lies: jax.Array
  holder: jax.Array
  trail: jax.Array
  visited: jax.Array


def _carried(cfg: "MemoryConfig", key: jax.Array, depth: int, moves: int) -> tuple[_World, tuple]:
  """The world after `depth` facts, and the facts: person, verb and word, [depth] each.

  So that there is always something to ask for, one person (the carrier) is bound at 1 + `moves` facts, drawn
  evenly: he moves to a certain object, gets it, and if `moves` is 2 moves on with it. Before the last of them
  he does nothing else, and nobody else takes that object. At every other fact a person is drawn evenly; with
  probability 1/2, if he can, he gets an object that lies where he is or drops one that he holds; else he
  moves.
  """
  place_key, bound_key, who_key, step_key = jax.random.split(key, 4)
  lies = below(place_key, cfg.places, (cfg.objects,))
  bound = ascending(choose(bound_key, 1 + moves, depth))
  carrier, target = below(who_key, jnp.asarray([cfg.persons, cfg.objects]), (2,))
  world = _World(
    jnp.full(cfg.persons, NOWHERE),
    lies,
    jnp.full(cfg.objects, NOWHERE),
    jnp.full((cfg.objects, depth), NOWHERE),
    jnp.zeros(cfg.objects, jnp.int32),
  )

  def step(world: _World, given):
    i, k = given
    actor_key, hands_key, which_key, go_key = jax.random.split(k, 4)
    role = jnp.where(i == bound, jnp.arange(1 + moves), NOWHERE).max()  # 0 goes there, 1 gets it, 2 moves on
    free = i > bound[-1]
    actor = _other(actor_key, cfg.persons, jnp.where(free, NOWHERE, carrier))
    actor = jnp.where(role >= 0, carrier, actor)
    here = world.at[actor]
    reserved = (jnp.arange(cfg.objects) == target) & (i < bound[1])
    can_get = (world.holder == NOWHERE) & (world.lies == here) & ~reserved
    can = jnp.concatenate([can_get, world.holder == actor])
    chosen = jnp.argmax(jnp.where(can, jax.random.uniform(which_key, can.shape), -1.0))
    hands = jnp.where(role >= 0, role == 1, jnp.any(can) & jax.random.bernoulli(hands_key))
    thing = jnp.where(role == 1, target, chosen % cfg.objects)
    verb = jnp.where(~hands, MOVE, jnp.where((role == 1) | (chosen < cfg.objects), GET, DROP))
    there = jnp.where(role == 0, world.lies[target], _other(go_key, cfg.places, here))

    at = jnp.where(hands, world.at, world.at.at[actor].set(there))
    after = jnp.where(verb == GET, actor, NOWHERE)
    holder = jnp.where(hands, world.holder.at[thing].set(after), world.holder)
    lies = jnp.where((holder == actor) & ~hands, there, world.lies)
    seen = (world.visited > 0) | (holder >= 0)
    last = jnp.take_along_axis(world.trail, jnp.maximum(world.visited - 1, 0)[:, None], axis=1)[:, 0]
    new = seen & ((world.visited == 0) | (last != lies))
    rows = jnp.arange(cfg.objects)
    trail = world.trail.at[rows, jnp.where(new, world.visited, depth)].set(lies, mode="drop")
    word = jnp.where(hands, thing, there)
    return _World(at, lies, holder, trail, world.visited + new), (actor, verb, word)

  return jax.lax.scan(step, world, (jnp.arange(depth), jax.random.split(step_key, depth)))


def _told(words: Words, facts: tuple) -> jax.Array:
  """The statements of facts: person, verb, and a place or an object."""
  person, verb, word = facts
  said = jnp.where(verb == MOVE, words.of("place", word), words.of("object", word))
  return columns(words.of("person", person), words.marks["move"] + verb, said)


def _where(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """babi2: asks for objects that were picked up at some time."""
  del length
  world_key, ask_key = jax.random.split(key)
  world, facts = _carried(cfg, world_key, depth, moves=1)
  thing, known = _some(ask_key, world.visited > 0, cfg.queries)
  questions = columns(words.marks["where"], words.of("object", thing))
  return _blank(known, Story(_told(words, facts), questions, columns(words.of("place", world.lies[thing]))))


def _before(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """babi3: asks for objects that were in two places at least, and for any of these but the first."""
  del length
  world_key, ask_key, which_key = jax.random.split(key, 3)
  world, facts = _carried(cfg, world_key, depth, moves=2)
  thing, known = _some(ask_key, world.visited > 1, cfg.queries)
  trail, count = world.trail[thing], world.visited[thing]
  which = 1 + below(which_key, jnp.maximum(count - 1, 1), count.shape)
  place = jnp.take_along_axis(trail, which[:, None], axis=1)
  inside = (jnp.arange(depth) >= 1) & (jnp.arange(depth) < count[:, None])
  last = jnp.max(jnp.where((trail == place) & inside, jnp.arange(depth), 1), axis=1)
  before = jnp.take_along_axis(trail, last[:, None] - 1, axis=1)[:, 0]
  questions = columns(words.marks["before"], words.of("object", thing), words.of("place", place[:, 0]))
  return _blank(known, Story(_told(words, facts), questions, columns(words.of("place", before))))


def _sides(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """babi4: a walk over `depth` + 1 places, north or south and east or west, that never turns back.

  One direction of each pair is drawn for the whole walk, so that no two places lie in one spot and each has
  at most one neighbour on a side. Of two neighbours either may be said to lie beside the other.
  """
  del length
  place_key, sign_key, axis_key, flip_key, order_key, end_key, form_key, ask_key = jax.random.split(key, 8)
  walk = words.of("place", choose(place_key, depth + 1, cfg.places))
  signs = below(sign_key, 2, (2,))
  axis = below(axis_key, 2, (depth,))
  side = axis + 2 * signs[axis]  # of the next place, seen from the one before: a number in SIDES

  def said(flip):
    """Place, side, place: the first lies on that side of the second."""
    first, second = jnp.where(flip, walk[:-1], walk[1:]), jnp.where(flip, walk[1:], walk[:-1])
    return first, words.marks["north"] + jnp.where(flip, (side + 2) % 4, side), second

  statements = columns(*said(jax.random.bernoulli(flip_key, shape=(depth,))))
  order = shuffled(order_key, depth)
  first, beside, second = said(jax.random.bernoulli(end_key, shape=(depth,)))
  asks_first = jax.random.bernoulli(form_key, shape=(depth,))
  ask = jnp.full(depth, words.marks["ask"])
  questions = columns(jnp.where(asks_first, ask, first), beside, jnp.where(asks_first, second, ask))
  answers = columns(jnp.where(asks_first, first, second))
  fact = choose(ask_key, cfg.queries, depth)
  return Story(statements[order], questions[fact], answers[fact])


def _gifts(cfg: "MemoryConfig", words: Words, key: jax.Array, depth: int, length: int) -> Story:
  """babi5: each fact, an even draw of an object, which its holder gives to another person, drawn evenly.

  Nobody holds an object at first: then the giver is drawn too. Asked are `queries` different facts, each in
  one of five ways, drawn evenly; a question that was asked before is left out.
  """
  del length
  step_key, ask_key, kind_key = jax.random.split(key, 3)

  def step(holder, k):
    thing_key, first_key, next_key = jax.random.split(k, 3)
    thing = below(thing_key, cfg.objects)
    begin = below(first_key, cfg.persons)
    giver = jnp.where(holder[thing] >= 0, holder[thing], begin)
    receiver = _other(next_key, cfg.persons, giver)
    return holder.at[thing].set(receiver), (giver, thing, receiver)

  _, facts = jax.lax.scan(step, jnp.full(cfg.objects, NOWHERE), jax.random.split(step_key, depth))
  giver, thing, receiver = facts = (
    words.of("person", facts[0]),
    words.of("object", facts[1]),
    words.of("person", facts[2]),
  )
  fact = choose(ask_key, cfg.queries, depth)
  kind = below(kind_key, len(GIFT_MARKS), (cfg.queries,))
  asked = jnp.asarray([words.marks[name] for name in GIFT_MARKS])[kind]
  pad = jnp.full_like(giver, PAD)
  # each way to ask: two words that are given, and the word that is asked for
  ways = ((giver, thing, receiver), (thing, receiver, giver), (giver, receiver, thing))
  ways += ((pad, thing, giver), (pad, thing, receiver))
  first, second, wanted = (jnp.stack([way[i] for way in ways]) for i in range(3))  # [ways, depth]
  one, two = first[kind, fact], second[kind, fact]
  same = (first[kind] == one[:, None]) & (second[kind] == two[:, None])  # [Q, depth]
  last = jnp.max(jnp.where(same, jnp.arange(depth), 0), axis=1)
  short = one == PAD
  questions = columns(jnp.where(short, PAD, asked), jnp.where(short, asked, one), two)
  repeated = jnp.all(questions[:, None] == questions, axis=2) & jnp.tri(cfg.queries, k=-1, dtype=bool)
  return _blank(~jnp.any(repeated, axis=1), Story(columns(*facts), questions, columns(wanted[kind, last])))


GIFT_MARKS = ("to_whom", "by_whom", "what", "giver", "receiver")


def _test(shape: Shape, **others) -> Test:
  """A test whose story has `depth` statements of the other sizes."""
  marks = others.pop("marks")
  fields = others.pop("fields")
  return Test(
    depth="facts",
    kinds={field.removesuffix("s"): field for field in fields},
    marks=marks,
    fields=fields,
    shape=lambda cfg, depth, length: shape._replace(statements=depth),
    **others,
  )


def _some_of(*kinds: str):
  """One word of each kind: a world needs no more, whatever its size."""
  return lambda cfg, depth, length: dict.fromkeys(kinds, 2)


BABI = {
  "babi1": _test(
    Shape(0, 2, 2, 1),
    fields=("persons", "places"),
    marks=("where",),
    needs=lambda cfg, depth, length: {"place": 2},
    most_queries=lambda cfg, depth: (cfg.persons, "data.persons"),
    draw=_moves,
    chance=lambda cfg, depth, length: 1 / cfg.places,
    blanks=True,
  ),
  "babi2": _test(
    Shape(0, 3, 2, 1),
    fields=("persons", "places", "objects"),
    marks=("where", *VERBS),
    least=2,
    needs=_some_of("person", "place"),
    most_queries=lambda cfg, depth: (cfg.objects, "data.objects"),
    draw=_where,
    chance=lambda cfg, depth, length: 1 / cfg.places,
    blanks=True,
  ),
  "babi3": _test(
    Shape(0, 3, 3, 1),
    fields=("persons", "places", "objects"),
    marks=("before", *VERBS),
    least=3,
    needs=_some_of("person", "place"),
    most_queries=lambda cfg, depth: (cfg.objects, "data.objects"),
    draw=_before,
    chance=lambda cfg, depth, length: 1 / (cfg.places - 1),
    blanks=True,
  ),
  "babi4": _test(
    Shape(0, 3, 3, 1),
    fields=("places",),
    marks=("ask", *SIDES),
    needs=lambda cfg, depth, length: {"place": depth + 1},
    most_queries=lambda cfg, depth: (depth, "the least of data.depths"),
    draw=_sides,
    chance=lambda cfg, depth, length: 1 / (cfg.places - 1),
  ),
  "babi5": _test(
    Shape(0, 3, 3, 1),
    fields=("persons", "objects"),
    marks=GIFT_MARKS,
    needs=_some_of("person"),
    most_queries=lambda cfg, depth: (depth, "the least of data.depths"),
    draw=_gifts,
    chance=lambda cfg, depth, length: (
      (2 / (cfg.persons - 1) + 1 / cfg.objects + 2 / cfg.persons) / len(GIFT_MARKS)
    ),
    blanks=True,
  ),
}
