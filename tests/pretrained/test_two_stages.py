"""From a checkpoint on disk to a table of answers and back to a checkpoint, as a user types it."""

import dataclasses
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from sleep_jax import model, params, pretrained, train
from sleep_jax.experiments import gsm_infinite
from sleep_jax.experiments.configs import gsm_infinite as presets
from sleep_jax.runtime import checkpoint_files
from tests import forked, hybrids
from tests.pretrained import tiny

RUN = f"--config={forked.ROOT}/experiments/configs/gsm_infinite.py"
CONVERT = f"--config={forked.ROOT}/experiments/configs/convert.py"
WINDOW = 128
SHORT = [
  f"--config.{name}"
  for name in (
    *("train.steps=2", "train.batch_size=2", "train.log_every=1", "train.save_every=2", "train.eval_every=2"),
    *("train.eval_sequences=4", "train.eval_batch_size=4", "data.operations=(1,2)", "data.problems=3"),
    *("data.min_tokens=200", "data.max_tokens=245", "data.cut.max_tokens=256", "data.cut.tails=()"),
    *(
      "data.cut.bucket_batches=1",
      "train.microbatches=2",
      f"model.window={WINDOW}",
      "sleep.num_passes=2",
      "optim.adam_lr=1e-3",
    ),
    *("optim.newton_schulz_dtype=float32", "optim.newton_schulz_steps=1", "model.dtype=float32"),
  )
]
FAST = ("fast.num_heads=1", "fast.key_dim=8", "fast.value_dim=8")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  """The two programs: (name, *flags) -> what the command printed; it must end well."""
  scratch = {name: tmp_path_factory.mktemp(name) for name in ("gsm_infinite", "convert")}
  with (
    forked.Experiment("experiments.gsm_infinite", scratch["gsm_infinite"]) as run,
    forked.Experiment("experiments.convert", scratch["convert"]) as convert,
  ):

    def command(name, *flags):
      ended = {"run": run, "convert": convert}[name].run(*flags)
      assert ended.code == 0, ended.err
      return ended.out

    yield command


def table(out: str) -> list[list[str]]:
  """Operations and problems of each row of the table that a run ends with."""
  lines = out.splitlines()
  start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["operations", "problems"])
  rows = (line.split() for line in lines[start + 1 :])
  return [row[:2] for row in itertools.takewhile(lambda row: row and row[0].isdigit(), rows)]


def names_of(tree) -> dict[str, np.ndarray]:
  return {params.name_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def changed(before, after) -> set[str]:
  """Names of the weights that are not equal to the bit."""
  before, after = names_of(before), names_of(after)
  assert set(before) == set(after)
  return {name for name, x in before.items() if x.tobytes() != after[name].tobytes()}


def held_by_optimizer(folder: pathlib.Path) -> set[str]:
  """Weights for which a run's checkpoint has optimizer state, by the manifest of its files."""
  tree = checkpoint_files.read_manifest(folder / "checkpoints" / "2")["tree"]
  weights = [name.removeprefix("params.") for name in tree if name.startswith("params.")]
  state = [name for name in tree if name.startswith("opt_state.")]
  return {w.replace(".", "/") for w in sorted(weights) if any(name.endswith(f".{w}") for name in state)}


def model_and_weights(folder: pathlib.Path):
  run = pretrained.load_run(folder)
  return run.config.model, run.weights


def logits_of(cfg, weights):
  tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 8), dtype=np.int32)
  return np.asarray(
    hybrids.jit(lambda w: model.predict(w, tokens, model.init_state(cfg, 1), cfg)[0])(weights)
  )


