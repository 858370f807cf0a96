"""A disk that is full at any place, files that are none, links that lead elsewhere: nothing saved is lost."""

import contextlib
import errno
import os
import pathlib
import random
import resource
import shutil
import socket
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.runtime import files, manifest, metrics, workdir
from sleep_jax.runtime.checkpoint import Checkpoints
from sleep_jax.runtime.checkpoint_files import CheckpointFiles
from tests import forked

# One line, and not the user's mistake.
FAILURES = (files.RunFailedError,)


def state(step):
  return {"w": jnp.full((4, 3), step, jnp.float32), "n": jnp.int32(step)}


def live(path, first, last, said):
  """A run's life from its start to its end, that saves each step; `said` takes the steps that it calls
  saved.
  """
  with workdir.prepare(path, {"seed": 1}) as run:
    with (
      metrics.Writer(run.path, tensorboard=False, report=lambda line: None) as writer,
      Checkpoints(run.checkpoints, config=run.config, keep=2, report=lambda line: None) as saved,
    ):
      restored = saved.restore(state(0))
      done = restored[0] if restored else 0
      assert done >= max(said, default=0), "a step that was called saved is gone"
      if restored:
        np.testing.assert_array_equal(restored[1]["w"], state(done)["w"])
      writer.truncate_after(done)
      for step in range(max(first, done + 1), last + 1):
        writer.write({"kind": "train", "step": step, "loss": 0.5})
        saved.save(step, state(step))
        saved.wait()
        said += saved.poll()


class FullDisk:
  """Makes the i-th call that writes fail, as the system does where there is no space; counts them."""

  CALLS = ("open", "write", "pwrite", "fsync", "replace", "rename", "mkdir", "ftruncate")

  def __init__(self, patch, below, number=errno.ENOSPC):
    self.calls, self.full_at, self.failed = [], None, False
    for name in self.CALLS:
      patch.setattr(os, name, self._watched(name, getattr(os, name), str(below), number))

  def _watched(self, name, do, below, number):
    def call(target, *args, **kw):
      flags = args[0] if args else kw.get("flags", 0)
      if name != "open" or flags & os.O_CREAT:
        where = f"/proc/self/fd/{target}" if isinstance(target, int) else os.fspath(target)
        if str(os.path.realpath(where)).startswith(below):
          self.calls.append((name, pathlib.Path(os.path.realpath(where)).name))
          if self.full_at is not None and len(self.calls) > self.full_at:
            self.failed = True
            raise OSError(number, os.strerror(number))
      return do(target, *args, **kw)

    return call


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  ("number", "tried"),
  [(errno.ENOSPC, 5), *(pytest.param(n, None, marks=pytest.mark.slow) for n in (errno.ENOSPC, errno.EDQUOT))],
)
def test_a_disk_that_is_full_from_any_call_on_is_one_line_and_loses_nothing(
  tmp_path, monkeypatch, number, tried
):
  folder = tmp_path / "runs"
  folder.mkdir()
  with monkeypatch.context() as patch:
    disk = FullDisk(patch, folder, number)
    live(folder / "whole", 1, 3, [])
    places = list(disk.calls)
  assert {"write", "fsync", "replace", "mkdir"} <= {name for name, _ in places}
  assert {
    ".config.json.tmp",
    ".env.json.tmp",
    ".in_flight.json.tmp",
    ".manifest.json.tmp",
    "metrics.jsonl",
  } <= {where for _, where in places}
  all_places = range(len(places))
  for place in random.Random(0).sample(all_places, tried) if tried else all_places:
    run, said = folder / str(place), []
    with monkeypatch.context() as patch:
      disk = FullDisk(patch, folder, number)
      disk.full_at = place
      retires = places[place] in (
        ("mkdir", ".trash"),
        ("replace", "1"),
      )  # all is saved, a step too many stays
      with contextlib.nullcontext() if retires else pytest.raises(FAILURES) as e:
        live(run, 1, 3, said)
      assert disk.failed
    assert e is None or str(e.value).isprintable(), (places[place], e.value)
    live(run, 1, 3, said)  # there is space again: the same command goes on
    assert said[-1] == 3
    with Checkpoints(run / "checkpoints", read_only=True) as saved:
      assert saved.steps()[-2:] == [2, 3]
    rows = metrics.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_disk_fills_ends_with_1_and_one_line_and_goes_on(tmp_path):
  arguments = (
    *("--config=experiments/configs/rule110.py:tiny", f"--workdir={tmp_path}/run", "--tensorboard=False"),
    *("--config.train.steps=60", "--config.train.save_every=20", "--config.train.eval_every=60"),
  )
  with forked.Experiment("experiments.rule110", tmp_path) as experiment:
    pid = experiment.start(*arguments)
    while not (tmp_path / "run" / "checkpoints" / "20" / "manifest.json").exists():
      time.sleep(0.01)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16_000, 16_000))  # what it prints fits, the weights do not
    ended = experiment.wait()
    assert ended.code == 1, ended
    assert ended.err.startswith("failed: ") or ended.err.startswith("error: "), ended.err
    assert len(ended.err.splitlines()) == 1
    assert "Traceback" not in ended.out + ended.err
    again = experiment.run(*arguments)
    assert again.code == 0, again
    assert "resuming at step 20 of 60" in again.out or "resuming at step 40 of 60" in again.out


