"""GSM-Infinite: the generator against a solver of the text, the reference files, and its law."""

import collections
import functools
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax.config import ConfigError
from sleep_jax.data import gsm_infinite as gsm
from sleep_jax.data.gsm_infinite import problems, solver, task, tokenizer, words
from tests.forked import Experiment

DATA = Path(__file__).parents[1] / "data"
CELLS = (("medium", 2), ("hard", 1), ("mixed", 1), ("symbolic", 1))
LOST = "ref-op8-0294"  # the original lost a definition here


def recorded(name: str) -> list[dict]:
  return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def comparable(answer):
  return list(answer) if isinstance(answer, (list, tuple)) else answer


def assert_agrees(p: gsm.Problem):
  assert comparable(gsm.solve(p.question, p.context)) == comparable(p.answer), p
  assert gsm.count_operations(p.question, p.context) == p.op, p


def test_solver_and_counter_agree_with_the_original():
  rows = recorded("gsm_infinite_reference.jsonl") + recorded("gsm_infinite_symbolic_reference.jsonl")
  assert len(rows) > 140
  for row in rows:
    if row["id"] != LOST:
      assert comparable(gsm.solve(row["question"], row["context"])) == comparable(row["answer"]), row["id"]
      assert gsm.count_operations(row["question"], row["context"]) == row["op"], row["id"]


def test_solver_refuses_the_problem_whose_definition_the_original_lost():
  (row,) = [r for r in recorded("gsm_infinite_reference.jsonl") if r["id"] == LOST]
  with pytest.raises(solver.UnsolvableError):
    gsm.solve(row["question"], row["context"])


def test_solver_by_hand():
  context = (
    "The number of adult fox in Pine Ridge equals 3 times the difference between the number of adult bear in"
    " Pine Ridge and the number of adult wolf in Maple Creek. The number of adult wolf in Maple Creek"
    " equals 1."
    " The number of adult bear in Pine Ridge equals 4."
  )
  question = "What is the total number of adult animals in Pine Ridge?"
  assert gsm.solve(question, context) == 3 * (4 - 1) + 4
  assert gsm.count_operations(question, context) == 1 + 1 + 3 + 2


class GeneratedTest(parameterized.TestCase):
  @parameterized.parameters(*CELLS)
  def test_text_alone_gives_answer_and_operations(self, subset, low):
    cfg = gsm.GsmInfiniteConfig(subset=subset, operations=(low, 8), mode="both")
    for i in range(40):
      assert_agrees(gsm.problem(cfg, 3, i))

  @parameterized.parameters(*CELLS)
  @pytest.mark.slow
  def test_thousands_of_texts(self, subset, low):
    cfg = gsm.GsmInfiniteConfig(subset=subset, operations=(low, 8), mode="both")
    for i in range(1500):
      assert_agrees(gsm.problem(cfg, 4, i))

  @parameterized.parameters(*CELLS)
  def test_lengths_fill_the_range_whatever_the_operations(self, subset, low):
    cfg = gsm.GsmInfiniteConfig(subset=subset, operations=(low, 8))
    sizes = collections.defaultdict(list)
    for i in range(200):
      p = gsm.problem(cfg, 0, i, op=8 if i % 2 else 2)
      sizes[p.op].append(p.num_tokens)
    for counts in sizes.values():
      assert 2000 <= min(counts) and max(counts) <= 3300
      # Standard error of a mean of 120 even lengths: 1300 / sqrt(12 * 120) = 34.
      assert abs(np.mean(counts) - 2650) < 4 * 34 + 15
      assert max(counts) - min(counts) > 1000

  @parameterized.parameters(2, 3)
  def test_noise_is_a_spider(self, depth):
    cfg = gsm.GsmInfiniteConfig(subset="hard" if depth == 3 else "medium", operations=(2, 8), mode="both")
    forms = collections.Counter()
    for i in range(80):
      p = gsm.problem(cfg, 0, i)
      said = collections.defaultdict(list)
      for sentence, role in zip(solver.split_sentences(p.context), p.sentence_roles, strict=True):
        said[role == "N"].append(sentence)
      place = {
        noise: {re.split(" equals | exists| is greater", s)[0].rpartition(" in ")[2] for s in said[noise]}
        for noise in said
      }
      assert not place[True] & place[False]
      assert len(set(said[True])) == len(said[True])
      for sentence in said[True]:
        right = sentence.partition(" equals ")[2]
        assert right and not re.search(r"\d", right)
        forms[right.split()[1] if right.startswith(("the sum", "the difference")) else "copy"] += 1
      if p.mode == "forward":
        assert "greater than 0" not in p.context
      else:
        assert p.context.count("greater than 0") == 1 and 1 <= p.answer <= 4
    total = sum(forms.values())
    for form, share in (("copy", 0.5), ("sum", 0.25), ("difference", 0.25)):
      # Copies fall short by the totals of noise places, one operand for some twenty sentences.
      assert abs(forms[form] / total - share) < 0.04, forms

  def test_operations_are_even_and_balanced(self):
    cfg = gsm.GsmInfiniteConfig(min_tokens=200, max_tokens=500)
    drawn = collections.Counter(gsm.problem(cfg, 0, i).op for i in range(400))
    assert sorted(drawn) == list(range(1, 9)) and min(drawn.values()) > 50 - 4 * 6.6
    held = collections.Counter(p.op for p in problems.held_out(cfg, "balanced", 40))
    assert held == dict.fromkeys(range(1, 9), 5)


