"""Depo from the command line's side: presets fit, a short run reports every k, the figure shows it."""

import csv
import functools
import math
import pathlib
import tempfile

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from sleep_jax import config, train, windows
from sleep_jax.config import ConfigError
from sleep_jax.experiments import depo, figures
from sleep_jax.experiments.configs import depo as presets
from sleep_jax.experiments.figures import depo as depo_figures
from sleep_jax.report.load import RunError
from sleep_jax.runtime import metrics, workdir


class PresetTest(parameterized.TestCase):
  @parameterized.parameters(*presets.PRESETS)
  def test_every_preset_and_its_sweep_fit(self, preset):
    for changes in presets.sweep(preset).values():
      values = presets.get_config(preset)
      values.update_from_flattened_dict(changes)
      cfg, _ = depo.build(values.to_dict())
      self.assertEqual(cfg.sleep.num_passes, changes["sleep.num_passes"])
    self.assertEqual(sorted(presets.sweep(preset)), ["n1_s0", "n2_s0", "n4_s0"])

  def test_the_papers_setting(self):
    cfg, task = depo.build(presets.get_config("paper").to_dict())
    self.assertLen(task.layout, 360)
    self.assertEqual((cfg.model.window, cfg.model.embed_dim, len(cfg.model.blocks)), (75, 512, 10))
    self.assertEqual(cfg.model.blocks.count("jet"), 8)
    self.assertEqual((cfg.train.batch_size, cfg.train.steps), (128, 100_000))
    self.assertEqual((cfg.optim.muon_lr, cfg.optim.adam_lr), (2e-3, 5e-5))

  def test_the_papers_model_builds_and_its_step_traces(self):
    """Abstractly, at full size: the count that the config states, and a whole step with N = 4 passes."""
    values = presets.get_config("paper")
    values.sleep.num_passes = 4
    cfg, task = depo.build(values.to_dict())
    _, tx, one_step = train.optimization(cfg)
    state = jax.eval_shape(lambda: train.init_state(cfg, tx))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    self.assertIn(f"{count:,} parameters", " ".join(presets.__doc__.split()))
    segments = windows.plan(task.layout, cfg.model.window)
    step = functools.partial(one_step, segments=segments)
    batch = jax.eval_shape(lambda: task.batch(jax.random.key(0), 0, cfg.train.batch_size))
    after, measured = jax.eval_shape(step, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    self.assertEqual(measured["loss"].shape, ())

  @parameterized.parameters(
    ({"model.vocab_size": 7}, "model.vocab_size: must be 118"),
    ({"model.window": 70}, "model.window: must divide data.context_length = 300"),
    ({"data.test_hops": (17,)}, "data.test_hops: must lie in 1..16"),
  )
  def test_mistakes(self, changes, message):
    values = presets.get_config("paper")
    values.update_from_flattened_dict(changes)
    with self.assertRaisesRegex(ConfigError, message):
      depo.build(values.to_dict())

  def test_an_unknown_preset(self):
    with self.assertRaisesRegex(ValueError, "unknown preset 'huge'; known: smoke, tiny"):
      presets.get_config("huge")


@pytest.mark.slow
def test_a_short_run_reports_every_k_and_is_drawn():
  cfg, task = depo.build(presets.get_config("smoke").to_dict())
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "n2")
    with workdir.prepare(str(path), config.to_dict(cfg)) as run:
      row = train.train(cfg, task, run, report=lambda line: None)
    for k in cfg.data.test_hops:
      assert row[f"k{k}_asked"] == cfg.train.eval_sequences * cfg.data.pairs
      assert row[f"k{k}_low"] <= row[f"k{k}_exact"] <= row[f"k{k}_high"]
      assert len(row["by_answer"][f"k{k}"]["answer_loss"]) == cfg.data.pairs
    assert len(depo.table(row, cfg.data.test_hops, 6).splitlines()) == 3
    evals = [r for r in metrics.read(path / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 5, 10]
    drawing = depo_figures.figure_3(figures.load_runs(path))
    drawing.save(pathlib.Path(folder, "figures"))
    written = list(csv.DictReader(open(pathlib.Path(folder, "figures", "figure_3.csv"))))
    points = [row for row in written if row["kind"] == "curve"]
    assert len(points) == 2 * 2 * 3  # loss and accuracy, two k, three evaluations
    assert (points[-1]["measure"], points[-1]["k"]) == ("answer_loss", "2")
    assert float(points[-1]["value"]) == evals[-1]["k2_answer_loss"]


@pytest.mark.slow
def test_a_shrunk_copy_of_the_papers_model_trains():
  """Its kinds of blocks and its attention; widths, lengths and the number of blocks are divided."""
  values = presets.get_config("paper")
  values.data.update(max_nodes=6, mini_vocab=8, num_pairs=3, context_length=24, query_length=12, max_name=1)
  values.data.update(max_hops=4, test_hops=(1,), sizes="largest")
  values.model.update(blocks=presets.JET[3:7], embed_dim=16, mlp_dim=24, window=12, vocab_size=22)
  values.model.fast.update(num_heads=2, key_dim=4, value_dim=8)
  values.optim.update(muon_lr=1e-2, adam_lr=1e-2, newton_schulz_dtype="float32")
  values.train.update(steps=8, batch_size=16)
  values.sleep.num_passes = 2
  cfg, task = depo.build(values.to_dict())
  _, tx, one_step = train.optimization(cfg)
  segments = windows.plan(task.layout, cfg.model.window)
  batch = task.batch(jax.random.key(0), 0, cfg.train.batch_size)
  one = functools.partial(one_step, segments=segments)
  step = jax.jit(one, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner
  state, losses = train.init_state(cfg, tx), []
  first = state.params
  for _ in range(8):
    state, measured = step(state, batch)
    losses.append(float(measured["loss"]))
  assert losses[-1] < 0.8 * losses[0], losses
  same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first, state.params)
  still = [
    jax.tree_util.keystr(path) for path, unchanged in jax.tree_util.tree_leaves_with_path(same) if unchanged
  ]
  assert not still, still


def test_runs_of_another_task_are_refused():
  with pytest.raises(RunError, match="figure 3"):
    depo_figures.figure_3([])
