"""Any finished run as a model: config, weights and tokenizer; and as a checkpoint that is read bit-equal."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from sleep_jax import config, pretrained
from sleep_jax.data import depo, rule110
from sleep_jax.data.gsm_infinite import task as gsm
from sleep_jax.experiments import convert, fine_tuning, generate_model
from sleep_jax.pretrained import from_run, identity, own_format
from sleep_jax.pretrained.memory import memory_config
from sleep_jax.runtime import checkpoint, workdir
from tests import hybrids
from tests.pretrained import tiny

FAST = config.FastConfig(num_heads=1, key_dim=4, value_dim=8)
DRAWN = {
  "rule110": (rule110.Rule110Config(), hybrids.model_config(("attn", "gdn"))),
  "depo": (depo.DepoConfig(), hybrids.model_config(("attn", "kda"), norm_placement="sandwich")),
  "gsm": (
    gsm.TaskConfig(), hybrids.model_config(("attn", "gdn2"), vocab_size=tiny.VOCAB, tied_embeddings=True),
  ),
  "ablation": (rule110.Rule110Config(), hybrids.model_config(("hebbian", "delta", "jet"), mlp_bias=True)),
}  # fmt: skip


def start_run(folder, cfg, weights, steps=(3,)):
  """A workdir as a run of `cfg` leaves it; at step k the weights are k times as large."""
  with workdir.prepare(folder, config.to_dict(cfg)) as run:
    with checkpoint.Checkpoints(run.checkpoints, config=run.config) as saved:
      for step in steps:
        state = {"params": jax.tree.map(lambda x, k=step: jax.numpy.asarray(x * k), weights)}
        saved.save(step, state | {"opt_state": {"count": jax.numpy.zeros((), "int32")}}, block=True)
  return folder


def drawn_run(root: pathlib.Path, name: str, steps=(3,)) -> tuple[pathlib.Path, config.Config, dict]:
  data, model = DRAWN[name]
  cfg = config.Config(data=data, model=model, sleep=config.SleepConfig(num_passes=2))
  weights = tiny.weights(model)
  folder = start_run(root / name, cfg, weights, steps)
  if name == "gsm":
    tiny.make_tokenizer(folder / "tokenizer.json")
  return folder, cfg, weights


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawn_run_gives_config_weights_and_tokenizer_and_is_written_and_read_bit_equal(name, tmp_path):
  folder, cfg, weights = drawn_run(tmp_path, name)
  run = pretrained.load_run(folder)
  assert run.step == 3 and dataclasses.replace(run.config, data=cfg.data) == cfg
  assert config.from_dict(type(cfg.data), run.config.data) == cfg.data
  wanted = jax.tree.map(lambda x: x * 3, weights)
  hybrids.assert_same(run.weights, wanted)
  assert (run.tokenizer is not None) == (name == "gsm")

  line = convert.convert(
    convert.ConvertConfig(source=str(folder), target=str(tmp_path / "out"), dtype="float32")
  )
  assert f"read step 3 of {folder}: " in line and line.endswith("bit-equal to what was read")
  files = {"config.json", "model.safetensors"} | ({"tokenizer.json"} if name == "gsm" else set())
  assert {p.name for p in (tmp_path / "out").iterdir()} == files
  model, again, source = pretrained.load(tmp_path / "out")
  assert model == cfg.model and source.own and source.config["step"] == 3
  hybrids.assert_same(again, wanted)
  # From the exported folder and from the workdir a run starts with the same weights.
  for origin in (folder, tmp_path / "out"):
    hybrids.assert_same(pretrained.start_weights(cfg.model, origin, jax.random.key(1)), wanted)
  # And it is written again, by the same names, whatever it came from.
  pretrained.export(tmp_path / "again", model, again, source)
  for file in files:
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_run_of_another_platform_is_read_with_what_this_one_has(tmp_path, monkeypatch):
  data, model = DRAWN["rule110"]
  there = dataclasses.replace(
    model,
    fast=dataclasses.replace(model.fast, kernel="pallas_tpu"),
    attention=dataclasses.replace(model.attention, implementation="splash"),
  )
  folder = start_run(tmp_path / "run", config.Config(data=data, model=there), tiny.weights(model))
  warned = []
  monkeypatch.setattr(from_run.logging, "warning", lambda text, *words: warned.append(text % words))
  run = pretrained.load_run(folder)
  assert run.config.model == model
  assert len(warned) == 2 and "model.fast.kernel" in warned[0] and "'pallas_tpu'" in warned[0]
  assert "model.attention.implementation: 'splash' runs on tpu, not on cpu" in warned[1]


def test_any_saved_step_is_loaded_and_exported(tmp_path):
  folder, cfg, weights = drawn_run(tmp_path, "rule110", steps=(1, 2, 5))
  for step in (2, 1, 5):
    run = pretrained.load_run(folder, step=step)
    assert run.step == step
    hybrids.assert_same(run.weights, jax.tree.map(lambda x, k=step: x * k, weights))
  convert.convert(convert.ConvertConfig(source=str(folder), target=str(tmp_path / "out"), step=2))
  hybrids.assert_same(pretrained.load(tmp_path / "out")[1], jax.tree.map(lambda x: x * 2, weights))
  with pytest.raises(checkpoint.CheckpointError, match="step 4 was not saved .* saved steps: 1, 2, 5"):
    pretrained.load_run(folder, step=4)


def test_the_newest_good_step_is_taken_and_nothing_is_written(tmp_path):
  folder, _, weights = drawn_run(tmp_path, "rule110", steps=(1, 2))
  (folder / "checkpoints/2/manifest.json").write_text("{}")
  before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
  run = pretrained.load_run(folder)
  assert run.step == 1
  hybrids.assert_same(run.weights, weights)
  assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def test_the_package_offers_it_by_one_name(tmp_path):
  import sleep_jax

  folder, _, _ = drawn_run(tmp_path, "rule110")
  assert sleep_jax.load_run(folder).step == 3


@pytest.mark.parametrize("step", [None, 7])
def test_our_own_format_is_what_it_says(step, tmp_path):
  fast = {"kernel": "xla", "decay_init": (0.1, 1.0)}
  cfg = hybrids.model_config(("attn", "gdn"), fast=fast, attention={"implementation": "blocked"})
  weights = tiny.weights(cfg)
  pretrained.export_own(tmp_path / "out", cfg, weights, step=step)
  values = json.loads((tmp_path / "out/config.json").read_text())
  assert values["model_type"] == own_format.MODEL_TYPE and values["step"] == step
  again, read, source = pretrained.load(tmp_path / "out", window=9)
  machine = {"fast": {"kernel": None}, "attention": {"implementation": None}}
  assert again == config.replace(cfg, window=9, **machine)
  hybrids.assert_same(read, weights)
  assert "blocks.0.mixer.q" in source.tensors.files
  with pytest.raises(pretrained.PretrainedError, match="out: exists already"):
    pretrained.export_own(tmp_path / "out", cfg, weights)
  values["model"]["attention"]["implementation"] = "cudnn"  # which belongs to a machine
  (tmp_path / "out/config.json").write_text(json.dumps(values))
  with pytest.raises(config.ConfigError, match="model.attention.implementation: must be null, got 'cudnn'"):
    pretrained.open_source(tmp_path / "out")


def test_a_memory_is_added_to_a_model_of_our_own(tmp_path):
  cfg = hybrids.model_config(("attn", "attn"))
  pretrained.export_own(tmp_path / "in", cfg, tiny.weights(cfg), tokenizer=None)
  line = convert.convert(
    convert.ConvertConfig(
      source=str(tmp_path / "in"), target=str(tmp_path / "out"), memory_layers=1, fast=FAST
    )
  )
  assert "added 1 layers" in line and line.endswith("bit-equal to what was read")
  assert pretrained.load(tmp_path / "out")[0] == memory_config(cfg, num_layers=1, fast=FAST)


def test_a_drawn_run_with_a_tokenizer_is_what_generate_takes(tmp_path):
  folder, cfg, weights = drawn_run(tmp_path, "gsm")
  convert.convert(convert.ConvertConfig(source=str(folder), target=str(tmp_path / "out")))
  opened = generate_model.Checkpoint(generate_model.GenerateConfig(checkpoint=str(tmp_path / "out")))
  assert opened.model == cfg.model and opened.tokenizer.encode("two plus two")
  hybrids.assert_same(opened.weights(), jax.tree.map(lambda x: x * 3, weights))


@pytest.fixture
def tuned(tmp_path):
  """A checkpoint with a tokenizer, the config of a run that gives it a memory, and that run's workdir."""
  origin = tiny.checkpoint(tmp_path / "origin", "qwen2")
  model = memory_config(pretrained.open_source(origin, window=8).model, num_layers=1, fast=FAST)
  data = dataclasses.replace(gsm.TaskConfig(), tokenizer=str(origin / "tokenizer.json"))
  cfg = config.Config(data=data, model=model, train=config.TrainConfig(init_from=str(origin)))
  cfg, movable = fine_tuning.identified(cfg, tmp_path / "run")
  assert movable == () and cfg.train.init_digest == pretrained.start_digest(origin)
  start_run(tmp_path / "run", cfg, tiny.weights(model))
  return origin, cfg, tmp_path / "run"


