"""What is installed: one import name, with its presets and data, beside whatever else is there."""

import configparser
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import sleep_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
BESIDE = ("benchmarks", "experiments", "kernels", "launch")
EXTRAS = {
  "train": ("grain", "array_record", "ml_collections"),
  "tokenizers": ("tokenizers",),
  "figures": ("matplotlib",),
}

# A stand-in for PyPI's `kernels`, built where the registry cannot be reached.
STAND_IN = """
[metadata]
name = kernels
version = 0.17.2
[options]
packages = kernels
"""


def run(*command: object, cwd: pathlib.Path, code: int = 0, **environment: str) -> str:
  """Runs a command to its end, outside of this checkout; what it printed."""
  kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
  done = subprocess.run(
    list(map(str, command)),
    cwd=cwd,
    env=kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=600,
  )
  assert done.returncode == code, done.stdout[-4000:]
  return done.stdout


def folders() -> set[str]:
  """Every package of the repository that is to be installed, by the name under which it is imported."""
  found = set()
  for top in ("sleep_jax", *BESIDE):
    for file in (ROOT / top).rglob("__init__.py"):
      name = ".".join(file.parent.relative_to(ROOT).parts)
      found.add(name if top == "sleep_jax" else f"sleep_jax.{name}")
  return found


def test_setup_cfg_lists_every_package():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  assert setup["options"]["packages"].split() == sorted(folders())
  assert setup["options"]["package_dir"].split() == [
    word for name in BESIDE for word in (f"sleep_jax.{name}", "=", name)
  ]


def test_every_module_lies_in_a_package():
  """A folder without an `__init__.py` would work in a clone and be missing where it is installed."""
  lost = [
    str(file.relative_to(ROOT))
    for top in ("sleep_jax", *BESIDE)
    for file in (ROOT / top).rglob("*.py")
    if not (file.parent / "__init__.py").exists()
  ]
  assert not lost


def test_the_names_of_the_package():
  for name in dir(sleep_jax):
    getattr(sleep_jax, name)
  assert {"model", "sleep", "train", "generate", "load_run", "ModelConfig", "Rule"} <= set(dir(sleep_jax))
  with pytest.raises(AttributeError, match="has no attribute 'slep'"):
    _ = sleep_jax.slep


def test_importing_the_package_alone_is_light(tmp_path: pathlib.Path):
  program = "import sys, sleep_jax; print(sleep_jax.__version__); sys.exit('jax' in sys.modules)"
  assert run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip() == version()


def version() -> str:
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  return setup["metadata"]["version"]


def test_the_method_needs_no_extra(tmp_path: pathlib.Path):
  """Without the extras the modules at the top import, and the other rooms say why they do not."""
  program = f"""
import importlib, sys
extras = {EXTRAS}
for name in sum(extras.values(), ("tensorboardX",)):
  sys.modules[name] = None
for name in sys.argv[1:]:
  importlib.import_module(name)
for room, extra in {{"data": "train", "experiments.cli": "train", "pretrained.tokenizer": "tokenizers",
                    "report": "figures", "kernels.bench": "figures"}}.items():
  try:
    importlib.import_module("sleep_jax." + room)
  except ImportError as e:
    assert f"pip install 'sleep_jax[{{extra}}]'" in str(e), e
  else:
    raise AssertionError(room)
"""
  method = [f"sleep_jax.{file.stem}" for file in (ROOT / "sleep_jax").glob("[a-z]*.py")]
  assert len(method) > 12
  run(
    sys.executable,
    "-c",
    program,
    *method,
    "sleep_jax.config",
    "sleep_jax.pretrained",
    cwd=tmp_path,
    PYTHONPATH=str(ROOT),
  )


@pytest.mark.parametrize("module", ["tokenizers", "ml_collections"])
def test_a_program_names_the_extra_that_it_lacks_in_one_line(tmp_path: pathlib.Path, module: str):
  (extra,) = (extra for extra, modules in EXTRAS.items() if module in modules)
  (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
  path = os.pathsep.join([str(tmp_path), str(ROOT)])
  said = run(
    sys.executable, "-m", "sleep_jax.experiments.gsm_infinite", cwd=tmp_path, code=2, PYTHONPATH=path
  )
  assert said == f"error: {module} is not installed; it comes with: pip install 'sleep_jax[{extra}]'\n"


def copy_of_the_sources(folder: pathlib.Path) -> pathlib.Path:
  """What is needed to build, without caches: building writes beside the sources."""
  folder.mkdir()
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder)
  for name in ("sleep_jax", *BESIDE):
    shutil.copytree(
      ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.csv", "*.png")
    )
  return folder


