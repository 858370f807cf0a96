"""All that a GPU must answer, in one command that can be stopped and started again: most valuable first.

    python -m benchmarks.gpu_once --minutes=12 --out=work/gpu_once
    python -m benchmarks.gpu_once --dry_run --size=tiny --out=work/dry      # every part, on a CPU

    kernel_errors    outputs and gradients of the gated delta rule against float64 (kernels.gpu_check)
    kernels_fla      its times beside flash-linear-attention's, where `fla` can be imported
    attention        each form of attention at the windows of figure 6: times, memory, errors
    figure_2a_t*     figure 2a whole: six depths, 40 M tokens each (experiments.rule110)
    figure_6         training throughput (benchmarks.throughput)
    generate         tokens a second of generation
    figure_2b_n*     figure 2b, N = 1 to 4, as far as time goes

Each part is a process in a time box of its own: asked to end when its time is up, and ended soon after. What
it has measured is added to OUT/gpu_once.jsonl at once. A second start, with the same OUT, skips what is done
and goes on with what is not, training from its newest checkpoint; a part that fails does not stop the next.
At the end OUT/gpu_once.md is written from the JSON lines. It needs no network and no package that training
does not need.

Exit code: 0 all parts are done, 1 one failed, 2 a mistake or no GPU, 3 some are not done yet: start it again.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sleep_jax
from sleep_jax.benchmarks import boxes, command, tables
from sleep_jax.benchmarks.boxes import Part
from sleep_jax.config import check
from sleep_jax.experiments import cli
from sleep_jax.kernels.measure import flags
from sleep_jax.runtime import files, metrics

ROOT = pathlib.Path(sleep_jax.__file__).parents[1]  # from here `sleep_jax` is found, wherever we were called
NAME = "gpu_once"
GRACE_S = 20.0  # of a box: a run that is asked to end saves a checkpoint, after the steps of a dispatch
FACTS_S = 120.0  # for the process that says what the machine is
DEPTHS, PASSES = (4, 8, 10, 12, 14, 16), (1, 2, 3, 4)  # t of figure 2a, N of figure 2b
# Of a figure at the size `tiny`: the same commands on the smallest preset.
SMALLEST = (
  *("train.steps=2", "train.steps_per_dispatch=1", "train.log_every=1", "train.eval_every=2"),
  *("train.save_every=1", "train.batch_size=4", "train.eval_sequences=4", "train.eval_batch_size=4"),
)


def parts(out: pathlib.Path, size: str) -> list[Part]:
  """All parts, most valuable first; their weights are seconds of twelve minutes.

  Args:
    out: where they write.
    size: `full` or `tiny`.
  """
  tiny = size == "tiny"
  preset = "rule110.py:tiny" if tiny else "rule110.py:{}"
  small = [f"--config.{change}" for change in SMALLEST] if tiny else []

  def own(name: str, weight: float) -> Part:
    """One of `benchmarks.gpu_parts`."""
    rows = out / "rows" / f"{name}.jsonl"
    flags = [f"--part={name}", f"--size={size}", f"--out={rows}"]
    return Part(name, _module("benchmarks.gpu_parts", *flags), weight, functools.partial(_lines, rows))

  def run(name: str, figure: str, folder: str, change: str, weight: float) -> Part:
    """One training run of a figure, under the name that its sweep gives it."""
    workdir = out / figure / folder
    flags = [f"--config={preset.format(figure)}", f"--config.{change}", "--config.seed=0", *small]
    flags += [f"--workdir={workdir}", "--tensorboard=False"]
    rows = functools.partial(_training, workdir)
    return Part(name, _module("experiments.rule110", *flags), weight, rows)

  speeds = out / "figure_6"
  figure_6 = _module("benchmarks.throughput", f"--size={size}", f"--out={speeds}")
  depths, passes = ((1,), (1,)) if tiny else (DEPTHS, PASSES)
  return [
    own("kernel_errors", 60),
    own("kernels_fla", 60),
    own("attention", 50),
    *(
      run(f"figure_2a_t{t:02}", "fig2a", f"t{t:02}_n1_s0", f"data.rollout_steps={t}", 240 / len(depths))
      for t in depths
    ),
    Part("figure_6", figure_6, 180, functools.partial(_lines, speeds / "throughput.jsonl")),
    own("generate", 30),
    *(
      run(f"figure_2b_n{n}", "fig2b", f"t32_n{n}_s0", f"sleep.num_passes={n}", 100 / len(passes))
      for n in passes
    ),
  ]


def _module(module: str, *flags: str) -> list[str]:
  return [sys.executable, "-m", f"sleep_jax.{module}", *flags]


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a part that writes JSON lines; none if it did not come so far."""
  return command.Journal(path, ()).rows


