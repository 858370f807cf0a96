"""Tests of memory by the command line: presets fit, a short run reports every set, checkpoints are tested."""

import csv
import json
import pathlib

import jax
import numpy as np
import pytest

from sleep_jax import config, model, sharding, train
from sleep_jax.config import ConfigError
from sleep_jax.data import batching
from sleep_jax.data.memory import set_names
from sleep_jax.experiments import figures, memory, tasks
from sleep_jax.experiments.configs import memory as presets
from sleep_jax.experiments.figures import memory as memory_figures
from sleep_jax.report.load import RunError
from sleep_jax.runtime import metrics, workdir
from sleep_jax.scoring import by_group
from tests.forked import Experiment
from tests.pretrained import tiny
from tests.report import fake_runs

CONFIG = "--config=experiments/configs/memory.py:{}".format


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_and_its_sweep_fit(preset):
  values = presets.get_config(preset)
  for name, changes in presets.sweep(preset, seeds=2).items():
    values.update_from_flattened_dict(changes)
    cfg, task = memory.build(values.to_dict())
    train.check_fits(cfg, task)
    assert name == f"n{cfg.sleep.num_passes}_s{cfg.seed}"
    assert len(task.layout) == cfg.data.length
  assert tasks.experiment_of(values.to_dict()) is memory


def test_every_task_has_a_tiny_preset_and_needles_have_four():
  tasks_of = [presets.get_config(name).data.task for name in presets.TINY]
  assert set(tasks_of) == set(memory.memory.TESTS)
  assert tasks_of.count("needle") == 4


def test_presets_say_what_they_are():
  for preset in presets.TINY:
    cfg, _ = memory.build(presets.get_config(preset).to_dict())
    assert cfg.train.steps == 1000 and cfg.sleep.num_passes == 2
    # no larger than a step of Rule 110's demo twice over, which takes 85 ms of two cores: under three minutes
    assert cfg.data.length * cfg.sleep.num_passes <= 2 * 26 * 2
  with pytest.raises(ValueError, match="unknown preset 'tiny_recal'; did you mean \"tiny_recall\""):
    presets.get_config("tiny_recal")


@pytest.mark.slow
def test_a_short_run_reports_every_set_beside_a_guess_and_is_drawn(tmp_path):
  cfg, task = memory.build(presets.get_config("smoke").to_dict())
  with workdir.prepare(str(tmp_path / "n2"), config.to_dict(cfg)) as run:
    row = train.train(cfg, task, run, report=lambda line: None, tensorboard=False)
  names = set_names(cfg.data)
  assert names == ["d2_t8", "d2_t16"]
  for name in names:
    assert row[f"{name}_asked"] == cfg.train.eval_sequences * cfg.data.queries
    assert row[f"{name}_low"] <= row[f"{name}_exact"] <= row[f"{name}_high"]
    assert row[f"{name}_chance"] == 1 / cfg.data.words
  assert len(memory.table(row, cfg.data).splitlines()) == 1 + len(names)
  assert memory.describe(cfg.data, row).startswith("recall: right at 2 pairs at 8 tokens ")
  assert "(a guess 25.0 %)" in memory.describe(cfg.data, row)
  evals = [r for r in metrics.read(tmp_path / "n2" / "metrics.jsonl") if r["kind"] == "eval"]
  assert [r["step"] for r in evals] == [0, 5, 10]
  [drawing] = [d for d in figures.drawings(figures.load_runs(tmp_path / "n2")) if d.name == "memory_recall"]
  drawing.save(tmp_path)
  written = list(csv.DictReader(open(tmp_path / "memory_recall.csv")))
  points = [r for r in written if r["kind"] == "curve"]
  assert len(points) == 2 * 3 and {r["set"] for r in points} == set(names)
  assert float(points[-1]["value"]) == 100 * evals[-1]["d2_t16_exact"]
  assert {float(r["value"]) for r in written if r["series"] == "a guess"} == {25.0}


def test_figures_need_one_task(tmp_path):
  with pytest.raises(RunError, match="needs runs of one task: no run was tested"):
    memory_figures.figure([])
  rates = {"d2_t8_exact": 0.5, "d2_t8_low": 0.4, "d2_t8_high": 0.6, "d2_t8_chance": 0.1}
  for task in ("recall", "needle"):
    fake_runs.write(
      tmp_path / task, 2, [(0, 0.1), (10, 0.5)], per_eval=rates, task=task, depths=[2], lengths=[8]
    )
  runs = figures.load_runs(str(tmp_path / "*"))
  with pytest.raises(RunError, match=r"the runs are of several tasks \(needle, recall\)"):
    memory_figures.figure(runs)
  names = {d.name for d in figures.drawings(runs)}
  assert {"memory_recall", "memory_needle"} <= names


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.vocab_size": 7}, "model.vocab_size: must be 41"),
    ({"model.window": 9}, "model.window: must divide 24"),
    ({"data.task": "needle", "data.depths": (20,)}, "data.words: must be at least 20"),
  ],
)
def test_mistakes(changes, message):
  values = presets.get_config("tiny_recall")
  values.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    memory.build(values.to_dict())


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny.checkpoint(tmp_path_factory.mktemp("checkpoints") / "jet", "jet")


