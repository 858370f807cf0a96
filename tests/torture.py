"""Kills runs at random moments, goes on with them, and compares their ends with runs that nobody killed.

    python -m tests.torture --kills=200

A campaign is one run that is killed (SIGKILL) several times and then finished: Rule 110, whose data the
device makes, GSM-Infinite, whose data the host feeds, or a sweep, whose parent is killed while its runs go
on. Half of the kills come at any moment from the start on, the others while a step is being saved. After
each kill every step that was said to be saved must be there, byte for byte what its manifest says, and the
rows up to it must be those of the whole run. At the end the rows but for times, and every byte of the last
state, must be.

One line a kill. Exit 1 at the first difference, with the command that repeats the campaign: the moments are
drawn from its seed, as far as a machine's speed lets a moment be repeated.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import app, flags, logging

from sleep_jax.runtime import metrics
from sleep_jax.runtime.checkpoint import Checkpoints
from sleep_jax.runtime.checkpoint_files import CheckpointFiles
from sleep_jax.runtime.files import read_json
from tests import forked

KILLS = flags.DEFINE_integer("kills", 200, "in all", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the first campaign; the next one has the next", lower_bound=0)
EACH = flags.DEFINE_integer("each", 12, "of one run, at most", lower_bound=1)

TIMED = re.compile("wall_s|cpu_s|tokens_per_s|data_wait|.*_ms_per_.*")  # what the clock says, in a row
SLOW_EACH = 3  # kills of a sweep, whose runs import everything anew at each start
WAIT_S = 600.0

_TRAIN = "--config.train."
_OFTEN = (f"{_TRAIN}steps=60", f"{_TRAIN}save_every=5", f"{_TRAIN}eval_every=30")
_RULE110 = "--config=experiments/configs/rule110.py:tiny"
KINDS = {
  "rule110": (
    "experiments.rule110",
    (_RULE110, *_OFTEN, "--tensorboard=False", f"{_TRAIN}eval_sequences=16", f"{_TRAIN}eval_batch_size=16"),
  ),
  "gsm_infinite": (
    "experiments.gsm_infinite",
    (
      "--config=experiments/configs/gsm_infinite.py:tiny",
      *(*_OFTEN, "--tensorboard=False"),
      *(f"{_TRAIN}batch_size=2", f"{_TRAIN}log_every=5"),
      *(f"{_TRAIN}eval_sequences=4", f"{_TRAIN}eval_batch_size=4", "--config.data.tokenizer_texts=8"),
      *("--config.model.blocks=('gdn',)", "--config.sleep.last_block=1", "--config.sleep.num_passes=1"),
    ),
  ),
  "sweep": (
    "experiments.sweep",
    (
      *(_RULE110, "--jobs=2", *_OFTEN),
      *(f"{_TRAIN}eval_sequences=16", f"{_TRAIN}eval_batch_size=16"),
    ),
  ),
}
ORDER = ("rule110", "gsm_infinite", "rule110", "gsm_infinite", "sweep")


class DifferenceError(AssertionError):
  """What was promised did not hold."""


class Torture:
  """Campaigns, and the whole runs that they are compared with. A context manager.

  Args:
    scratch: a folder for all of it.
    report: takes one line a kill.
  """

  def __init__(self, scratch: pathlib.Path, report: Callable[[str], None]):
    self.scratch, self._report = scratch, report
    self.kills, self.in_saves, self.campaigns = 0, 0, 0
    self._whole: dict[str, tuple[pathlib.Path, float]] = {}  # of each kind: its folder, how long it took
    self._servers: dict[str, forked.Experiment] = {}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for server in self._servers.values():
      server.__exit__()

  def whole(self, kind: str) -> tuple[pathlib.Path, float]:
    """The folder of a run that nobody killed, and the seconds that it took, all it compiles being cached."""
    if kind not in self._whole:
      for name in ("first", "whole"):  # the first one fills the cache of compiled programs
        folder, began = self.scratch / f"{kind}_{name}", time.monotonic()
        ended = self._server(kind).run(*_arguments(kind, folder))
        if ended.code:
          raise DifferenceError(f"{kind}: the run that nobody killed ended with {ended.code}: {ended.err}")
      self._whole[kind] = folder, time.monotonic() - began
      _same_ends(self.scratch / f"{kind}_first", folder)
    return self._whole[kind]

  def campaign(self, seed: int, most: int) -> None:
    """One run, killed up to `most` times and finished.

    Raises:
      DifferenceError: if it is not what the run that nobody killed is.
    """
    kind, rng = ORDER[seed % len(ORDER)], random.Random(seed)
    whole, took = self.whole(kind)
    folder = self.scratch / f"{kind}_{seed}"
    left = min(most, SLOW_EACH) if kind == "sweep" else most
    try:
      while left and self._killed(kind, folder, whole, took, rng):
        left -= 1
      ended = self._server(kind).run(*_arguments(kind, folder))
      _check(ended.code == 0, f"it cannot be finished: exit code {ended.code}, {ended.err.strip()}")
      _same_ends(folder, whole)
    except DifferenceError as e:
      repeat = f"python -m tests.torture --seed={seed} --kills={most} --each={most}"
      raise DifferenceError(f"{kind}, seed {seed}, in {folder}: {e}; to repeat it: {repeat}") from e
    self.campaigns += 1
    self._report(f"{kind}, seed {seed}: finished, equal to the whole run to the byte")
    shutil.rmtree(folder)

  def _killed(self, kind, folder, whole, took, rng) -> bool:
    """Starts the run and kills it; False if it was faster, and is done."""
    server, began, begun_ns = self._server(kind), time.monotonic(), time.time_ns()
    pid = server.start(*_arguments(kind, folder))
    wants_save = rng.random() < 0.5
    moment, saves, wait = rng.uniform(0, 0.9 * took), rng.randint(1, 2), rng.uniform(0, 0.05)
    notes = sum(1 for _ in _saves(folder, pid, saves)) if wants_save else 0
    if wants_save:
      time.sleep(wait * (notes == saves))
    else:
      _sleep(moment, pid)
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
    after, ended = time.monotonic() - began, server.wait()
    _wait_until_free(folder)
    if ended.code != -signal.SIGKILL:
      _check(ended.code == 0, f"it ended by itself with {ended.code}: {ended.err.strip()}")
      return False
    _check(not ended.err.strip(), f"it complained: {ended.err.strip()}")
    saving, told = 0, []
    for run in _runs(folder):
      note = run / "checkpoints" / "in_flight.json"
      saving += os.path.lexists(note) and note.lstat().st_mtime_ns >= begun_ns  # not of an earlier start
      said = _acknowledged(ended.out, run.name if kind == "sweep" else None)
      there = _on_disk(run / "checkpoints")
      told.append(f"{said} said, {there} there")
      _check(there >= said, f"step {said} was said to be saved in {run}, the newest whole one is {there}")
      _same_rows(run, whole / run.relative_to(folder), there)
    self.kills += 1
    self.in_saves += saving > 0
    what = "in a save" if saving else "between saves"
    self._report(f"kill {self.kills}: {kind}, after {after:.2f} s, {what}; steps saved: {'; '.join(told)}")
    return True

  def _server(self, kind: str) -> forked.Experiment:
    if kind not in self._servers:
      cache = self.scratch / "cache"  # one of our own: a kill may come while it is written
      changes = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
      out = self.scratch / f"out_{kind}"
      out.mkdir()
      self._servers[kind] = forked.Experiment(KINDS[kind][0], out, **changes)
    return self._servers[kind]


def _arguments(kind: str, folder: pathlib.Path) -> tuple[str, ...]:
  return (*KINDS[kind][1], f"--workdir={folder}")


def _runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """The workdirs at or below a folder, as far as they have begun."""
  found = [folder, *(sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ())]
  return [run for run in found if (run / "config.json").exists()]


def _sleep(seconds: float, pid: int) -> None:
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline and forked.Experiment.alive(pid):
    time.sleep(0.005)


def _saves(folder: pathlib.Path, pid: int, count: int) -> Iterator[str]:
  """The notes of steps that begin to be saved below a folder, until there were `count` or the run ended."""
  seen = {str(p): p.stat().st_mtime_ns for p in folder.glob("**/in_flight.json")}
  deadline = time.monotonic() + WAIT_S
  while count and forked.Experiment.alive(pid):
    _check(time.monotonic() < deadline, "it hangs")
    for note in ("checkpoints/in_flight.json", "*/checkpoints/in_flight.json"):
      for path in folder.glob(note):
        with contextlib.suppress(FileNotFoundError):
          written = path.stat().st_mtime_ns
          if count and seen.get(str(path)) != written:
            seen[str(path)], count = written, count - 1
            yield str(path)
    time.sleep(0.001)


def _wait_until_free(folder: pathlib.Path) -> None:
  """Waits for the runs of a sweep whose parent is gone: each ends at its next line, or when it is done."""
  deadline = time.monotonic() + WAIT_S
  for run in _runs(folder):
    if not (run / "lock").exists():
      continue
    with open(run / "lock") as lock:
      while True:
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
          break
        except BlockingIOError:
          _check(time.monotonic() < deadline, f"{run} is still in use")
          time.sleep(0.05)


def _acknowledged(said: str, name: str | None) -> int:
  """The newest step that a run said was saved; of a sweep, one run's lines begin with its name."""
  lines = said.splitlines(keepends=True)
  if name is not None:
    lines = [
      line.split(None, 1)[1] for line in lines if line.split(None, 1)[:1] == [name] and " " in line.strip()
    ]
  return max((int(m[1]) for line in lines if (m := re.fullmatch(r"saved step (\d+)\n", line))), default=0)


