"""Rules that hold for the repository as a whole: who imports whom, what importing does, what is never used.

The layers are `launch, benchmarks -> experiments -> sleep_jax -> kernels`; docs/design.md says why.
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
PACKAGES = ("kernels", "sleep_jax", "experiments", "benchmarks", "launch")

# The method, at the top of sleep_jax, one file or one package each; everything else there is a room.
METHOD = (
  *("sleep", "windows", "model", "blocks", "looped", "carry", "attention", "fast_weights", "rules", "layers"),
  *(
    "products",
    "params",
    "sharding",
    "optim",
    "decoding",
    "generate",
    "prompts",
    "sampling",
    "session_file",
    "flax_module",
  ),
  *("consolidation", "flat", "session", "spread"),
)

# What each layer and each room of sleep_jax may import of this repository, beside itself; a name stands for
# itself and for all below it.
_LIBRARY = (*METHOD, "config", "cost", "data", "kernels", "pretrained", "runtime", "scoring")
ALLOWED = {
  "kernels": (),
  "config": (),
  "attention": ("config", "kernels", "layers", "params", "products", "sharding"),
  "runtime": (),  # knows no model
  "data": ("config", "windows"),
  "report": ("runtime.files", "runtime.metrics", "scoring.intervals"),  # knows no jax
  "cost": ("config", *METHOD),
  "scoring": ("config", "data", "runtime.processes", *METHOD),  # scores are summed over processes
  "pretrained": ("config", "data", "runtime", *METHOD),
  "train": _LIBRARY,
  "experiments": (*_LIBRARY, "report", "train"),
  "benchmarks": (*_LIBRARY, "experiments", "launch.aot", "launch.hardware", "report", "train"),
  "launch": (*_LIBRARY, "experiments", "report", "train"),
  "": ("config", "kernels", *METHOD),  # a module of the method
  "names": ("config", "flax_module", "pretrained", "rules"),  # the __init__ of sleep_jax, on demand
}
# Who opens workdirs and checkpoints: beside the rooms above, one file, which reads the weights of a run.
RUNTIME_READERS = ("pretrained.from_run",)

# Which extras of setup.cfg a module may need, by the longest name that fits.
EXTRAS = {
  "sleep_jax.kernels.measure": ("figures", "peers"),
  "sleep_jax.data": ("train",),
  "sleep_jax.data.gsm_infinite": ("tokenizers",),
  "sleep_jax.data.text": ("tokenizers",),
  "sleep_jax.pretrained": ("tokenizers",),
  "sleep_jax.pretrained.gguf_model": ("tokenizers", "gguf"),
  "sleep_jax.report": ("figures",),
  "sleep_jax.runtime.metrics": ("train",),
  "sleep_jax.experiments": ("train",),
  "sleep_jax.experiments.figures": ("figures",),
  "sleep_jax.experiments.lm_eval_adapter": ("train", "eval"),
  "sleep_jax.benchmarks": ("peers", "tokenizers"),
}

# Modules that run code while they read data, and calls that do. `eval` means the builtin only.
CODE_READERS = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "runpy")
CODE_CALLS = ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "os.system")
CODE_OPTIONS = ("allow_pickle", "trust_remote_code", "shell")


def modules(package: str) -> list[Path]:
  return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
  """The name under which a file is imported: all of them lie in sleep_jax."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  parts = parts[:-1] if parts[-1] == "__init__" else parts
  return ".".join(parts if parts[0] == "sleep_jax" else ("sleep_jax", *parts))


def room_of(path: Path) -> str:
  """A key of `ALLOWED`."""
  top, *rest = path.relative_to(ROOT).parts
  if path == ROOT / "sleep_jax" / "__init__.py":
    return "names"
  if top != "sleep_jax":
    return top
  return rest[0] if len(rest) > 1 else ""


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


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_what_it_may(room: str):
  files = [path for package in PACKAGES for path in modules(package) if room_of(path) == room]
  assert files, room
  tops = tuple(package for package in PACKAGES if package != "sleep_jax")
  roots = tuple(f"sleep_jax.{name}" for name in (*ALLOWED[room], *filter(None, [room])))
  wrong = {
    module_name(path): bad
    for path in files
    if (bad := [name for name in imports_of(path) if not _may_import(name, roots, tops)])
  }
  assert not wrong


