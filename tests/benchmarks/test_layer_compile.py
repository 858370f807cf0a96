"""The compiler's bill for one layer: what is compiled, and what is refused."""

import csv
import pathlib
import tempfile

import pytest

from sleep_jax import model
from sleep_jax.benchmarks import command, layer_compile


@pytest.mark.parametrize("part", layer_compile.PARTS)
def test_a_row_has_one_block_of_the_published_width(part):
  cfg = layer_compile.one_layer(part, 512)
  kind, kernel, mlp = layer_compile.PARTS[part]
  (block,) = model.declare(cfg)["blocks"].values()
  assert (cfg.blocks, cfg.embed_dim, cfg.window, cfg.fast.kernel) == ((kind,), 1536, 512, kernel)
  assert ("mlp" in block) == mlp


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--hardware=h200:8", "--hardware: must be a TPU, got h200:8"),
    ("--hardware=v5q:1", "--hardware: there is no 'v5q:1'; the nearest chip is v5p"),
    ("--hardware=v5p:3x3", "--hardware: "),
  ],
)
def test_a_mistake_is_one_line(flag, said, capsys):
  assert command.run(layer_compile.main, [flag, "--out=."]) == 2
  err = capsys.readouterr().err
  assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_unknown_parts_are_named(capsys):
  with pytest.raises(SystemExit, match="2"):
    layer_compile.main(["--parts=attn;mamba"])
  assert "'mamba' is none of attn; attn + mlp; gdn" in capsys.readouterr().err


@pytest.mark.aot
def test_runs():
  with tempfile.TemporaryDirectory() as out:
    assert layer_compile.main(["--parts=attn", "--windows=128", "--batch=1", f"--out={out}"]) == 0
    (path,) = pathlib.Path(out).glob("*.csv")
    (row,) = csv.DictReader(path.read_text().splitlines())
  assert (row["block"], row["window"]) == ("attn", "128")
  assert int(row["instructions"]) > 100
