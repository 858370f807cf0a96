"""Processes that test_checkpoint_processes.py starts, kills, or runs out of disk: MODE, directory ..."""

import json
import pathlib
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from sleep_jax.runtime.checkpoint import CheckpointError, Checkpoints


def state_of(step):
  """Some MB that are a function of the step."""
  random = np.random.default_rng(step)
  return {
    "step": jnp.int32(step),
    "w": [jnp.asarray(random.random((300, 500), np.float32)) for _ in range(6)],
  }


def save(folder, end):
  """Saves without pause; at the start, compares every step that is there with the truth."""
  said, wrong = [], []
  with Checkpoints(folder, report=said.append) as c:
    for step in c.steps():  # read by plain Orbax, so that no step hides behind a fallback
      got = ocp.PyTreeCheckpointer().restore(folder / str(step) / "default")
      want = state_of(step)
      same = int(got["step"]) == step and all(
        np.array_equal(got[f"w.{i}"], x) for i, x in enumerate(want["w"])
      )
      wrong += [] if same else [step]
    restored = c.restore(state_of(0))
    first = restored[0] if restored else 0
    print("START", json.dumps({"wrong": wrong, "said": said, "restored": first}), flush=True)
    for step in range(first + 1, first + (5 if end else 1000)):
      print("SAVE", step, flush=True)
      c.save(step, state_of(step), block=step % 3 == 0)
      for saved in c.poll():
        print("SAVED", saved, flush=True)
    c.wait()
    for saved in c.poll():
      print("SAVED", saved, flush=True)


def fail(folder):
  """Fills the disk, for this process, again and again."""
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(full):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else hard, hard))

  def small(step):
    return {"w": jax.random.normal(jax.random.key(step), (40, 8)), "n": jnp.int32(step)}

  def big(step):
    return {"w": jax.random.normal(jax.random.key(step), (300, 500))}

  def attempt(do, *args, **kw):
    try:
      do(*args, **kw)
    except CheckpointError as e:
      print("ERROR", e, flush=True)

  c = Checkpoints(folder, report=lambda line: print(line, flush=True))
  limit(True)
  attempt(c.save, 1, big(1), block=True)
  print("polled", c.poll(), "latest", c.latest_step)
  limit(False)
  attempt(c.save, 2, small(2))
  attempt(c.wait)
  print("saved", c.poll())
  for step in (3, 5):
    limit(True)
    state = big(step)
    attempt(c.save, step, state)
    while c._pending.thread.is_alive():
      pass
    jax.tree.map(lambda x: x.delete(), state)  # what donation does
    limit(False)
    if step == 3:
      attempt(c.save, 4, small(4))
      print("saved", c.poll())
  attempt(c.wait)
  c.__exit__(ValueError)


def pair(folder, port, index):
  """One of two processes that save a state sharded over both, and meet a damaged step."""
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, coordinator_bind_address=f"127.0.0.1:{port}")
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

  def sharded(step):
    return {
      "w": jax.make_array_from_callback((8, 4), sharding, lambda i: np.full((8, 4), step, np.float32)[i])
    }

  def barrier(name):
    jax.experimental.multihost_utils.sync_global_devices(name)

  def damage(step):
    barrier(f"before {step}")
    if index == 0:
      (folder / str(step) / "default" / "_METADATA").write_text("damaged")
    barrier(f"after {step}")

  with Checkpoints(folder, report=print) as c:
    for step in (1, 2):
      c.save(step, sharded(step))
  damage(2)
  with Checkpoints(folder, report=print) as c:
    step, got = c.restore(sharded(0))
    same = all((np.asarray(s.data) == 1).all() for s in got["w"].addressable_shards)
    print("restored", step, "equal", same and got["w"].sharding == sharding)
    c.save(2, sharded(2))
    c.wait()
    backup = {p: p.read_bytes() for p in folder.glob("*/default/_METADATA")}
    damage(1)
    damage(2)
    try:
      c.restore(sharded(0))
    except CheckpointError as e:
      print("all damaged", "all checkpoints" in str(e))
    barrier("seen")
    if index == 0:
      for path, data in backup.items():
        path.write_bytes(data)
    barrier("repaired")
    c.save(3, sharded(3))


if __name__ == "__main__":
  logging.set_verbosity(logging.FATAL)
  mode, folder, *rest = sys.argv[1:]
  {
    "save": lambda f: save(f, rest[0] == "True"),
    "fail": fail,
    "pair": lambda f: pair(f, int(rest[0]), int(rest[1])),
  }[mode](pathlib.Path(folder))
