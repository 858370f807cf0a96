"""Runs as they lie on disk, what makes them one curve, and the tables that compare them.

Reads workdirs (`config.json`, `env.json`, `metrics.jsonl`), finished or not, and nothing else. A value
that a run did not measure is None here and "not measured" in print.
"""

import dataclasses
import glob
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sleep_jax.runtime import metrics

# Settings that cannot move a curve: how often one looks, and how XLA is asked for the same numbers.
NEUTRAL = frozenset((
  *("seed", "sleep.num_passes", "sleep.remat", "sleep.loops", "model.fast.kernel", "mesh.data", "mesh.model"),
  *("train.log_every", "train.eval_every", "train.save_every"),
  *("train.steps_per_dispatch", "train.eval_batch_size", "train.keep_checkpoints"),
))  # fmt: skip


class RunError(ValueError):
  """A path that is no run, or a run whose files are damaged: one line that names it."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir as read.

  Attributes:
    path: the workdir.
    config: config.json, nested.
    rows: metrics.jsonl by `kind`, ordered by step; of a step that was repeated after a resume, the later row.
    env: env.json, empty if there is none.
  """

  path: Path
  config: dict[str, Any]
  rows: dict[str, list[dict[str, Any]]]
  env: dict[str, Any] = dataclasses.field(default_factory=dict)

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
    """The workdir's last component."""
    return self.path.resolve().name

  @property
  def num_passes(self) -> int | None:
    """N."""
    return self.get("sleep.num_passes")

  @property
  def rollout_steps(self) -> int | None:
    """t, for Rule 110; None elsewhere."""
    return self.get("data.rollout_steps")

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


def load_runs(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Run]:
  """Reads workdirs.

  Args:
    paths: one or more workdirs, or globs of workdirs. Of what a glob matches, plain files are passed over;
      each directory must be a run.

  Returns:
    The runs ordered by task, N and path, each once. A last line that is not yet whole is left out.

  Raises:
    RunError: nothing matches, a directory is no run, or one of its files is damaged.
  """
  paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  found: dict[Path, Path] = {}
  for pattern in map(os.fspath, paths):
    if os.path.exists(pattern):
      matches = [pattern]
    else:
      matches = [m for m in sorted(glob.glob(pattern)) if os.path.isdir(m)]
    if not matches:
      raise RunError(f"no run matches {pattern!r}")
    for match in map(Path, matches):
      found.setdefault(match.resolve(), match)
  if not found:
    raise RunError("no runs were named")
  runs = [_load(path) for path in found.values()]
  return sorted(runs, key=lambda r: (r.rollout_steps or 0, r.task, r.num_passes or 0, str(r.path)))


def _load(path: Path) -> Run:
  if not (path / "config.json").is_file():
    raise RunError(f"{path} is no run: it has no config.json")
  config = _json_object(path / "config.json")
  env = _json_object(path / "env.json") if (path / "env.json").is_file() else {}
  by_kind: dict[str, dict[int, dict[str, Any]]] = {}
  try:
    for row in metrics.read(path / "metrics.jsonl"):
      by_kind.setdefault(row["kind"], {})[row.get("step", 0)] = row
  except FileNotFoundError:
    pass  # a run that has only just begun
  except metrics.MetricsError as error:
    raise RunError(str(error)) from error
  rows = {kind: [steps[s] for s in sorted(steps)] for kind, steps in by_kind.items()}
  return Run(path, config, rows, env)


def _json_object(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_bytes())
  except ValueError as error:
    raise RunError(f"{path} is damaged: {error}") from error
  if not isinstance(value, dict):
    raise RunError(f"{path} is damaged: not a JSON object")
  return value


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
  """A nested config as dotted key -> text of the value."""
  if not isinstance(value, dict):
    return {prefix: value if isinstance(value, str) else json.dumps(value)}
  return {
    k: v for name, x in value.items() for k, v in flatten(x, f"{prefix}.{name}" if prefix else name).items()
  }


