"""What one layer of a model costs the compiler of a TPU that need not be there: part by part, form by form.

    python -m benchmarks.layer_compile --hardware=v5p:2x2x1 --windows=512 --out=benchmarks/results

The gradient of a loss through one window of Jet-Nemotron 2B's widths, with one block. Needs libtpu, which
runs on a CPU (`make test-aot` adds it).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sleep_jax import config, model, sharding, windows
from sleep_jax.benchmarks import command, tables
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.kernels.measure import flags
from sleep_jax.kernels.measure.static_tpu import NO_LIBTPU
from sleep_jax.launch import aot
from sleep_jax.launch.hardware import Hardware, find
from sleep_jax.pretrained import jet_nemotron

VOCAB = 1024  # of the embedding and the head, which are not what is asked for
PARTS = {  # row -> the block, what its fast weights' kernel is, and whether it has an MLP
  "attn": ("attn", None, False),
  "attn + mlp": ("attn", None, True),
  "gdn": ("gdn", None, False),
  "gdn, pallas_tpu": ("gdn", "pallas_tpu", False),
  "gdn, pallas_tpu_fused": ("gdn", "pallas_tpu_fused", False),
  "jet": ("jet", None, False),
  "jet, pallas_tpu": ("jet", "pallas_tpu", False),
}
NOTES = (
  "A row has one block, the embedding, the final norm, the head and the loss; what a part adds is a"
  " difference of rows.",
  "CPU seconds are those of the process while it compiles; other processes lengthen them less than the"
  " clock's.",
)


def one_layer(part: str, window: int) -> ModelConfig:
  """Jet-Nemotron 2B cut down to the block of a row of `PARTS`."""
  kind, kernel, mlp = PARTS[part]
  return config.replace(
    jet_nemotron.config_2b(),
    blocks=(kind,),
    without_mlp=() if mlp else (0,),
    vocab_size=VOCAB,
    window=window,
    dtype="bfloat16",
    fast={"kernel": kernel},
  )


def compiled(part: str, row: Hardware, window: int, batch: int) -> dict[str, Any]:
  """A row of the table: one program, traced and compiled.

  Args:
    row: a TPU slice, of which one chip is used.
    batch: sequences, each of one window with a loss at every token.
  """
  cfg, sleep_cfg = one_layer(part, window), SleepConfig()
  segments = windows.plan(np.ones(window, bool), window, sleep_cfg)
  mesh = sharding.make_mesh(config.MeshConfig(data=1), list(aot.devices(row))[:1])
  with jax.set_mesh(mesh):
    weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    layout = NamedSharding(mesh, P(sharding.RULES["batch"]))
    ids, share, real = (
      jax.ShapeDtypeStruct((batch, window), jnp.dtype(kind), sharding=layout)
      for kind in ("int32", "float32", "bool")
    )
    gradient = jax.jit(jax.grad(lambda w, b: model.loss(w, b, segments, cfg, sleep_cfg)[0]))
    began, began_cpu = time.monotonic(), time.process_time()
    lowered = gradient.lower(weights, windows.Batch(ids, ids, share, real))
    program = lowered.compile()
    cpu, wall = time.process_time() - began_cpu, time.monotonic() - began
  return {
    "window": window,
    "block": part,
    "StableHLO lines": len(lowered.as_text().splitlines()),
    "instructions": program.as_text().count(" = "),
    "program MB": program.memory_analysis().generated_code_size_in_bytes / 1e6,
    "CPU s": cpu,
    "wall s": wall,
  }


def main(argv: Sequence[str] | None = None) -> int:
  args = _arguments(argv)
  row = find(args.hardware)
  config.check(row.chip.platform == "tpu", "--hardware", f"must be a TPU, got {args.hardware}")
  if not aot.available():
    print(f"layer_compile: {NO_LIBTPU}", file=sys.stderr)
    return 2
  facts = tables.machine(("jax", "jaxlib", "libtpu"))
  rows = []
  for window in args.windows:
    for part in args.parts:
      rows.append(compiled(part, row, window, args.batch))
      print(f"{part}, L = {window}: {rows[-1]['CPU s']:.0f} CPU s", file=sys.stderr, flush=True)
  title = f"The gradient of one layer for {row.name}, batch {args.batch}"
  tables.save(args.out, "layer_compile", title, {"layers": rows}, tables.finish(facts), NOTES)
  return 0


def _parts(text: str) -> tuple[str, ...]:
  names = tuple(text.split(";"))
  for name in names:
    if name not in PARTS:
      raise argparse.ArgumentTypeError(f"{name!r} is none of {'; '.join(PARTS)}")
  return names


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.layer_compile", __doc__)
  parser.add_argument("--hardware", default="v5p:2x2x1", help="a TPU, as for launch.plan")
  parser.add_argument("--windows", type=flags.counts, default=(512,), help="values of L, with commas")
  parser.add_argument("--parts", type=_parts, default=tuple(PARTS), help="of the table, with semicolons")
  parser.add_argument("--batch", type=flags.count, default=8, help="sequences")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(command.run(main, None))
