"""Checkpoints: what was called saved comes back bit for bit, and damage is never trained on."""

import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import tempfile
import threading
from typing import Any
from unittest import mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sleep_jax.runtime import checkpoint_files
from sleep_jax.runtime.checkpoint import CheckpointError, Checkpoints


@flax.struct.dataclass
class State:
  params: Any
  opt_state: Any
  step: jax.Array
  key: jax.Array


def optimizer():
  axes = {"a": optax.contrib.MuonDimensionNumbers(0, 1), "b": None, "s": None}
  muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=axes)
  return optax.chain(optax.clip_by_global_norm(1.0), muon)


@functools.partial(jax.jit, static_argnums=0)
def make_state(seed):
  """Muon and Adam states with masked nodes, typed keys, and dtypes from bool to bf16."""
  k = jax.random.split(jax.random.key(seed), 4)
  params = {"a": jax.random.normal(k[0], (8, 16)), "b": jax.random.normal(k[1], (8, 4, 2)), "s": jnp.ones(16)}
  extra = {
    "bf16": jax.random.normal(k[2], (3, 5), jnp.bfloat16),
    "i8": jnp.arange(-4, 4, dtype=jnp.int8),
    "u32": jnp.uint32(4294967295),
    "flags": jnp.array([True, False]),
    "keys": jax.random.split(k[3], 8),
    "rbg": jax.random.key(seed, impl="rbg"),
  }
  opt_state = (optimizer().init(params), extra)
  return State(params=params, opt_state=opt_state, step=jnp.int32(seed), key=k[3])


def small(seed):
  """What most tests need: a few arrays that are a function of the seed."""
  return {"w": jax.random.normal(jax.random.key(seed), (40, 8)), "n": jnp.int32(seed)}


def raw(tree):
  """Path, dtype, shape and bytes of every leaf, gathered to the host."""
  found = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    x = np.int64(x) if isinstance(x, int) else x
    dtype = str(x.dtype)
    data = jax.random.key_data(x) if dtype.startswith("key") else x
    found.append((jax.tree_util.keystr(path), dtype, x.shape, np.asarray(data).tobytes()))
  return found