def is_number(value: Any) -> bool:
  """Whether a JSON value is a finite number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- curves --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
  """Runs that differ in their seed alone: `mean`, `low`, `high` (per cent) over them at each of `tokens`.

  `cpu_s` is what training up to there took, on average over the runs; NaN where it was not measured.
  """

  label: str
  runs: tuple[Run, ...]
  tokens: tuple[int, ...]
  cpu_s: tuple[float, ...]
  mean: tuple[float, ...]
  low: tuple[float, ...]
  high: tuple[float, ...]

  @property
  def num_passes(self) -> int | None:
    """N."""
    return self.runs[0].num_passes


def settings(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
  """Groups runs that differ in nothing but the seed: `(label, runs)`, in the order of `runs`.

  A label names N and whatever else tells the groups apart ("N = 1, Muon lr 0.01"), so that nothing
  that was changed beside N can hide in a curve. Unequal `train.steps` are named only where labels would
  otherwise be the same: elsewhere the end of the curve shows them.
  """
  flat = {id(r): {k: v for k, v in flatten(r.config).items() if k not in NEUTRAL} for r in runs}
  groups: dict[tuple, list[Run]] = {}
  for run in runs:
    groups.setdefault((run.num_passes, tuple(sorted(flat[id(run)].items()))), []).append(run)
  seen = [flat[id(r)] for r in runs]
  varying = {k for values in seen for k, v in values.items() if any(other.get(k) != v for other in seen)}

  def label(run: Run, keys: Iterable[str]) -> str:
    return ", ".join(
      [f"N = {run.num_passes}", *(_phrase(k, flat[id(run)].get(k, "none")) for k in sorted(keys))]
    )

  short = [label(members[0], varying - {"train.steps"}) for members in groups.values()]
  full = [label(members[0], varying) for members in groups.values()]
  names = [f if short.count(s) > 1 else s for s, f in zip(short, full, strict=True)]
  return list(zip(names, groups.values(), strict=True))


def _phrase(key: str, value: str) -> str:
  phrases = {
    "data.rollout_steps": f"t = {value}",
    "train.steps": f"{value} steps",
    "optim.muon_lr": f"Muon lr {value}",
    "train.init_from": f"from {Path(value).name}",
  }
  return phrases.get(key, f"{key.rpartition('.')[2]} {value}")


def curves(runs: Sequence[Run]) -> list[Curve]:
  """Exact accuracy against tokens, one curve a setting; runs without an evaluation are left out.

  A point needs an evaluation of every seed: a mean whose members change on the way would show steps
  that no run took. Seeds without a common evaluation become a curve each.
  """
  result = []
  for label, members in settings(runs):
    points = {id(r): {row["tokens"]: 100 * row["exact"] for row in r.evals} for r in members}
    members = [r for r in members if points[id(r)]]
    if not members:
      continue
    together = set.intersection(*(set(points[id(r)]) for r in members))
    parts = [(label, members)] if together else [(f"{label}, seed {r.seed}", [r]) for r in members]
    for name, part in parts:
      tokens = tuple(sorted(set.intersection(*(set(points[id(r)]) for r in part))))
      at = [[points[id(r)][x] for r in part] for x in tokens]
      mean, low, high = (tuple(map(f, at)) for f in (_mean, min, max))
      spent = {(id(r), row["tokens"]): row.get("cpu_s", math.nan) for r in part for row in r.evals}
      cpu_s = tuple(_mean([spent[id(r), x] for r in part]) for x in tokens)
      result.append(Curve(name, tuple(part), tokens, cpu_s, mean, low, high))
  return result


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def constant(runs: Iterable[Run], key: str = "const_exact") -> float | None:
  """Per cent that the best constant answer gets, as the runs measured it on their held-out sets (mean)."""
  values = [r.last("eval").get(key) for r in runs]
  values = [100 * v for v in values if is_number(v)]
  return sum(values) / len(values) if values else None


# ---- tables --------------------------------------------------------------------------------------


def percent(rate: float) -> str:
  """0.981 -> "98.1 %"."""
  return f"{100 * rate:.1f} %"


def amount(number: float, unit: str = "") -> str:
  """1331200 -> "1.33 M"."""
  for scale, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
    if abs(number) >= scale:
      return f"{number / scale:.3g}{letter}{unit}"
  return f"{number:.3g}{unit}"


def seconds(value: float) -> str:
  """3012.4 -> "3,012"; under ten seconds two figures."""
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
  "run": ("run", str),
  "num_passes": ("N", str),
  "rollout_steps": ("t", str),
  "seed": ("seed", str),
  "muon_lr": ("Muon lr", "{:g}".format),
  "steps": ("steps", "{:,}".format),
  "tokens": ("tokens", amount),
  "exact": ("exact", percent),
  "bit": ("per bit", percent),
  "const_exact": ("best constant, exact", percent),
  "const_bit": ("best constant, per bit", percent),
  "cpu_s": ("CPU s", seconds),
  "wake_ms_per_answer": ("awake ms / answer", "{:.3g}".format),
  "sleep_ms_per_window": ("sleep ms / window", "{:.3g}".format),
  "state_bytes": ("state bytes", "{:,}".format),
  "equal_cpu_s": ("CPU s that every run reached", seconds),
  "equal_exact": ("exact by then", percent),
  "equal_at": ("evaluated at CPU s", seconds),
  "longest_cpu_s": ("CPU s that a run of every N reached", seconds),
  "longest_exact": ("exact by then", percent),
  "longest_at": ("evaluated at CPU s", seconds),
}
MISSING = "not measured"


def summary_table(runs: Iterable[Run]) -> list[dict[str, Any]]:
  """One row a run, of `COLUMNS` keys: rates in 0..1, times in the units of the names, None if not measured.

  Steps, tokens, accuracies and CPU seconds are those of the last evaluation, so that they belong
  together; a run without one shows how far it trained.
  """
  table = []
  for run in runs:
    measured, cost = run.last("eval"), run.last("cost")
    progress = measured or run.last("done") or run.last("train")
    table.append(
      _identity(run)
      | {k: _number(progress, k, rename) for k, rename in (("steps", "step"), ("tokens", "tokens"))}
      | {k: _number(measured, k) for k in ("exact", "bit", "const_exact", "const_bit")}
      | {"cpu_s": _number(progress, "cpu_s")}
      | {k: _number(cost, k) for k in ("wake_ms_per_answer", "sleep_ms_per_window", "state_bytes")}
    )
  return table


def _identity(run: Run) -> dict[str, Any]:
  return {
    "run": run.name,
    "num_passes": run.num_passes,
    "rollout_steps": run.rollout_steps,
    "seed": run.seed,
    "muon_lr": run.get("optim.muon_lr"),
  }


def _number(row: dict[str, Any], key: str, name: str | None = None) -> Any:
  value = row.get(name or key)
  return value if is_number(value) else None


def reached(run: Run, budget: float, by: str) -> dict[str, Any] | None:
  """The last eval row that cost at most `budget` (`by`: "tokens" or "cpu_s"); None if the run stopped before.

  Nothing is interpolated: a run that is evaluated rarely is shown as it was at its last look.
  """
  rows = [r for r in run.evals if is_number(r.get(by))]
  if not rows or rows[-1][by] < budget:
    return None
  within = [r for r in rows if r[by] <= budget]
  return within[-1] if within else None


def budgets(runs: Sequence[Run], by: str) -> tuple[float | None, float | None]:
  """What every run spent at least, and what a run of every N spent; each None if nobody measured it."""
  spent = [(r.num_passes, [e[by] for e in r.evals if is_number(e.get(by))]) for r in runs]
  spent = [(n, values[-1]) for n, values in spent if values]
  if not spent:
    return None, None
  longest = {n: max(v for m, v in spent if m == n) for n, _ in spent}
  return min(v for _, v in spent), min(longest.values())


def equal_compute_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Exact accuracy at equal CPU seconds: one row for each run that shares its task, of `COLUMNS` keys.

  Runs on an accelerator are left out: there CPU seconds measure nothing.

  The budget is the largest that all runs with an evaluation reached. Where some N was also run for
  longer, a second one follows, the largest that at least one run of every N reached.
  """
  table = []
  for task in dict.fromkeys(r.task for r in runs):
    members = [r for r in runs if r.task == task and not r.accelerated]
    if len(members) < 2:
      continue
    equal, longest = budgets(members, "cpu_s")
    for run in members:
      row = _identity(run)
      for name, budget in (("equal", equal), ("longest", longest)):
        at = reached(run, budget, "cpu_s") if budget is not None else None
        row |= {
          f"{name}_cpu_s": budget,
          f"{name}_exact": at and at["exact"],
          f"{name}_at": at and at["cpu_s"],
        }
      table.append(row)
  if all(row["longest_cpu_s"] == row["equal_cpu_s"] for row in table):
    table = [{k: v for k, v in row.items() if not k.startswith("longest")} for row in table]
  return table


def cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
  """Headers and printed cells of a table; a column that is None in every identity field is left out."""
  keys = [k for k in rows[0] if k not in ("rollout_steps", "muon_lr") or any(r[k] is not None for r in rows)]
  known = [(k, *COLUMNS.get(k, (k, str))) for k in keys]
  body = [[MISSING if row[k] is None else show(row[k]) for k, _, show in known] for row in rows]
  return [header for _, header, _ in known], body


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
  """A table as GitHub Markdown, numbers to the right; empty for no rows."""
  if not rows:
    return ""
  headers, body = cells(rows)
  rule = ["---" if header == "run" else "---:" for header in headers]
  lines = [headers, rule, *([c.replace("|", r"\|") for c in row] for row in body)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
