"""The command that generates, on a tiny checkpoint in published format and a tokenizer made here."""

import io
import json
import pathlib
import re
import shutil
import signal
import tempfile

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from absl.testing import parameterized

from sleep_jax import config, generate, model, pretrained
from sleep_jax.config import ConfigError
from sleep_jax.experiments import generate as command
from sleep_jax.experiments.configs import generate as presets
from sleep_jax.generate import SamplingConfig
from sleep_jax.pretrained.tokenizer import Tokenizer
from sleep_jax.train import PreemptedError
from tests import hybrids
from tests.forked import ROOT, Experiment

GOLDEN = ROOT / "tests" / "data" / "golden" / "jet_nemotron_tiny"
ALPHABET = [*map(chr, range(32, 127)), "\n", "\x1b"]  # as many as the tiny model has tokens
PLAIN = f"--config={ROOT / 'experiments' / 'configs' / 'generate.py'}:plain"
TEXT = "The quick brown fox sleeps well."  # 32 tokens: a window, and 8 of the next


def make_tokenizer(path, alphabet=ALPHABET):
  """One token a character."""
  vocab = {c: i for i, c in enumerate(alphabet)}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  made.decoder = tokenizers.decoders.Fuse()
  made.save(str(path))


def make_checkpoint(folder):
  shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("expected.npz"))
  make_tokenizer(folder / "tokenizer.json")
  return folder


class Interrupting(io.StringIO):
  """Raises SIGINT in this process when so many pieces of text are written."""

  def __init__(self, after):
    super().__init__()
    self._left = after

  def write(self, text):
    size = super().write(text)
    self._left -= bool(text)
    if text and self._left == 0:
      signal.raise_signal(signal.SIGINT)
    return size


