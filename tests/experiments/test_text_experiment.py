"""Language modelling on files: mistakes are one line before anything is written; runs resume."""

import json
import pathlib
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from sleep_jax import config, model, sharding, train
from sleep_jax.config import ConfigError
from sleep_jax.data.text import rows
from sleep_jax.experiments import text
from sleep_jax.experiments.configs import text as presets
from sleep_jax.report import context
from sleep_jax.runtime import metrics, workdir
from sleep_jax.scoring import by_context
from sleep_jax.train import row_steps

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
  "data.length": 32, "data.vocab_size": 280, "model.vocab_size": 280, "model.window": 8,
  "model.embed_dim": 16, "model.mlp_dim": 16, "model.blocks": ("gdn",), "model.fast.key_dim": 8,
  "model.fast.value_dim": 8, "model.attention.num_heads": 2, "train.steps": 4, "train.batch_size": 2,
  "train.log_every": 1, "train.save_every": 2, "train.eval_every": 4, "train.eval_sequences": 4,
  "train.eval_batch_size": 2, "mesh.data": 1,
}  # fmt: skip


def story(seed: int, sentences: int) -> str:
  draw = random.Random(seed)
  names = ["".join(draw.choice("bdklmnr") + draw.choice("aeiou") for _ in range(3)) for _ in range(4)]
  return " ".join(f"{draw.choice(names)} saw the {draw.choice(['sea', 'hill'])}." for _ in range(sentences))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with texts, which is the current one."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("books").mkdir()
  for i in range(4):
    pathlib.Path(f"books/{i}.txt").write_text(story(i, 10 + 20 * i))
  pathlib.Path("held.jsonl").write_text(
    "".join(json.dumps({"text": story(9 + i, 12)}) + "\n" for i in range(5))
  )
  return tmp_path


def values_of(**changes):
  values = presets.get_config("tiny")
  given = SMALL | {"data.files": "books/*.txt", "data.held_out": "held.jsonl"}
  values.update_from_flattened_dict(given | {name.replace("__", "."): x for name, x in changes.items()})
  return values.to_dict()


def run(where, steps=None, **changes):
  """Trains in a folder; the rows of the log."""
  cfg = text.build(values_of(**changes))
  with workdir.prepare(where, config.to_dict(cfg), may_grow=("train.steps",)) as opened:
    train.train(
      cfg, text.make_task(cfg, str(opened.path)), opened, tensorboard=False, report=lambda line: None
    )
  return metrics.read(pathlib.Path(where) / "metrics.jsonl")


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"data.files": ""}, "^data.files: needs at least one file or pattern"),
    ({"data.held_out": ""}, "^data.held_out: needs at least one file or pattern"),
    ({"data.files": "nothing*.txt"}, "^data.files: 'nothing\\*.txt' matches no file"),
    ({"data.files": "books"}, "^data.files: 'books' is a folder"),
    ({"data.files": "empty.txt"}, "^empty.txt: is empty"),
    ({"data.held_out": "binary.txt"}, "^binary.txt: is binary"),
    ({"data.files": "latin.txt"}, "^latin.txt: is not UTF-8"),
    ({"data.files": "short.txt"}, "^data.files: has 0 tokens to read, fewer than a window"),
    ({"data.held_out": "short.txt"}, "^data.held_out: has . tokens to read, fewer than a window"),
    ({"data.held_out": "books/2.txt"}, "^data.held_out: books/2.txt is trained on"),
    (
      {"data.held_out": "copy.txt"},
      "^data.held_out: copy.txt is trained on, it is the same text as books/0.txt",
    ),
    ({"data.field": "body"}, "^held.jsonl: line 1 has no field 'body'"),
    ({"data.length": 30}, "^data.length: must be a multiple of model.window = 8"),
    (
      {"data.digest": "0" * 64},
      "^data.digest: the texts are not those of this run: its digest is 0{64}, that of",
    ),
    ({"data.tokenizer": "none.json"}, "^data.tokenizer: there is no file 'none.json'"),
    ({"data.tokenizer": "short.txt"}, "^data.tokenizer: 'short.txt' is no tokenizer.json"),
    ({"model.vocab_size": 270}, "^model.vocab_size: must be at least 280"),
    ({"data.documents": "joined"}, "^data.documents: unknown value 'joined'"),
  ],
)
def test_a_mistake_is_one_line_before_anything_is_written(folder, changes, said):
  for name, data in (
    ("empty.txt", b""), ("binary.txt", b"a\0b"), ("latin.txt", b"\xe9t\xe9"), ("short.txt", b"a"),
    ("copy.txt", pathlib.Path("books/0.txt").read_bytes()),
  ):  # fmt: skip
    pathlib.Path(name).write_bytes(data)
  before = sorted(folder.rglob("*"))
  with pytest.raises(ConfigError, match=said) as e:
    text.build(values_of(**changes))
  assert "\n" not in str(e.value)
  assert sorted(folder.rglob("*")) == before


def test_every_preset_and_its_sweep_fit(folder):
  for preset in ("tiny", "scratch"):
    for changes in presets.sweep(preset).values():
      values = presets.get_config(preset)
      values.update_from_flattened_dict(
        {"data.files": "books/*.txt", "data.held_out": "held.jsonl", "data.length": 32, "model.window": 8}
        | changes
      )
      assert text.build(values.to_dict()).sleep.when == "always"


