"""From a checkpoint to training: a run starts with its weights, and stage 1 moves the memory alone."""

import dataclasses
import functools
import json
import pathlib
import weakref

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

from sleep_jax import config, model, optim, params, pretrained, sharding, train, windows
from sleep_jax.experiments import convert
from sleep_jax.pretrained import memory, safetensors_io
from sleep_jax.runtime import checkpoint, workdir
from tests import hybrids

OURO = pathlib.Path(__file__).resolve().parents[1] / "data" / "golden" / "ouro_tiny"


def run_config(cfg, **optim_fields):
  return config.Config(
    data=None,
    model=cfg,
    sleep=config.SleepConfig(num_passes=2),
    optim=config.OptimConfig(newton_schulz_dtype="float32", **optim_fields),
    train=config.TrainConfig(init_from=str(OURO)),
  )


def test_a_run_starts_with_the_weights_of_a_checkpoint():
  source = pretrained.open_source(OURO, window=8, predict_passes=1)
  run = run_config(source.model)
  tx = train.optimization(run).tx
  train.check_fits(run)
  state = train.first_state(run, tx)
  hybrids.assert_same(state.params, pretrained.load(OURO)[1])
  optim.check_partition(state.opt_state, model.declare(run.model))
  assert int(state.step) == 0
  data_key = jax.random.split(jax.random.key(run.seed))[1]  # as that of a run whose weights are drawn
  np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(data_key))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"norm_eps": 1e-3}, "^train.init_from: .* is another model: model.norm_eps is 0.001, that of the check"),
    ({"blocks": ("attn",)}, "model.blocks is .'attn',., that of the checkpoint .'attn', 'attn', 'attn'."),
  ],
)
def test_another_model_is_refused_before_anything_is_made(changes, message):
  source = pretrained.open_source(OURO, window=8, predict_passes=1)
  with pytest.raises(config.ConfigError, match=message):
    train.check_fits(run_config(dataclasses.replace(source.model, **changes)))


def test_how_attention_is_computed_is_the_runs_own():
  source = pretrained.open_source(OURO, window=8, predict_passes=1)
  train.check_fits(run_config(config.replace(source.model, attention={"implementation": "blocked"})))


def test_no_checkpoint_is_one_line():
  source = pretrained.open_source(OURO, window=8, predict_passes=1)
  run = config.replace(run_config(source.model), train={"init_from": "nowhere"})
  with pytest.raises(config.ConfigError, match="^nowhere: there is no such folder$"):
    train.check_fits(run)


FAST = config.FastConfig(num_heads=2, key_dim=8, value_dim=8)


def start_run(folder, cfg, weights, step=3):
  """A workdir as a run of `cfg` leaves it, with these weights and some optimizer state."""
  with workdir.prepare(folder, config.to_dict(cfg)) as run:
    with checkpoint.Checkpoints(run.checkpoints) as saved:
      saved.save(step, {"params": weights, "opt_state": {"count": jax.numpy.zeros((), "int32")}}, block=True)
  return folder


def tuned_ouro(window=8):
  """The config of a run that gives the golden Ouro a memory, and weights that it may have trained."""
  cfg, weights, _ = pretrained.load(OURO, window=window, predict_passes=1)
  cfg, weights = memory.add_memory(cfg, weights, jax.random.key(0), num_layers=1, fast=FAST)
  return run_config(cfg), jax.tree.map(lambda x: x + 0.01, weights)


