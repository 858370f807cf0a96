"""Runs as they lie on disk: workdirs, finished or not, and runs that were archived as one file each.

A workdir has `config.json`, `env.json` and `metrics.jsonl`. An archived run is one `NAME.jsonl`, whose first
row is of kind `run` and holds config and environment. Nothing else is read.
"""

import dataclasses
import glob
import json
import math
import os
import shlex
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from sleep_jax.runtime import files, metrics

# Of env.json: what a reader needs to repeat a run, and not whose machine it was.
ENV_KEYS = ("command", "versions", "git", "platform", "backend", "devices", "processes", "started")
ARCHIVED = ("eval", "cost", "sleep", "done")  # kinds of rows that tables and figures are made of
# Fields by which runs are sorted and named: a run in which one is no whole number cannot be compared.
WHOLE = ("seed", "sleep.num_passes", "train.steps")


class RunError(ValueError):
  """A path that is no run, or a run whose files are damaged: one line that names it."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """How the runs of one experiment are spoken of.

  Attributes:
    title: its name on figures.
    field: dotted name of a config field that only its runs have.
    letter: what that field's value is called where it tells tasks apart ("t = 4"). "": it does not.
  """

  title: str = ""
  field: str = ""
  letter: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
  """One run as read.

  Attributes:
    path: the workdir, or the file of an archived run.
    config: config.json, nested.
    rows: metrics.jsonl by `kind`, ordered by step; of a step that was repeated after a resume, the later row.
    env: env.json, empty if there is none.
    experiment: how to speak of it.
  """

  path: Path
  config: dict[str, Any]
  rows: dict[str, list[dict[str, Any]]]
  env: dict[str, Any] = dataclasses.field(default_factory=dict)
  experiment: Experiment = Experiment()

  def get(self, key: str, default: Any = None) -> Any:
    """The config's value under a dotted key, or `default`."""
    value: Any = self.config
    for part in key.split("."):
      if not isinstance(value, dict) or part not in value:
        return default
      value = value[part]
    return value

  @property
  def name(self) -> str:
    """The workdir's last component; an archived run's file name without its ending."""
    return self.path.stem if self.path.is_file() else self.path.resolve().name

  @property
  def num_passes(self) -> int | None:
    """N."""
    return self.get("sleep.num_passes")

  @property
  def depth(self) -> int | float | None:
    """The setting by which tasks of this experiment differ in depth; None if there is none."""
    value = self.get(self.experiment.field) if self.experiment.letter else None
    return value if is_number(value) else None

  @property
  def seed(self) -> int | None:
    """The run's seed."""
    return self.get("seed")

  @property
  def accelerated(self) -> bool:
    """Whether env.json names another backend than the CPU."""
    return self.env.get("backend", "cpu") != "cpu"

  @property
  def task(self) -> tuple[tuple[str, str], ...]:
    """The data config: runs are compared only where it is the same."""
    return tuple(sorted(flatten(self.get("data", {})).items()))

  @property
  def evals(self) -> list[dict[str, Any]]:
    """Eval rows whose tokens and exact accuracy are finite numbers."""
    return [r for r in self.rows.get("eval", []) if is_number(r.get("exact")) and is_number(r.get("tokens"))]

  def last(self, kind: str) -> dict[str, Any]:
    """The newest row of a kind (of `evals` for "eval"); empty if there is none."""
    rows = self.evals if kind == "eval" else self.rows.get(kind, [])
    return rows[-1] if rows else {}


def load_runs(
  paths: str | os.PathLike | Iterable[str | os.PathLike], experiments: Sequence[Experiment] = ()
) -> list[Run]:
  """Reads runs.

  Args:
    paths: one or more workdirs or archived runs, or globs of them. Of what a glob matches, files that do not
      end in .jsonl are passed over; each directory must be a run.
    experiments: a run is of the first one whose field its config has.

  Returns:
    The runs ordered by depth, task, N and path, each once. A last line that is not yet whole is left out.

  Raises:
    RunError: nothing matches, a path is no run, or one of its files is damaged.
  """
  paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  known: dict[Path, Path] = {}
  for pattern in (str(os.fspath(path)) for path in paths):
    if os.path.exists(pattern):
      matches = [pattern]
    else:
      matches = [m for m in sorted(glob.glob(pattern)) if os.path.isdir(m) or m.endswith(".jsonl")]
    if not matches:
      raise RunError(f"no run matches {pattern!r}")
    for match in map(Path, matches):
      known.setdefault(match.resolve(), match)
  if not known:
    raise RunError("no runs were named")
  runs = [_load(path, experiments) for path in known.values()]
  return sorted(runs, key=lambda r: (r.depth or 0, r.task, r.num_passes or 0, str(r.path)))


