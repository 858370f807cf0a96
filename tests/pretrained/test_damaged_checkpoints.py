"""Checkpoints with wrong values and damaged files: one line that names the file, no hang, no huge memory.

Every field of every JSON file is set to every value of a pool; files are cut, flipped and replaced. A seeded
sample runs with the quick tests, all of it with the slow ones.
"""

import json
import os
import pathlib
import random
import tracemalloc
from collections.abc import Callable

import pytest

from sleep_jax import config, pretrained
from sleep_jax.pretrained import safetensors_io
from sleep_jax.pretrained.memory import memory_config
from tests import damage
from tests.pretrained import tiny
from tests.pretrained.test_checkpoint_files import save, tensors_of

QUICK = 400  # cases of the sample
SECONDS = 60  # for one case, on any machine
MOST = 64e6  # bytes that Python and NumPy may hold at once


def header_cases(data: bytes) -> damage.Cases:
  """A safetensors file: its header's fields, its claims about sizes, its bytes."""
  length = int.from_bytes(data[:8], "little")
  header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

  def packed(text: str) -> bytes:
    content = damage.encoded(text)
    return len(content).to_bytes(8, "little") + content + body

  names = [n for n in header if n != "__metadata__"]
  part = {n: header[n] for n in (*names[:2], names[-1])} | {"__metadata__": {"format": "pt"}}
  for path in damage.paths_of(part):
    for value in [*damage.POOL, damage.DEEP, "F4", "I64", "C64", [2**62, 2**62], [0, 2**62], [2**63, 0]]:
      changed = lambda p=path, v=value: packed(json.dumps(damage.with_value(header, p, v)))  # noqa: E731
      yield f"{path} = {damage.named(value)}", changed
  sizes = (0, 1, length - 1, length + 1, len(data) - 8, len(data), 2**31, 10**8 + 1, 2**60, 2**63, 2**64 - 1)
  for claim in sizes:
    yield f"a header of {claim} bytes", lambda claim=claim: claim.to_bytes(8, "little") + data[8:]
  a, b = names[:2]
  moved = header | {b: header[b] | {"data_offsets": header[a]["data_offsets"]}}
  yield "two tensors on the same bytes", lambda: packed(json.dumps(moved))
  twice = "{" + f'"{a}":{json.dumps(header[a])},' + json.dumps(header)[1:]
  yield "a tensor twice", lambda: packed(twice)
  for size in (0, 1, 7, 8, 9, length, 8 + length, len(data) - 1):
    yield f"cut to {size}", lambda size=size: data[:size]
  yield "longer", lambda: data + b"\0"
  rng = random.Random(0)
  for _ in range(100):
    at, bit = rng.randrange(8 + length), rng.randrange(8)
    flipped = bytes([data[at] ^ 1 << bit])
    yield f"bit {bit} of byte {at}", lambda at=at, flipped=flipped: data[:at] + flipped + data[at + 1 :]


def index_cases(text: str) -> damage.Cases:
  """Weight maps that lead elsewhere."""
  values = json.loads(text)
  name = next(iter(values["weight_map"]))
  for file in (
    "../model.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", "..", ".", "", "x\0.safetensors",
    "x" * 300 + ".safetensors", "\\x.safetensors", "config.json", "model.safetensors.index.json",
    "~/x.safetensors", "nothing.safetensors", "file:///x.safetensors",
  ):  # fmt: skip
    changed = values | {"weight_map": values["weight_map"] | {name: file}}
    yield f"-> {file!r:.40}", lambda changed=changed: json.dumps(changed).encode()


def make(root: pathlib.Path, name: str) -> pathlib.Path:
  """A good checkpoint: of a family, sharded, with a memory, or in our own format."""
  folder = tiny.checkpoint(root / f"plain_{name}", name if name in tiny.CONFIGS else "qwen2", tokenizer=False)
  if name == "sharded":
    save(folder, tensors_of(folder), 2)
  elif name in ("memory", "own"):
    source = pretrained.open_source(folder)
    fast = config.FastConfig(num_heads=1, key_dim=4, value_dim=8)
    cfg = memory_config(source.model, num_layers=1, fast=fast)
    weights = tiny.weights(cfg)
    if name == "own":
      pretrained.export_own(root / name, cfg, weights, step=3)
    else:
      pretrained.export(root / name, cfg, weights, source)
    return root / name
  return folder


