"""GSM-Infinite from the command line's side: presets fit, mistakes are one line, runs end in a table."""

import csv
import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, train
from sleep_jax.config import ConfigError
from sleep_jax.data import batching
from sleep_jax.data import gsm_infinite as generator
from sleep_jax.data.gsm_infinite import shortcut, task, tokenizer
from sleep_jax.experiments import figures, gsm_infinite
from sleep_jax.experiments.configs import gsm_infinite as presets
from sleep_jax.experiments.figures import gsm_infinite as gsm_figures
from sleep_jax.report.load import RunError
from sleep_jax.runtime import metrics, workdir
from tests.forked import Experiment

SHORT = {
  "train.steps": 3,
  "train.batch_size": 2,
  "train.log_every": 1,
  "train.save_every": 3,
  "train.eval_every": 3,
  "train.eval_sequences": 12,
  "train.eval_batch_size": 4,
  "data.tokenizer_texts": 8,
  "model.blocks": ("gdn",),
  "sleep.last_block": 1,
  "sleep.num_passes": 1,
  "mesh.data": 1,
}


def values_of(preset="tiny", **changes):
  values = presets.get_config(preset)
  values.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
  return values.to_dict()


def faked_rows(n):
  """The metrics of a run with N = n, as training writes them."""
  return [
    {"kind": "eval", "step": step, "tokens": step, "cpu_s": 1.0, "exact": 0.1, "op2_majority": 0.3}
    | {"op2_shortcut": 0.4, "faithful_op2_exact": 0.9}
    | {f"op{op}_exact": (step + op) / (100 * n) for op in (2, 4)}
    for step in (0, 10)
  ]


class PresetTest(parameterized.TestCase):
  @parameterized.parameters(*(p for p in presets.PRESETS if p not in presets.PRETRAINED))
  def test_every_preset_and_its_sweep_fit(self, preset):
    for changes in presets.sweep(preset).values():
      values = presets.get_config(preset)
      values.update_from_flattened_dict(changes)
      cfg = gsm_infinite.build(values.to_dict())
      self.assertEqual(cfg.sleep.num_passes, changes["sleep.num_passes"])

  def test_the_papers_setting(self):
    cfg = gsm_infinite.build(values_of("scratch"))
    self.assertEqual((cfg.model.window, cfg.train.batch_size, cfg.optim.muon_lr), (2000, 256, 1e-3))
    self.assertEqual((cfg.data.operations, cfg.data.min_tokens, cfg.data.max_tokens), ((1, 8), 2000, 3300))
    self.assertEqual((cfg.train.eval_sequences, cfg.data.noise, cfg.data.mode), (1600, True, "forward"))

  def test_an_unknown_preset_names_the_known(self):
    with self.assertRaisesRegex(ValueError, "unknown preset 'jet_3b'; known: tiny, mini, small"):
      presets.get_config("jet_3b")

  @parameterized.parameters(
    ({"model__window": 300}, "model.window: must be at most data.cut.max_tokens = 110"),
    ({"data__operations": (1, 3)}, r"data.operations: no medium problem \(d = 2\) has 1 operation"),
    ({"data__max_tokens": 95, "data__min_tokens": 0}, "data.max_tokens: must be at least 100"),
    ({"data__cut__max_tokens": 105}, "data.cut.max_tokens: must be at least 109"),
    ({"data__noise": False}, "data.noise: must be on"),
    ({"data__subset": "symbolic"}, "data.cut.answer_tokens: must be at least 24, the tokens of the longest"),
    ({"data__modulus": 1001, "data__cut__answer_tokens": 4}, "data.cut.answer_tokens: must be at least 5"),
    ({"data__modulus": 3}, r"data.modulus: must be -1 \(none\) or at least data.number_range = 10, got 3"),
    ({"model__vocab_size": 1023}, "model.vocab_size: must be at least 1024"),
    ({"data__held_out": ()}, "data.held_out: needs at least one of balanced, faithful"),
    ({"data__held_out": ("faithful", "faithful")}, "data.held_out: names a set twice"),
    ({"data__held_out": ("faithfull",)}, r"data.held_out\[0\]: unknown value 'faithfull'"),
    ({"seed": 1_000_003}, "seed: must differ from data.held_out_seed"),
    (
      {"train__eval_sequences": 129, "train__eval_batch_size": 129},
      "train.eval_sequences: must be a multiple of the 2",
    ),
    ({"train__steps_per_dispatch": 2}, "train.steps_per_dispatch: must be 1"),
    ({"data__tokenizer": "/nowhere.json"}, "data.tokenizer: there is no file"),
  )
  def test_mistakes(self, changes, message):
    with self.assertRaisesRegex(ConfigError, message):
      gsm_infinite.build(values_of(**changes))