def asked(cfg, origin, digest=None):
  """The config as a command line builds it for a checkpoint that lies at `origin`."""
  data = dataclasses.replace(cfg.data, tokenizer=str(origin / "tokenizer.json"))
  return config.replace(cfg, data=data, train={"init_from": str(origin), "init_digest": digest})


def resume(folder, cfg):
  """What the command line does with a workdir before it trains."""
  cfg, movable = fine_tuning.identified(cfg, folder)
  with workdir.prepare(folder, config.to_dict(cfg), may_change=movable, defaults=config.defaults_of(cfg)):
    return json.loads((folder / "config.json").read_text())


def test_a_run_goes_on_when_its_checkpoint_was_moved(tuned, tmp_path):
  origin, cfg, folder = tuned
  assert resume(folder, asked(cfg, origin))["train"]["init_from"] == str(origin)
  moved = tmp_path / "elsewhere/name"
  moved.parent.mkdir()
  origin.rename(moved)
  with pytest.raises(config.ConfigError, match="origin: there is no such folder; .*say where with `origin`"):
    convert.convert(convert.ConvertConfig(source=str(folder)))
  line = convert.convert(convert.ConvertConfig(source=str(folder), origin=str(moved)))
  assert "step 3" in line and "Qwen2ForCausalLM" in line
  assert pretrained.load_run(folder, origin=moved).tokenizer is not None
  values = resume(folder, asked(cfg, moved))
  assert values["train"]["init_from"] == str(moved)
  assert values["data"]["tokenizer"] == str(moved / "tokenizer.json")
  assert pretrained.load_run(folder).tokenizer is not None


