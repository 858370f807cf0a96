"""A mistake on a benchmark's command line is one line and exit code 2, before anything is measured."""

import ast
import importlib
import importlib.util
import pathlib

import pytest

from sleep_jax.kernels.measure import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "kernels/measure")
# What each kind of number refuses.
WRONG = {
  "natural": ("-1", "x", "1.5", "", "1" * 9, "nan", "²"),
  "count": ("0", "-1", "x", "1.5", "", "1" * 9, "inf", "1,2"),
  "naturals": ("-1", "1,x", "1,,2", ",", "1" * 9),
  "counts": ("0", "1,0", "1,-2", "x", "1,,2", ",", "1" * 9),
  "above_zero": ("0", "-1", "x", "", "nan", "inf", "1e999"),
  "from_zero": ("-1", "x", "", "nan", "inf", "-1e-9"),
}


def calls(path: pathlib.Path, name: str) -> list[ast.Call]:
  """Calls of functions or methods of a name in a file."""
  found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  return [c for c in found if name in (getattr(c.func, "attr", None), getattr(c.func, "id", None))]


def numbers(path: pathlib.Path) -> dict[str, str]:
  """The flags of a file that take numbers: `--name` -> the function of `flags` that reads them."""
  found = {}
  for call in calls(path, "add_argument"):
    kind = next((k.value for k in call.keywords if k.arg == "type"), None)
    if (
      isinstance(kind, ast.Attribute)
      and isinstance(kind.value, ast.Name)
      and kind.value.id == "flags"
      and kind.attr in WRONG
    ):
      name = call.args[0]
      if isinstance(name, ast.Constant):
        found[name.value] = kind.attr
  return found


FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
WRITERS = [path for path in FILES if "type=command.out" in path.read_text()]
STEMS = [path for path in FILES if "type=flags.stem" in path.read_text()]
COMMANDS = {path: numbers(path) for path in FILES if numbers(path)}


def test_every_number_of_a_command_line_is_checked():
  assert len(COMMANDS) > 12 and len(WRITERS) > 8
  for path in FILES:
    for call in calls(path, "add_argument"):
      kinds = [k.value.id for k in call.keywords if k.arg == "type" and isinstance(k.value, ast.Name)]
      assert not {"int", "float"} & set(kinds), f"{path}:{call.lineno}"
    if path.name != "flags.py":
      assert not calls(path, "ArgumentParser"), path


@pytest.mark.parametrize("kind", WRONG)
def test_numbers_are_read_and_refused(kind):
  read = getattr(flags, kind)
  for text in WRONG[kind]:
    with pytest.raises(flags.argparse.ArgumentTypeError, match="^must be .* got "):
      read(text)
  right = {
    "natural": ("0", 0), "count": ("12", 12), "naturals": ("0,4,0", (0, 4)), "counts": ("2,1,2", (2, 1)),
    "above_zero": ("0.5", 0.5), "from_zero": ("0", 0.0),
  }  # fmt: skip
  text, value = right[kind]
  assert read(text) == value


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_wrong_number_is_one_line(path, capsys):
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  module = importlib.import_module(f"sleep_jax.{name}")
  for flag, kind in COMMANDS[path].items():
    for text in WRONG[kind][:2]:
      with pytest.raises(SystemExit) as ended:
        module.main([f"{flag}={text}"])
      said = capsys.readouterr().err
      assert ended.value.code == 2
      assert said.startswith(f"error: argument {flag}: must be ") and said.count("\n") == 1, said


@pytest.mark.parametrize("path", WRITERS, ids=lambda path: path.stem)
def test_results_that_cannot_be_written_are_told_before_anything_is_measured(path, tmp_path, capsys):
  (tmp_path / "file").write_text("mine")
  module = importlib.import_module(f"sleep_jax.benchmarks.{path.stem}")
  with pytest.raises(SystemExit) as ended:
    module.main([f"--out={tmp_path / 'file'}"])
  said = capsys.readouterr().err
  assert ended.value.code == 2 and said.count("\n") == 1
  assert said.startswith("error: argument --out: ") and "is a file" in said
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("path", STEMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["file/table", ".", "a/../file/b/table", "\0", "x" * 300 + "/table"])
def test_tables_of_kernels_that_cannot_be_written_are_told_first(path, name, tmp_path, monkeypatch, capsys):
  (tmp_path / "file").write_text("mine")
  monkeypatch.chdir(tmp_path)
  module = importlib.import_module(f"sleep_jax.kernels.measure.{path.stem}")
  with pytest.raises(SystemExit) as ended:
    module.main([f"--out={name}"])
  said = capsys.readouterr().err
  assert ended.value.code == 2 and said.count("\n") == 1
  assert said.startswith("error: argument --out: ") and ("cannot write" in said or "must be" in said)
  assert [p.name for p in tmp_path.iterdir() if p.name != "a"] == ["file"]


def test_every_path_of_a_table_of_kernels_is_checked():
  assert len(STEMS) == 4
  for path in sorted((ROOT / "kernels/measure").glob("*.py")):
    for call in calls(path, "add_argument"):
      if call.args and getattr(call.args[0], "value", None) == "--out":
        assert [ast.unparse(k.value) for k in call.keywords if k.arg == "type"] == ["flags.stem"], path