@pytest.mark.slow
def test_ouro_from_checkpoint_to_table_in_two_stages(commands, tmp_path):
  plain = tiny.checkpoint(tmp_path / "ouro", "ouro")
  memory, tuned = tmp_path / "memory", tmp_path / "tuned"
  sizes = [f"--config.{x}" for x in ("memory_layers=1", *FAST)]
  out = commands(
    "convert", f"{CONVERT}:memory", f"--config.source={plain}", f"--config.target={memory}", *sizes
  )
  assert "added 1 layers" in out and (memory / "tokenizer.json").is_file()

  inserted = [f"--config.pretrained.{x}" for x in ("memory_layers=1", *FAST)]
  first, second = tmp_path / "stage1", tmp_path / "stage2"
  out = commands(
    "run",
    f"{RUN}:ouro_memory",
    *SHORT,
    *inserted,
    f"--config.pretrained.folder={memory}",
    f"--workdir={first}",
  )
  assert table(out) == [["1", "2"], ["2", "2"]]
  cfg, begun, _ = pretrained.load(memory)
  run = pretrained.load_run(first)
  after = run.weights
  assert run.step == 2 and run.tokenizer is not None and pretrained.open_run(first).origin == memory
  assert changed(begun, after) == {name for name in names_of(begun) if name.startswith("blocks/1/")}
  assert held_by_optimizer(first) == changed(begun, after)

  out = commands("convert", f"{CONVERT}:export", f"--config.source={first}", f"--config.target={tuned}")
  assert f"read step 2 of {first}, OuroForCausalLM" in out and out.strip().endswith(
    "bit-equal to what was read"
  )
  _, exported, _ = pretrained.load(tuned)
  hybrids.assert_same(exported, after)

  out = commands(
    "run", f"{RUN}:ouro_sliding", *SHORT, f"--config.pretrained.folder={tuned}", f"--workdir={second}"
  )
  assert table(out) == [["1", "2"], ["2", "2"]]
  run_cfg, after = model_and_weights(second)
  assert (run_cfg.eviction, run_cfg.blocks, run_cfg.without_mlp) == ("sliding", ("attn", "jet", "attn"), (1,))
  # In one pass awake nobody asks the exit gate: its matrix decays, its bias stays.
  assert set(names_of(after)) - changed(exported, after) == {"exit_gate/b"}
  assert held_by_optimizer(second) == set(names_of(after))

  final = tmp_path / "final"
  commands("convert", f"{CONVERT}:export", f"--config.source={second}", f"--config.target={final}")
  cfg, weights, _ = pretrained.load(final)
  hybrids.assert_same(weights, after)
  assert np.ptp(logits_of(cfg, weights) - logits_of(cfg, exported)) > 0
  np.testing.assert_array_equal(logits_of(cfg, weights), logits_of(cfg, after))
  tensors = safetensors.numpy.load_file(final / "model.safetensors")
  q = np.asarray(after["blocks"]["2"]["mixer"]["q"])
  np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], q.reshape(16, 16).T)
  assert json.loads((final / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.slow
def test_jet_nemotron_sleeps_with_its_own_memory(commands, tmp_path):
  """One stage; written back in the checkpoint's bfloat16 and in its files."""
  published, folder, tuned = tiny.checkpoint(tmp_path / "jet", "jet"), tmp_path / "run", tmp_path / "tuned"
  looped = ("--config.sleep.first_block=1", "--config.sleep.last_block=3")
  out = commands(
    "run", f"{RUN}:jet_2b", *SHORT, *looped, f"--config.pretrained.folder={published}", f"--workdir={folder}"
  )
  assert table(out) == [["1", "2"], ["2", "2"]]
  run_cfg, after = model_and_weights(folder)
  _, begun, _ = pretrained.load(published)
  assert run_cfg.blocks == ("jet", "jet", "attn", "swa")
  assert changed(begun, after) == held_by_optimizer(folder) == set(names_of(after))
  out = commands(
    *("convert", f"{CONVERT}:export", f"--config.source={folder}", f"--config.target={tuned}"),
    "--config.dtype=published",
  )
  assert "rounded in" in out
  _, rounded, _ = pretrained.load(tuned)
  for name, x in names_of(after).items():
    np.testing.assert_array_equal(names_of(rounded)[name], x.astype(jax.numpy.bfloat16).astype(np.float32))
  for name in ("config.json", "tokenizer.json"):
    assert (tuned / name).read_bytes() == (published / name).read_bytes()
  before, now = (safetensors.numpy.load_file(f / "model.safetensors") for f in (published, tuned))
  assert {n: (x.shape, x.dtype) for n, x in before.items()} == {n: (x.shape, x.dtype) for n, x in now.items()}


@pytest.mark.slow
def test_ouro_is_given_its_memory_on_the_way_and_the_next_run_goes_on_from_the_workdir(commands, tmp_path):
  """The preset `ouro` from the plain checkpoint; then, as far as its first state, from the workdir."""
  plain, first = tiny.checkpoint(tmp_path / "ouro", "ouro"), tmp_path / "first"
  inserted = [f"--config.pretrained.{x}" for x in ("memory_layers=1", *FAST)]
  out = commands(
    "run", f"{RUN}:ouro", *SHORT, *inserted, f"--config.pretrained.folder={plain}", f"--workdir={first}"
  )
  assert table(out) == [["1", "2"], ["2", "2"]]
  run_cfg, after = model_and_weights(first)
  source = pretrained.run_source(pretrained.open_run(first))
  assert source.folder == plain and source.memory is None
  values = presets.get_config("ouro_sliding")
  values.pretrained.folder = str(first)
  cfg = gsm_infinite.build(values.to_dict())
  train.check_fits(cfg)
  assert cfg.model == dataclasses.replace(run_cfg, window=512, eviction="sliding", dtype="bfloat16")
  assert cfg.data.tokenizer == str(plain / "tokenizer.json")
  tx = train.optimization(cfg).tx
  hybrids.assert_same(train.first_state(cfg, tx).params, after)