def _training(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """One row of a training run: how far it has come, its accuracy and its speed."""
  path = workdir / "metrics.jsonl"
  rows = metrics.read(path) if path.exists() else []
  kinds = {row["kind"]: row for row in rows}  # the newest of each
  if not kinds:
    return []
  newest, tested = kinds.get("train", {}), kinds.get("eval", {})
  return [
    {
      "run": workdir.name,
      "step": newest.get("step"),
      "tokens": newest.get("tokens"),
      "tokens/s": newest.get("tokens_per_s"),
      "of peak": newest.get("mfu"),
      "loss": newest.get("loss"),
      "tested at step": tested.get("step"),
      "exact": tested.get("exact"),
      "per bit": tested.get("bit"),
      "best constant": tested.get("const_exact"),
    }
  ]


def environment(out: pathlib.Path, dry_run: bool) -> dict[str, str]:
  """What the processes are started with: our modules, programs that are kept, and in a dry run a CPU."""
  search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  quiet = {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
  kept = {"JAX_COMPILATION_CACHE_DIR": str(out / "programs")}
  kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
  given = {name: value for name, value in kept.items() if name not in os.environ}
  return quiet | given | ({"JAX_PLATFORMS": "cpu"} if dry_run else {})


def main(argv: Sequence[str] | None = None) -> int:
  return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
  args = _arguments(argv)
  begun = time.monotonic()
  check(args.size == "tiny" or not args.dry_run, "--dry_run", "runs on a CPU and needs --size=tiny")
  out = command.folder(args.out).absolute()
  journal = command.Journal(out / f"{NAME}.jsonl", boxes.KEYS)
  asked = {"size": args.size, "dry_run": args.dry_run}
  for row in journal.rows:
    check(
      row["asked"] == asked,
      "--out",
      f"{files.shown(out)} holds results of other settings, {row['asked']}; name another folder",
    )
  for name in ("logs", "rows"):
    (out / name).mkdir(exist_ok=True)
  around = environment(out, args.dry_run)
  wanted = [part for part in parts(out, args.size) if group(part) in args.parts]
  wanted = [dataclasses.replace(part, environment=around) for part in wanted]
  with boxes.until_signal() as stop:
    facts = _facts(out, around, stop)
    if stop.is_set():
      return cli.STOPPED
    check(
      args.dry_run or facts["platform"] == "gpu",
      "JAX",
      f"sees no GPU here but {facts['platform']}; --dry_run --size=tiny goes through every part on a CPU",
    )
    left = 60 * args.minutes - (time.monotonic() - begun)
    boxes.run_all(wanted, journal, out / "logs", seconds=left, grace_s=GRACE_S, asked=asked, stop=stop)
  text = page(journal.rows, [part.name for part in wanted], facts, asked)
  files.write_file(out / f"{NAME}.md", text)
  print(text)
  return _code(journal.rows, [part.name for part in wanted])


def group(part: Part) -> str:
  """The name that `--parts` has for a part: a figure is several runs."""
  return part.name.rpartition("_")[0] if part.name.startswith("figure_2") else part.name


GROUPS = tuple(dict.fromkeys(group(part) for part in parts(pathlib.Path(), "full")))


def _facts(out: pathlib.Path, around: Mapping[str, str], stop: Any) -> dict[str, Any]:
  """What the machine is, found out by a process of its own: this one never holds the GPU.

  Raises:
    ConfigError: if it fails, unless the command was stopped.
  """
  rows, log = out / "rows" / "machine.jsonl", out / "logs" / "machine.log"
  line = _module("benchmarks.gpu_parts", "--part=machine", f"--out={rows}")
  part = Part("machine", line, 1, functools.partial(_lines, rows), around)
  ended = boxes.run_child(part, log, box_s=FACTS_S, grace_s=1.0, stop=stop)
  found = _lines(rows)
  if stop.is_set():
    return {}
  check(ended.code == 0 and bool(found), "JAX", f"cannot be started: see {files.shown(log)}")
  line = " ".join(["python -m benchmarks.gpu_once", *sys.argv[1:]])
  return found[-1] | {"command": f"`{line}`"}


def _code(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
  states = {name: row["state"] for name, row in boxes.latest(rows).items()}
  if any(states.get(name) == boxes.FAILED for name in names):
    return cli.FAILED
  return cli.DONE if all(states.get(name) == boxes.DONE for name in names) else cli.STOPPED


def page(
  rows: Sequence[Mapping[str, Any]],
  names: Sequence[str],
  facts: Mapping[str, Any],
  asked: Mapping[str, Any],
) -> str:
  """The results as Markdown, from the JSON lines alone.

  Args:
    rows: lines with `boxes.KEYS`.
    names: of all parts, in order.
    facts: of the machine.
    asked: the size, and whether it was a dry run.
  """
  newest = boxes.latest(rows)
  lines = ["# What a GPU answered" if not asked["dry_run"] else "# A dry run: no number here is of a GPU", ""]
  lines += [tables.markdown([_state(name, newest.get(name)) for name in names]), ""]
  for title, prefix in _SECTIONS:
    here = [newest[name] for name in names if name in newest and name.startswith(prefix)]
    lines += [f"## {title}", "", *_section(here), ""]
  lines += ["## How it was measured", "", *(f"* {name}: {value}" for name, value in facts.items())]
  lines += [f"* size: {asked['size']}", *(f"* {note}" for note in NOTES)]
  return "\n".join(lines) + "\n"


_SECTIONS = (
  ("Errors of the kernels", "kernel_errors"),
  ("Kernels beside flash-linear-attention", "kernels_fla"),
  ("Forms of attention", "attention"),
  ("Figure 2a: accuracy by depth, one pass", "figure_2a"),
  ("Figure 6: training throughput", "figure_6"),
  ("Generation", "generate"),
  ("Figure 2b: accuracy by N, as far as time went", "figure_2b"),
)
NOTES = (
  "Errors are relative to the largest entry of an array; 0.02 is tolerated for bfloat16.",
  "Times of kernels are wall times of calls queued back to back; `ns` is for one token of one head.",
  "`stopped` parts have used up their time: start the command again, with the same folder, to continue.",
  "Draw the figures: `python -m experiments.figures --runs='OUT/fig2a/*' --figure=2a`; likewise of `fig2b`.",
)


def _state(name: str, row: Mapping[str, Any] | None) -> dict[str, Any]:
  columns = ("state", "code", "seconds", "box_s", "ended")
  if row is None:
    return {"part": name, "state": "not begun"} | dict.fromkeys(columns[1:])
  return {"part": name} | {column: row[column] for column in columns}


def _section(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  found = [row for line in rows for row in line["rows"]]
  yield tables.markdown(command.same_keys(found)) if found else "Nothing was measured."
  for line in rows:
    if line["state"] == boxes.FAILED:
      last = line["tail"].strip().splitlines()[-1:] or ["it printed nothing"]
      yield f"\n`{line['part']}` failed with exit code {line['code']}: {last[0]}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.gpu_once", __doc__)
  parser.add_argument("--minutes", type=flags.above_zero, default=12.0, help="for all parts together")
  parser.add_argument(
    "--parts", type=command.choices(GROUPS), default=GROUPS, help=f"some of {', '.join(GROUPS)}; none: all"
  )
  parser.add_argument("--size", type=command.choice(("full", "tiny")), default="full", help="full or tiny")
  parser.add_argument("--dry_run", action="store_true", help="on a CPU, to see that every part runs")
  parser.add_argument("--out", default="work/gpu_once", help="folder of the results; the same one goes on")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main())