SMALL = (
  *("--config.model.window=64", "--config.data.lengths=(480,)", "--config.data.depths=(1,2)"),
  *("--config.train.eval_sequences=2", "--config.train.eval_batch_size=2"),
)
MISTAKES = {
  "no folder": ((), "--workdir is required"),
  "unknown task": (("--config.data.task=tracing",), "data.task: unknown value 'tracing'; did you mean"),
  "too short": (
    ("--config.data.lengths=(40,)",),
    "data.lengths: must hold the",
  ),
  "too many questions": (
    ("--config.data.task=recall", "--config.data.queries=2", "--config.data.depths=(2,)"),
    "data.queries: must be 1 where data.task = recall is asked as text, got 2",
  ),
  "too many names": (
    ("--config.data.task=babi1", "--config.data.persons=99"),
    "data.persons: must be at most 16, the names that text has, got 99",
  ),
  "a window without room": (("--config.model.window=3",), "model.window: must be at least"),
  "no filler": (("--filler=none.txt",), "--filler: 'none.txt' matches no file"),
}


def test_a_mistake_is_one_line_and_nothing_is_written(checkpoint, tmp_path):
  with Experiment("experiments.memory", tmp_path) as command:
    for name, (flags, message) in MISTAKES.items():
      given = {flag.partition("=")[0]: flag for flag in (CONFIG("text"), *SMALL, *flags)}.values()
      folder = () if name == "no folder" else (f"--workdir={tmp_path / 'new'}",)
      ended = command.run(*given, f"--checkpoint={checkpoint}", *folder)
      assert ended.code == 2, (name, ended)
      assert len(ended.err.strip().splitlines()) == 1 and message in ended.err, (name, ended.err)
      assert not (tmp_path / "new").exists(), name
    for flags, message in (
      (("--checkpoint=nowhere", f"--workdir={tmp_path / 'new'}"), "nowhere"),
      (("--filler=a.txt", f"--workdir={tmp_path / 'new'}"), "--filler: says nothing without --checkpoint"),
    ):
      ended = command.run(CONFIG("text"), *flags)
      assert ended.code == 2 and message in ended.err and not (tmp_path / "new").exists(), ended


@pytest.mark.slow
def test_a_checkpoint_is_tested_in_all_its_forms_on_the_same_prompts(checkpoint, tmp_path):
  (tmp_path / "book.txt").write_text("It rained. Nobody came! Was it late? " * 20)
  with Experiment("experiments.memory", tmp_path) as command:
    ended = command.run(
      CONFIG("text"), *SMALL, f"--checkpoint={checkpoint}", f"--workdir={tmp_path / 'out'}",
      f"--filler={tmp_path / 'book.txt'}", "--config.data.values=2",
    )  # fmt: skip
  assert ended.code == 0, ended.err
  made = json.loads((tmp_path / "out" / "memory.json").read_text())
  assert list(made["forms"]) == ["full attention", "window only", "N = 1", "N = 2", "N = 4"]
  assert {row["d2_t480_asked"] for row in made["forms"].values()} == {2}
  losses = [row["answer_loss"] for row in made["forms"].values()]
  assert np.isfinite(losses).all() and len(set(losses)) == len(losses)  # what each form sees matters
  assert {row["words_d2_t480_asked"] for row in made["forms"].values()} == {4}  # two words an answer
  assert made["chance"]["d1_t480"] == pytest.approx(1 / 9e6**2, rel=1e-5)
  table = (tmp_path / "out" / "memory.md").read_text()
  assert table in ended.out and "N = 4" in table and "right words" in table
  assert sorted(p.name for p in pathlib.Path(tmp_path, "out").iterdir()) == [
    *(f"memory{end}" for end in (".json", ".md")),
    *(f"memory_needle{end}" for end in (".csv", ".png", ".svg")),
  ]


@pytest.mark.slow
def test_window_only_sees_the_last_window_alone():
  """What was said in the windows before changes nothing, and without `forget` it does."""
  cfg = config.ModelConfig(
    vocab_size=30, embed_dim=16, blocks=("gdn",), window=4,
    fast=config.FastConfig(num_heads=1, key_dim=8, value_dim=8),
  )  # fmt: skip
  weights = model.init(cfg, jax.random.key(0))
  mesh = sharding.make_mesh(config.MeshConfig(data=1), jax.devices()[:1])
  cut = batching.CutConfig(max_tokens=12, answer_tokens=2)
  losses = {}
  for forget in (True, False):
    for seed in (1, 2):
      before = np.random.default_rng(seed).integers(1, 30, 8)
      example = batching.Example(np.concatenate([before, [3, 4]]), np.asarray([5, 6]))
      evaluate = by_group.make_host_evaluate(
        {"one": batching.HeldOut([example])}, ["all"], cut, 1, cfg, config.SleepConfig(), mesh, forget=forget
      )
      losses[forget, seed] = evaluate(weights)["answer_loss"]
  assert losses[True, 1] == pytest.approx(losses[True, 2], rel=1e-5)
  assert losses[False, 1] != pytest.approx(losses[False, 2], rel=1e-5)
