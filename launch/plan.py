"""Says whether a run fits some accelerators, and what it would take there: from this machine, which has none.

    python -m launch.plan --config=experiments/configs/rule110.py:fig2b --hardware=v5p:4x4x4
    python -m launch.plan --config=experiments/configs/gsm_infinite.py:jet_2b --hardware=v5e:4x4 --search
    python -m launch.plan --config=experiments/configs/rule110.py:fig2b --hardware=v5e:2x2,h200:8 \\
      --table --passes=1,4 --out=work/plan

For a TPU, an H100 or an H200 the training step itself is compiled, where the compiler is installed; otherwise
all is counted from shapes. Times are a roofline: no hardware is faster; a run usually gets less
(--efficiency). --search tries other microbatches, remat and meshes until one fits. Exit code: 0 it fits,
1 it does not, 2 a mistake, or nothing that was tried fits.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from sleep_jax.config import ConfigError, check
from sleep_jax.experiments import cli
from sleep_jax.launch import aot, planning
from sleep_jax.launch.hardware import Hardware, find
from sleep_jax.runtime import files

CONFIG = cli.define_config_flag()
HARDWARE = flags.DEFINE_list(
  "hardware", [], "CHIP:TOPOLOGY, such as v5p:4x4x4 or h200:8; with --table several"
)
SEARCH = flags.DEFINE_bool("search", False, "try what would make it fit")
TABLE = flags.DEFINE_bool("table", False, "one row for each --hardware and each of --passes")
PASSES = flags.DEFINE_list("passes", [], "values of N for --table; none: the config's")
OUT = flags.DEFINE_string("out", None, "path without suffix: also writes .md and .json")
SHAPES = flags.DEFINE_bool("shapes", False, "compile nothing, count from shapes")
MINUTES = flags.DEFINE_float("compile_minutes", 10.0, "after which a compiler is stopped", lower_bound=0.01)
EFFICIENCY = flags.DEFINE_float(
  "efficiency", 0.4, "share of the roofline that a run gets", lower_bound=0.01, upper_bound=1.0
)
PRICE = flags.DEFINE_float("price", None, "of a chip and hour, in any currency", lower_bound=0.0)
WATTS = flags.DEFINE_float("watts", None, "of a chip; GPUs have a default", lower_bound=0.0)


def report(plan: planning.Plan) -> str:
  """A plan as text."""
  row = plan.hardware
  lines = [
    f"{row.name}: {row.chips} chip(s) on {row.hosts} host(s), {plan.mesh[0]} x {plan.mesh[1]} devices"
    f" (data x model) of {planning.gigabytes(plan.memory)}",
    f"{plan.verdict} ({plan.source})",
    *(f"  {name:24} {planning.gigabytes(size):>10}" for name, size in plan.bytes.items()),
    *([f"in the host's memory, a device: {planning.gigabytes(plan.on_host)}"] if plan.on_host else []),
    f"a step: {plan.sequences:,} sequences of {plan.tokens:,} tokens, {plan.work.useful / 1e12:,.4g} TFLOP,"
    f" {plan.work.executed / 1e12:,.4g} with what is recomputed",
    f"  at best  {plan.work.least:.3g} s ({plan.work.limit}): {plan.tokens_per_s(1.0):,.0f} tokens/s,"
    f" {plan.days(1.0):.3g} days for {plan.steps:,} steps",
    f"  expected {plan.work.least / EFFICIENCY.value:.3g} s at {100 * EFFICIENCY.value:.0f} % of that:"
    f" {plan.tokens_per_s(EFFICIENCY.value):,.0f} tokens/s, {plan.days(EFFICIENCY.value):.3g} days",
  ]
  cost = plan.cost(EFFICIENCY.value, watts=WATTS.value, price=PRICE.value)
  lines += [f"  {name} {value:,.4g}" for name, value in cost.items() if value is not None]
  if plan.collectives is not None:
    lines.append("collectives a step: " + ("none" if not plan.collectives else ""))
    lines += [
      f"  {kind:24} {count:>8,.0f} times {planning.gigabytes(size):>10} a device"
      for kind, (count, size) in plan.collectives.items()
    ]
  return "\n".join(line.rstrip() for line in lines)


def table(cells: Sequence[tuple[Hardware, int, planning.Plan | str]]) -> str:
  """Plans as Markdown; of hardware that a run does not divide over, the reason."""
  lines = [
    "| hardware | N | fits | GB a device | of | s a step at best | tokens/s at best | days at"
    f" {100 * EFFICIENCY.value:.0f} % | from |",
    "|---|---:|---|---:|---:|---:|---:|---:|---|",
  ]
  for row, passes, plan in cells:
    if isinstance(plan, str):
      lines.append(f"| {row.name} | {passes} | {plan} | | | | | | |")
      continue
    used = "" if plan.needed is None else f"{plan.needed / 1e9:.3g}"
    lines.append(
      f"| {row.name} | {passes} | {'yes' if plan.fits else 'no'} | {used} | {plan.memory / 1e9:.3g}"
      f" | {plan.work.least:.3g} | {plan.tokens_per_s(1.0):,.0f} | {plan.days(EFFICIENCY.value):.3g}"
      f" | {plan.source} |"
    )
  return "\n".join(lines)


def _write(text: str, values: Any) -> None:
  """Writes --out, if it was given: the text and, beside it, the same as JSON."""
  if OUT.value is None:
    return
  path = pathlib.Path(OUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  for suffix, content in ((".md", text), (".json", json.dumps(values, indent=2))):
    files.write_file(path.with_name(path.name + suffix), content + "\n")


def _as_json(plan: planning.Plan) -> dict[str, Any]:
  share = EFFICIENCY.value
  return plan.as_dict(share) | plan.cost(share, watts=WATTS.value, price=PRICE.value)


def _cell(row: Hardware, passes: int, plan: planning.Plan | str) -> dict[str, Any]:
  found = {"error": plan} if isinstance(plan, str) else _as_json(plan)
  return {"hardware": row.name, "passes": passes} | found


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  rows = [find(name) for name in cli.required("hardware", HARDWARE.value or None)]
  check(TABLE.value or len(rows) == 1, "--hardware", "takes one name without --table")
  check(not (TABLE.value and SEARCH.value), "--search", "says nothing beside --table; give one of the two")
  check(TABLE.value or not PASSES.value, "--passes", "says nothing without --table")
  passes = cli.whole_numbers("passes", PASSES.value)
  jax.config.update("jax_platforms", "cpu")
  planner = planning.Planner(CONFIG.path, values, minutes=None if SHAPES.value else MINUTES.value)
  planner.check_possible()
  if not (aot.available() or SHAPES.value) and any(row.chip.platform == "tpu" for row in rows):
    planning.say(aot.NO_COMPILER)
  if TABLE.value:
    cells: list[tuple[Hardware, int, planning.Plan | str]] = []
    for row in rows:
      for n in passes or [planner.asked.cfg.sleep.num_passes]:
        try:
          cells.append((row, n, planner.plan(row, {"sleep.num_passes": n})))
        except ConfigError as e:
          cells.append((row, n, str(e)))
        _write(table(cells), [_cell(*cell) for cell in cells])  # each may take minutes: none is lost
    print(table(cells))
    return cli.DONE
  (row,) = rows
  plan = planner.search(row) if SEARCH.value else planner.plan(row)
  text = report(plan)
  if plan.changes:
    text = f"fits with {' '.join(f'--config.{k}={v}' for k, v in plan.changes.items())}\n{text}"
  print(text)
  _write(text, _as_json(plan))
  return cli.DONE if plan.fits else cli.FAILED


if __name__ == "__main__":
  cli.run(main)