def files(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(os.path.realpath(self.enterContext(tempfile.TemporaryDirectory())))
    self.dir = self.tmp / "checkpoints"
    self.said = []

  def open(self, **kw):
    return Checkpoints(self.dir, report=self.said.append, **kw)

  def save_steps(self, *steps, make=small):
    with self.open() as c:
      for step in steps:
        c.save(step, make(step), block=True)

  def restore(self, like=None, **kw):
    with self.open(**kw) as c:
      return c.restore(small(0) if like is None else like)


class RoundTripTest(CheckpointTest):
  def test_every_dtype_optimizer_state_and_key_comes_back_bit_for_bit(self):
    state = make_state(3)
    self.save_steps(3, make=make_state)
    step, got = self.restore(jax.eval_shape(make_state, 0))
    self.assertEqual(step, 3)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(state))
    self.assertEqual(raw(got), raw(state))
    grads = jax.tree.map(jnp.ones_like, state.params)
    update = jax.jit(optimizer().update)
    before, after = ((s.opt_state[0], s.params) for s in (state, got))
    self.assertEqual(raw(update(grads, *after)), raw(update(grads, *before)))
    self.assertEqual(raw(jax.random.normal(got.key, 3)), raw(jax.random.normal(state.key, 3)))

  @parameterized.parameters("one device", "4 x 2", "8 in another order")
  def test_a_state_sharded_over_8_devices_restores_onto_others(self, where):
    self.assertEqual(jax.device_count(), 8, "tests need 8 simulated devices")
    state = make_state(5)
    flat = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def first_axis(x):
      return NamedSharding(flat, P("data") if x.ndim and x.shape[0] % 8 == 0 else P())

    with self.open() as c:
      c.save(5, jax.device_put(state, jax.tree.map(first_axis, state)))
    if where == "one device":
      devices = {jax.devices()[0]}
      _, got = self.restore(jax.eval_shape(make_state, 0))
    elif where == "4 x 2":
      devices = set(jax.devices())
      mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
      with jax.set_mesh(mesh):
        spread = jax.jit(
          lambda x: jax.reshard(x, P("data", "model") if x.ndim == 2 and x.shape[0] == 8 else P())
        )
        abstract = jax.eval_shape(lambda s: jax.tree.map(spread, s), state)  # its shardings are abstract
        _, got = self.restore(abstract)
      self.assertEqual(got.params["a"].sharding, NamedSharding(mesh, P("data", "model")))
      self.assertEqual(got.params["a"].addressable_shards[0].data.shape, (2, 8))
    else:
      devices = set(jax.devices())
      mesh = jax.sharding.Mesh(np.array(jax.devices()[::-1]), ("x",))
      sharding = jax.tree.map(lambda x: NamedSharding(mesh, P("x") if x.shape[:1] == (8,) else P()), state)
      _, got = self.restore(jax.device_put(state, sharding))
      self.assertEqual(got.opt_state[1]["keys"].sharding, sharding.opt_state[1]["keys"])
    self.assertEqual(raw(got), raw(state))
    self.assertEqual(got.params["a"].sharding.device_set, devices)
    self.assertEqual(got.key.sharding.device_set, devices)

  def test_a_subset_restores_the_weights_alone(self):
    self.save_steps(2, make=make_state)
    with self.open(read_only=True) as c:
      step, got = c.restore({"params": make_state(0).params}, subset=True)
    self.assertEqual((step, raw(got["params"])), (2, raw(make_state(2).params)))

  def test_the_state_may_be_donated_at_once(self):
    change = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    make = lambda seed: {str(i): jax.random.normal(jax.random.key(seed + i), (200, 500)) for i in range(6)}  # noqa: E731
    with self.open() as c:
      for step in range(1, 4):
        state = make(step)
        c.save(step, state)
        for _ in range(3):
          state = change(state)
        jax.block_until_ready(state)
        c.wait()
        self.assertEqual(raw(c.restore(make(0))), raw((step, make(step))))

  def test_any_saved_step_is_read_and_no_other(self):
    self.save_steps(1, 2, 3)
    with self.open(read_only=True) as c:
      for step in (2, 1, 3):
        self.assertEqual(raw(c.restore(small(0), step=step)), raw((step, small(step))))
      with self.assertRaisesRegex(CheckpointError, "step 4 was not saved .* saved steps: 1, 2, 3"):
        c.restore(small(0), step=4)
      (self.dir / "2" / "manifest.json").write_text("{}")
      with self.assertRaisesRegex(CheckpointError, "step 2 .* is damaged"):
        c.restore(small(0), step=2)
    with self.open() as c, self.assertRaisesRegex(CheckpointError, "goes on from its newest step"):
      c.restore(small(0), step=1)

  def test_nothing_saved_is_none(self):
    self.assertIsNone(self.restore())
    self.assertIsNone(Checkpoints(self.tmp / "nowhere", read_only=True).restore(small(0)))
    self.assertFalse((self.tmp / "nowhere").exists())

  def test_a_plain_orbax_can_read_it(self):
    self.save_steps(4)
    got = ocp.PyTreeCheckpointer().restore(self.dir / "4" / "default")
    np.testing.assert_array_equal(got["w"], small(4)["w"])


class SavingTest(CheckpointTest):
  def test_poll_names_a_step_only_with_its_manifest_on_disk(self):
    gate = threading.Event()
    write = checkpoint_files.write_manifest

    def slow(*args):
      gate.wait(20)
      write(*args)

    with self.open() as c, mock.patch.object(checkpoint_files, "write_manifest", slow):
      c.save(1, small(1))
      while not (self.dir / "1").exists():
        pass
      self.assertEqual((c.poll(), c.latest_step), ([], None))  # committed, but not saved
      gate.set()
      c.wait()
      self.assertEqual((c.poll(), c.latest_step), ([1], 1))
      self.assertEqual(c.poll(), [])

  def test_the_newest_stay_and_the_trash_is_emptied(self):
    with self.open(keep=2) as c:
      for step in (1, 5, 7, 20):
        c.save(step, small(step))
      c.wait()
      self.assertEqual((c.steps(), c.poll()), ([7, 20], [1, 5, 7, 20]))
    self.assertEqual({p.name for p in self.dir.iterdir()}, {"7", "20", ".trash"})
    self.assertEqual(list((self.dir / ".trash").iterdir()), [])

  def test_numbers_only_rise(self):
    self.save_steps(10)
    before = files(self.dir)
    with self.open() as c:
      self.assertFalse(c.save(10, small(11)))
      with self.assertRaisesRegex(CheckpointError, "step 9 cannot be saved .* holds step 10"):
        c.save(9, small(9))
    self.assertEqual(files(self.dir), before)

  @parameterized.parameters((jnp.nan, jnp.float32), (-jnp.inf, jnp.bfloat16))
  def test_a_state_that_is_not_finite_is_not_saved(self, value, dtype):
    self.save_steps(1)
    with self.open() as c:
      with self.assertRaisesRegex(CheckpointError, "step 2 .* NaN or infinity in b.x; .* remains step 1"):
        c.save(2, small(2) | {"b": {"x": jnp.zeros((4, 4), dtype).at[2, 1].set(value), "y": jnp.ones(2)}})
      self.assertEqual(c.steps(), [1])

  @parameterized.parameters(
    ({"a": {"b": 3.0}}, "a.b is a float"),
    ({"a": np.ones(2)}, "a is a ndarray"),
    ({"a": {"b": jnp.ones(2)}, "a.b": jnp.ones(2)}, "two leaves .* called a.b"),
    ({}, "no arrays"),
  )
  def test_what_is_no_array_is_refused_by_path(self, state, pattern):
    with self.open() as c, self.assertRaisesRegex(CheckpointError, pattern):
      c.save(1, state)

  def test_reading_disturbs_nothing(self):
    self.save_steps(1, 2)
    (self.dir / "2" / "_CHECKPOINT_METADATA").write_text("damaged")
    (self.dir / "3.orbax-checkpoint-tmp").mkdir()  # of a trainer that is saving now
    (self.dir / "3.orbax-checkpoint-tmp" / "file").write_text("half")
    before = files(self.dir)
    with self.open(read_only=True) as c:
      self.assertEqual(c.restore(small(0))[0], 1)
      with self.assertRaisesRegex(CheckpointError, "for reading only"):
        c.save(4, small(4))
    self.assertEqual(files(self.dir), before)
    self.assertLen(self.said, 1)