def test_a_run_is_written_back_and_gone_on_from_to_the_bit(tmp_path):
  run, weights = tuned_ouro()
  first = start_run(tmp_path / "first", run, weights)
  opened = pretrained.open_run(first)
  (read, step), source = pretrained.run_weights(opened), pretrained.run_source(opened)
  cfg = opened.model
  assert (cfg, step, source.folder, source.memory) == (run.model, 3, OURO, None)
  hybrids.assert_same(read, weights)
  pretrained.export(tmp_path / "out", cfg, read, source, dtype="float32")
  again, exported, _ = pretrained.load(tmp_path / "out", window=8)
  assert again == cfg
  hybrids.assert_same(exported, weights)
  assert not pretrained.differing(pretrained.open_source(tmp_path / "out"), weights)
  for folder in (first, tmp_path / "out"):
    hybrids.assert_same(pretrained.start_weights(run.model, folder, jax.random.key(1)), weights)
  # A run that began with the run finds the published files behind both.
  second = start_run(tmp_path / "second", config.replace(run, train={"init_from": str(first)}), weights)
  assert pretrained.open_run(second).origin == OURO
  with pytest.raises(config.ConfigError, match="model.window is 9|another model: model.norm_eps is 0.1"):
    pretrained.check_start(dataclasses.replace(run.model, norm_eps=0.1), first)


def test_what_is_no_run_to_start_from_is_one_line(tmp_path):
  run, weights = tuned_ouro()
  with workdir.prepare(tmp_path / "empty", config.to_dict(run)):
    pass
  with pytest.raises(config.ConfigError, match="empty: this run has saved no step yet"):
    pretrained.load_run(tmp_path / "empty")
  gone = start_run(tmp_path / "gone", config.replace(run, train={"init_from": "nowhere"}), weights)
  with pytest.raises(config.ConfigError, match="^nowhere: there is no such folder; .*gone began with it. If"):
    convert.convert(convert.ConvertConfig(source=str(gone), target=str(tmp_path / "new" / "out")))
  around = start_run(
    tmp_path / "around", config.replace(run, train={"init_from": str(tmp_path / "around")}), weights
  )
  with pytest.raises(config.ConfigError, match="found no checkpoint behind 16 runs"):
    pretrained.load_run(around)
  (tmp_path / "empty" / "config.json").write_text("{}")
  with pytest.raises(config.ConfigError, match="is not that of a run: model is missing"):
    pretrained.load_run(tmp_path / "empty")


def test_shards_in_bfloat16_are_written_in_float32_with_what_is_said_of_them(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  published = json.loads((OURO / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
  (folder / "config.json").write_text(json.dumps(published))
  tensors = safetensors.numpy.load_file(OURO / "model.safetensors")
  tensors = {name: x.astype(jax.numpy.bfloat16) for name, x in tensors.items()}
  files = {}
  for k in range(2):
    name = f"model-0000{k + 1}-of-00002.safetensors"
    part = dict(sorted(tensors.items())[k::2])
    safetensors.numpy.save_file(part, folder / name, {"format": "pt"})
    files |= dict.fromkeys(part, name)
  size = sum(x.nbytes for x in tensors.values())
  index = {"metadata": {"total_size": size, "more": 1}, "weight_map": files}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  cfg, weights, source = pretrained.load(folder)
  weights = jax.tree.map(lambda x: x * 1.001, weights)
  pretrained.export(tmp_path / "out", cfg, weights, source, dtype="float32")
  hybrids.assert_same(pretrained.load(tmp_path / "out")[1], weights)
  assert json.loads((tmp_path / "out/config.json").read_text()) == published | {"torch_dtype": "float32"}
  written = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
  assert written == index | {"metadata": {"total_size": 2 * size, "more": 1}}


def started(run, folder):
  """The first state of a run from `folder`, and for each weight the layout that it is declared to have."""
  run = config.replace(run, train={"init_from": str(folder)})
  declared, tx, _ = train.optimization(run)
  wanted = jax.tree.map(lambda w: sharding.spec(w.axes, w.shape), declared, is_leaf=params.is_weight)
  return train.first_state(run, tx), wanted


def losses(run, state, steps=2):
  """What training steps from a state measure on the mesh that is set."""
  batch, layout = hybrids.random_batch(14, [12, 13], pads=(0,) * 4)
  segments = windows.plan(layout, run.model.window)
  one_step = train.optimization(run).one_step
  step = hybrids.jit(lambda s, b: one_step(s, train.shard(b), segments=segments))
  found = []
  for _ in range(steps):
    state, measured = step(state, batch)
    found.append(float(measured["loss"]))
  return found


@pytest.fixture
def tensors_alive(monkeypatch):
  """A list: after each tensor that is read, how many that were read are still in host memory."""
  alive, counts, read = {}, [], safetensors_io.Tensors.read

  def counting(self, name):
    x = read(self, name)
    alive[id(x)] = name
    weakref.finalize(x, alive.pop, id(x))
    counts.append(len(alive))
    return x

  monkeypatch.setattr(safetensors_io.Tensors, "read", counting)
  return counts


def assert_placed(state, wanted, weights, drawn="none"):
  """Weights lie as they are to, and equal others that lie elsewhere: to the bit, or almost if drawn here."""
  for (path, x), spec, y in zip(
    jax.tree_util.tree_leaves_with_path(state.params),
    jax.tree.leaves(wanted, is_leaf=lambda s: isinstance(s, tuple)),
    jax.tree.leaves(weights),
    strict=True,
  ):
    name = params.name_of(path)
    assert x.sharding.spec == spec, name
    np.testing.assert_allclose(x, y, rtol=3e-7 if name.startswith(drawn) else 0, err_msg=name)


@pytest.mark.slow
def test_on_a_mesh_of_eight_a_run_starts_with_the_same_weights_and_learns_the_same(tensors_alive):
  """A memory is inserted on the way. On the host there is one tensor at a time, and the one before it."""
  run, _ = tuned_ouro()
  state, _ = started(run, OURO)
  alone = losses(run, state)
  tensors_alive.clear()
  with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=4, model=2))):
    spread, wanted = started(run, OURO)
    assert_placed(spread, wanted, state.params, drawn="blocks/1/")
    together = losses(run, spread)
  assert len(tensors_alive) == len(pretrained.open_source(OURO).tensors.files) and max(tensors_alive) <= 2
  np.testing.assert_allclose(together, alone, rtol=2e-5)
  assert alone[-1] < alone[0]