CHANGES = {
  "a weight": ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
  "the tokenizer": ("tokenizer.json", lambda data: data + b"\n"),
  "the config": ("config.json", lambda data: data + b"\n"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_checkpoint_is_told_by_one_bit(what, tuned, tmp_path):
  origin, cfg, folder = tuned
  moved = tmp_path / "moved"
  shutil.copytree(origin, moved)
  file, change = CHANGES[what]
  (moved / file).write_bytes(change((moved / file).read_bytes()))
  before = (folder / "config.json").read_bytes()
  for place in (moved, origin):  # elsewhere, and where the right one was
    with pytest.raises(workdir.WorkdirError, match="train.init_digest: .* in the workdir"):
      resume(folder, asked(cfg, place))
    if place == moved:
      shutil.rmtree(origin)
      moved.rename(origin)
  assert (folder / "config.json").read_bytes() == before
  with pytest.raises(pretrained.PretrainedError, match="is not the checkpoint with which .*run began"):
    pretrained.load_run(folder, origin=origin)
  with pytest.raises(config.ConfigError, match="train.init_digest: is .*, that of .* is"):
    fine_tuning.identified(asked(cfg, origin, digest=cfg.train.init_digest), folder)


def test_a_workdir_of_an_older_version_goes_on_at_the_same_place_and_learns_the_digest(tuned, tmp_path):
  origin, cfg, folder = tuned
  path = folder / "config.json"
  values = json.loads(path.read_text())
  del values["train"]["init_digest"]
  path.write_text(json.dumps(values))
  shutil.copytree(origin, tmp_path / "moved")
  with pytest.raises(workdir.WorkdirError, match="train.init_from"):
    resume(folder, asked(cfg, tmp_path / "moved"))
  assert resume(folder, asked(cfg, origin))["train"]["init_digest"] == identity.digest(origin)
  assert resume(folder, asked(cfg, tmp_path / "moved"))["train"]["init_from"] == str(tmp_path / "moved")


def test_a_run_that_began_with_a_run_knows_it_wherever_it_lies(tuned, tmp_path):
  origin, cfg, first = tuned
  cfg = config.replace(cfg, train={"init_from": str(first), "init_digest": None}, seed=1)
  cfg, _ = fine_tuning.identified(cfg, tmp_path / "second")
  second = start_run(tmp_path / "second", cfg, tiny.weights(cfg.model))
  assert pretrained.open_run(second).origin == origin
  path = first / "config.json"  # it goes on, at the same place, with another setting
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {"train": values["train"] | {"batch_size": 256}}))
  before = cfg.train.init_digest
  asked_again = config.replace(cfg, train={"init_digest": None})
  assert resume(second, asked_again)["train"]["init_digest"] == pretrained.start_digest(first) != before
  first.rename(tmp_path / "moved")
  moved = config.replace(cfg, train={"init_from": str(tmp_path / "moved"), "init_digest": None})
  assert resume(second, moved)["train"]["init_from"] == str(tmp_path / "moved")
  assert from_run.open_run(second).origin == origin
  # The step was saved before all this, and is still this run's: to read, and to go on from.
  assert pretrained.load_run(second).step == 3
  cfg, movable = fine_tuning.identified(moved, second)
  with workdir.prepare(second, config.to_dict(cfg), may_change=movable) as run:
    with checkpoint.Checkpoints(run.checkpoints, config=run.config) as saved:
      assert saved.restore({"params": jax.eval_shape(lambda: tiny.weights(cfg.model))}, subset=True)[0] == 3


