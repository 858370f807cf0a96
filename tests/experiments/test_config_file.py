"""Config files and what is typed behind them: found from everywhere, executed once, a mistake is one line."""

import inspect
import json
import pathlib
import subprocess
import sys

import pytest
from ml_collections import config_dict

from sleep_jax import config
from sleep_jax.config import ConfigError
from sleep_jax.experiments import config_file, rule110, runner, usage
from sleep_jax.experiments.configs import rule110 as presets
from tests.forked import ROOT, environment

OWN = str(config_file.CONFIGS / "rule110.py")


@pytest.mark.parametrize(
  "path", ["rule110:tiny", "rule110.py:tiny", "experiments/configs/rule110.py:tiny", f"{OWN}:tiny"]
)
def test_a_file_of_the_package_is_found_from_everywhere(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file, preset = config_file.find(path)
  assert preset == "tiny" and pathlib.Path(file).samefile(OWN)
  assert config_file.read(path).to_dict() == presets.get_config("tiny").to_dict()


def test_a_file_that_is_there_comes_first_whatever_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("rule110.py", "a:b.py"):
    (tmp_path / name).write_text("def get_config(preset=None): ...\n")
  assert config_file.find("rule110.py:x") == ("rule110.py", "x")
  assert config_file.find("a:b.py") == ("a:b.py", None)
  assert config_file.find("a:b.py:tiny") == ("a:b.py", "tiny")


MISTAKES = {
  "syntax": ("def get_config(:\n", r"x\.py, line 1: "),
  "not utf-8": (b"# \xff\n", r"--config: .*x\.py"),
  "nul": (b"a = '\0'\n", r"--config: "),
  "raises": ("\n1 / 0\n", r"x\.py, line 2: ZeroDivisionError: division by zero"),
  "exits": ("raise SystemExit(0)\n", r"x\.py, line 1: SystemExit"),
  "imports": ("import no_such_thing\n", r"x\.py, line 1: ModuleNotFoundError: No module"),
  "no function": ("a = 1\n", r"x\.py has no function get_config"),
  "no function but a value": ("get_config = 3\n", r"x\.py has no function get_config"),
  "takes none": ("def get_config(): return 1\n", r"x\.py takes no preset"),
  "nothing": ("def get_config(p): pass\n", r"must return a ConfigDict, got NoneType"),
  "a dict": ("def get_config(p): return {}\n", r"must return a ConfigDict, got dict"),
  "unknown": ("def get_config(p): raise ValueError('unknown\\npreset')\n", r"^--config: unknown preset$"),
  "raises inside": ("def get_config(p):\n  return p.q\n", r"x\.py, line 2: AttributeError"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_is_one_line(name, tmp_path):
  text, message = MISTAKES[name]
  file = tmp_path / "x.py"
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ConfigError, match=message) as caught:
    config_file.read(f"{file}:tiny")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["", ":", ":tiny", "nofile.py", "\0", "x" * 5000, "/", ".", "rule111:tiny"])
def test_no_file_is_one_line_that_names_those_there_are(path):
  with pytest.raises(ConfigError, match="there is no file .*rule110") as caught:
    config_file.read(path)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# Field, text, what it is then.
TYPED = (
  ("model.blocks", "attn,gdn", ("attn", "gdn")),
  ("model.blocks", "('attn','gdn')", ("attn", "gdn")),
  ("model.blocks", "['attn', 'gdn']", ("attn", "gdn")),
  ("model.blocks", "(attn, gdn)", ("attn", "gdn")),
  ("model.blocks", "gdn", ("gdn",)),
  ("model.blocks", "gdn,", ("gdn",)),
  ("model.without_mlp", "0,1", (0, 1)),
  ("model.without_mlp", "()", ()),
  ("model.fast.decay_init", "0.5,2", (0.5, 2)),
  ("optim.trained", "blocks/*,head", ("blocks/*", "head")),
  ("sleep.last_block", "None", None),
  ("sleep.last_block", "none", None),
  ("sleep.last_block", "2", 2),
  ("model.attention.head_dim", "None", None),
  ("sleep.remat", "none", "none"),
  ("model.loop_norm", None, True),
  ("model.loop_norm", "false", False),
  ("seed", "0x10", 16),
  ("optim.muon_lr", "1", 1.0),
)


@pytest.mark.parametrize(("field", "text", "value"), TYPED)
def test_what_a_text_stands_for(field, text, value):
  values = presets.get_config("tiny")
  assert config_file.change(values, {field: text}) == {field: value}
  for key in field.split("."):
    values = values[key]
  assert values == value and type(values) is type(value)


@pytest.mark.parametrize("text", ["None", "none"])
def test_none_is_never_the_text(text):
  values = presets.get_config("tiny")
  config_file.change(values, {"train.init_from": text, "model.fast.kernel": text, "model.mlp_dim": text})
  cfg, _ = rule110.build(values.to_dict())
  assert (cfg.train.init_from, cfg.model.fast.kernel, cfg.model.mlp_dim) == (None, None, None)
  config_file.change(values, {"sleep.num_passes": text})
  with pytest.raises(ConfigError, match="^sleep.num_passes: must be a whole number, got None$"):
    rule110.build(values.to_dict())


HOW = "is no list that can be read; write --config.model.blocks=\"('attn','gdn')\""
WRONG = (
  ("model.blocks", "('attn'", f"--config.model.blocks=('attn': {HOW}"),
  ("model.blocks", "", f"--config.model.blocks=: {HOW}"),
  ("model.blocks", "{'attn': 1}", HOW),
  ("model.blocks", "attn gdn", HOW),
  ("model.blocks", "(" * 500, HOW),
  ("model", "3", "--config.model=3: is a group of fields"),
  ("model.window", None, "--config.model.window: needs a value"),
  ("model.window", "9" * 5000, "must be a whole number"),
  ("model.window.x", "3", "config.model.window is a single value"),
  ("model.windw", "3", "config.model has no field 'windw'; did you mean \"window\"?"),
  ("model.windo\nw", "3", "has no field"),
  ("", "3", "config has no field ''"),
  ("model.loop_norm", "maybe", "must be true or false"),
)


@pytest.mark.parametrize(("field", "text", "message"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_read_is_one_line_that_says_how(field, text, message):
  with pytest.raises(ConfigError) as caught:
    config_file.change(presets.get_config("tiny"), {field: text})
  assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_command_line_is_parted():
  words = [
    "p",
    "--config=f",
    "--config.a=1",
    "--config.b",
    "-2",
    "--noconfig.c",
    "--workdir",
    "w",
    "--config.d",
  ]
  others, changes = config_file.split(words)
  assert others == ["p", "--config=f", "--workdir", "w"]
  assert changes == {"a": "1", "b": "-2", "c": "false", "d": None}
  with pytest.raises(ConfigError, match="--config.a is given twice"):
    config_file.split(["p", "--config.a=1", "--config.a=2"])


STUDY = """
from sleep_jax import rules
from sleep_jax.experiments.configs import rule110
from sleep_jax.kernels.gated_hebbian import gated_hebbian

with open(__file__ + ".log", "a") as log:
  log.write("executed\\n")
rules.register("mine", rules.Rule(gated_hebbian))
EXPERIMENT, PRESETS, sweep = rule110.EXPERIMENT, rule110.PRESETS, rule110.sweep


def get_config(preset="tiny"):
  c = rule110.get_config(preset)
  c.model.blocks = ("attn", "mine")
  return c
"""


def test_a_rule_of_a_config_file_is_known_when_the_config_is_built(tmp_path):
  file = tmp_path / "my_study.py"
  file.write_text(STUDY)
  cfg, _ = rule110.build(config_file.read(f"{file}:tiny").to_dict())
  assert cfg.model.blocks == ("attn", "mine")
  todo = runner.commands(f"{file}:tiny", str(tmp_path / "all"), 1)
  assert all(f"--config={file}:tiny" in command for command in todo.values())
  assert (tmp_path / "my_study.py.log").read_text() == "executed\n"  # once, however often it was asked for


MAINS = (
  "rule110",
  "depo",
  "memory",
  "gsm_infinite",
  "gsm_infinite_data",
  "text",
  "perplexity",
  "convert",
  "generate",
  "memory_table",
)
HELP = """
import importlib, json, sys
from absl import flags
from sleep_jax.experiments import usage
texts = []
for name in sys.argv[1:]:
  main = importlib.import_module(f"sleep_jax.experiments.{name}")
  texts.append([usage.text(main, width=width) for width in (60, 100)])
  for flag in list(flags.FLAGS.flags_by_module_dict().get(main.__name__, ())):
    delattr(flags.FLAGS, flag.name)  # the next main may have one of the same name
print(json.dumps(texts))
"""


def test_help_has_flags_presets_and_every_field():
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", HELP, *MAINS],
    env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240, check=True,
  )  # fmt: skip
  texts = dict(zip(MAINS, json.loads(done.stdout), strict=True))
  for name in MAINS:
    for width, text in zip((60, 100), texts[name], strict=True):
      lines = [
        x for x in text.splitlines() if x.startswith(" ") and "python -m" not in x and " --config" not in x
      ]
      assert all(len(x) <= width or " " not in x.strip() for x in lines), max(lines, key=len)
      assert "--verbosity" in text
  for name, kinds in {"rule110": rule110.FIELDS}.items():
    flat = " ".join(texts[name][1].split())
    for kind in (
      *kinds.values(),
      config.ModelConfig,
      config.SleepConfig,
      config.OptimConfig,
      config.FastConfig,
    ):
      for field, said in config.documentation(kind).items():
        assert field in flat
        if field not in (
          "data",
          "model",
          "sleep",
          "optim",
          "train",
          "mesh",
          "attention",
          "fast",
          "rope_scaling",
        ):
          assert said in flat, (field, said)


@pytest.mark.parametrize("file", sorted(config_file.CONFIGS.glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_preset_has_a_line(file):
  module, _ = config_file.load(str(file))
  assert inspect.getdoc(module)
  assert all(usage.presets(module).values()), usage.presets(module)


def test_own_values_are_config_dicts():
  assert isinstance(config_file.read("rule110"), config_dict.ConfigDict)