class DamageTest(CheckpointTest):
  @parameterized.parameters("flip", "delete", "empty", "halve")
  def test_damage_to_any_file_is_named_and_the_step_before_restored(self, kind):
    self.save_steps(100, 200)
    whole = self.tmp / "whole"
    shutil.copytree(self.dir, whole)
    rng = random.Random(kind)
    names = sorted(files(self.dir / "200"))
    self.assertGreater(len(names), 8)
    for name in names:
      self.said.clear()
      shutil.rmtree(self.dir)
      shutil.copytree(whole, self.dir)
      path = self.dir / "200" / name
      data = bytearray(path.read_bytes())
      if kind == "delete":
        path.unlink()
      else:
        if kind == "flip":
          data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes({"flip": data, "empty": b"", "halve": data[: len(data) // 2]}[kind])
      with self.subTest(file=name), self.open() as c:
        step, got = c.restore(small(0))
        self.assertEqual((step, raw(got)), (100, raw(small(100))))
        [line] = self.said
        self.assertIn("step 200 is damaged", line)
        self.assertIn(name, line)
        self.assertIn("falling back to step 100", line)
        if name != "manifest.json":
          kept = self.dir / "aside" / "200" / name
          then = hashlib.sha256((whole / "200" / name).read_bytes()).hexdigest()[:12]
          now = hashlib.sha256(kept.read_bytes()).hexdigest()[:12] if kept.exists() else "no file"
          self.assertRegex(line, f"expected .*{then}, found .*{now}")
        self.assertEqual((c.steps(), c.latest_step), ([100], 100))
        if name == names[-1]:
          c.save(200, small(201), block=True)
          self.assertEqual(raw(c.restore(small(0))), raw((200, small(201))))

  def test_the_same_step_damaged_twice_is_kept_twice(self):
    for _ in range(2):
      self.save_steps(*([100] if not self.dir.exists() else []), 200)
      (self.dir / "200" / "_CHECKPOINT_METADATA").unlink()
      self.assertEqual(self.restore()[0], 100)
    self.assertEqual({p.name for p in (self.dir / "aside").iterdir()}, {"200", "200.1"})

  def test_if_all_are_damaged_nothing_is_touched_and_nothing_starts_anew(self):
    self.save_steps(1, 2)
    for step in (1, 2):
      (self.dir / str(step) / "default" / "_METADATA").write_text("{}")
    before = files(self.dir)
    for _ in range(2):  # a second try must not find an empty directory
      with self.assertRaisesRegex(
        CheckpointError, "all checkpoints in .* are damaged.*step 2: .*step 1: "
      ) as e:
        self.restore()
      self.assertNotIn("\n", str(e.exception))
      self.assertEqual(files(self.dir), before)

  def test_a_manifest_of_another_step_is_damage(self):
    self.save_steps(1, 2)
    shutil.copy(self.dir / "1" / "manifest.json", self.dir / "2" / "manifest.json")
    self.assertEqual(self.restore()[0], 1)

  def test_a_save_cut_short_before_its_manifest_is_unfinished_not_damaged(self):
    self.save_steps(1)
    (self.dir / "1" / "manifest.json").unlink()
    (self.dir / "in_flight.json").write_text(json.dumps({"step": 1}))
    self.assertIsNone(self.restore())  # never called saved: the run starts, it need not be repaired
    self.assertRegex(self.said[0], "step 1 was still being saved")
    self.assertTrue((self.dir / "aside" / "1" / "default").is_dir())
    self.save_steps(1)
    self.assertEqual(self.restore()[0], 1)

  def test_death_while_old_steps_are_deleted_leaves_only_whole_ones(self):
    class Died(BaseException):
      pass

    self.save_steps(1, 2, 3)
    whole = self.tmp / "whole"
    shutil.copytree(self.dir, whole)
    unlink, deaths = os.unlink, 0
    for k in range(1, 100):
      shutil.rmtree(self.dir)
      shutil.copytree(whole, self.dir)
      calls = 0

      def dying(*args, k=k, **kw):
        nonlocal calls
        calls += "dir_fd" in kw or ".trash" in str(args[0])
        if calls >= k:
          raise Died
        unlink(*args, **kw)

      c = self.open()
      c.save(4, small(4), block=True)  # retires step 1
      with mock.patch.object(os, "unlink", dying):
        try:
          c.wait()
        except Died:
          deaths += 1
        else:
          break
        finally:
          c._manager.close()
      with self.open() as c:
        self.assertEqual(c.steps(), [2, 3, 4])
        for step in c.steps():
          self.assertIsNone(checkpoint_files.damage(self.dir / str(step)))
      self.assertEqual(list((self.dir / ".trash").iterdir()), [])
    self.assertGreater(deaths, 8)
    self.assertEqual(self.said, [])

  def test_symbolic_links_are_refused(self):
    self.save_steps(1)
    elsewhere = self.tmp / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "7").mkdir()
    for name in ("2", ".trash", "aside"):
      link = self.dir / name
      if link.exists():
        link.rmdir()
      link.symlink_to(elsewhere)
      with self.assertRaisesRegex(CheckpointError, f"{name} is a symbolic link"):
        self.open()
      link.unlink()
    self.assertTrue((elsewhere / "7").is_dir())
    path = self.dir / "1" / "_CHECKPOINT_METADATA"
    shutil.move(path, elsewhere / "file")
    path.symlink_to(elsewhere / "file")  # the right bytes, but not here
    with self.assertRaisesRegex(CheckpointError, "all checkpoints .* _CHECKPOINT_METADATA: .* found no file"):
      self.restore()

  def test_a_path_that_cannot_hold_checkpoints_is_one_line(self):
    self.dir.write_text("a file")
    with self.assertRaisesRegex(CheckpointError, "cannot use .*checkpoints for checkpoints"):
      self.open()


class MisfitTest(CheckpointTest):
  @parameterized.parameters(
    ({"w": jnp.zeros((40, 9))}, r"w is float32\[40,8\], float32\[40,9\] was asked for"),
    ({"w": jnp.zeros((40, 8), jnp.bfloat16)}, r"w is float32\[40,8\], bfloat16\[40,8\] was asked for"),
    ({"n": jax.random.key(0)}, r"n is int32\[\], key<fry>\[\] was asked for"),
    ({"m": {"ww": jnp.zeros(3)}}, r"m.ww is not in it \(nearest name: "),
  )
  def test_a_state_of_another_shape_is_refused_by_path(self, change, pattern):
    self.save_steps(1, 2)
    before = files(self.dir)
    with self.assertRaisesRegex(CheckpointError, "step 2 in .* does not fit: .*" + pattern) as e:
      self.restore(small(0) | change)
    self.assertNotIn("\n", str(e.exception))
    self.assertEqual((files(self.dir), self.said), (before, []))

  def test_the_nearest_name_and_those_not_asked_for(self):
    self.save_steps(1)
    with self.assertRaisesRegex(
      CheckpointError, r"weight is not in it \(nearest name: w\); w was not asked for"
    ):
      self.restore({"weight": small(0)["w"], "n": small(0)["n"]})

  def test_at_most_ten_are_named(self):
    self.save_steps(1)
    with self.assertRaisesRegex(CheckpointError, "(x.*){10}; and 90 more$"):
      self.restore(small(0) | {f"x{i:02}": jnp.zeros(2) for i in range(100)})
