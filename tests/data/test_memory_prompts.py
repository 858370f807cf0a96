"""Tests of memory as text: a reader of the sentences finds the answer; prompts have the tokens they may."""

import collections
import re

import pytest

from sleep_jax.config import ConfigError
from sleep_jax.data.memory import MemoryConfig, prompts, wording

CONFIGS = {
  "needle": MemoryConfig(task="needle", depths=(1, 4), lengths=(250,), words=64),
  "many": MemoryConfig(task="needle", depths=(3,), lengths=(300,), values=2, queries=2, words=64),
  "recall": MemoryConfig(task="recall", depths=(5,), lengths=(150,)),
  "overwriting": MemoryConfig(task="overwriting", depths=(3,), lengths=(200,)),
  "tracking": MemoryConfig(task="tracking", depths=(0, 4), lengths=(200,), chains=2),
  "hops": MemoryConfig(task="tracking", depths=(0, 4), lengths=(200,), chains=2, asked="value"),
  "common": MemoryConfig(task="common", depths=(3,), lengths=(200,), often=9, words=64),
  "frequent": MemoryConfig(task="frequent", depths=(3,), lengths=(200,), words=64),
  "babi1": MemoryConfig(task="babi1", depths=(6,), lengths=(150,)),
  "babi2": MemoryConfig(task="babi2", depths=(9,), lengths=(150,)),
  "babi3": MemoryConfig(task="babi3", depths=(12,), lengths=(200,)),
  "babi4": MemoryConfig(task="babi4", depths=(2, 4), lengths=(150,)),
  "babi5": MemoryConfig(task="babi5", depths=(2, 6), lengths=(150,)),
}  # fmt: skip


def count(text):
  """Tokens of a tokenizer of words."""
  return len(re.findall(r"\w+|[^\w\s]", text))


def parts(text):
  """The sentences or words of the body, and the question."""
  head, body, rest = text.split("\n\n")
  assert head == prompts.INTRODUCTION
  question, end = rest.removeprefix("Question: ").split("\n")
  assert end == "Answer:"
  return body, question


def held_by(body):
  """Object -> the trail of its places, by the sentences alone."""
  at, holder, trails = {}, {}, collections.defaultdict(list)
  for who, what, thing in re.findall(r"(\w+) (went to|took|put down) the (\w+)\.", body):
    if what == "went to":
      at[who] = thing
    elif what == "took":
      holder[thing] = who
    else:
      del holder[thing]
    for carried, by in holder.items():
      if trails[carried][-1:] != [at[by]]:
        trails[carried].append(at[by])
  return trails


