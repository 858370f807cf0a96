"""The command that generates: several prompts, JSON, chats, where a text ends, and what fails."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import safetensors.numpy
from absl.testing import parameterized

from sleep_jax import config, generate
from sleep_jax.config import ConfigError
from sleep_jax.experiments import generate as command
from sleep_jax.experiments import generate_many
from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.runtime.files import RunFailedError
from tests.experiments.test_generate_cli import ALPHABET, PLAIN, TEXT, make_checkpoint, make_tokenizer
from tests.forked import environment

WARM = {"temperature": 20.0}  # the tiny model is sure of itself
TEMPLATE = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


class OutputTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.checkpoint = make_checkpoint(pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory())) / "x")

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.told = io.StringIO()

  def config(self, **changes):
    values = {"checkpoint": str(self.checkpoint), "window": 24, "sleep": {"num_passes": 2, "first_block": 1}}
    return config.from_dict(
      command.GenerateConfig, values | {"max_new_tokens": 6, "sampling": WARM} | changes
    )

  def text(self, prompt=TEXT, session=None, out=None, as_chat=False, as_json=False, **changes):
    out = out or io.StringIO()
    command.run(self.config(**changes), prompt, session, out, self.told, as_chat=as_chat, as_json=as_json)
    return out.getvalue()

  def rows(self, *lines, statistics=False, out=None, **changes):
    (self.dir / "prompts").write_text("".join(line + "\n" for line in lines))
    out = out or io.StringIO()
    cfg = self.config(**changes)
    generate_many.run(cfg, str(self.dir / "prompts"), out, self.told, statistics=statistics)
    return [json.loads(line) for line in out.getvalue().splitlines()]

  def changed(self, **files):
    """A copy of the checkpoint in which JSON files have other fields."""
    folder = make_checkpoint(self.dir / "changed")
    for name, fields in files.items():
      path = folder / f"{name}.json"
      values = json.loads(path.read_text()) if path.exists() else {}
      path.write_text(json.dumps(values | fields))
    return str(folder)

  def test_one_prompt_of_a_file_is_the_prompt_alone(self):
    [row] = self.rows(json.dumps(TEXT))
    self.assertEqual(row, {"prompt": 0, "text": self.text()[:-1], "tokens": 6, "ended": "length"})
    alone = [self.text(TEXT, seed=seed)[:-1] for seed in (5, 6)]
    rows = self.rows(json.dumps(TEXT), "", json.dumps({"prompt": TEXT}), rows=1, seed=5)  # read one by one
    self.assertEqual([row["text"] for row in rows], alone)
    together = self.rows(json.dumps(TEXT), json.dumps(TEXT), rows=2, seed=5)  # of one length: no pads
    self.assertEqual([row["text"] for row in together], alone)

  def test_every_line_has_its_own_sampling_length_stop_and_seed(self):
    whole = self.text(max_new_tokens=8, seed=3)[:-1]
    stop = whole[3:5]
    rows = self.rows(
      json.dumps({"prompt": TEXT, "seed": 3, "max_new_tokens": 8}),
      json.dumps({"prompt": TEXT, "seed": 3, "max_new_tokens": 8, "stop_strings": [stop]}),
      json.dumps({"prompt": TEXT, "max_new_tokens": 0}),
      json.dumps({"prompt": TEXT, "sampling": {"temperature": 0}}),
      statistics=True,
    )
    cut = whole.index(stop)
    greedy = self.text(sampling={})[:-1]
    self.assertEqual([row["text"] for row in rows], [whole, whole[:cut], "", greedy])
    self.assertEqual([row["tokens"] for row in rows], [8, cut + len(stop), 0, 6])
    self.assertEqual([row["ended"] for row in rows], ["length", f"the text {stop!r}", "length", "length"])
    self.assertEqual([row["prompt"] for row in rows], [0, 1, 2, 3])
    for row in rows:
      self.assertEqual(row["statistics"]["tokens_read"], len(TEXT) + 8)
      self.assertGreater(row["statistics"]["token_ms_p99"], 0)

  @parameterized.named_parameters(
    ("no JSON", "no", "line 2: is no JSON"),
    ("a number", "3", "line 2: must be a text or an object"),
    ("too deep", "[" * 100_000, "line 2: is no JSON"),
    ("no prompt", "{}", "line 2: prompt: give it or messages, not both"),
    ("both", '{"prompt": "a", "messages": [{}]}', "line 2: prompt: give it or messages, not both"),
    ("an unknown field", '{"prompt": "a", "stop": "b"}', "line 2: .*stop"),
    ("a field of sampling", '{"prompt": "a", "sampling": {"top_q": 1}}', "line 2: .*top_q"),
    ("a wrong value", '{"prompt": "a", "sampling": {"top_p": 2}}', "line 2: .*top_p"),
    ("a wrong kind", '{"prompt": 3}', "line 2: .*prompt"),
    ("a seed", '{"prompt": "a", "seed": -1}', "line 2: seed: must lie in"),
    ("no tokens", '""', "line 2: prompt: has no tokens"),
    ("half a character", r'"\ud800"', "line 2: prompt: character 0 is half of one"),
    ("roles", '{"messages": [{"role": "user"}]}', "messages: each must have a role and a content"),
  )
  def test_a_line_that_is_no_prompt(self, line, message):
    with self.assertRaisesRegex(ConfigError, message) as caught:
      self.rows('"good"', line)
    self.assertNotIn("\n", str(caught.exception))
    self.assertLess(len(str(caught.exception)), 500)

  def test_files_without_prompts(self):
    with self.assertRaisesRegex(ConfigError, "--prompts_file: .* holds no prompt"):
      self.rows("", " ")
    for name, message in (("none", "No such file"), (".", "Is a directory"), ("a\0b", "null byte")):
      with self.assertRaisesRegex(ConfigError, f"--prompts_file: .* cannot be read: .*{message}"):
        path = str(self.dir / name)
        generate_many.run(self.config(), path, io.StringIO(), self.told, statistics=False)

  def test_prompts_and_stop_strings_may_be_any_text(self):
    """Line ends, control characters, and the word that elsewhere stands for nothing."""
    prompt = "None\n\x1b" + TEXT
    alone = self.text(prompt, max_new_tokens=40)[:-1]
    [row] = self.rows(json.dumps(prompt), max_new_tokens=40)
    self.assertEqual(row["text"], alone)
    self.assertEqual(self.rows('"None"', max_new_tokens=0)[0]["tokens"], 0)
    cfg = self.config(stop_strings=["\n", "None", "\x1b"])
    self.assertEqual(cfg.stop_strings, ("\n", "None", "\x1b"))
    [row] = self.rows(json.dumps({"prompt": prompt, "stop_strings": ["\n", alone[2:4]]}), max_new_tokens=40)
    self.assertEqual(row["text"], alone.partition(alone[2:4])[0].partition("\n")[0])

  def test_one_object_with_the_text_and_what_it_took(self):
    row = json.loads(self.text(as_json=True))
    self.assertEqual((row["text"], row["tokens"], row["ended"]), (self.text()[:-1], 6, "length"))
    self.assertEqual((row["statistics"]["tokens_read"], row["statistics"]["windows"]), (len(TEXT) + 6, 1))

  def test_a_chat_in_one_session_is_what_its_template_writes(self):
    checkpoint = self.changed(tokenizer_config={"chat_template": TEMPLATE})
    said = f"[user]{TEXT}>"
    self.assertEqual(self.text(TEXT, as_chat=True, checkpoint=checkpoint), self.text(said))
    [row] = self.rows(json.dumps({"messages": [{"role": "user", "content": TEXT}]}), checkpoint=checkpoint)
    self.assertEqual(row["text"], self.text(said)[:-1])
    path = self.dir / "session"
    answer = self.text("hi", path, as_chat=True, checkpoint=checkpoint)[:-1]
    more = self.text("more", path, as_chat=True, checkpoint=checkpoint)
    self.assertEqual(more, self.text(f"[user]hi>{answer}[user]more>"))
    with self.assertRaisesRegex(PretrainedError, "there is no chat_template.jinja"):
      self.text("hi", as_chat=True)

  @parameterized.parameters("int", "list")
  def test_a_text_ends_at_the_end_tokens_of_both_files(self, kind):
    free = self.text(max_new_tokens=12)[:-1]
    tokens = [ALPHABET.index(c) for c in free]
    other = next(token for token in range(len(ALPHABET)) if token not in tokens)
    for name, token in (("generation_config", tokens[2]), ("config", tokens[4])):
      length = tokens.index(token) + 1
      checkpoint = self.changed(**{name: {"eos_token_id": token if kind == "int" else [other, token]}})
      ended = json.loads(self.text(as_json=True, max_new_tokens=12, checkpoint=checkpoint))
      self.assertEqual((ended["text"], ended["tokens"]), (free[:length], length))
      self.assertEqual(ended["ended"], f"token {token} {free[length - 1]!r}")
      on = WARM | {"stop_at_end": False}
      self.assertEqual(self.text(max_new_tokens=12, checkpoint=checkpoint, sampling=on)[:-1], free)
      pathlib.Path(checkpoint).rename(self.dir / name)

  def test_a_weight_that_is_not_finite_is_named(self):
    checkpoint = self.changed()
    path = pathlib.Path(checkpoint) / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name in (min(tensors), max(tensors)):
      for value in (np.nan, np.inf):
        broken = tensors[name].copy()
        broken.flat[-1] = value
        safetensors.numpy.save_file(tensors | {name: broken}, path)
        with self.assertRaisesRegex(RunFailedError, f"tensor {name} holds NaN or infinity in float32$"):
          self.text(checkpoint=checkpoint)

  def test_logits_that_are_not_finite_end_it_and_store_nothing(self):
    checkpoint = self.changed()
    path = pathlib.Path(checkpoint) / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    largest = np.finfo(np.float32).max
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], largest)  # finite, but for that
    safetensors.numpy.save_file(tensors, path)
    for prompt in ("abc", TEXT):
      with self.assertRaisesRegex(generate.NotFiniteError, "^logits are not finite from token [0-9]+ on$"):
        self.text(prompt, self.dir / "session", checkpoint=checkpoint)
      self.assertFalse((self.dir / "session").exists())

  @contextlib.contextmanager
  def closed_pipe(self):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
      yield out
      with contextlib.suppress(OSError):
        out.close()

  @contextlib.contextmanager
  def full_device(self):
    with contextlib.suppress(OSError), open("/dev/full", "w", encoding="utf-8") as out:
      yield out

  @contextlib.contextmanager
  def closed(self):
    out = io.StringIO()
    out.close()
    yield out

  @parameterized.parameters(
    ("closed_pipe", "its reader is gone"),
    ("full_device", "No space left on device"),
    ("closed", "it is closed|closed file"),
  )
  def test_a_stdout_that_fails(self, kind, message):
    """The session is stored first, with the text that was not written: the next run begins with it."""
    path, whole = self.dir / "session", self.text(max_new_tokens=9)
    for as_json in (False, True):
      path.unlink(missing_ok=True)
      with getattr(self, kind)() as out:
        with self.assertRaisesRegex(RunFailedError, f"stdout cannot be written: ({message}); ") as caught:
          command.run(self.config(), TEXT, path, out, self.told, as_json=as_json)
      self.assertNotIn("\n", str(caught.exception))
      self.assertIn(f"the session is stored in {path}", str(caught.exception))
      count = int(str(caught.exception).partition(" tokens were made")[0].split()[-1])
      rest = self.text(None, path, max_new_tokens=9 - count)
      self.assertEqual(rest, whole)
    with getattr(self, kind)() as out:
      with self.assertRaisesRegex(RunFailedError, f"stdout cannot be written: ({message}); 1 of 2 prompts"):
        (self.dir / "prompts").write_text('"a"\n"b"\n')
        generate_many.run(self.config(rows=1), str(self.dir / "prompts"), out, self.told, statistics=False)

  def test_a_character_that_stdout_does_not_have(self):
    checkpoint = self.changed()
    letters = [chr(ord(c) + 0xE0 - ord("a")) if c.islower() else c for c in ALPHABET]
    make_tokenizer(f"{checkpoint}/tokenizer.json", letters)
    prompt, path = "THE QUICK BROWN FOX", self.dir / "session"
    shown = {"checkpoint": checkpoint, "sampling": WARM | {"stop_at_end": False}}
    whole = self.text(prompt, max_new_tokens=60, **shown)
    self.assertFalse(whole.isascii())
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    with self.assertRaisesRegex(RunFailedError, r"its encoding ascii has no '\\x[ef].'; PYTHONIOENCODING"):
      command.run(self.config(max_new_tokens=60, **shown), prompt, path, out, self.told)
    self.assertTrue(whole.startswith(written := out.buffer.getvalue().decode()))
    rest = self.text(None, path, max_new_tokens=60 - len(written) - 1, **shown)
    self.assertEqual(written + rest, whole)

  @parameterized.parameters(">/dev/full", "| true", ">&-")
  @pytest.mark.slow  # innermost: absl hands the marks of a function on to its cases
  def test_a_stdout_of_a_process_that_fails(self, where):
    program = f'{sys.executable} -W ignore -m sleep_jax.experiments.generate "$@"'
    line = f"{{ {program}; echo $? >code; }} {where}"
    ended = subprocess.run(
      ["bash", "-c", line, "bash", PLAIN, f"--config.checkpoint={self.checkpoint}", f"--prompt={TEXT}",
       "--config.window=24", "--config.max_new_tokens=3", f"--session={self.dir / 'session'}"],
      cwd=self.dir, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    self.assertEqual((self.dir / "code").read_text(), "1\n", ended.stderr)
    [failed] = [row for row in ended.stderr.splitlines() if row and not row.startswith("[")]
    self.assertStartsWith(failed, "failed: stdout cannot be written: ")
    self.assertTrue((self.dir / "session").is_file())
