"""Chat templates are programs that came with a checkpoint: they can make text and nothing else."""

import json
import pathlib
import tempfile

import pytest
from absl.testing import parameterized

from sleep_jax.pretrained import chat
from sleep_jax.pretrained.ends import end_tokens
from sleep_jax.pretrained.fields import PretrainedError

pytest.importorskip("jinja2")

PLAIN = (
  "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, name, values):
    (self.dir / name).write_text(values if isinstance(values, str) else json.dumps(values))

  def refused(self, message, chats=(HELLO,)):
    with self.assertRaisesRegex(PretrainedError, message) as caught:
      chat.render(self.dir, chats)
    self.assertNotIn("\n", str(caught.exception))
    self.assertLess(len(str(caught.exception)), 400)


class ChatTest(FolderTest):
  def test_several_chats_and_a_turn_behind_an_answer(self):
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    self.write("tokenizer_config.json", tokens | {"chat_template": PLAIN})
    other = [{"role": "system", "content": "é\n{{ 1 }}"}, *HELLO]
    self.assertEqual(
      chat.render(self.dir, [HELLO, other]),
      ["<s><user>hello</s><assistant>", "<s><system>é\n{{ 1 }}</s><user>hello</s><assistant>"],
    )
    self.assertEqual(chat.next_turn(self.dir, "more", ""), "</s><user>more</s><assistant>")
    self.assertEqual(chat.next_turn(self.dir, "more", "</s>"), "<user>more</s><assistant>")
    self.write(
      "chat_template.jinja", "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
    )  # comes first
    self.assertEqual(chat.render(self.dir, [HELLO]), ["hello"])
    with self.assertRaisesRegex(PretrainedError, "changes what was said before"):
      chat.next_turn(self.dir, "more", "")
    (self.dir / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages|length }}"}]
    self.write("tokenizer_config.json", {"chat_template": named})
    self.assertEqual(chat.render(self.dir, [HELLO]), ["1"])

  @parameterized.named_parameters(
    ("classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ("by a filter", "{{ (''|attr('__class__')).__mro__ }}"),
    ("by a string", "{{ ''['__class__']['__base__'] }}"),
    ("of a function", "{{ raise_exception.__globals__['json'] }}"),
    ("of the loop", "{{ cycler.__init__.__globals__.os.popen('id').read() }}"),
    ("by a format", "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"),
    ("a message is changed", "{{ messages.append(1) }}"),
    ("another file", "{% include '/etc/passwd' %}"),
    ("its own error", "{{ raise_exception('roles must\nalternate') }}"),
    ("no template", "{% for %}"),
    ("a name that is missing", "{{ nothing.there }}"),
    ("ends the program", "{{ namespace().__init__.__globals__ }}"),
  )
  def test_refused(self, template):
    self.write("chat_template.jinja", template)
    self.refused("^the chat template fails: [A-Za-z]+: .")

  @parameterized.named_parameters(
    ("never ends", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    ("a power", "{{ 9 ** (9 ** 9) }}"),
    ("grows", "{{ 'x' * 10 ** 10 }}"),
  )
  def test_takes_no_more_time_or_memory_than_it_may(self, template):
    program = pathlib.Path(chat.__file__).with_name("chat_render.py").read_text()
    self.assertIn("SECONDS, BYTES = 10, 1 << 30", program)
    quick = self.dir / "quick.py"  # the same program, with a second in place of ten
    quick.write_text(program.replace("SECONDS, BYTES = 10,", "SECONDS, BYTES = 1,"))
    self.write("chat_template.jinja", template)
    patch = pytest.MonkeyPatch()
    patch.setattr(chat, "RENDER", quick)
    self.addCleanup(patch.undo)
    self.refused("^the chat template (takes too much time or memory|fails: (MemoryError|OverflowError))")

  def test_messages_and_files_that_are_none(self):
    self.refused("there is no chat_template.jinja, and no chat_template in tokenizer_config.json")
    self.write("tokenizer_config.json", {"chat_template": 3})
    self.refused("there is no chat_template.jinja, and no chat_template")
    (self.dir / "chat_template.jinja").write_bytes(b"\xff")
    self.refused("chat_template.jinja: cannot be read")
    self.write("chat_template.jinja", PLAIN + " " * (1 << 20))
    self.refused("chat_template.jinja: is no file, or larger than 1 MB")
    self.write("chat_template.jinja", PLAIN)
    for message in ("hello", {"role": "user"}, {"role": 1, "content": "x"}, {"content": "x"}, None):
      self.refused("^messages: each must have a role and a content", [[message]])


class EndTokensTest(FolderTest):
  @parameterized.parameters(
    (None, None, ()),
    (3, None, (3,)),
    (None, [4, 3], (4, 3)),
    ([7, 3], 3, (7, 3)),
    (3, [3, 0, 3], (3, 0)),
    ([], [], ()),
  )
  def test_of_both_files(self, generation, model, expected):
    for name, value in (("generation_config.json", generation), ("config.json", model)):
      self.write(name, {} if value is None else {"eos_token_id": value})
    self.assertEqual(end_tokens(self.dir), expected)
    self.write("generation_config.json", {"eos_token_id": None})
    (self.dir / "config.json").unlink()
    self.assertEqual(end_tokens(self.dir), ())

  @parameterized.parameters(("</s>",), (1.0,), (True,), ([[3]],), ([3, "3"],), ({"a": 1},), ([None],))
  def test_that_are_none(self, value):
    for name in ("generation_config.json", "config.json"):
      self.write(name, {"eos_token_id": value})
      with self.assertRaisesRegex(
        PretrainedError, f"{name}: eos_token_id must be a token or a list"
      ) as caught:
        end_tokens(self.dir)
      self.assertNotIn("\n", str(caught.exception))
      (self.dir / name).unlink()