def test_a_problem_depends_on_its_number_alone():
  cfg = gsm.GsmInfiniteConfig(mode="both")
  program = (
    "from sleep_jax.data import gsm_infinite as g; from sleep_jax.data.gsm_infinite import problems as d;"
    "c = g.GsmInfiniteConfig(mode='both'); print(d.digest(g.problem(c, 5, i) for i in (7, 3, 11)))"
  )
  here = problems.digest(gsm.problem(cfg, 5, i) for i in (7, 3, 11))
  for salt in ("1", "2"):
    ran = subprocess.run(
      [sys.executable, "-c", program],
      env={"PYTHONHASHSEED": salt, "PYTHONPATH": str(DATA.parents[1]), "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
    )
    assert ran.stdout.strip() == here
  assert problems.digest([gsm.problem(cfg, 6, 7)]) != problems.digest([gsm.problem(cfg, 5, 7)])


@pytest.mark.parametrize("noise", [True, False])
def test_no_held_out_text_is_trained_on(noise):
  cfg = gsm.GsmInfiniteConfig(subset="medium", operations=(2, 4), noise=noise, min_tokens=150, max_tokens=300)
  train = [gsm.problem(cfg, seed, i) for seed in (0, 1) for i in range(300)]
  test = problems.held_out(cfg, "balanced", 45) + problems.held_out(cfg, "faithful", 45)
  trained, tested = ({problems.fingerprint(p.question, p.context) for p in side} for side in (train, test))
  assert not trained & tested


def test_a_fingerprint_does_not_see_the_order_of_sentences():
  p = gsm.problem(gsm.GsmInfiniteConfig(noise=False), 0, 0)
  turned = f"{'. '.join(reversed(p.context.removesuffix('.').split('. ')))}."
  assert turned != p.context
  assert problems.fingerprint(p.question, turned) == problems.fingerprint(p.question, p.context)
  assert problems.fingerprint(p.question, p.context + " And.") != problems.fingerprint(p.question, p.context)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  cfg = gsm.GsmInfiniteConfig(mode="both", min_tokens=300, max_tokens=500)
  trained = tokenizer.train([gsm.problem(cfg, 0, i).text for i in range(200)], 1200)
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  trained.save(path)
  return trained, str(path)


def test_tokenizer_round_trip(small):
  trained, path = small
  for text in ("Rêves de Belleville equals 42", " a  b\n\tc’d — 日本 😀", "V012345 = V9 - 1."):
    assert trained.decode(trained.encode(text)) == text
  assert [trained.decode([i]) for i in trained.encode("9876543210")] == list("9876543210")
  assert tokenizer.load(path).encode("the total in South Zoo") == trained.encode("the total in South Zoo")


def test_lengths_are_those_of_the_tokenizer_and_examples_lead_to_the_answer(small):
  trained, path = small
  cfg = task.TaskConfig(mode="both", min_tokens=600, max_tokens=900, tokenizer=path)
  assert tokenizer.counter(path).exact
  examples = task.training(cfg, 0, 30)
  assert len(examples) == 30
  for i in range(30):
    p, made = gsm.problem(cfg, 0, i), examples[i]
    assert p.num_tokens == len(trained.encode(p.text)) and 600 <= p.num_tokens <= 900
    assert trained.decode(made.prompt[:-1]) == p.text
    assert made.prompt[-1] == trained.answer_prompt[-1]
    assert trained.decode(made.answer) == str(p.answer) and made.answer[-1] == trained.eos
    assert made.group == p.op - 1 and made.prompt.dtype == made.answer.dtype == np.int32
  with pytest.raises(IndexError, match="example 30 of 30"):
    examples[30]
  with pytest.raises(ConfigError, match="^seed: must differ from data.held_out_seed"):
    task.training(cfg, cfg.held_out_seed, 30)


def test_words_that_are_looked_up_give_the_ids_of_the_whole_text(small):
  trained, _ = small
  assert trained.by_words
  for i in range(40):
    for subset in ("both", "symbolic"):
      text = gsm.problem(gsm.GsmInfiniteConfig(subset=subset, mode="both", max_tokens=2100), 8, i).text
      assert trained.encode_problem(text) == trained.encode(text)


def test_a_tokenizer_whose_tokens_reach_over_spaces_reads_texts_as_a_whole():
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  made = gsm.problem(gsm.GsmInfiniteConfig(min_tokens=300, max_tokens=500), 8, 0)
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
  backend.decoder = decoders.Fuse()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=list(tokenizer.SPECIAL),
    initial_alphabet=list("V0123456789"),
    show_progress=False,
  )
  backend.train_from_iterator([made.text] * 5, trainer)
  joined = tokenizer.Tokenizer(backend, "here")
  assert not joined.by_words
  assert joined.encode_problem(made.text) == joined.encode(made.text)


