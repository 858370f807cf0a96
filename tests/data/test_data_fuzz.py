"""Any value in any field of a task's config: one line that names a field, or data that can be made."""

import dataclasses
import random
import time

import jax
import pytest

from sleep_jax import config
from sleep_jax.config import ConfigError
from sleep_jax.data import depo, memory, rule110
from sleep_jax.data import gsm_infinite as gsm
from sleep_jax.data.gsm_infinite import cores, draws, noise, problems, task, words

NASTY = (
  0, -1, 1, 2, 7, 40, 2**31 - 1, 2**31, 2**63, 10**400, 1e30, 1.5, float("nan"), float("inf"), True, None, "",
  "medium", "\0", "x" * 5000, (), (0,), (2, 3), (8, 2), (1, 2**31), (1, 2, 3), (float("nan"), 1.0, 1.0),
  (1e308, 1e308, 1e308), [[]], {}, {"a": 1}, ("balanced", "balanced"),
)  # fmt: skip
TASKS = {
  "rule110": rule110.Rule110Config(),
  "depo": depo.DepoConfig(),
  "memory": memory.MemoryConfig(),
  "memory_worlds": memory.MemoryConfig(task="babi3", depths=(5, 8), lengths=(24, 48)),
  "words": task.TaskConfig(min_tokens=200, max_tokens=400),
  "symbolic": task.TaskConfig(
    subset="symbolic",
    operations=(1, 2),
    min_tokens=60,
    max_tokens=160,
    cut=task.CutConfig(max_tokens=400, answer_tokens=24),
  ),
}
MOST_SECONDS = 20  # for one config, on a busy machine; a hang is much longer


def changed(start, rng):
  """The fields of a config as plain data, one or two of them replaced; a nested one may be."""
  values = config.to_dict(start)
  for _ in range(rng.choice((1, 1, 2))):
    name = rng.choice(list(values))
    if isinstance(values[name], dict) and values[name] and rng.random() < 0.8:
      values[name][rng.choice(list(values[name]))] = rng.choice(NASTY)
    else:
      values[name] = rng.choice(NASTY)
  return values


def make_one(cfg):
  """The first piece of data of a config that was accepted."""
  if isinstance(cfg, task.TaskConfig):
    problems.problem(cfg, 0, 0)
  elif cfg.length <= 10_000:  # larger ones are memory alone
    rooms = {rule110.Rule110Config: rule110, depo.DepoConfig: depo, memory.MemoryConfig: memory}
    room = rooms[type(cfg)]
    jax.eval_shape(lambda key: room.batch(cfg, key, 0, 2), jax.random.key(0))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("cases", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_any_value_in_any_field(name, cases):
  rng = random.Random(f"{name} {cases}")
  refused = made = 0
  for _ in range(cases):
    values = changed(TASKS[name], rng)
    begin = time.process_time()
    try:
      make_one(config.from_dict(type(TASKS[name]), values, "data."))
      made += 1
    except ConfigError as e:
      refused += 1
      assert str(e).startswith("data") and "\n" not in str(e) and len(str(e)) < 500, e
    assert time.process_time() - begin < MOST_SECONDS, values
  assert refused > cases / 3 and made >= 2


class TestAGeneratorThatCannotSucceed:
  """Every rejection loop ends, with the field that is to blame."""

  def test_numbers_too_large_for_so_many_operations(self):
    cfg = gsm.GsmInfiniteConfig(subset="hard", operations=(20, 20), number_range=1000)
    with pytest.raises(ConfigError, match="^data.number_range: problems of 20 operations .* are too rare"):
      problems.check_possible(cfg, 0)

  def test_an_operation_count_that_no_graph_has(self, monkeypatch):
    monkeypatch.setattr(cores, "draw_core", lambda *_: cores.OPERATIONS)
    with pytest.raises(
      ConfigError, match="^data.operations: problems of 4 operations .* too rare: none in 20000"
    ):
      gsm.problem(gsm.GsmInfiniteConfig(operations=(4, 4)), 0, 0)

  def test_a_share_that_holds_nothing_out(self):
    cfg = gsm.GsmInfiniteConfig(operations=(4, 4), noise=False, held_out_share=10**6)
    with pytest.raises(ConfigError, match="^data.held_out_share: found no problem of this side among 2000"):
      problems.held_out(cfg, "faithful", 1)

  def test_lengths_that_no_problem_has(self, monkeypatch):
    monkeypatch.setattr(noise, "fill_room", lambda *_: [])
    cfg = gsm.GsmInfiniteConfig(operations=(4, 4), min_tokens=3000, max_tokens=3100)
    with pytest.raises(
      ConfigError, match="^data.max_tokens: found no problem of 4 operations with 3000..3100"
    ):
      gsm.problem(cfg, 0, 0)

  def test_more_noise_than_there_are_names(self):
    with pytest.raises(ConfigError, match="^data.max_tokens: is too long: 20000 noise sentences are needed"):
      noise.draw_noise(words.TEMPLATES["crazy_zootopia"], ["the number of a in B"], 20_000, 2, draws.Draws(0))

  def test_the_longest_problem_can_be_made(self):
    cfg = gsm.GsmInfiniteConfig(operations=(4, 4), min_tokens=2**18 - 40, max_tokens=2**18)
    for template in range(3):
      only = dataclasses.replace(cfg, templates=tuple(float(i == template) for i in range(3)))
      made = gsm.problem(only, 0, 0)
      assert 2**18 - 40 <= made.num_tokens <= 2**18
      assert gsm.solve(made.question, made.context) == made.answer

  @pytest.mark.parametrize("number_range", [5, 23])
  @pytest.mark.parametrize("subset", ["medium", "hard"])
  def test_the_benchmark_s_own_settings_are_possible(self, subset, number_range):
    cfg = gsm.GsmInfiniteConfig(
      subset=subset, operations=(2, 20), number_range=number_range, noise=False, mode="both"
    )
    problems.check_possible(cfg, task.TOKENIZER_SEED)
