"""The symbolic subset as a task: from the command line's overrides to scores by operations."""

import dataclasses
import pathlib
import tempfile

import numpy as np
import pytest

from sleep_jax import config, train
from sleep_jax.config import ConfigError
from sleep_jax.data import batching
from sleep_jax.data import gsm_infinite as generator
from sleep_jax.data.gsm_infinite import task, tokenizer
from sleep_jax.experiments import gsm_infinite
from sleep_jax.experiments.configs import gsm_infinite as presets
from sleep_jax.runtime import metrics, workdir

# What the config's docstring says to add to `tiny`.
OVERRIDES = {"data.subset": "symbolic", "data.cut.answer_tokens": 24, "data.cut.max_tokens": 130}


def values_of(**changes):
  values = presets.get_config("tiny")
  values.update_from_flattened_dict(OVERRIDES | {name.replace("__", "."): x for name, x in changes.items()})
  return values.to_dict()


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
  cfg = gsm_infinite.build(values_of(data__tokenizer_texts=32))
  return task.with_tokenizer(cfg.data, tmp_path_factory.mktemp("tokenizer"))


def test_the_overrides_are_those_of_the_docstring():
  told = presets.__doc__
  assert "--config.data.subset=symbolic" in told
  assert all(f"--config.{name}={x}" in told for name, x in OVERRIDES.items() if name != "data.subset")


def test_examples_hold_answers_that_the_solver_finds(ready):
  known, (low, high) = tokenizer.load(ready.tokenizer), ready.operations
  levels, window = high - low + 1, presets.get_config("tiny").model.window
  sets = task.held_out(ready, 12 * levels)
  assert np.bincount([e.group for e in sets["balanced"].examples]).tolist() == [12] * levels
  assert not any(sets["faithful"].guesses["shortcut"])  # a number is no list of variables
  made = [task.training(ready, 0, 40)[i] for i in range(40)]
  for example in [*made, *sets["balanced"].examples, *sets["faithful"].examples]:
    question, _, context = known.decode(example.prompt).partition("\n")
    said = known.decode(example.answer[:-1])
    assert said.split(", ") == generator.solve(question, context)
    assert example.answer[-1] == known.eos and len(example.answer) <= ready.answer_bound
    assert generator.count_operations(question, context) == example.group + low
    assert batching.bucket_of(example, ready.cut, window).windows >= 1  # something is slept on
    assert ready.min_tokens <= len(example.prompt) - 1 <= ready.max_tokens


def test_the_longest_answer_fits_and_a_tokenizer_that_needs_more_is_refused(ready):
  known = tokenizer.load(ready.tokenizer)
  assert len(known.encode(ready.longest_answer)) + 1 == ready.answer_bound == 24
  wide = tokenizer.train(["the number of"], 270)  # bytes: a space and a letter are two tokens
  with tempfile.TemporaryDirectory() as folder:
    wide.save(pathlib.Path(folder, "wide.json"))
    bytes_alone = dataclasses.replace(ready, tokenizer=str(pathlib.Path(folder, "wide.json")))
    with pytest.raises(ConfigError, match="^data.cut.answer_tokens: must be at least 26, the longest answer"):
      task.check_answers(bytes_alone)


def test_up_to_thirty_operations():
  cfg = generator.GsmInfiniteConfig(subset="symbolic", operations=(25, 30))
  for i in range(12):
    p = generator.problem(cfg, 0, i)
    assert list(p.answer) == generator.solve(p.question, p.context)
    assert generator.count_operations(p.question, p.context) == p.op >= 25
  with pytest.raises(ConfigError, match="highest <= 30, got"):
    generator.GsmInfiniteConfig(subset="symbolic", operations=(1, 31))


@pytest.mark.slow
def test_a_run_scores_whole_lists_by_operations():
  """Exact match of a list is what teacher forcing says of all its tokens at once."""
  short = values_of(
    train__steps=3,
    train__batch_size=2,
    train__log_every=1,
    train__save_every=3,
    train__eval_every=3,
    train__eval_sequences=12,
    train__eval_batch_size=4,
    data__tokenizer_texts=32,
    model__blocks=("gdn",),
    sleep__last_block=1,
    sleep__num_passes=1,
    mesh__data=1,
  )
  cfg = gsm_infinite.build(short)
  with tempfile.TemporaryDirectory() as folder:
    with workdir.prepare(folder, config.to_dict(cfg)) as run:
      row = train.train(cfg, gsm_infinite.make_task(cfg, folder), run, report=lambda line: None)
    rows = metrics.read(pathlib.Path(folder, "metrics.jsonl"))
  assert [r["step"] for r in rows if r["kind"] == "train"] == [1, 2, 3]
  names = task.groups(cfg.data)
  assert [row[f"{name}_asked"] for name in names] == [12 // len(names)] * len(names)
  assert all(0 <= row[f"{name}_exact"] <= 1 and row[f"{name}_majority"] <= 0.5 for name in names)
  assert np.isfinite(row["loss"])