def test_noise_names_are_many_and_harmless():
  for template in words.TEMPLATES.values():
    core = {name for group in template.places + template.kinds for name in group}
    for groups, size in ((template.noise_places, 20), (template.noise_kinds, 10)):
      names = [name for group in groups for name in group]
      assert len(groups) == 32 and min(map(len, groups)) >= size and len(set(names)) == len(names)
      assert not core & set(names)
      assert not [n for n in names if re.search(r"\d|\.| in | and |^total|^average", n)]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"subset": "medium"}, r"^data.operations: no medium problem \(d = 2\) has 1 operation"),
    ({"subset": "hrad"}, r'^data.subset: .*did you mean "hard"'),
    ({"operations": (3, 2)}, r"^data.operations: needs 1 <= lowest <= highest"),
    ({"operations": (2, 21)}, r"^data.operations: .*highest <= 20"),
    ({"min_tokens": 10, "max_tokens": 60}, r"^data.max_tokens: must be at least"),
    ({"min_tokens": 2000, "max_tokens": 2010}, r"^data.max_tokens: must exceed data.min_tokens"),
    ({"templates": (0, 0, 0)}, r"^data.templates: needs three weights"),
    ({"number_range": 2}, r"^data.number_range: must be at least 3"),
  ],
)
def test_an_impossible_setting_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    gsm.GsmInfiniteConfig(**changes)


def test_a_tokenizer_without_digits_is_refused(tmp_path):
  from tokenizers import Tokenizer, models, pre_tokenizers

  path = tmp_path / "words.json"
  vocab = {"<pad>": 0, "<eos>": 1, "[UNK]": 2, "equals": 3, "42": 4}
  words_only = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
  words_only.pre_tokenizer = pre_tokenizers.Whitespace()
  words_only.save(str(path))
  with pytest.raises(ConfigError, match="^data.tokenizer: .*one token for each digit"):
    gsm.problem(gsm.GsmInfiniteConfig(tokenizer=str(path)), 0, 0)
  with pytest.raises(ConfigError, match="^data.tokenizer: there is no file"):
    tokenizer.load(str(tmp_path / "none.json"))
  (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
  with pytest.raises(ConfigError, match="^data.tokenizer: .*is no tokenizer.json"):
    tokenizer.load(str(tmp_path / "bad.json"))


def test_a_data_set_on_disk(tmp_path):
  with Experiment("experiments.gsm_infinite_data", tmp_path) as experiment:
    run = functools.partial(experiment.run, "--config=experiments/configs/gsm_infinite_data.py:tiny")
    done = run(f"--workdir={tmp_path / 'set'}")
    refused = run(f"--workdir={tmp_path / 'no'}", "--config.data.subset=medium")
  assert done.code == 0, done.err
  assert "Not compared: fewer than" in done.out and "0 comparisons" not in done.out
  manifest = json.loads((tmp_path / "set" / "manifest.json").read_text(encoding="utf-8"))
  assert manifest["texts_in_train_and_held_out"] == 0
  for row in manifest["files"]:
    content = (tmp_path / "set" / row["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert row["rows"] == (64 if row["file"].startswith("train") else 16)
  lines = (tmp_path / "set" / "train.jsonl").read_bytes().splitlines()
  with grain.sources.ArrayRecordDataSource(str(tmp_path / "set" / "train.array_record")) as records:
    assert [records[i] for i in range(len(records))] == lines
  assert refused.code == 2 and refused.err.count("\n") == 1 and "data.operations" in refused.err
