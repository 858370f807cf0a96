"""One contract for both kinds of task: what the loop relies on, and what a run says to its user and its
loggers.
"""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest

from sleep_jax import config, model, train, windows
from sleep_jax.data import batching
from sleep_jax.runtime import metrics, progress, workdir
from sleep_jax.train import step as training_step
from tests.train import test_host_steps, test_train


def device_kind(*blocks):
  """Config and task of data that the device makes, two steps a call; one block compiles sooner than two."""
  changes = {
    "model__blocks": blocks or ("hebbian",),
    "train__steps": 4,
    "train__steps_per_dispatch": 2,
    "train__eval_every": 4,
    "train__save_every": 4,
  }
  return test_train.settings(
    **changes, train__batch_size=8, train__eval_sequences=16, train__eval_batch_size=16
  )


def host_kind():
  """Config and task of data that the host makes."""
  cfg = test_host_steps.settings(train={"steps": 4, "eval_every": 4})
  held_out = {"first": batching.HeldOut(test_host_steps.HELD_OUT)}
  return cfg, train.HostTask(test_host_steps.Made(), test_host_steps.CUT, held_out, ["a", "b", "c"])


KINDS = {"device": device_kind, "host": host_kind}


@pytest.fixture(params=KINDS)
def kind(request):
  cfg, task = KINDS[request.param]()
  return cfg, task


def prepared(cfg, task):
  """The steps of a run, and its first state."""
  _, tx, one_step = train.optimization(cfg)
  mesh = train.check_fits(cfg, task)
  state = jax.jit(functools.partial(train.init_state, cfg, tx), compiler_options=training_step._QUICK)()
  return task.steps(cfg, one_step, mesh), state


def test_steps_advance_the_state_and_count_their_load(kind):
  cfg, task = kind
  usual = cfg.train.steps  # and one call more, which is not finite
  cfg = config.replace(cfg, train={"steps": usual + cfg.train.steps_per_dispatch})
  lines, clock = [], progress.Clock()
  steps, state = prepared(cfg, task)
  tokens, done = 0, 0
  with steps:
    assert steps.tokens_before(0, None) == 0
    steps.start(state, clock, lines.append)
    while done < usual:
      state, measured, loads = steps(state)
      done += len(loads)
      assert int(state.step) == done
      assert {name: x.shape for name, x in measured.items()} == {
        "loss": (len(loads),),
        "grad_norm": (len(loads),),
      }
      assert all(load.tokens > 0 and load.work.train > 0 for load in loads)
      tokens += sum(load.tokens for load in loads)
    last_row = {"step": done, "tokens": tokens}
    assert steps.tokens_before(done, last_row) == tokens
    _, measured, _ = steps(state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params)))
    assert np.isnan(measured["loss"]).all(), "a step that is not finite says so"
  assert any(line.startswith("compiling the step") for line in lines)
  assert sum(line.startswith("compiled the step") for line in lines) * 2 == len(lines)


def test_an_evaluation_has_a_score_beside_what_needs_no_reading(kind):
  cfg, task = kind
  steps, state = prepared(cfg, task)
  with steps:
    row = steps.evaluation()(state.params)
  assert {"loss", "exact"} <= set(row)
  assert task.score(row) == (
    f"exact {100 * row['exact']:.1f} % (best constant {100 * row['const_exact']:.1f} %)"
  )


def test_a_sample_fits_its_plan(kind):
  cfg, task = kind
  steps, state = prepared(cfg, task)
  with steps:
    segments, batch = steps.sample()
    made = batch()
  logits, _ = jax.eval_shape(
    lambda w, b: model.forward(w, b, segments, cfg.model, cfg.sleep), state.params, made
  )
  assert logits.shape[0] == made.inputs.shape[0] > 0


def test_a_task_refuses_a_config_that_does_not_fit_it():
  cfg, task = host_kind()
  with pytest.raises(config.ConfigError, match="^train.steps_per_dispatch: must be 1 where the host"):
    train.check_fits(config.replace(cfg, train={"steps_per_dispatch": 2}), task)


def test_tokens_outside_the_vocabulary_are_refused_where_they_enter(tmp_path):
  cfg, task = host_kind()
  small = config.replace(cfg, model={"vocab_size": 5})  # the data has tokens 1..5
  with (
    workdir.prepare(tmp_path / "run", config.to_dict(small)) as run,
    pytest.raises(config.ConfigError, match=r"^model.vocab_size: is 5, but the data has tokens \d..5$"),
  ):
    train.train(small, task, run, report=lambda line: None)


def test_what_a_run_says_and_gives_to_loggers(kind, tmp_path):
  cfg, task = kind
  lines, rows = [], []
  with workdir.prepare(tmp_path / "run", config.to_dict(cfg)) as run:
    row = train.train(cfg, task, run, report=lines.append, on_row=rows.append)
  written = metrics.read(tmp_path / "run" / "metrics.jsonl")
  assert [r["kind"] for r in rows] == [r["kind"] for r in written]
  assert [r.get("loss") for r in rows] == [r.get("loss") for r in written]
  text = "\n".join(lines)
  assert f"eval step {cfg.train.steps}: {task.score(row)}" in lines
  assert lines.index(next(x for x in lines if x.startswith("eval step 0:"))) < len(lines) - 1
  assert re.search(r"compiled the step.* in \d+ s", text)
  totals = next(line for line in lines if line.startswith("weights and their optimizers"))
  assert len(totals.splitlines()) == 2, "the table of every weight is for --verbosity=1"


def test_a_profile_names_blocks_and_passes_without_tensorboard(tmp_path):
  cfg, task = device_kind()
  with workdir.prepare(tmp_path / "run", config.to_dict(cfg)) as run:
    train.train(cfg, task, run, report=lambda line: None, profile_steps=2, tensorboard=False)
  assert not list(pathlib.Path(tmp_path, "run", "tb").iterdir())
  traces = list(pathlib.Path(tmp_path, "run", "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_blocks_passes_and_windows_have_names_in_the_program():
  cfg, task = device_kind("attn", "gdn")
  _, tx, one_step = train.optimization(cfg)
  plan = windows.plan(task.layout, cfg.model.window)
  state = jax.eval_shape(functools.partial(train.init_state, cfg, tx))
  text = train.make_dispatch(cfg, task, one_step, plan).lower(state).as_text(debug_info=True)
  for name in ("window", "asleep", "awake", "pass", "block_0", "gdn", "attn", "mlp"):
    assert re.search(rf"[/\"(]{name}[/\")]", text), name


@pytest.mark.parametrize("made_by", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_a_finished_run_made_longer_ends_as_one_that_was_long_from_the_start(made_by, tmp_path):
  cfg, task = KINDS[made_by]()
  longer = config.replace(cfg, train={"steps": 8, "eval_every": 4})
  ends = {}
  for name, lengths in (("grown", (cfg, longer)), ("whole", (longer,))):
    for one in lengths:
      with workdir.prepare(tmp_path / name, config.to_dict(one), may_grow=("train.steps",)) as run:
        ends[name] = train.train(one, task, run, report=lambda line: None)
  assert ends["grown"] == ends["whole"]
  losses = {
    name: [
      (r["step"], r["loss"]) for r in metrics.read(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"
    ]
    for name in ends
  }
  assert losses["grown"] == losses["whole"]
  assert [r["step"] for r in metrics.read(tmp_path / "grown" / "metrics.jsonl") if r["kind"] == "done"] == [
    4,
    8,
  ]
