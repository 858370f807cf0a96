"""Data that cannot be, tried from the command line: one line, exit code 2, nothing written."""

import pathlib

import pytest
import tokenizers

from sleep_jax.data.gsm_infinite import tokenizer
from tests.forked import ROOT, Experiment

CONFIGS = ROOT / "experiments" / "configs"

# A setting of each experiment that is right, whatever `tiny` is.
BASE = {
  "gsm_infinite": "data.subset=mixed data.operations=(1,3) data.number_range=5 data.min_tokens=190"
  " data.max_tokens=250 data.cut.max_tokens=260 data.cut.answer_tokens=6 model.window=96"
  " model.vocab_size=2048 train.eval_sequences=12 train.eval_batch_size=4",
  "depo": "",
  "memory": "",
  "gsm_infinite_data": "",
}
# What is changed in it, with `--config=...:tiny --workdir=new`, and words of the one line that comes back.
# {dir} holds words.json (no digits), bytes.json (each byte a token) and bad.json (no tokenizer).
GSM = {
  "one_operation_with_d_2": (
    "data.subset=medium",
    "data.operations: no medium problem (d = 2) has 1 operation",
  ),
  "no_operation": (
    "data.operations=(0,3)",
    "data.operations: needs 1 <= lowest <= highest <= 20, got (0, 3)",
  ),
  "operations_backwards": ("data.operations=(3,1)", "data.operations: needs 1 <= lowest <= highest"),
  "too_many_operations": ("data.operations=(1,21)", "data.operations: needs 1 <= lowest <= highest <= 20"),
  "one_number_of_operations": ("data.operations=(3,)", "data.operations: must have 2 values, got 1"),
  "budget_below_the_shortest": (
    "data.min_tokens=0 data.max_tokens=100",
    "data.max_tokens: must be at least 170, the length of a short problem of up to 3 operations",
  ),
  "budget_below_the_shortest_by_the_tokenizer": (
    "data.tokenizer={dir}/bytes.json",
    "data.max_tokens: found no problem of 1 operations with 190..250 tokens",
  ),
  "no_room_between_the_lengths": (
    "data.min_tokens=240",
    "data.max_tokens: must exceed data.min_tokens = 240",
  ),
  "window_longer_than_a_sequence": (
    "model.window=300",
    "model.window: must be at most data.cut.max_tokens = 260",
  ),
  "tail_longer_than_the_window": (
    "data.cut.tails=(97,)",
    "data.cut.tails: must be at most model.window = 96",
  ),
  "answers_that_do_not_fit": ("data.cut.answer_tokens=4", "data.cut.answer_tokens: must be at least 5"),
  "sequences_that_do_not_fit": ("data.cut.max_tokens=255", "data.cut.max_tokens: must be at least 260"),
  "tokenizer_without_digits": ("data.tokenizer={dir}/words.json", "must have one token for each digit"),
  "no_tokenizer": ("data.tokenizer={dir}/none.json", "data.tokenizer: there is no file"),
  "tokenizer_that_is_none": ("data.tokenizer={dir}/bad.json", "is no tokenizer.json"),
  "modulus": ("data.modulus=4", "data.modulus: must be -1 (none) or at least data.number_range = 5, got 4"),
  "modulus_backwards": ("data.modulus=23 data.mode=reverse", "data.modulus: needs data.mode = forward"),
  "symbolic_answers": ("data.subset=symbolic", "data.cut.answer_tokens: must be at least 24"),
  "unknown_subset": ("data.subset=hrad", "data.subset: unknown value 'hrad'; did you mean \"hard\"?"),
  "unknown_mode": ("data.mode=backward", "data.mode: unknown value 'backward'"),
  "no_template": ("data.templates=(0.0,0.0,0.0)", "data.templates: needs three weights"),
  "no_numbers": ("data.number_range=2", "data.number_range: must be at least 3, got 2"),
  "no_noise": ("data.noise=False", "data.noise: must be on"),
  "workers": ("data.workers=-1", "data.workers: must be at least 0, got -1"),
  "trained_on_the_held_out": ("seed=1000003", "seed: must differ from data.held_out_seed"),
}
DEPO = {
  "more_nodes_than_names": (
    "data.mini_vocab=2 data.max_nodes=7 model.vocab_size=20",
    "data.max_nodes: must be at most",
  ),
  "hops_outside_the_trained_range": ("data.test_hops=(1,99)", "data.test_hops: must lie in 1.."),
  "no_hop": ("data.test_hops=(0,1)", "data.test_hops: must lie in 1.."),
  "window_longer_than_a_sequence": ("model.window=100000", "model.window: must divide data.context_length"),
  "nodes_that_do_not_fit": ("data.context_length=8", "data.context_length: must hold the"),
  "questions_that_do_not_fit": ("data.query_length=4", "data.query_length: must hold the"),
  "vocabulary": ("model.vocab_size=5", "model.vocab_size: must be"),
}
MEMORY = {
  "unknown_task": ("data.task=needel", "data.task: unknown value 'needel'; did you mean \"needle\"?"),
  "more_keys_than_words": ("data.depths=(17,) data.lengths=(48,)", "data.words: must be at least 17"),
  "facts_that_do_not_fit": ("data.lengths=(12,)", "data.lengths: must hold the 16 tokens of 8 pairs, got 12"),
  "more_questions_than_keys": ("data.queries=5", "data.queries: must be at most 4, the least of data.depths"),
  "a_field_of_another_task": ("data.hops=2", "data has no field 'hops'"),
  "a_field_that_means_nothing_here": ("data.chains=2", "data.chains: means nothing to data.task = recall"),
  "window": ("model.window=9", "model.window: must divide 24, the longest of data.lengths"),
  "questions_longer_than_a_window": ("model.window=6", "model.window: must hold the 8 tokens"),
  "vocabulary": ("model.vocab_size=5", "model.vocab_size: must be"),
}
WRITTEN = {
  "one_operation_with_d_2": (
    "data.subset=medium",
    "data.operations: no medium problem (d = 2) has 1 operation",
  ),
  "budget_below_the_shortest": ("data.min_tokens=10 data.max_tokens=60", "data.max_tokens: must be at least"),
  "tokenizer_without_digits": ("data.tokenizer={dir}/words.json", "must have one token for each digit"),
  "trained_on_the_held_out": ("seed=1000003", "seed: must differ from data.held_out_seed"),
  "nothing_to_write": ("num=0", "num: must be at least 1, got 0"),
  "uneven": ("held_out=17", "held_out: must be a multiple of the 8 numbers of operations, got 17"),
  "modulus": ("data.modulus=-2", "data.modulus: must be -1 (none) or at least data.number_range = 5, got -2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("mistakes")
  words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "12": 3}, unk_token="<unk>")
  tokenizers.Tokenizer(words).save(str(made / "words.json"))
  tokenizer.train(["a"], tokenizer.LEAST_VOCAB).save(made / "bytes.json")
  (made / "bad.json").write_text("{}")
  return made