def _on_disk(checkpoints: pathlib.Path) -> int:
  """The newest step whose files are all what its manifest says; nothing is changed."""
  files = CheckpointFiles(checkpoints, lambda line: _check(False, line), read_only=True)
  files.open()
  return files.choose() or 0


def _same_ends(run: pathlib.Path, whole: pathlib.Path) -> None:
  """Raises if the rows of a finished run, or its last state, are not those of another one."""
  _check([r.name for r in _runs(run)[1:]] == [r.name for r in _runs(whole)[1:]], "some runs are missing")
  for one, other in zip(_runs(run), _runs(whole), strict=True):
    _same_rows(one, other, None)
    got, want = _last_state(one), _last_state(other)
    _check(got.keys() == want.keys(), f"{one}: its state has other parts")
    for name in want:
      _check(got[name] == want[name], f"{one}: {name} of the last state differs")


def _same_rows(run: pathlib.Path, whole: pathlib.Path, upto: int | None) -> None:
  """Raises if rows differ, times apart: all, or those of training and of tests up to a step."""
  got, want = _rows(run, upto), _rows(whole, upto)
  for a, b in zip(got, want, strict=False):
    _check(a == b, f"a row of {run} is {a}, in the whole run {b}")
  begins_anew = upto == 0 and not got  # killed before the row of its first test, and nothing was saved
  _check(
    len(got) == len(want) or begins_anew,
    f"{run} has {len(got)} rows up to step {upto}, the whole run {len(want)}",
  )