class RunTest(parameterized.TestCase):
  """In this process, so that programs are compiled once."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dir = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.checkpoint = make_checkpoint(cls.dir / "checkpoint")

  def run_command(self, text, session=None, out=None, told=None, **changes):
    """What came out, without the time that it took."""
    values = {"checkpoint": str(self.checkpoint), "window": 24, "sleep": {"num_passes": 2, "first_block": 1}}
    out, told = out or io.StringIO(), told or io.StringIO()
    cfg = config.from_dict(command.GenerateConfig, values | changes)
    command.run(cfg, text, session, out, told)
    return out.getvalue(), re.sub(r"[0-9.]+ ms", "_ ms", told.getvalue()).strip().splitlines()

  def expected(self, text, count, seed=0, **sampling):
    """The same with a plain loop over windows, in which nothing is cached but the state."""
    sleep_cfg = config.SleepConfig(num_passes=2, first_block=1)
    cfg, weights, _ = pretrained.load(self.checkpoint, window=24)
    asleep = hybrids.jit(lambda x, s: model.consolidate(weights, x, s, cfg, sleep_cfg))
    awake = hybrids.jit(lambda x, s: model.predict(weights, x, s, cfg)[0])
    tokenizer = Tokenizer(self.checkpoint, cfg)
    tokens, state, at = tokenizer.encode(text), model.init_state(cfg, 1), 0
    for _ in range(count):
      while len(tokens) - at > 24:
        state = asleep(np.array([tokens[at : at + 24]]), state)
        at += 24
      room = 24 - (len(tokens) - at)  # what follows a token changes nothing for it
      logits = awake(np.array([tokens[at:] + [0] * room]), state)[:, 23 - room]
      key = jax.random.fold_in(jax.random.key(seed), len(tokens))
      tokens.append(int(generate.sample(logits, key, SamplingConfig(**sampling))[0]))
    return tokenizer.decode(tokens[-count:])

  def test_text_and_what_is_told(self):
    sampling = {"temperature": 2.0, "top_k": 30, "top_p": 0.95}
    out, told = self.run_command(TEXT, sampling=sampling, max_new_tokens=18, seed=1)
    self.assertEqual(out, self.expected(TEXT, 18, 1, **sampling) + "\n")
    size = generate.state_bytes(
      generate.start(pretrained.open_source(self.checkpoint).model, config.SleepConfig())
    )
    tail = f"2 passes each, {size} bytes of state, _ ms awake, _ ms asleep"
    took = "a token took _ ms (p50), _ ms (p99), _ ms (most)"
    self.assertEqual(
      told,
      [
        f"[slept _ ms | 24 tokens read, 1 windows slept on, {tail}]",
        "",
        f"[slept _ ms | 48 tokens read, 2 windows slept on, {tail}]",
        f"[50 tokens read, 2 windows slept on, {tail}, {took}, compilation included]",
      ],
    )

  def test_stored_and_resumed_is_never_stopped(self):
    whole, _ = self.run_command(TEXT, sampling={"temperature": 1.0}, max_new_tokens=18)
    path = self.dir / "session"
    first, _ = self.run_command(TEXT, path, sampling={"temperature": 1.0}, max_new_tokens=5)
    rest, told = self.run_command(None, path, sampling={"temperature": 1.0}, max_new_tokens=13)
    self.assertEqual(first[:-1] + rest, whole)
    self.assertIn("50 tokens read", told[-1])
    with self.assertRaisesRegex(ConfigError, "session: .* is another model's: sleep.num_passes was 2, is 1"):
      self.run_command(None, path, sleep={"num_passes": 1, "first_block": 1})

  def test_a_signal_stores_the_session_after_the_token_and_it_goes_on_as_if_never_stopped(self):
    asked = {"max_new_tokens": 15, "sampling": {"temperature": 1.0}}
    whole, _ = self.run_command(TEXT, **asked)
    # What a shell starts in the background ignores SIGINT, and so would this test.
    self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    path, before = self.dir / "interrupted", signal.getsignal(signal.SIGINT)
    out, told = Interrupting(after=4), io.StringIO()
    with self.assertRaisesRegex(PreemptedError, "stopped by SIGINT after 4 tokens; .* is stored in .*inter"):
      self.run_command(TEXT, path, out=out, told=told, **asked)
    self.assertIn(
      "[received SIGINT: storing the session after this token; once more ends it now", told.getvalue()
    )
    self.assertIs(signal.getsignal(signal.SIGINT), before)
    rest, _ = self.run_command(None, path, **(asked | {"max_new_tokens": 11}))
    self.assertEqual(out.getvalue()[:-1] + rest, whole)
    with self.assertRaises(KeyboardInterrupt):  # nothing to store: it ends at once
      self.run_command(TEXT, out=Interrupting(after=4), **asked)
    late = Interrupting(after=15)  # at the last token: it is done
    self.assertEqual(self.run_command(TEXT, self.dir / "late", out=late, **asked)[0], whole)

  def test_a_stop_token_ends_it(self):
    out, _ = self.run_command(TEXT, max_new_tokens=6)
    stop = ALPHABET.index(out[0])
    self.assertEqual(self.run_command(TEXT, max_new_tokens=6, stop=(stop,))[0], out[0] + "\n")

  @parameterized.parameters(*presets.PRESETS)
  def test_every_preset_holds_every_field(self, preset):
    values = presets.get_config(preset).to_dict() | {"checkpoint": "x"}
    cfg = config.from_dict(command.GenerateConfig, values)
    self.assertEqual(json.loads(json.dumps(config.to_dict(cfg))), json.loads(json.dumps(values)))


class TextStreamTest(parameterized.TestCase):
  def test_characters_of_several_tokens_come_whole(self):
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab={c: i for i, c in enumerate(sorted(letters))}, merges=[])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
      made.save(f"{folder}/tokenizer.json")
      tokenizer = Tokenizer(folder, config.ModelConfig(vocab_size=256))
    stream = command.TextStream(tokenizer)
    tokens = tokenizer.encode("a\x1b[2Jé😴\u202e\tz\n😴")[:-1]  # the last character is cut off
    parts = [stream.add(t) for t in tokens] + [stream.end()]
    self.assertEqual("".join(parts), "a\x1b[2Jé😴\u202e\tz\n\N{REPLACEMENT CHARACTER}")
    self.assertEqual(parts[:8], ["a", "\x1b", "[", "2", "J", "", "é", ""])


class MistakeTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    scratch = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.experiment = cls.enterClassContext(Experiment("experiments.generate", scratch))

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.checkpoint = make_checkpoint(self.dir / "tiny")

  def assert_refused(self, message, *arguments):
    before = sorted(self.dir.rglob("*"))
    usual = (PLAIN, f"--config.checkpoint={self.checkpoint}")
    given = [word.partition("=")[0] for word in arguments]  # a flag that is given twice is another mistake
    usual = [word for word in usual if word.partition("=")[0] not in given]
    ended = self.experiment.run(*usual, *arguments, cwd=self.dir)
    self.assertEqual((ended.code, ended.out), (2, ""), ended.err)
    [line] = ended.err.splitlines()
    self.assertStartsWith(line, "error: ")
    self.assertIn(message, line)
    self.assertEqual(sorted(self.dir.rglob("*")), before)

  @parameterized.named_parameters(
    ("empty prompt", ("--prompt=",), "prompt: has no tokens"),
    ("unknown characters", ("--prompt=é",), "prompt: has no tokens"),
    ("no prompt", (), "--prompt or --prompt_file is required"),
    ("no prompt, new session", ("--session=new",), "--prompt or --prompt_file is required"),
    ("two prompts", ("--prompt=a", "--prompt_file=b"), "give one of them, not both"),
    ("no file", ("--prompt_file=b",), "--prompt_file: b cannot be read: No such file"),
    ("binary", ("--prompt_file=tiny/model.safetensors",), "is no UTF-8 text"),
    ("no folder", ("--prompt=a", "--session=no/new"), "--session: there is no folder no"),
    (
      "no passes",
      ("--prompt=a", "--config.sleep.num_passes=0"),
      "sleep.num_passes: must be at least 1, got 0",
    ),
    ("too many blocks", ("--prompt=a", "--config.sleep.last_block=7"), "sleep.last_block: must be at most 6"),
    (
      "window below swa",
      ("--prompt=a", "--config.window=23"),
      "model.window: must be at least model.attention",
    ),
    ("damaged session", ("--prompt=a", "--session=tiny/config.json"), "is damaged or no session"),
    ("no checkpoint", ("--prompt=a", "--config.checkpoint="), "checkpoint: is required"),
    ("nothing there", ("--prompt=a", "--config.checkpoint=no"), "no: there is no such folder"),
    ("preset", (f"{PLAIN}er", "--prompt=a"), "unknown preset 'plainer'; known: plain, jet, ouro"),
    ("top_p", ("--prompt=a", "--config.sampling.top_p=2"), "sampling.top_p: must lie in (0, 1], got 2"),
  )
  def test_in_the_command(self, arguments, message):
    self.assert_refused(message, *arguments)

  def test_several_prompts(self):
    (self.dir / "prompts").write_text('"a b"\n{"prompt": "cd", "max_new_tokens": 1}\n')
    usual = (PLAIN, f"--config.checkpoint={self.checkpoint}", "--prompts_file=prompts")
    few = "--config.max_new_tokens=2"
    ended = self.experiment.run(*usual, few, "--json", "--config.window=24", cwd=self.dir)
    self.assertEqual(ended.code, 0, ended.err)
    rows = [json.loads(line) for line in ended.out.splitlines()]
    self.assertEqual(
      [(row["prompt"], row["tokens"], len(row["text"])) for row in rows], [(0, 2, 2), (1, 1, 1)]
    )
    self.assertEqual({row["statistics"]["tokens_read"] for row in rows}, {5})
    self.assert_refused("--prompts_file: goes without --prompt", "--prompts_file=prompts", "--prompt=a")
    self.assert_refused("--prompts_file: no cannot be read: No such file", "--prompts_file=no")

  def test_a_weight_that_is_not_finite_is_a_failure(self):
    tensors = safetensors.numpy.load_file(self.checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, self.checkpoint / "model.safetensors")
    usual = (PLAIN, f"--config.checkpoint={self.checkpoint}", "--prompt=a", "--session=session")
    ended = self.experiment.run(*usual, cwd=self.dir)
    self.assertEqual((ended.code, ended.out), (1, ""))
    [line] = ended.err.splitlines()
    self.assertStartsWith(line, "failed: ")
    self.assertIn("tensor model.norm.weight holds NaN or infinity in float32", line)
    self.assertFalse((self.dir / "session").exists())

  def test_in_the_checkpoint(self):
    make_tokenizer(self.checkpoint / "tokenizer.json", [*ALPHABET, "é"])
    self.assert_refused("tokenizer.json: its tokens go up to 97, the model's vocabulary to 96", "--prompt=a")
    (self.checkpoint / "tokenizer.json").unlink()
    self.assert_refused("tokenizer.json: there is no such file", "--prompt=a")
    published = json.loads((self.checkpoint / "config.json").read_text())
    other = json.dumps(published | {"architectures": ["GPT2LMHeadModel"]})
    (self.checkpoint / "config.json").write_text(other)
    self.assert_refused("config.json: unknown architecture 'GPT2LMHeadModel'", "--prompt=a")
    (self.checkpoint / "config.json").write_text(json.dumps(published))
    (self.checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (self.checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    self.assert_refused("model-00001-of-00002.safetensors", "--prompt=a")
