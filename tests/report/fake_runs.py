"""Workdirs as a run leaves them, made up, for the tests of figures and reports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleep_jax.report import load

EXPERIMENT = load.Experiment("Rule 110", "data.rollout_steps", "t")
TOKENS_PER_STEP = 3328
CPU_S_PER_STEP = {1: 0.075, 2: 0.14, 3: 0.21, 4: 0.275}


def config(
  passes: int, *, t: int = 4, seed: int = 0, lr: float = 3e-3, steps: int = 400, **data: Any
) -> dict:
  return {
    "data": {"num_strings": 2, "num_cells": 12, "rollout_steps": t, "boundary": "periodic"} | data,
    "model": {"vocab_size": 3, "window": 12, "blocks": ["attn", "gdn"]},
    "sleep": {"num_passes": passes, "loops": "scan"},
    "optim": {"muon_lr": lr},
    "train": {"steps": steps, "log_every": 10, "eval_sequences": 4096},
    "seed": seed,
  }


def evaluation(step: int, exact: float, passes: int, **values: Any) -> dict[str, Any]:
  row = {
    "kind": "eval",
    "step": step,
    "tokens": step * TOKENS_PER_STEP,
    "cpu_s": step * CPU_S_PER_STEP[passes],
  }
  row |= {"wall_s": row["cpu_s"], "loss": 0.5, "exact": exact, "bit": exact**0.5}
  row |= {"low": max(0.0, exact - 0.02), "high": min(1.0, exact + 0.02)}
  return row | {"const_exact": 0.278, "const_bit": 0.527} | values


def sleep_row(step: int, windows: int, passes: int, blocks: Sequence[str] = ("1",)) -> dict[str, Any]:
  change = [[1 / (1 + w + p) for p in range(passes)] for w in range(windows)]
  return {
    "kind": "sleep",
    "step": step,
    "windows": windows,
    "passes": passes,
    "change": dict.fromkeys(blocks, change),
  }


def write(
  path: Path,
  passes: int,
  points: Sequence[tuple[int, float]],
  *,
  extra: Sequence[dict[str, Any]] = (),
  tail: str = "",
  env: dict[str, Any] | None = None,
  per_eval: dict[str, Any] | None = None,
  **settings: Any,
) -> Path:
  """Makes a workdir whose evaluations are `points` (step, exact); `tail` ends the metrics as it is.

  A field that is None in `per_eval` is left out of the rows, as runs of older versions leave it out.
  """
  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(config(passes, **settings)))
  if env is not None:
    (path / "env.json").write_text(json.dumps(env))
  rows = [evaluation(step, exact, passes, **(per_eval or {})) for step, exact in points]
  rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
  (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]) + tail)
  return path


def read(*paths: Path | str) -> list[load.Run]:
  """Reads workdirs, or globs of them, as runs of Rule 110."""
  return load.load_runs(paths, [EXPERIMENT])