def _rows(run: pathlib.Path, upto: int | None) -> list[str]:
  path = run / "metrics.jsonl"
  rows = metrics.read(path) if path.exists() else []
  if upto is not None:  # the rows of a run's end come after its last checkpoint
    rows = [row for row in rows if row["step"] <= upto and row["kind"] in ("train", "eval")]
  return [json.dumps({name: x for name, x in row.items() if not TIMED.fullmatch(name)}) for row in rows]


def _last_state(run: pathlib.Path) -> dict[str, bytes]:
  """Every array of the newest checkpoint: its type and its bytes."""
  with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
    step = checkpoints.latest_step
    tree = read_json(run / "checkpoints" / str(step) / "manifest.json")["tree"]
    found = checkpoints.restore({path: _abstract(told) for path, told in tree.items()})
  plain = {
    path: jax.random.key_data(x) if tree[path].startswith("key") else x for path, x in found[1].items()
  }
  return {path: f"{tree[path]} {step} ".encode() + np.asarray(x).tobytes() for path, x in plain.items()}


def _abstract(told: str) -> jax.ShapeDtypeStruct:
  """What a manifest says of an array, `float32[2,3]`, as a type."""
  dtype, _, sizes = told.removesuffix("]").partition("[")
  shape = tuple(int(n) for n in sizes.split(",") if n)
  if dtype.startswith("key"):
    return jax.ShapeDtypeStruct(shape, jax.eval_shape(lambda: jax.random.key(0)).dtype)
  return jax.ShapeDtypeStruct(shape, dtype)


def _check(holds: bool, otherwise: str) -> None:
  if not holds:
    raise DifferenceError(" ".join(otherwise.split()))


def main(argv: list[str]) -> int:
  del argv
  logging.set_verbosity(logging.ERROR)

  def report(line):
    print(line, flush=True)

  began, seed = time.monotonic(), SEED.value
  scratch = pathlib.Path(tempfile.mkdtemp(prefix="torture_"))
  try:
    with Torture(scratch, report) as torture:
      while torture.kills < KILLS.value:
        torture.campaign(seed, min(EACH.value, KILLS.value - torture.kills))
        seed += 1
  except DifferenceError as e:  # what is left of it stays, to be looked at
    report(f"DIFFERENCE after {torture.kills} kills: {e}")
    return 1
  shutil.rmtree(scratch)
  report(
    f"{torture.kills} kills, {torture.in_saves} of them in a save, over {torture.campaigns} runs and sweeps:"
    f" all ends equal to the byte, 0 acknowledged steps lost ({time.monotonic() - began:.0f} s)"
  )
  return 0


if __name__ == "__main__":
  app.run(main)
