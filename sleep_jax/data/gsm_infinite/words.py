"""The three templates: phrases and names of their core, and our own names for the noise.

Noise names are combined from a stock of words, group by group, without chance: 32 groups of 20 place names
and of 20 (school: 10) kinds a template, about as long as those of the benchmark. No name of the noise is a
name of the core, holds a digit, a full stop, " in " or " and ", or begins like a sentence.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Template:
  """Names of one theme.

  Attributes:
    total, product, average: phrases of the implicit totals and of the average.
    places, kinds: groups of core names; a problem takes each layer's names from one group.
    noise_places, noise_kinds: groups of names that occur in noise only.
  """

  total: str
  product: str
  average: str
  places: tuple[tuple[str, ...], ...]
  kinds: tuple[tuple[str, ...], ...]
  noise_places: tuple[tuple[str, ...], ...]
  noise_kinds: tuple[tuple[str, ...], ...]


def _names(text: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in text.split(","))


def _crossed(
  firsts: Sequence[str], lasts: Sequence[str], size: int, *patterns: str
) -> tuple[tuple[str, ...], ...]:
  """One group for each of `lasts`: `size` of the `firsts`, another stretch of them in each group.

  Args:
    patterns: of the names; the groups take them in turn.
  """
  groups = []
  for i, last in enumerate(lasts):
    chosen = [firsts[(7 * i + j) % len(firsts)] for j in range(size)]
    groups.append(tuple(patterns[i % len(patterns)].format(first, last) for first in chosen))
  return tuple(groups)


_SHADES = _names(
  "Amber, Silver, Crimson, Willow, Granite, Misty, Golden, Hollow, Northern, Frozen, Emerald, Coral, Thunder,"
  " Whispering, Ivory, Copper, Sunken, Velvet, Shadow, Starlit, Juniper, Marble, Saffron, Windswept, Cobalt,"
  " Ancient, Lantern, Heron, Obsidian, Painted"
)
_GROUNDS = _names(
  "Lagoon, Reef, Fjord, Glacier, Plateau, Canyon, Savanna, Delta, Marsh, Peninsula, Archipelago, Crater,"
  " Dunes,"
  " Prairie, Tundra, Oasis, Grotto, Summit, Estuary, Harbor, Terrace, Meadow, Basin, Moor, Cove, Steppe,"
  " Gorge,"
  " Highlands, Sanctuary, Observatory, Botanical Garden, Rainforest"
)
_LOOKS = _names(
  "spotted, striped, grey, giant, dwarf, crested, tawny, desert, mountain, river, white-tailed, horned,"
  " marbled,"
  " long-eared, arctic, red-bellied, pygmy, masked, ringed, woodland, coastal, banded, bearded, snowy"
)
_ANIMALS = _names(
  "gecko, antelope, marmot, heron, lemur, tortoise, badger, lynx, pelican, hedgehog, otter, iguana, gazelle,"
  " porcupine, falcon, salamander, moose, weasel, flamingo, turtle, hamster, bison, cobra, stork, seal,"
  " mongoose,"
  " tapir, beetle, dolphin, kangaroo, trout, penguin"
)
_STEMS = _names(
  "Ash, Briar, Cold, Dun, Elm, Fern, Gold, Hazel, Iron, Lark, Moss, Nettle, Oat, Pebble, Raven, Stone, Thorn,"
  " Under, Wether, Yarrow, Barley, Clover, Drift, Fallow, Heather, Kestrel, Linden, Marl, Otter, Quarry"
)
_ENDINGS = _names(
  "wick, mere, stead, combe, thorpe, holm, garth, minster, ham, fold, gate, haven, by, croft, march, reach,"
  " crest, moor, barrow, den, hurst, worth, leigh, bourne, fell, shaw, dale, ley, pool, bank, cross, field"
)
_SUBJECTS = _names(
  "pottery, marine law, alpine rescue, lighting, bee keeping, river navigation, paper folding,"
  " desert farming, opera, bridge design, chemistry, comet watching, puppet theatre,"
  " boat building"
)
_SCHOOLS = _names(
  "school of {}, academy of {}, institute of {}, college of {}, {} academy, {} institute, {} college,"
  " {} workshop,"
  " evening school of {}, summer school of {}, royal academy of {}, national institute of {},"
  " open college of {},"
  " {} training centre, {} conservatory, {} boarding school, junior academy of {}, senior college of {},"
  " free school of {}, {} night school, municipal institute of {}, {} research school, coastal academy of {},"
  " highland college of {}, {} preparatory school, guild school of {}, {} evening academy,"
  " travelling school of {},"
  " {} field institute, central academy of {}, {} honours college, old school of {}"
)
_GALAS = _names(
  "Lantern, Harvest, Cathedral, Riverside, Moonrise, Orchard, Compass, Carousel, Meridian, Lighthouse,"
  " Nightingale,"
  " Horizon, Clockwork, Sapphire, Voyager, Paper Crane, Winter, Boulevard, Phoenix, Echo, Monsoon, Tapestry,"
  " Silver Thread, Parade, Solstice, Labyrinth, Wildflower, Aurora, Canvas, Twilight"
)
_EVENTS = _names(
  "Film Festival, Movie Awards, Cinema Gala, Screen Festival, International Film Gala, Picture Week,"
  " Movie Night,"
  " Short Film Awards, Cinema Prize, Open Air Festival, Documentary Festival, Movie Marathon, Film Biennale,"
  " Cinema Days, Premiere Gala, Film Jubilee, Animation Festival, Movie Convention, Cinema Summit,"
  " Film Carnival,"
  " Student Film Awards, Cinema Retrospective, Movie Showcase, Film Assembly, Cinema Pageant,"
  " Independent Film Awards,"
  " Movie Symposium, Film Regatta, Audience Awards, Critics Gala, Debut Film Festival, World Cinema Festival"
)
_PEOPLE = _names(
  "retired clockmaker, lonely astronaut, stubborn gardener, blind painter, runaway violinist, village doctor,"
  " forgotten boxer, desert pilot, young cartographer, double agent, reluctant king, ghost hunter,"
  " subway conductor,"
  " arctic surgeon, circus acrobat, disgraced judge, robot librarian, pirate cook, midnight baker,"
  " river smuggler,"
  " sleepless detective, orphan inventor, wandering monk, tired superhero"
)
_PLOTS = _names(
  "treasure hunt, courtroom drama, heist comedy, rescue thriller, time travel romance, family reunion,"
  " revenge drama,"
  " road trip comedy, spy thriller, mountain expedition, wedding comedy, submarine thriller,"
  " coming of age story,"
  " alien encounter, murder mystery, war drama, cooking contest, haunted house tale, election thriller,"
  " dance drama,"
  " prison escape, chess duel, jungle journey, shipwreck survival, museum robbery, love triangle comedy,"
  " political drama, musical journey, volcano disaster, western duel, sports drama, identity swap comedy"
)


def _school_kinds() -> tuple[tuple[str, ...], ...]:
  groups = []
  for i, pattern in enumerate(_SCHOOLS):
    groups.append(tuple(pattern.format(_SUBJECTS[(5 * i + j) % len(_SUBJECTS)]) for j in range(10)))
  return tuple(groups)


TEMPLATES: dict[str, Template] = {
  "crazy_zootopia": Template(
    total="total number of adult animals",
    product="total number of newborn animal children",
    average="average number of newborn children",
    places=(
      _names("Beverly Forest, Cedar Valley, Oakridge Riverside, Pine Ridge, Maple Creek"),
      _names("South Zoo, Jefferson Circus, Mayer Aquarium, Bundle Ranch, Hamilton Farm"),
    ),
    kinds=(
      _names("adult bear, adult wolf, adult deer, adult fox, adult racoon"),
      _names("adult eagle, adult parrot, adult owl, adult blue jay, adult crow"),
    ),
    noise_places=_crossed(_SHADES, _GROUNDS, 20, "{} {}"),
    noise_kinds=_crossed(_LOOKS, _ANIMALS, 20, "adult {} {}"),
  ),
  "teachers_in_school": Template(
    total="total number of schools",
    product="total number of teachers from all schools",
    average="average number of teachers",
    places=(
      _names("Evervale City, Hawkesbury, Glenfield City, Westhaven City, Brightford"),
      _names("Riverton City, Clearwater Bay, Shoreline City, Oakbridge City, Ruby Bay"),
    ),
    kinds=(
      _names(
        "elementary school, private middle school, public highschool, regional medical school,"
        " culinarian school"
      ),
    ),
    noise_places=_crossed(_STEMS, _ENDINGS, 20, "{}{}"),
    noise_kinds=_school_kinds(),
  ),
  "movie_festival_awards": Template(
    total="total number of movies",
    product="total number of movie nominations",
    average="average number of nominations",
    places=(
      _names(
        "Taylor Movie Festival, Verdi Movie Festival, West Sahara Movie Festival, Northwood Movie Festival,"
        " Golden Banana Movie Festival"
      ),
      _names(
        "Festival Lumière de Valmont, Rêves de Belleville, Cinéma de Montreval, Festival de Clairmont,"
        " Festival de Saint-Rivage"
      ),
    ),
    kinds=(
      _names(
        "upbeat metropolis comedy, solemn period drama, futuristic sci-fi movie, calm road movie,"
        " intense detective thriller"
      ),
    ),
    noise_places=_crossed(_GALAS, _EVENTS, 20, "{} City {}", "Greater {} City {}"),
    noise_kinds=_crossed(_PEOPLE, _PLOTS, 20, "film about {} {}", *["film about the {} {}"] * 4),
  ),
}


def phrases() -> list[str]:
  """All words of problems, as they stand in a text: after a space, and at its beginning."""
  fixed = (
    "The number of the number of equals plus times the sum of , and . What is the ?\nThe How many does have?"
    "\nThe The average the difference between exists, and its number is greater than 0. The total per\n"
    "Which variables are equal to -1?\nassign V1 = V2 - 1. assign V3 = V4 + 1."
  )
  names = [fixed]
  for t in TEMPLATES.values():
    names += [f" {phrase} in" for phrase in (t.total, t.product, t.average)]
    names += [
      f" {name}"
      for groups in (t.places, t.kinds, t.noise_places, t.noise_kinds)
      for g in groups
      for name in g
    ]
  return names
