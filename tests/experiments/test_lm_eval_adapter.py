"""The model of lm-evaluation-harness beside transformers' own numbers on the same small random checkpoint.

Needs lm_eval, torch and transformers (`pip install -e .[eval]` beside `make peers`); skipped without.
"""

import json

import numpy as np
import pytest

from tests.pretrained import tiny

pytestmark = [pytest.mark.peers, pytest.mark.slow]
TEXTS = ["The number of adult crow in South Zoo equals 4.", " equals 2 plus the sum of", "a\nb  c"]
PAIRS = [(TEXTS[0], " The number"), (TEXTS[0] + "  ", "of 3"), ("", "adult eagle"), (TEXTS[1], TEXTS[2])]
TOLERANCE = 1e-3  # nats of a whole text; both compute in float32


class Request:
  """What the harness hands over."""

  def __init__(self, *args):
    self.args = args


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tiny.checkpoint(tmp_path_factory.mktemp("eval") / "qwen2", "qwen2")
  values = json.loads((folder / "config.json").read_text())
  values |= {"model_type": "qwen2", "eos_token_id": 0, "bos_token_id": None, "max_position_embeddings": 512}
  (folder / "config.json").write_text(json.dumps(values))
  return folder


@pytest.fixture(scope="module")
def adapter():
  pytest.importorskip("lm_eval")
  from sleep_jax.experiments import lm_eval_adapter

  return lm_eval_adapter