def test_a_batch_is_a_function_of_the_step_and_hosts_share_it(folder, monkeypatch):
  cfg = text.build(values_of())
  task = text.make_task(cfg, str(folder))

  def batch(step, host, hosts):
    monkeypatch.setattr(jax, "process_index", lambda: host)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    steps = row_steps.RowSteps(cfg, task, None, sharding.make_mesh(cfg.mesh))
    monkeypatch.setattr(sharding, "put", lambda batch, mesh: batch)
    return steps._placed(step)

  for step in (0, 3):
    whole, tokens = batch(step, 0, 1)
    parts = [batch(step, host, 2) for host in (0, 1)]
    assert [n for _, n in parts] == [tokens, tokens] == [int(whole.valid.sum())] * 2
    for name in ("inputs", "targets", "loss_mask", "valid", "begins"):
      joined = np.concatenate([getattr(part, name) for part, _ in parts])
      np.testing.assert_array_equal(joined, getattr(whole, name))


def test_a_summary_by_hand():
  described = [
    {
      "targets": np.array([5, 6, 5, 0]), "loss_mask": np.array([1.0, 1, 1, 0]),
      "bytes": np.array([2, 1, 5, 9]),
      "position": np.array([1, 2, 3, 0]), "kind": np.array([0, 0, 3, 0]),
      "evicted_name": np.array([False, True, True, True]),
    }
  ]  # fmt: skip
  nats, right = np.array([[1.0, 2.0, 6.0, 99.0]]), np.array([[True, False, False, True]])
  row = by_context.summary(described, nats, right, length=4, window=2)
  assert (row["loss"], row["tokens_scored"], row["bytes_scored"]) == (3.0, 3, 8)
  assert row["perplexity"] == pytest.approx(np.exp(3))
  assert row["bits_a_byte"] == pytest.approx(9 / 8 / np.log(2))
  assert (row["exact"], row["const_exact"]) == (1 / 3, 2 / 3)
  assert (row["loss_at_0_2"], row["tokens_at_0_2"]) == (1.5, 2)
  assert (row["loss_at_2_4"], row["loss_new"], row["loss_long_evicted"]) == (6.0, 1.5, 6.0)
  assert (row["loss_near"], row["tokens_near"]) == (None, 0)
  assert (row["loss_evicted_names"], row["tokens_evicted_names"]) == (4.0, 2)
  assert "1.5" in context.table({"N = 1": row, "N = 2": row}).replace("1.500", "1.5")
  assert context.line(row).startswith("3.000 nats a token, perplexity 20.09")


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_refuses_other_texts(folder):
  whole = run("whole")
  begun = run("parts", **{"train.steps": 2})
  resumed = run("parts")
  losses = [[r["loss"] for r in rows_ if r["kind"] == "train"] for rows_ in (whole, resumed)]
  assert losses[0] == losses[1]
  assert len(begun) < len(resumed)
  pathlib.Path("books/1.txt").write_text(story(77, 40))
  with pytest.raises(
    workdir.WorkdirError, match='data.digest: "[0-9a-f]{64}" in the workdir, "[0-9a-f]{64}"'
  ):
    run("parts")


@pytest.mark.slow
def test_perplexity_of_a_run_as_it_scored_itself(folder):
  rows_ = run("run", **{"data.documents": "alone", "sleep.num_passes": 2})
  done = subprocess.run(
    [sys.executable, "-m", "experiments.perplexity", f"--checkpoint={folder}/run", "--passes=1,2",
     f"--files={folder}/held.jsonl", "--sequences=4", f"--out={folder}/out"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  forms = json.loads((folder / "out" / "perplexity.json").read_text())["forms"]
  assert list(forms) == ["full attention", "window only", "N = 1", "N = 2"]
  evaluated = [r for r in rows_ if r["kind"] == "eval"][-1]
  for key in ("loss", "bits_a_byte", "loss_at_0_8", "tokens_scored"):
    assert forms["N = 2"][key] == pytest.approx(evaluated[key], rel=1e-5)
  same = {(f["tokens_scored"], f["bytes_scored"]) for f in forms.values()}
  assert len(same) == 1  # all on the same tokens
  assert forms["window only"]["loss_at_0_8"] == pytest.approx(forms["N = 1"]["loss_at_0_8"], rel=1e-5)
  assert (folder / "out" / "perplexity.png").exists()


def test_window_only_sees_its_window_alone():
  """The loss in a window does not change with what stands in the windows before it."""
  cfg = config.ModelConfig(
    vocab_size=30,
    embed_dim=16,
    blocks=("gdn",),
    window=4,
    fast=config.FastConfig(num_heads=1, key_dim=8, value_dim=8),
  )
  weights = model.init(cfg, jax.random.key(0))
  mesh = sharding.make_mesh(config.MeshConfig(data=1), jax.devices()[:1])

  class Fixed:
    counts = (9,)

    def __init__(self, seed):
      ids = np.random.default_rng(seed).integers(0, 30, 9).astype(np.int32)
      self.ids = np.concatenate([ids[:4], np.arange(5, dtype=np.int32)])

    def read(self, document, start, stop):
      return self.ids[start:stop], np.ones(stop - start, np.int32), np.zeros(stop - start, np.int32)

  forms = {
    name: (how, s, forget) for name, how, s, forget in by_context.forms(cfg, config.SleepConfig(), [2], 8)
  }
  assert list(forms) == ["full attention", "window only", "N = 2"]
  got = {}
  for name in ("window only", "N = 2"):
    how, s, forget = forms[name]
    got[name] = [
      by_context.make_evaluate(
        rows.make_rows(Fixed(seed), rows.TextConfig(length=8), 4, None, "--files"),
        1,
        1,
        how,
        s,
        mesh,
        forget=forget,
      )(weights)["loss_at_4_8"]
      for seed in (0, 1)
    ]
  assert got["window only"][0] == pytest.approx(got["window only"][1], rel=1e-5)
  assert got["N = 2"][0] != pytest.approx(got["N = 2"][1], rel=1e-5)