# What is no file.


def make(kind, path, outside):
  """Puts something in a file's place."""
  with contextlib.suppress(FileNotFoundError):
    path.unlink()
  path.parent.mkdir(parents=True, exist_ok=True)
  if kind == "folder":
    path.mkdir()
    (path / "x").write_text("x")
  elif kind == "pipe":
    os.mkfifo(path)
  elif kind == "socket":
    with socket.socket(socket.AF_UNIX) as s:
      at = os.open(path.parent, os.O_RDONLY)
      s.bind(f"/proc/self/fd/{at}/{path.name}")
      os.close(at)
  elif kind == "link":
    path.symlink_to(outside)
  elif kind == "link_to_nothing":
    path.symlink_to(outside.with_name("new"))
  elif kind == "link_to_a_device":
    path.symlink_to("/dev/zero")
  elif kind == "hard_link":
    os.link(outside, path)
  else:
    raise ValueError(kind)


NO_FILE = ("folder", "pipe", "socket", "link", "link_to_nothing", "link_to_a_device")


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp("steps") / "c"
  with Checkpoints(folder) as saved:
    for step in (1, 2, 3):
      saved.save(step, state(step), block=True)
  return folder


def newest(folder):
  """The step that a run would go on from, and what was said about newer ones. Nothing is changed."""
  said = []
  steps = CheckpointFiles(folder, said.append, read_only=True)
  steps.open()
  return steps.choose(), said


MENDED = ("unreadable", "does not work")  # and later it does


@pytest.mark.parametrize("kind", [*NO_FILE, "gone", *MENDED])
def test_one_file_that_cannot_be_read_does_not_block_older_steps(tmp_path, three_steps, monkeypatch, kind):
  outside = tmp_path / "outside"
  outside.write_text("{}")
  names = [p.relative_to(three_steps / "3") for p in (three_steps / "3").rglob("*") if p.is_file()]
  assert len(names) > 3
  for i, name in enumerate(names):
    folder = tmp_path / str(i)
    shutil.copytree(three_steps, folder)
    path = folder / "3" / name
    with monkeypatch.context() as patch:
      if kind == "gone":
        path.unlink()
      elif kind in MENDED:  # root may read all, so the system's answer is made up
        number, do = errno.EACCES if kind == "unreadable" else errno.EIO, os.open

        def refuse(target, *args, path=path, number=number, do=do, **kw):
          if not isinstance(target, int) and os.path.realpath(target) == str(path):
            raise OSError(number, os.strerror(number), str(target))
          return do(target, *args, **kw)

        patch.setattr(os, "open", refuse)
      else:
        make(kind, path, outside)
      step, said = newest(folder)
      assert step == 2, (name, said)
      assert len(said) <= 1
      assert all(line.startswith("step 3 is damaged (") and line.isprintable() for line in said), said
    if name.name in ("manifest.json", "_METADATA"):  # some of them: a run goes on from there
      with Checkpoints(folder, report=lambda line: None) as saved:
        step, got = saved.restore(state(0))
        assert step == (3 if kind in MENDED else 2)
        np.testing.assert_array_equal(got["w"], state(step)["w"])
        assert saved.save(4, state(4), block=True)
  assert outside.read_text() == "{}"


@pytest.mark.parametrize("kind", NO_FILE)
def test_what_stands_in_the_place_of_the_note_blocks_nothing(tmp_path, three_steps, kind):
  folder, outside = tmp_path / "c", tmp_path / "outside"
  outside.write_text('{"step": 3}')
  shutil.copytree(three_steps, folder)
  make(kind, folder / "in_flight.json", outside)
  with Checkpoints(folder, report=lambda line: None) as saved:
    assert saved.restore(state(0))[0] == 3
    assert saved.save(4, state(4), block=True)
    assert saved.steps() == [2, 3, 4]
  assert outside.read_text() == '{"step": 3}'
  assert not (tmp_path / "new").exists()