def build(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """A wheel, by way of a source distribution; without a network."""
  sdist = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
  name = run(sys.executable, "-c", sdist, out, cwd=source).splitlines()[-1]
  with tarfile.open(out / name) as archive:
    archive.extractall(out, filter="data")
  unpacked = out / name.removesuffix(".tar.gz")
  run(*pip("wheel"), "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out, unpacked, cwd=out)
  (wheel,) = out.glob("*.whl")
  return wheel


def pip(*words: str) -> list[str]:
  return [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]


def new_environment(folder: pathlib.Path) -> pathlib.Path:
  """A fresh environment that finds this one's packages behind its own; its interpreter."""
  venv.create(folder, with_pip=False)
  python = folder / "bin" / "python"
  where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
  pathlib.Path(where, "lock.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return python


needs_setuptools = pytest.mark.skipif(
  int(importlib.metadata.version("setuptools").partition(".")[0]) < 77,
  reason="needs the lock's setuptools; `make setup` brings it",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("dist")
  return build(copy_of_the_sources(out / "sources"), out)


@pytest.fixture(scope="module")
def python(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """An environment with our wheel and, put in after it, PyPI's `kernels` (or a stand-in)."""
  python = new_environment(tmp_path_factory.mktemp("installed") / "env")
  install = [*pip("--python", str(python), "install"), "--quiet", "--no-deps"]
  run(*install, "--no-index", wheel, cwd=wheel.parent)
  found = subprocess.run([*install, "--retries=0", "--timeout=5", "kernels==0.17.2"], capture_output=True)
  if found.returncode:
    source = wheel.parent / "stand_in"
    (source / "kernels").mkdir(parents=True)
    (source / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    (source / "setup.cfg").write_text(STAND_IN)
    run(*install, "--no-index", "--no-build-isolation", source, cwd=source)
  return python


@pytest.mark.slow
@needs_setuptools
def test_the_wheel_holds_one_import_name_and_all_of_it(wheel: pathlib.Path):
  with zipfile.ZipFile(wheel) as archive:
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
  assert {name.partition("/")[0] for name in names} == {"sleep_jax"}
  here = {
    ("" if top == "sleep_jax" else "sleep_jax/") + file.relative_to(ROOT).as_posix()
    for top in ("sleep_jax", *BESIDE)
    for file in (ROOT / top).rglob("*.py")
  }
  assert {name for name in names if name.endswith(".py")} == here
  data = [*(ROOT / "sleep_jax").rglob("*.json"), *(ROOT / "sleep_jax").rglob("*.jsonl")]
  assert len(data) >= 3
  assert {file.relative_to(ROOT).as_posix() for file in data} | {"sleep_jax/py.typed"} <= names
  templates = {f"sleep_jax/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "launch").rglob("*.tmpl")}
  assert templates and templates <= names


@pytest.mark.slow
@needs_setuptools
def test_installed_beside_the_package_kernels_both_import(python: pathlib.Path, tmp_path: pathlib.Path):
  program = """
import importlib.metadata, importlib.util, json, kernels, sleep_jax
from sleep_jax.kernels import kda
facts = {"kernels": kernels.__file__, "ours": kda.__file__, "version": sleep_jax.__version__}
facts["has"] = hasattr(kernels, "get_kernel")
facts["names"] = [name for name in ("experiments", "launch", "benchmarks") if importlib.util.find_spec(name)]
if importlib.util.find_spec("transformers"):
  from transformers.integrations import hub_kernels
  assert hub_kernels.is_kernels_available()
  from kernels import get_kernel
print(json.dumps(facts))
"""
  facts = json.loads(run(python, "-c", program, cwd=tmp_path).splitlines()[-1])
  site = python.parents[1]
  assert pathlib.Path(facts["kernels"]).is_relative_to(site) and "sleep_jax" not in facts["kernels"]
  assert pathlib.Path(facts["ours"]).is_relative_to(site)
  assert (facts["version"], facts["has"], facts["names"]) == (version(), True, [])


@pytest.mark.slow
@needs_setuptools
def test_installed_it_trains_from_any_folder_with_its_own_presets(
  python: pathlib.Path, tmp_path: pathlib.Path
):
  experiment = [python, "-m", "sleep_jax.experiments.rule110", "--config=rule110:tiny", "--workdir=work/run"]
  experiment.append("--tensorboard=False")
  assert "best constant" in run(*experiment, cwd=tmp_path)
  assert not list((tmp_path / "work" / "run" / "tb").iterdir())
  assert "is complete" in run(*experiment, cwd=tmp_path)
  demo = run(python, "-m", "sleep_jax.experiments.demo", "--size=tiny", "--workdir=work/demo", cwd=tmp_path)
  assert "At equal compute" in demo
  assert (tmp_path / "work" / "demo" / "report.html").is_file()
  assert [path.name for path in tmp_path.iterdir()] == ["work"]


@pytest.mark.slow
@needs_setuptools
def test_an_editable_installation_follows_its_sources(tmp_path: pathlib.Path):
  source = copy_of_the_sources(tmp_path / "sources")
  python = new_environment(tmp_path / "env")
  editable = [*pip("--python", str(python), "install"), "--no-build-isolation", "--no-deps", "--no-index"]
  run(*editable, "--editable", source, cwd=tmp_path)
  program = "from sleep_jax.kernels import kda; from sleep_jax.experiments.configs import rule110;"
  program += "print(kda.__file__, rule110.__file__)"
  files = run(python, "-c", program, cwd=tmp_path).split()
  assert files == [str(source / "kernels/kda/__init__.py"), str(source / "experiments/configs/rule110.py")]


@pytest.mark.slow
def test_programs_do_not_show_the_compilers_banners(tmp_path: pathlib.Path):
  """A constant that takes XLA more than a second to fold; without our programs it does say so."""
  fold = """
import jax, numpy
jax.config.update("jax_enable_compilation_cache", False)
print(jax.jit(lambda: jax.lax.sort(jax.numpy.asarray(numpy.arange(10000.0)[::-1].copy())))()[-1])
"""
  environment = {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "1"}
  assert "slow_operation_alarm" in run(sys.executable, "-c", fold, cwd=tmp_path, **environment)
  del environment["TF_CPP_MIN_LOG_LEVEL"]
  clean = (
    "import os; del os.environ['TF_CPP_MIN_LOG_LEVEL']\n" if "TF_CPP_MIN_LOG_LEVEL" in os.environ else ""
  )
  for program in ("experiments", "sleep_jax.benchmarks"):
    said = run(sys.executable, "-c", f"{clean}import {program}\n{fold}", cwd=tmp_path, **environment)
    assert said == "9999.0\n"