def _may_import(name: str, roots: tuple[str, ...], tops: tuple[str, ...]) -> bool:
  """Whether a name is none of ours, or one of `roots`; the names of folders in a clone are not installed."""
  if within(name, (*tops, "tests")):
    return False
  return (
    not within(name, ("sleep_jax",)) or name in ("sleep_jax", "sleep_jax.__version__") or within(name, roots)
  )


def test_only_experiments_know_of_command_lines():
  """The library has neither flags nor a main; programs that measure have parsers of their own."""
  flags = ("absl.flags", "absl.app", "argparse")
  bad = [
    module_name(path)
    for path in modules("sleep_jax")
    if any(within(name, flags) for name in imports_of(path))
  ]
  assert not bad


def test_one_file_outside_of_training_opens_the_checkpoints_of_runs():
  runtime = ("sleep_jax.runtime",)
  readers = [
    module_name(path).removeprefix("sleep_jax.")
    for path in modules("sleep_jax/pretrained")
    if any(within(name, runtime) for name in imports_of(path))
  ]
  assert set(readers) <= set(RUNTIME_READERS)


def test_the_method_is_alone_at_the_top():
  files = {path.stem for path in (ROOT / "sleep_jax").glob("*.py")} - {"__init__"}
  assert files | {"attention"} == set(METHOD)


def test_reports_are_drawn_without_jax():
  """Nor anything that imports it, over any number of steps."""
  program = """
import importlib, sys
for name in sys.argv[1:]:
  importlib.import_module(name)
sys.exit(", ".join(name for name in ("jax", "jaxlib", "flax", "orbax") if name in sys.modules) or 0)
"""
  names = [module_name(path) for path in modules("sleep_jax/report")]
  assert len(names) > 3
  done = subprocess.run(
    [sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0 and not done.stderr, done.stderr


def test_what_is_imported_is_installed_with_the_package():
  """Every import names the standard library, this repository, or a requirement that its room may have.

  On a GPU `gpu_check.py` may ask for fla, which runs there only and which nothing here installs.
  """
  installed_by = metadata.packages_distributions()
  core = {canonicalize_name(r.name) for r in declared("options", "install_requires")} | {"jaxlib"}
  unknown = {}
  for path in (path for package in PACKAGES for path in modules(package)):
    name = module_name(path)
    allowed = core | {"fla"} if path.stem == "gpu_check" else set(core)
    for extra in (extra for root, extras in EXTRAS.items() if within(name, (root,)) for extra in extras):
      allowed |= {canonicalize_name(r.name) for r in declared("options.extras_require", extra)}
    tops = {name.partition(".")[0] for name in imports_of(path)} - {"sleep_jax"} - sys.stdlib_module_names
    # A module that nothing here installs counts under its own name.
    bad = [top for top in tops if not allowed & set(map(canonicalize_name, installed_by.get(top, [top])))]
    if bad:
      unknown[name] = bad
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
  files = [path for package in PACKAGES for path in modules(package)]
  elsewhere = ("torch_model", "lm_eval_adapter")  # the rival, where torch is; a guest, where its host is
  names = [module_name(path) for path in files if path.stem not in elsewhere]
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


def guesses(tree: ast.Module) -> Iterator[str]:
  """Yields what finds out from names what a rule or a task is, instead of asking it."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Compare) and any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops):
      if any(ast.unparse(x) == "weights" for x in node.comparators):
        yield ast.unparse(node)
    if isinstance(node, (ast.Name, ast.Attribute)):
      name = node.id if isinstance(node, ast.Name) else node.attr
      if name in ("FUSED", "SQUASH", "FedTask"):
        yield name


def test_what_a_rule_or_a_task_is_is_asked_of_it():
  assert len(list(guesses(ast.parse("'conv_w1' in weights or isinstance(task, host.FedTask)")))) == 2
  assert not list(guesses(ast.parse("[w for w in weights]")))
  files = [path for package in PACKAGES for path in modules(package)]
  assert not {module_name(path): bad for path in files if (bad := list(guesses(parse(path))))}


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

  wanted = declared("options", "install_requires")
  for extra in ("train", "tokenizers", "gguf", "figures", "dev"):
    wanted += declared("options.extras_require", extra)
  assert len(wanted) >= 20, "setup.cfg was not read"
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