def test_what_a_run_left_is_placed_on_a_mesh_of_eight(tmp_path):
  run, weights = tuned_ouro()
  folder = start_run(tmp_path / "run", run, weights)
  with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=4, model=2))):
    assert_placed(*started(run, folder), weights)


@pytest.mark.slow
def test_stage_1_moves_the_memory_alone_and_its_norm_is_that_of_the_memory():
  base = hybrids.model_config(("attn", "attn"))
  weights = model.init(base, jax.random.key(0))
  fast = config.FastConfig(num_heads=1, key_dim=3, value_dim=4, generator_reduction=2)
  cfg, weights = pretrained.add_memory(base, weights, jax.random.key(1), num_layers=1, fast=fast)
  assert pretrained.memory_weights(cfg) == ("blocks/1/*",)
  weights["blocks"]["1"]["mixer"]["o"] = (
    weights["blocks"]["1"]["mixer"]["o"] + 0.1
  )  # so that all of it learns
  batch, layout = hybrids.random_batch(7, [5, 6])
  segments = windows.plan(layout, cfg.window)
  run = dataclasses.replace(
    run_config(cfg, trained=pretrained.memory_weights(cfg)), train=config.TrainConfig()
  )
  declared, tx, one_step = train.optimization(run)
  state = train.TrainState(
    step=jax.numpy.zeros((), "int32"), key=jax.random.key(0), params=weights, opt_state=tx.init(weights)
  )
  step = hybrids.jit(functools.partial(one_step, segments=segments))
  after, measured = step(state, batch)
  _, grads, _ = hybrids.program(segments, cfg, run.sleep)(weights, batch)
  np.testing.assert_allclose(measured["grad_norm"], optax.tree.norm(grads["blocks"]["1"]), rtol=1e-4)
  assert measured["grad_norm"] < 0.9 * optax.tree.norm(grads)
  for (path, old), new in zip(
    jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(after.params), strict=True
  ):
    name = params.name_of(path)
    assert np.array_equal(old, new) != name.startswith("blocks/1/"), name
