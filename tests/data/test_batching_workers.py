"""Batches from worker processes: the same in the same order, nothing made twice, and a death is heard."""

import dataclasses
import os
import pathlib
import signal

import numpy as np
import pytest
from absl import flags

from sleep_jax.data import batching
from sleep_jax.data.batching import BatchPlan, CutConfig, Example, WorkerError
from sleep_jax.data.gsm_infinite import task

CUT = CutConfig(max_tokens=40, answer_tokens=2, tails=(4,), bucket_batches=3)
STEPS, BATCH, GROUP = 12, 4, 12  # a group holds 3 batches of 4


@dataclasses.dataclass(frozen=True)
class Logged:
  """Example i; which were made stands in a file, whoever made them. The process that makes `fatal` dies."""

  log: str
  fatal: int = -1
  bad: int = -1

  def __len__(self):
    return 10_000

  def __getitem__(self, i):
    if i == self.fatal:
      os.kill(os.getpid(), signal.SIGKILL)
    if i == self.bad:
      raise OSError("the disk is gone")
    with open(self.log, "a") as file:
      file.write(f"{i} {os.getpid()}\n")
    p = 1 + (i * 7) % 30
    return Example(np.arange(100, 100 + p) + 1000 * i, np.arange(1, 2 + i % 2) + 1000 * i, i % 4)


@pytest.fixture(autouse=True)
def parsed_flags():
  flags.FLAGS.mark_as_parsed()  # as `app.run` does: grain's workers read flags


def fed(log, start=0, workers=0, count=STEPS, host=0, hosts=1, **source):
  plan = BatchPlan(
    Logged(str(log), **source), CUT, window=8, batch_size=BATCH, steps=STEPS, seed=0, host=host, hosts=hosts
  )
  stream = batching.feed(plan, CUT, start, workers=workers)
  try:
    return [next(stream) for _ in range(count - start)]
  finally:
    stream.close()


def made(log):
  """(index, process) of all that was made, and forgets it."""
  lines = pathlib.Path(log).read_text().splitlines()
  pathlib.Path(log).write_text("")
  return [tuple(map(int, line.split())) for line in lines]


def same(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert (a.bucket, a.padding) == (b.bucket, b.padding)
    assert a.rows.keys() == b.rows.keys()
    for name, x in a.rows.items():
      assert x.dtype == b.rows[name].dtype
      np.testing.assert_array_equal(x, b.rows[name])


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_workers_make_the_same_batches_and_resume_without_replay(tmp_path, workers):
  log = tmp_path / "log"
  want = fed(log)
  assert sorted(i for i, _ in made(log)) == list(range(48))
  start = 7  # the second batch of the third group
  same(fed(log, start, workers), want[start:])
  indices, processes = zip(*made(log), strict=True)
  assert sorted(indices) == list(range(2 * GROUP, 4 * GROUP))  # nothing before the group, nothing twice
  assert os.getpid() not in processes and len(set(processes)) == min(workers, 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_any_number_of_workers_from_any_step(tmp_path, workers, start):
  same(fed(tmp_path / "log", start, workers), fed(tmp_path / "log")[start:])


@pytest.mark.parametrize("start", range(0, 10, 3))
def test_resuming_takes_the_same_time_wherever_it_is(tmp_path, start):
  """What is made for one step is at most the groups that are made ahead."""
  log = tmp_path / "log"
  fed(log, start, count=start + 1)
  indices = {i for i, _ in made(log)}
  first = start // 3 * GROUP
  assert min(indices) == first and set(range(first, first + GROUP)) <= indices
  assert len(indices) <= 3 * GROUP


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_union_of_the_hosts_is_the_global_batch_whatever_their_number(tmp_path, hosts):
  whole = fed(tmp_path / "log", 2)
  parts = [fed(tmp_path / "log", 2, host=host, hosts=hosts) for host in range(hosts)]
  for step, planned in enumerate(whole):
    mine = [part[step] for part in parts]
    assert {(p.bucket, p.padding) for p in mine} == {(planned.bucket, planned.padding)}
    assert {len(p.rows["inputs"]) for p in mine} == {BATCH // hosts}
    for name, x in planned.rows.items():
      np.testing.assert_array_equal(np.concatenate([p.rows[name] for p in mine]), x)


@pytest.mark.slow
def test_hosts_with_workers(tmp_path):
  whole = fed(tmp_path / "log", 1)
  halves = [fed(tmp_path / "log", 1, workers=2, host=host, hosts=2) for host in range(2)]
  for step, planned in enumerate(whole):
    joined = np.concatenate([half[step].rows["inputs"] for half in halves])
    np.testing.assert_array_equal(joined, planned.rows["inputs"])


def test_a_worker_that_dies_is_one_clear_line(tmp_path):
  with pytest.raises(WorkerError) as caught:
    fed(tmp_path / "log", workers=1, fatal=20)
  assert str(caught.value) == (
    "data.workers: a worker process that makes batches died (exit code -9: killed, or out of memory?);"
    " the same command goes on from the last checkpoint"
  )


@pytest.mark.slow
def test_what_a_source_raises_in_a_worker_is_raised_here(tmp_path):
  with pytest.raises(OSError, match="the disk is gone"):
    fed(tmp_path / "log", workers=2, bad=20)


@pytest.mark.slow
def test_word_problems_from_workers(tmp_path):
  """The real source, with its tokenizer, in processes of its own."""
  cfg = task.TaskConfig(
    operations=(1, 3),
    min_tokens=190,
    max_tokens=250,
    cut=CutConfig(max_tokens=260, answer_tokens=6),
    vocab_size=512,
  )
  ready = task.with_tokenizer(dataclasses.replace(cfg, tokenizer_texts=16), tmp_path)
  plan = BatchPlan(task.training(ready, 0, 64), ready.cut, window=96, batch_size=2, steps=32, seed=0)
  want, got = (batching.feed(plan, ready.cut, 11, workers=workers) for workers in (0, 2))
  for a, b in zip(want, got, strict=True):
    same([b], [a])