def answers_of(task, body, question):
  """What the sentences say, found with patterns."""
  if task == "needle":
    keys = re.findall(r"[a-z]+-[a-z]+", question)
    return [v for k in keys for v in re.findall(rf"magic numbers for {k} is: (\d+)\.", body)]
  if task in ("recall", "overwriting"):
    key = re.search(r"number of ([a-z-]+)\?", question)[1]
    return re.findall(rf"number of {key} is (?:now )?(\d+)\.", body)[-1:]
  if task == "tracking":
    source = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", body))
    if "What is the value" in question:
      at = re.search(r"variable (\w+)\?", question)[1]
      while at in source:
        at = source[at]
      return [at]
    found, wanted = [], [re.search(r"value (\d+),", question)[1]]
    for variable, value in source.items():  # in the order of the text: a copy follows what it copies
      if value in wanted:
        found.append(variable)
        wanted.append(variable)
    return found
  if task in ("common", "frequent"):
    words = collections.Counter(w for w in re.sub(r"\d+\. ", "", body).split() if w != "...")
    asked = int(re.search(r"What are the (\d+)", question)[1])
    ranked = words.most_common(asked + 1)
    assert ranked[asked - 1][1] > (ranked[asked][1] if len(ranked) > asked else 0)
    named = [w for w, _ in ranked[:asked]]
    return sorted(named) if task == "common" else named
  if task == "babi1":
    who = re.search(r"Where is (\w+)\?", question)[1]
    return re.findall(rf"{who} went to the (\w+)\.", body)[-1:]
  if task == "babi2":
    return [held_by(body)[re.search(r"the (\w+)\?", question)[1]][-1]]
  if task == "babi3":
    thing, place = re.search(r"was the (\w+) before it came to the (\w+)", question).groups()
    trail = held_by(body)[thing]
    return [[a for a, b in zip(trail, trail[1:], strict=False) if b == place][-1]]
  if task == "babi4":
    other = {"north": "south", "south": "north", "east": "west", "west": "east"}
    said = re.findall(r"The (\w+) is (\w+) of the (\w+)\.", body)
    said += [(b, other[side], a) for a, side, b in said]
    if asked := re.match(r"What is (\w+) of the (\w+)\?", question):
      return [a for a, side, b in said if (side, b) == asked.groups()]
    place, way = re.match(r"What is the (\w+) (\w+) of\?", question).groups()
    return [b for a, side, b in said if (a, side) == (place, way)]
  gifts = re.findall(r"(\w+) gave the (\w+) to (\w+)\.", body)[::-1]
  for pattern, wanted in (
    (r"To whom did (?P<g>\w+) give the (?P<o>\w+) last\?", 2),
    (r"Who gave the (?P<o>\w+) to (?P<r>\w+) last\?", 0),
    (r"What did (?P<g>\w+) give to (?P<r>\w+) last\?", 1),
    (r"Who gave the (?P<o>\w+) away last\?", 0),
    (r"Who was given the (?P<o>\w+) last\?", 2),
  ):
    if asked := re.fullmatch(pattern, question):
      given = asked.groupdict()
      return [
        gift[wanted]
        for gift in gifts
        if all(dict(zip("gor", gift, strict=True))[k] == v for k, v in given.items())
      ][:1]
  raise AssertionError(question)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sentences_say_the_answer_and_the_length_is_used(name):
  cfg, seen = CONFIGS[name], set()
  for depth, length in cfg.sets:
    for i in range(6):
      made = prompts.prompt(cfg, 7, i, depth, length, count)
      assert made == prompts.prompt(cfg, 7, i, depth, length, count)
      body, question = parts(made.text)
      assert list(made.answers) == answers_of(cfg.task, body, question), made.text
      assert length - 16 <= count(made.text) <= length  # a sentence or a common word thrice more is too long
      assert made.expected == " " + ", ".join(made.answers)
      seen.add(made.text)
  assert len(seen) == 6 * len(cfg.sets)
  assert prompts.prompt(cfg, 8, 0, *cfg.sets[0], count).text not in seen


def test_the_facts_are_the_same_at_every_length_and_lie_elsewhere():
  cfg = CONFIGS["needle"]
  bodies = [parts(prompts.prompt(cfg, 7, 0, 4, length, count).text)[0] for length in (150, 400)]
  facts = [re.findall(r"One of [^.]*\.", body) for body in bodies]
  assert facts[0] == facts[1] and len(facts[0]) == 4
  assert [body.index(facts[0][0]) > 0 for body in bodies] != [False, False]


def test_the_filler_is_the_user_s_own_in_its_order():
  sentences = [f"Sentence number {i} of a book." for i in range(40)]
  body, _ = parts(prompts.prompt(CONFIGS["babi1"], 7, 0, 6, 150, count, sentences).text)
  numbers = [int(n) for n in re.findall(r"Sentence number (\d+)", body)]
  assert len(numbers) > 5
  assert all((b - a) % 40 == 1 for a, b in zip(numbers, numbers[1:], strict=False))
  assert not any(sentence in body for sentence in wording.NOISE)


def test_what_a_guess_gets_in_text():
  assert prompts.chance(CONFIGS["many"], 3) == pytest.approx(9e6**-4, rel=1e-5)
  assert prompts.chance(CONFIGS["babi3"], 12) == 1 / 5
  assert prompts.chance(CONFIGS["hops"], 4) == 1 / 90_000
  assert prompts.chance(CONFIGS["tracking"], 1) == pytest.approx(26**-10, rel=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"depths": (2000,), "lengths": (9000,), "words": 2000}, "data.depths: asks for 2000 keys, of which"),
    ({"task": "babi1", "depths": (1,), "places": 17}, "data.places: must be at most 16, the names that text"),
    ({"task": "babi5", "depths": (2,), "objects": 17}, "data.objects: must be at most 16"),
    ({"queries": 2}, "data.queries: must be 1 where data.task = recall is asked as text, got 2"),
  ],
)
def test_what_cannot_be_asked_is_one_line(changes, message):
  with pytest.raises(ConfigError, match=message):
    prompts.check_text(MemoryConfig(**changes))


def test_a_text_that_does_not_fit_is_one_line():
  with pytest.raises(ConfigError, match="^data.lengths: must hold the .* tokens of the shortest such text"):
    prompts.prompt(CONFIGS["needle"], 7, 0, 4, 40, count)


def test_names_are_different_words():
  for kind, pool in wording.POOLS.items():
    if not callable(pool):
      assert len(set(pool)) == len(pool) == wording.pool_size(kind)
