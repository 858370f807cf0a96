"""Depo from the command line's side: presets fit, a short run reports every k, the figure shows it."""

import csv
import pathlib
import tempfile

import pytest
from absl.testing import parameterized

from experiments import depo
from experiments.configs import depo as presets
from sleep_jax import config, figures_depo, metrics, runs, train, workdir
from sleep_jax.config import ConfigError


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
    self.assertEqual((cfg.train.batch_size, cfg.train.steps), (128, 100_000))
    self.assertEqual((cfg.optim.muon_lr, cfg.optim.adam_lr), (2e-3, 5e-5))

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
    assert len(depo.table(row, cfg.data.test_hops, 6).splitlines()) == 4
    evals = [r for r in metrics.read(path / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 5, 10]
    drawing = figures_depo.figure_3(runs.load_runs(path))
    drawing.save(pathlib.Path(folder, "figures"))
    written = list(csv.DictReader(open(pathlib.Path(folder, "figures", "figure_3.csv"))))
    assert len(written) == 3 * 3
    assert float(written[-1]["answer_loss"]) == evals[-1]["k4_answer_loss"]


def test_runs_of_another_task_are_refused():
  with pytest.raises(runs.RunError, match="figure 3"):
    figures_depo.figure_3([])
