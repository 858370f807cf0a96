"""Rules that hold for the repository as a whole: who imports whom, what importing does, what is never used.

The layers are `launch -> experiments -> sleep_jax -> kernels`; see the section on design in the README.
"""

import ast
import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from absl.testing import parameterized
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "sleep_jax", "experiments", "launch")

# What each package must not import; a name stands for itself and for all below it.
FORBIDDEN = {
  "kernels": ("sleep_jax", "experiments", "launch", "tests"),
  "sleep_jax": ("experiments", "launch", "tests", "absl.flags", "absl.app", "argparse"),
  "experiments": ("launch", "tests"),
  "launch": ("tests",),
}

# Modules that run code while they read data, and calls that do. `eval` means the builtin only.
CODE_READERS = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "runpy")
CODE_CALLS = ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "os.system")
CODE_OPTIONS = ("allow_pickle", "trust_remote_code", "shell")


def modules(package: str) -> list[Path]:
  return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
  return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module, package: str = "") -> Iterator[str]:
  """Yields every absolute dotted name that a module imports, wherever in the module it does.

  `from a import b` yields `a.b`, since b may be a module. `package` is the importing module's
  package, to which relative imports are relative.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")
        base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
      yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, roots: tuple[str, ...]) -> bool:
  return any(name == root or name.startswith(root + ".") for root in roots)


def imports_of(path: Path) -> list[str]:
  name = module_name(path)
  package = name if path.name == "__init__.py" else name.rpartition(".")[0]
  return list(imports(parse(path), package))


def code_uses(tree: ast.Module) -> Iterator[str]:
  """Yields every use of something that executes what it reads, as `name, line n`."""
  for name in imports(tree):
    if within(name, CODE_READERS):
      yield f"import of {name}"
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      if ast.unparse(node.func) in CODE_CALLS:
        yield f"{ast.unparse(node.func)}(), line {node.lineno}"
      for keyword in node.keywords:
        if keyword.arg in CODE_OPTIONS and getattr(keyword.value, "value", True) is not False:
          yield f"{keyword.arg}=..., line {node.lineno}"


def setup_cfg() -> configparser.ConfigParser:
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg", encoding="utf-8")
  return config


def declared(section: str, option: str) -> list[Requirement]:
  return [Requirement(line) for line in setup_cfg()[section][option].strip().splitlines()]


def locked() -> list[Requirement]:
  text = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
  lines = re.findall(r"^([a-z0-9][^\\\n]*?) *\\$", text, flags=re.MULTILINE)
  return [Requirement(line) for line in lines]


class DetectorTest(parameterized.TestCase):
  """The checks below would pass without a word if their detectors saw nothing."""

  @parameterized.parameters(
    ("import sleep_jax.train", "", "sleep_jax.train"),
    ("import sleep_jax.train as t", "", "sleep_jax.train"),
    ("from sleep_jax import train", "", "sleep_jax.train"),
    ("def f():\n  from absl import flags", "", "absl.flags"),
    ("from . import shapes", "kernels.gated_delta", "kernels.gated_delta.shapes"),
    ("from ..train import step", "sleep_jax.data", "sleep_jax.train.step"),
    ("from .. import experiments", "sleep_jax.data", "sleep_jax.experiments"),
  )
  def test_sees_an_import(self, source: str, package: str, expected: str):
    self.assertEqual(list(imports(ast.parse(source), package)), [expected])

  @parameterized.parameters(
    "import pickle",
    "from cloudpickle import loads",
    "eval(text)",
    "yaml.load(text)",
    "np.load(path, allow_pickle=True)",
    "np.load(path, allow_pickle=unsafe)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "subprocess.run(line, shell=True)",
  )
  def test_sees_what_executes_data(self, source: str):
    self.assertLen(list(code_uses(ast.parse(source))), 1)

  @parameterized.parameters(
    "jax.eval_shape(f, x)",
    "yaml.safe_load(text)",
    "np.load(path, allow_pickle=False)",
    "ast.literal_eval(text)",
    "model.eval()",
  )
  def test_leaves_what_only_reads_alone(self, source: str):
    self.assertEmpty(list(code_uses(ast.parse(source))))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_the_layers(package: str):
  wrong = {
    module_name(path): bad
    for path in modules(package)
    if (bad := [name for name in imports_of(path) if within(name, FORBIDDEN[package])])
  }
  assert not wrong


def test_reports_are_made_of_rows_alone():
  """`report` reads files that training wrote: of this repository it knows the reader of those, and no jax."""
  wrong = {}
  for path in modules("sleep_jax/report"):
    ours = ("sleep_jax.report", "sleep_jax.runtime.metrics")
    foreign = [name for name in imports_of(path) if within(name, ("jax", "flax", "optax", "orbax"))]
    foreign += [name for name in imports_of(path) if within(name, PACKAGES) and not within(name, ours)]
    if foreign:
      wrong[module_name(path)] = foreign
  assert modules("sleep_jax/report") and not wrong


def test_what_is_imported_is_installed_with_the_package():
  """Every import names the standard library, this repository or a requirement of setup.cfg.

  torch and transformers may be asked for by benchmarks alone (`bench*.py`), inside a function; on a GPU
  `gpu_check.py` may ask for fla, which runs there only and which nothing here installs.
  """
  installed_by = metadata.packages_distributions()
  required = {canonicalize_name(r.name) for r in declared("options", "install_requires")} | {"jaxlib"}
  peers = {canonicalize_name(r.name) for r in declared("options.extras_require", "peers")}
  unknown = {}
  for path in (path for package in PACKAGES for path in modules(package)):
    tops = {name.partition(".")[0] for name in imports_of(path)} - set(PACKAGES) - sys.stdlib_module_names
    allowed = required | (peers if path.stem.startswith("bench") else set())
    allowed |= peers | {"fla"} if path.stem == "gpu_check" else set()
    # A module that nothing here installs counts under its own name.
    bad = [top for top in tops if not allowed & set(map(canonicalize_name, installed_by.get(top, [top])))]
    if bad:
      unknown[module_name(path)] = bad
  assert not unknown


def test_importing_touches_no_device_and_reads_no_flag():
  """Imports all modules where JAX finds no platform: whatever asks for a device or an array raises.

  Flags are defined but never parsed there, so that reading one raises too. Programs may define the
  same flag, `--config` say: after each import the new ones are forgotten.
  """
  program = """