def test_a_tokenizer_without_digits_is_refused_before_anything_is_written(tmp_path):
  import tokenizers

  words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "12": 3}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  backend.save(str(tmp_path / "words.json"))
  with Experiment("experiments.gsm_infinite", tmp_path) as experiment:
    done = experiment.run(
      "--config=experiments/configs/gsm_infinite.py:tiny",
      f"--workdir={tmp_path / 'run'}",
      f"--config.data.tokenizer={tmp_path / 'words.json'}",
    )
  assert done.code == 2, done.err
  assert len(done.err.strip().splitlines()) == 1 and "one token for each digit" in done.err
  assert not (tmp_path / "run").exists()


def test_examples_are_the_problems_and_the_tokenizer_depends_on_the_config_alone(tmp_path):
  cfg = gsm_infinite.build(values_of(**{k.replace(".", "__"): x for k, x in SHORT.items()})).data
  ready = task.with_tokenizer(cfg, tmp_path)
  first = (tmp_path / "tokenizer.json").read_bytes()
  (tmp_path / "tokenizer.json").write_bytes(b"damaged")
  task.with_tokenizer(cfg, tmp_path)
  assert (tmp_path / "tokenizer.json").read_bytes() == first
  known = tokenizer.load(ready.tokenizer)
  source = task.training(ready, seed=0, num=20)
  for i in range(20):
    made, problem = source[i], generator.problem(ready, 0, i)
    assert known.decode(made.prompt) == problem.text
    assert known.decode(made.answer[:-1]) == problem.written_answer
    assert (made.answer[-1], made.group) == (known.eos, problem.op - 2)
    assert batching.bucket_of(made, ready.cut, 36).windows >= 1  # something is slept on
  sets = task.held_out(ready, 30)
  assert list(sets) == ["balanced", "faithful"]
  assert np.bincount([e.group for e in sets["balanced"].examples]).tolist() == [15, 15]
  drawn = [generator.problem(ready, ready.held_out_seed, i) for i in range(30)]
  assert [known.decode(e.prompt) for e in sets["faithful"].examples] == [p.text for p in drawn]
  assert sets["faithful"].guesses["shortcut"] == [shortcut.guess(p.context) == p.answer for p in drawn]
  texts = {tuple(e.prompt) for held in sets.values() for e in held.examples}
  assert not texts & {tuple(source[i].prompt) for i in range(20)}


def test_the_figure_has_a_panel_an_operation_count_and_a_curve_an_n(tmp_path):
  for n in (1, 2):
    with workdir.prepare(tmp_path / f"n{n}", values_of(sleep__num_passes=n)) as run:
      run.metrics.write_text("".join(metrics.dumps(row) + "\n" for row in faked_rows(n)))
  read = figures.load_runs(str(tmp_path / "n*"))
  assert gsm_figures.operations(read) == [2, 4]
  gsm_figures.figure_4(read).save(tmp_path / "figures")
  rows = list(csv.DictReader(open(tmp_path / "figures" / "figure_4.csv")))
  drawn = {(r["operations"], r["series"], r["step"]): float(r["value"]) for r in rows}
  assert drawn["4", "N = 2", "10"] == pytest.approx(100 * 14 / 200)
  assert drawn["2", "commonest answer", ""] == pytest.approx(30.0)
  assert drawn["2", "commonest number", ""] == pytest.approx(40.0)
  assert len(drawn) == 2 * 2 * 2 + 2
  with pytest.raises(RunError, match="figure 4"):
    gsm_figures.figure_4([])


@pytest.mark.slow
def test_a_short_run_ends_in_the_table():
  cfg = gsm_infinite.build(values_of(**{k.replace(".", "__"): x for k, x in SHORT.items()}))
  with tempfile.TemporaryDirectory() as folder:
    with workdir.prepare(folder, config.to_dict(cfg)) as run:
      row = train.train(cfg, gsm_infinite.make_task(cfg, folder), run, report=lambda line: None)
    rows = [r for r in metrics.read(pathlib.Path(folder, "metrics.jsonl")) if r["kind"] == "train"]
  assert [r["step"] for r in rows] == [1, 2, 3]
  assert all(0 < r["padding"] < 1 and 0 <= r["data_wait"] <= 1 for r in rows)
  lines = gsm_infinite.tables(row, cfg.data).splitlines()
  assert [line.split()[:2] for line in lines[2:4]] == [["2", "6"], ["3", "6"]]
  assert lines[4].startswith("held out, faithful")
  assert sum(int(line.split()[1]) for line in lines[6:]) == 12