def cases_of(folder: pathlib.Path) -> list[tuple[str, str, Callable[[], bytes]]]:
  """Every damage to every file of a folder: (file, what is wrong, its content)."""
  made = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    cases = [header_cases(data)] if path.suffix != ".json" else [damage.json_cases(data.decode())]
    cases += [index_cases(data.decode())] if path.name == safetensors_io.INDEX else []
    made += [(path.name, what, content) for group in cases for what, content in group]
  return made


KINDS = (*tiny.CONFIGS, "sharded", "memory", "own")


def refused(folder: pathlib.Path, file: str, what: str, content: Callable[[], bytes]) -> bool:
  """Whether a damaged checkpoint is refused, in one line that names a file. The file is put back."""
  before = (folder / file).read_bytes()
  (folder / file).write_bytes(content())
  try:
    with damage.limited(SECONDS):
      pretrained.open_source(folder)
    return False
  except pretrained.PretrainedError as e:
    text = str(e)
    assert text and "\n" not in text and len(text) < 3000, (file, what, text)
    named = (".json", ".safetensors", str(folder), ".weight", "inv_freq")
    assert any(word in text for word in named), (file, what, text)
    return True
  except Exception as e:
    raise AssertionError(f"{file}: {what}: {type(e).__name__}: {e}") from e
  finally:
    (folder / file).write_bytes(before)


def run(root: pathlib.Path, kinds, most: int | None, seed: int = 0) -> None:
  count, tried = 0, 0
  tracemalloc.start()
  try:
    for kind in kinds:
      folder = make(root, kind)
      cases = cases_of(folder)
      if most is not None:
        cases = random.Random(seed).sample(cases, min(most, len(cases)))
      tracemalloc.reset_peak()
      start = tracemalloc.get_traced_memory()[0]
      for case in cases:
        tried += 1
        count += refused(folder, *case)
      peak = tracemalloc.get_traced_memory()[1] - start
      assert peak < MOST, (kind, peak)
      pretrained.open_source(folder)  # the files are good again, so that what was refused was the damage
  finally:
    tracemalloc.stop()
  assert count > tried / 2  # many values are good ones: free fields, null, defaults


def test_a_sample_of_damages_is_one_line_each(tmp_path):
  run(tmp_path, KINDS, QUICK // len(KINDS))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_one_line(kind, tmp_path):
  run(tmp_path, [kind], None)


HUGE = [
  ("num_hidden_layers", 10**9), ("num_hidden_layers", 1 << 24), ("total_ut_steps", 16777216),
  ("vocab_size", 2**31), ("hidden_size", 2**63), ("intermediate_size", 1 << 24), ("head_dim", 1 << 24),
  ("num_attention_heads", 1 << 24), ("max_position_embeddings", 2**63),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), HUGE)
def test_a_claimed_size_is_refused_before_anything_of_it_is_made(field, value, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "ouro", tokenizer=False)
  values = json.loads((folder / "config.json").read_text())
  values.pop("layer_types", None)
  (folder / "config.json").write_text(json.dumps(values | {field: value}))
  tracemalloc.start()
  try:
    if field == "max_position_embeddings":  # free: nothing is made of it
      pretrained.open_source(folder)
    else:
      with pytest.raises(pretrained.PretrainedError, match=field if value > 1 << 24 else "config.json"):
        pretrained.open_source(folder)
    assert tracemalloc.get_traced_memory()[1] < 8e6
  finally:
    tracemalloc.stop()
  assert sorted(os.listdir(tmp_path)) == ["in"]


@pytest.mark.parametrize("size", [2**60, 2**40, 10**8])
def test_a_header_is_not_read_by_the_size_that_it_claims(size, tmp_path):
  folder = tiny.checkpoint(tmp_path / "in", "ouro", tokenizer=False)
  with open(folder / "model.safetensors", "r+b") as file:
    file.write(size.to_bytes(8, "little"))
  tracemalloc.start()
  try:
    with pytest.raises(
      pretrained.PretrainedError, match=f"model.safetensors: .*its header claims {size} bytes"
    ):
      pretrained.open_source(folder)
    assert tracemalloc.get_traced_memory()[1] < 8e6
  finally:
    tracemalloc.stop()