import importlib, sys
import jax
from absl import flags

def refuse(*args, **kwargs):
  raise AssertionError("asked for a device at import")

for name in ("devices", "local_devices", "device_count", "local_device_count", "default_backend"):
  setattr(jax, name, refuse)

failed = 0
for module in sys.argv[1:]:
  before = set(flags.FLAGS)
  try:
    importlib.import_module(module)
  except Exception as error:
    failed += 1
    print(f"{module}: {type(error).__name__}: {error}")
  for flag in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, flag)
sys.exit(failed > 0)
"""
  names = [module_name(path) for package in PACKAGES for path in modules(package)]
  environment = os.environ | {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
  result = subprocess.run(
    [sys.executable, "-c", program, *names],
    env=environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_no_file_outgrows_its_reader():
  """About 400 lines is the aim, 420 the limit: past it a file holds two things."""
  sizes = {
    str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
    for package in PACKAGES
    for path in modules(package)
  }
  assert not {name: lines for name, lines in sizes.items() if lines > 420}


def test_nothing_executes_what_it_only_reads():
  uses = {
    module_name(path): found
    for package in PACKAGES
    for path in modules(package)
    if (found := list(code_uses(parse(path))))
  }
  assert not uses


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_one_fitting_version_of_each_requirement(python: str):
  environment = {
    "python_version": python,
    "python_full_version": f"{python}.5",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
  }
  pins: dict[str, list[str]] = {}
  for pin in locked():
    if pin.marker is None or Marker(str(pin.marker)).evaluate(environment):
      (version,) = pin.specifier
      pins.setdefault(canonicalize_name(pin.name), []).append(version.version)

  wanted = declared("options", "install_requires") + declared("options.extras_require", "dev")
  assert len(wanted) >= 12, "setup.cfg was not read"
  for requirement in wanted:
    versions = pins.get(canonicalize_name(requirement.name), [])
    assert len(versions) == 1, f"{requirement.name}: {versions} in the lock for Python {python}"
    assert requirement.specifier.contains(versions[0]), f"{requirement}: the lock has {versions[0]}"


def test_the_tests_run_on_a_jax_that_setup_cfg_allows():
  (jax,) = [r for r in declared("options", "install_requires") if r.name == "jax"]
  assert jax.specifier.contains(metadata.version("jax"))
  for extra in ("cuda", "tpu"):
    (same,) = declared("options.extras_require", extra)
    assert same.name == "jax" and same.specifier == jax.specifier


def test_the_citation_names_the_released_version():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
  package = setup_cfg()["metadata"]
  assert citation["version"] == package["version"]
  assert citation["license"] == package["license"]