# Links: none is followed to write.

NAMES = (
  *("config.json", "env.json", "metrics.jsonl", "lock", ".config.json.tmp", ".env.json.tmp"),
  *(".metrics.jsonl.tmp", ".lock.tmp", "checkpoints/in_flight.json", "checkpoints/.in_flight.json.tmp"),
  *("checkpoints/1/manifest.json", "checkpoints/1/.manifest.json.tmp"),
)
MORE = (
  "tb/events",
  "checkpoints/2",
  "checkpoints/.trash",
  "checkpoints/aside",
  "checkpoints",
  "tb",
  "figures",
)
KINDS = ("link_to_nothing", "hard_link", "link", "link_to_a_folder")


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "run"
  live(folder, 1, 1, [])
  return folder


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    pytest.param(name, kind, marks=[pytest.mark.slow] * (name in MORE or kind not in KINDS[:2]))
    for name in NAMES + MORE
    for kind in KINDS
  ],
)
def test_no_link_is_followed_to_write_outside(tmp_path, one_step, name, kind):
  folder, outside, elsewhere = tmp_path / "run", tmp_path / "outside", tmp_path / "elsewhere"
  shutil.copytree(one_step, folder)
  shutil.copytree(one_step, elsewhere)
  path = folder / name
  if path.is_file():
    shutil.copy(path, outside)  # the right content, which is not refused
  else:
    outside.write_text('{"seed": 1}\n')
  if path.is_dir():
    shutil.rmtree(path)
  if kind == "link_to_a_folder":
    make("link", path, elsewhere / name)
  else:
    make(kind, path, outside)
  before = everything(outside, elsewhere)
  with contextlib.suppress(workdir.WorkdirError, manifest.CheckpointError, metrics.MetricsError, *FAILURES):
    live(folder, 2, 2, [])
  assert everything(outside, elsewhere) == before
  assert sorted(os.listdir(tmp_path)) == ["elsewhere", "outside", "run"]


def everything(*paths):
  """All files there are, with what they hold, and when it was last changed."""
  found = {}
  for top in paths:
    for path in [top, *top.rglob("*")]:
      info = path.lstat()
      found[str(path)] = (info.st_mode, info.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
  return found


@pytest.mark.parametrize("name", ["manifest.json", ".manifest.json.tmp"])
@pytest.mark.parametrize("kind", ["link", "link_to_nothing", "hard_link"])
def test_a_manifest_is_never_written_through_a_link(tmp_path, name, kind):
  folder, outside = tmp_path / "3", tmp_path / "outside"
  folder.mkdir()
  outside.write_text("mine")
  (folder / "data").write_text("data")
  make(kind, folder / name, outside)
  manifest.write_manifest(folder, {"w": "float32[1]"})
  assert outside.read_text() == "mine"
  assert not (tmp_path / "new").exists()
  assert (folder / "manifest.json").lstat().st_nlink == 1
  assert list(manifest.read_manifest(folder)["files"]) == ["data"]


# The user's repository.


def test_the_users_git_is_not_locked(tmp_path, monkeypatch):
  """A status that refreshes the index takes its lock, and a commit of the user's at that moment fails."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

  def git(*words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
      ["git", *identity, *words], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  git("init", "-q")
  (tmp_path / "code.py").write_text("1")
  git("add", ".")
  git("commit", "-q", "-m", "one")
  commit, index = git("rev-parse", "HEAD"), tmp_path / ".git" / "index"
  monkeypatch.setattr(workdir, "__file__", str(tmp_path / "code.py"))
  os.utime(tmp_path / "code.py", (1e9, 1e9))  # the index no longer knows whether it was changed
  before = index.read_bytes()
  assert workdir.git_state() == {"commit": commit, "dirty": False}
  assert index.read_bytes() == before
  (tmp_path / "result.csv").write_text("1")  # what git does not know is not the code
  assert workdir.git_state() == {"commit": commit, "dirty": False}
  (tmp_path / ".git" / "index.lock").touch()  # the user is at it
  assert workdir.git_state() == {"commit": commit, "dirty": False}
  (tmp_path / ".git" / "index.lock").unlink()
  git("status")
  assert index.read_bytes() != before  # or this test would see nothing
  (tmp_path / "code.py").write_text("2")
  assert workdir.git_state() == {"commit": commit, "dirty": True}