def archive(run: Run, directory: str | os.PathLike) -> Path:
  """Writes a run as one file, `NAME.jsonl`: what tables and figures read of it.

  Rows of training steps are left out, and of the environment what names the machine.

  Returns:
    The file.
  """
  first = {"kind": "run", "step": 0, "config": run.config, "env": public_env(run)}
  rows = sorted((r for kind in ARCHIVED for r in run.rows.get(kind, [])), key=lambda r: r["step"])
  path = Path(directory, f"{run.name}.jsonl")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(metrics.dumps(row) + "\n" for row in [first, *rows]), encoding="utf-8")
  return path


def public_env(run: Run) -> dict[str, Any]:
  """What a reader needs of a run's environment to repeat it, the command as one would type it."""
  known = {key: run.env[key] for key in ENV_KEYS if key in run.env}
  return known | ({"command": command_line(run)} if "command" in known else {})


def command_line(run: Run) -> str:
  """What the run recorded of its command, as one would type it in a clone; "" if it did not."""
  words = run.env.get("command")
  if isinstance(words, str):
    return words
  if not isinstance(words, list) or not words:
    return ""
  words = [str(word) for word in words]
  script = Path(words[0])
  if script.suffix == ".py" and script.parent.name == "experiments":  # started with -m, which Python replaces
    words = ["python", "-m", f"experiments.{script.stem}"] + [
      word.replace(f"{script.parent.parent}/", "", 1) for word in words[1:]
    ]
  return shlex.join(words)


def _load(path: Path, experiments: Sequence[Experiment]) -> Run:
  if path.is_dir():
    if not (path / "config.json").is_file():
      raise RunError(f"{path} is no run: it has no config.json")
    config, env = _json_object(path / "config.json"), _json_object(path / "env.json", {})
    source, rows = path / "metrics.jsonl", _rows(path / "metrics.jsonl")
  else:
    source, rows = path, _rows(path)
    head = rows.pop(0) if rows and rows[0]["kind"] == "run" else {}
    config, env = head.get("config"), head.get("env", {})
    if not isinstance(config, dict) or not isinstance(env, dict):
      raise RunError(f"{path} is no archived run: its first row is not of kind 'run' with a config")
  by_kind: dict[str, dict[int, dict[str, Any]]] = {}
  for number, row in enumerate(rows, 1):
    step = row.get("step", 0)
    if not is_whole(step):
      raise RunError(f"{source} row {number} is damaged: step must be a whole number, got {step!r:.60}")
    by_kind.setdefault(row["kind"], {})[step] = row
  ordered = {kind: [steps[s] for s in sorted(steps)] for kind, steps in by_kind.items()}
  run = Run(path, config, ordered, env)
  for key in WHOLE:
    if run.get(key) is not None and not is_whole(run.get(key)):
      where = path / "config.json" if path.is_dir() else path
      raise RunError(f"{where} is damaged: {key} must be a whole number, got {run.get(key)!r:.60}")
  of = next((e for e in experiments if run.get(e.field) is not None), Experiment())
  return dataclasses.replace(run, experiment=of)


def _rows(path: Path) -> list[dict[str, Any]]:
  """The rows of a metrics file; none of a run that has only just begun."""
  if not path.exists():
    return []
  _regular(path)
  try:
    return metrics.read(path)
  except metrics.MetricsError as error:
    raise RunError(str(error)) from error
  except OSError as error:
    raise RunError(f"{path} cannot be read: {error.strerror}") from error


def _json_object(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
  if default is not None and not path.exists():
    return default
  _regular(path)
  try:
    with open(path, "rb") as file:
      value = files.parse_json(file.read(files.MOST))
  except ValueError as error:
    raise RunError(f"{path} is damaged: {error}") from error
  except OSError as error:
    raise RunError(f"{path} cannot be read: {error.strerror}") from error
  if not isinstance(value, dict):
    raise RunError(f"{path} is damaged: not a JSON object")
  return value


def _regular(path: Path) -> None:
  """Refuses folders, pipes and devices: reading one could wait for ever."""
  try:
    if stat.S_ISREG(path.stat().st_mode):
      return
  except OSError as error:
    raise RunError(f"{path} cannot be read: {error.strerror}") from error
  raise RunError(f"{path} is damaged: not a regular file")


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
  """A nested config as dotted key -> text of the value."""
  if not isinstance(value, dict):
    return {prefix: value if isinstance(value, str) else json.dumps(value)}
  return {
    k: v for name, x in value.items() for k, v in flatten(x, f"{prefix}.{name}" if prefix else name).items()
  }


def is_number(value: Any) -> TypeGuard[float]:
  """Whether a JSON value is a finite number."""
  try:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
  except OverflowError:  # a whole number that no float can hold
    return False


def is_whole(value: Any) -> TypeGuard[int]:
  """Whether a JSON value is a whole number that a 64-bit integer can hold."""
  return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