@pytest.mark.parametrize(
  ("module", "mistakes"),
  [("gsm_infinite", GSM), ("depo", DEPO), ("memory", MEMORY), ("gsm_infinite_data", WRITTEN)],
)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, tmp_path, module, mistakes):
  config = f"--config={CONFIGS / module}.py:{'tiny_recall' if module == 'memory' else 'tiny'}"
  with Experiment(f"experiments.{module}", tmp_path) as experiment:
    for name, (changes, message) in mistakes.items():
      settings = dict(change.split("=", 1) for change in f"{BASE[module]} {changes}".split())
      flags = [f"--config.{key}={value.format(dir=folder)}" for key, value in settings.items()]
      ended = experiment.run(config, f"--workdir={tmp_path / 'new'}", *flags)
      assert ended.code == 2, (name, ended)
      assert len(ended.err.strip().splitlines()) == 1 and message in ended.err, (name, ended.err)
      assert ended.out == "" and not (tmp_path / "new").exists(), name


def test_a_data_set_is_not_written_twice(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "there" / "manifest.json").write_text("{}")
  with Experiment("experiments.gsm_infinite_data", tmp_path) as experiment:
    config = f"--config={CONFIGS / 'gsm_infinite_data'}.py:tiny"
    ended = experiment.run(config, f"--workdir={tmp_path / 'there'}")
    missing = experiment.run(config)
  assert ended.code == missing.code == 2
  assert "already holds a data set" in ended.err and "--workdir is required" in missing.err
  assert [p.name for p in pathlib.Path(tmp_path / "there").iterdir()] == ["manifest.json"]
