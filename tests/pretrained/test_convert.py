"""`python -m experiments.convert` as a user starts it: import, check, export; mistakes leave nothing."""

import pathlib

import pytest

from tests import forked

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "data" / "golden"
CONFIG = f"--config={forked.ROOT}/experiments/configs/convert.py"
SMALL = [f"--config.fast.{name}" for name in ("num_heads=2", "key_dim=8", "value_dim=8")]


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
  with forked.Experiment("experiments.convert", tmp_path_factory.mktemp("scratch")) as experiment:
    yield experiment.run


def test_a_checkpoint_is_read_checked_and_written(convert, tmp_path):
  source = GOLDEN / "jet_nemotron_tiny"
  ended = convert(CONFIG, f"--config.source={source}", f"--config.target={tmp_path}/new/out")
  assert ended.code == 0, ended.err
  told = f"read JetNemotronForCausalLM: 296,312 parameters in 92 tensors; wrote {tmp_path}/new/out, bit-equal"
  assert ended.out.startswith(told)
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
  for name in ("config.json", "model.safetensors"):
    assert (tmp_path / "new/out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.slow
def test_a_memory_is_added(convert, tmp_path):
  ended = convert(
    f"{CONFIG}:memory",
    f"--config.source={GOLDEN}/ouro_tiny",
    f"--config.target={tmp_path}/out",
    "--config.memory_layers=2",
    *SMALL,
  )
  assert ended.code == 0, ended.err
  assert "added 2 layers with 11,544 (7.0%)" in ended.out
  files = {p.name for p in (tmp_path / "out").iterdir()}
  assert files == {"config.json", "model.safetensors", "memory.json", "memory.safetensors"}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "source: is required: the folder with config.json"),
    (["--config.source=nowhere"], "nowhere: there is no such folder"),
    (
      [f"--config.source={GOLDEN}/ouro_tiny", "--config.memory_layers=9"],
      "memory_layers: must be at most 3, the blocks of",
    ),
    (
      [f"--config.source={GOLDEN}/jet_nemotron_tiny", "--config.memory_layers=1"],
      "model.blocks: a memory is added to attention-only models",
    ),
    ([f"--config.source={GOLDEN}/gated_delta_rule"], "config.json"),
  ],
)
def test_a_mistake_is_one_line_and_code_2_and_nothing_is_written(convert, tmp_path, flags, message):
  ended = convert(CONFIG, f"--config.target={tmp_path}/new/out", *flags, cwd=tmp_path)
  assert ended.code == 2 and ended.out == "", ended
  assert ended.err.startswith("error: ") and message in ended.err and len(ended.err.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_alone(convert, tmp_path):
  (tmp_path / "mine").write_text("mine")
  ended = convert(CONFIG, f"--config.source={GOLDEN}/ouro_tiny", f"--config.target={tmp_path}/mine")
  assert ended.code == 2 and "mine exists already" in ended.err
  assert (tmp_path / "mine").read_text() == "mine"