OTHERS = {
  "another seed": {"seed": 5},
  "another task of the same kind": {"data": {"rollout_steps": 9}},
  "a longer run": {"train": {"steps": 4000}},
  "other passes": {"sleep": {"num_passes": 1}},
  "an optimizer that shapes no weight": {"optim": {"muon_lr": 0.5}},
}
READERS = {
  "load_run": pretrained.load_run,
  "a step": lambda folder: pretrained.load_run(folder, step=3),
  "export": lambda folder: convert.convert(
    convert.ConvertConfig(source=str(folder), target=str(folder.parent / "out"))
  ),
  "a start": lambda folder: pretrained.start_weights(DRAWN["rule110"][1], folder, jax.random.key(1)),
}


@pytest.mark.parametrize(
  ("reader", "what"),
  [*(("load_run", what) for what in OTHERS), *((name, "another seed") for name in READERS)],
)
def test_a_checkpoint_of_another_run_is_never_taken(what, reader, tmp_path):
  folder, cfg, weights = drawn_run(tmp_path, "rule110", steps=(3,))
  stranger = start_run(tmp_path / "stranger", config.replace(cfg, **OTHERS[what]), weights, steps=(3, 4))
  name = "4" if reader != "a step" else "3"
  shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
  shutil.move(stranger / "checkpoints" / name, folder / "checkpoints" / name)
  with pytest.raises(checkpoint.CheckpointError, match=f"step {name} in .* is of another run: ") as caught:
    READERS[reader](folder)
  assert next(iter(OTHERS[what])) in str(caught.value) and not (tmp_path / "out").exists()


def test_a_step_from_before_the_run_was_made_longer_or_its_task_had_a_new_field_is_its_own(tmp_path):
  folder, cfg, weights = drawn_run(tmp_path, "rule110", steps=(3,))
  values = json.loads((folder / "config.json").read_text())
  values["train"]["steps"] *= 2
  values["data"]["a_new_field"] = 1
  (folder / "config.json").write_text(json.dumps(values))
  assert pretrained.load_run(folder).step == 3


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    ({"model": 3}, "is not that of a run: model is missing"),
    ({"train": {"init_from": 3}}, "train.init_from"),
    ({"seed": "x"}, "config.json: seed"),
    ({"colour": 1}, "config.json: colour: no such field"),
  ],
)
def test_a_damaged_workdir_is_one_line(damage, message, tmp_path):
  folder, _, _ = drawn_run(tmp_path, "rule110")
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(values | damage))
  with pytest.raises(config.ConfigError, match=message) as caught:
    pretrained.load_run(folder)
  assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_gone_is_one_line_and_may_lie_in_the_workdir(tuned):
  origin, cfg, folder = tuned
  (origin / "tokenizer.json").rename(folder / "elsewhere.json")
  with pytest.raises(
    pretrained.PretrainedError, match="its tokenizer is gone: .*it may also lie in the workdir"
  ):
    pretrained.load_run(folder)
  (folder / "elsewhere.json").rename(folder / "tokenizer.json")
  tokenizer = pretrained.load_run(folder).tokenizer
  assert tokenizer is not None and np.size(tokenizer.encode("two plus two")) > 0