@pytest.fixture(scope="module")
def peer(checkpoint):
  """Log probabilities of tokens, [n - 1, vocab], and greedy continuations, by transformers."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  there = transformers.AutoModelForCausalLM.from_pretrained(
    checkpoint, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))

  class Peer:
    def encode(self, text):
      return tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_p(self, tokens):
      with torch.no_grad():
        return torch.log_softmax(there(torch.tensor([tokens])).logits[0].double(), -1).numpy()

    def score(self, tokens, count):
      log_p = self.log_p(tokens)[:-1]
      targets = np.asarray(tokens[1:])
      chosen = log_p[np.arange(len(targets)), targets]
      return chosen[-count:].sum(), bool((log_p.argmax(-1) == targets)[-count:].all())

    def greedy(self, text, count):
      tokens = self.encode(text)
      with torch.no_grad():
        out = there.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=count, pad_token_id=0)
      return tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True)

  return Peer()


def test_log_likelihoods_are_those_of_transformers(adapter, checkpoint, peer):
  lm = adapter.SleepingLM(str(checkpoint))
  got = lm.loglikelihood([Request(*pair) for pair in PAIRS])
  for (context, continuation), (nats, greedy) in zip(PAIRS, got, strict=True):
    stripped = context.rstrip()
    before = peer.encode(stripped) if stripped else [0]
    whole = peer.encode(context + continuation) if stripped else [0, *peer.encode(continuation)]
    wanted, likeliest = peer.score(whole, len(whole) - len(before))
    assert nats == pytest.approx(wanted, abs=TOLERANCE) and greedy == likeliest
  # what greedy decoding writes is greedy
  written = peer.greedy(TEXTS[0], 4)
  [(_, greedy)] = lm.loglikelihood([Request(TEXTS[0], written)])
  assert greedy == (peer.encode(TEXTS[0] + written)[: len(peer.encode(TEXTS[0]))] == peer.encode(TEXTS[0]))


def test_rolling_log_likelihoods_are_those_of_transformers(adapter, checkpoint, peer):
  lm = adapter.SleepingLM(str(checkpoint))
  texts = [*TEXTS, TEXTS[0] * 4, ""]
  for text, nats in zip(texts, lm.loglikelihood_rolling([Request(text) for text in texts]), strict=True):
    tokens = [0, *peer.encode(text)]
    wanted = peer.score(tokens, len(tokens) - 1)[0] if text else 0.0
    assert nats == pytest.approx(wanted, abs=TOLERANCE)


def test_generation_is_that_of_transformers_and_ends_at_stop_strings(adapter, checkpoint, peer):
  lm = adapter.SleepingLM(str(checkpoint), max_gen_toks=12)
  [whole] = lm.generate_until([Request(TEXTS[0], {})])
  assert whole == peer.greedy(TEXTS[0], 12)
  stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
  [short, shorter] = lm.generate_until(
    [Request(TEXTS[0], {"until": [stop, "\0\0"]}), Request(TEXTS[0], {"until": stop, "max_gen_toks": 2})]
  )
  assert short == whole.split(stop)[0]
  assert whole.startswith(shorter) and len(shorter) < len(whole)


def test_windows_and_sleep_change_what_a_hybrid_says(adapter, tmp_path):
  folder = str(tiny.checkpoint(tmp_path / "jet", "jet"))
  values = json.loads((tmp_path / "jet" / "config.json").read_text())
  (tmp_path / "jet" / "config.json").write_text(json.dumps(values | {"eos_token_id": 0}))
  request = [Request(TEXTS[0] * 8)]
  forms = [{}, {"window": 24}, {"window": 24, "passes": 2}, {"window": 24, "passes": 4}]
  found = [adapter.SleepingLM(folder, **form).loglikelihood_rolling(request)[0] for form in forms]
  assert np.isfinite(found).all() and len({round(x, 4) for x in found}) == len(forms)
  # the same text token by token, as generation reads it
  lm = adapter.SleepingLM(folder, window=24, passes=2)
  tokens = [0, *lm._encode(TEXTS[0] * 8)]
  session, nats = adapter.generate.start(lm._cfg, lm._sleep), 0.0
  for token, following in zip(tokens, tokens[1:], strict=False):
    session = adapter.generate.read(lm._weights, [[token]], session, lm._cfg, lm._sleep)
    logits = np.asarray(session.logits[0], np.float64)
    nats += logits[following] - np.logaddexp.reduce(logits)
  assert found[2] == pytest.approx(nats, abs=TOLERANCE * 10)


def test_a_mistake_is_one_line(adapter, checkpoint):
  for given, message in (
    ({"checkpoint": "nowhere"}, "nowhere"),
    ({"checkpoint": str(checkpoint), "passes": 2}, "passes: must be 1 without a window"),
    ({"checkpoint": str(checkpoint), "window": 8, "passes": 0}, "sleep.num_passes: must be at least 1"),
  ):
    with pytest.raises(adapter.ConfigError, match=message):
      adapter.SleepingLM(**given)


def test_a_task_of_local_files_is_evaluated_offline(adapter, checkpoint, peer, tmp_path, monkeypatch):
  """The harness's own evaluation, of a task with two choices, is as accurate as transformers' numbers say."""
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  rows = [{"text": TEXTS[0], "choices": [" The number", " eagle plus"], "right": i % 2} for i in range(4)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "zoo.yaml").write_text(
    "task: zoo\ndataset_path: json\n"
    f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
    "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
    "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{right}}'\ntarget_delimiter: ''\n"
    "metric_list:\n  - metric: acc\n"
  )
  lm = adapter.SleepingLM(str(checkpoint))
  tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
  found = simple_evaluate(model=lm, tasks=["zoo"], task_manager=tasks, bootstrap_iters=0)
  scores = []
  for choice in rows[0]["choices"]:
    whole, before = peer.encode(TEXTS[0] + choice), peer.encode(TEXTS[0])
    scores.append(peer.score(whole, len(whole) - len(before))[0])
  wanted = np.mean([int(np.argmax(scores)) == row["right"] for row in rows])
  assert found["results"]["zoo"]["acc,none"] == wanted == 0.5
  said = sorted(sample["resps"][0][0][0] for sample in found["samples"]["zoo"][:1])
  assert min(abs(said[0] - score) for score in scores) < TOLERANCE
