"""What a model costs the compiler of a TPU that need not be there: a layer part by part, and the loops.

    python -m benchmarks.layer_compile --hardware=v5p:2x2x1 --windows=512 --out=benchmarks/results
    python -m benchmarks.layer_compile --of=loops --windows=512 --out=benchmarks/results

`layers`: the gradient of a loss through one window of Jet-Nemotron 2B's widths, with one block. `loops`: with
a block of each kind, through four windows, for each way of `sleep.loops` to put windows and passes under
loops. Needs libtpu, which runs on a CPU (`make test-aot` adds it).
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


LOOPS = [(when, loops) for when in ("unread", "always") for loops in ("scan", "flat")]
WINDOWS, PASSES = 4, 4  # of `loops`
LOOP_NOTES = (
  f"{WINDOWS} windows, N = {PASSES}, blocks gdn and attn without MLPs, sleep.remat = pass. `unread`: the last"
  " window is read awake, the others are slept on; `always`: all are read, and all but the last slept on.",
  "`temporary MB` is what a chip needs beside weights, batch and gradients.",
  NOTES[1],
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
  """A row of the table of layers: one program, traced and compiled.

  Args:
    row: a TPU slice, of which one chip is used.
    batch: sequences, each of one window with a loss at every token.
  """
  return {"window": window, "block": part} | _compiled(
    one_layer(part, window), SleepConfig(), np.ones(window, bool), row, batch
  )


def compiled_loops(when: str, loops: str, row: Hardware, window: int, batch: int) -> dict[str, Any]:
  """A row of the table of loops, as `compiled`.

  Args:
    when, loops: of the sleep.
    batch: sequences of `WINDOWS` windows; with `unread` the last token alone has a loss.
  """
  cfg = config.replace(one_layer("gdn", window), blocks=("gdn", "attn"), without_mlp=(0, 1))
  sleep_cfg = SleepConfig(num_passes=PASSES, when=when, loops=loops, remat="pass")
  layout = np.full(WINDOWS * window, when == "always")
  layout[-1] = True
  return {"window": window, "sleep.when": when, "sleep.loops": loops} | _compiled(
    cfg, sleep_cfg, layout, row, batch
  )


def _compiled(
  cfg: ModelConfig, sleep_cfg: SleepConfig, layout: np.ndarray, row: Hardware, batch: int
) -> dict[str, Any]:
  """What the gradient of a loss at the positions of `layout` costs the compiler."""
  segments = windows.plan(layout, cfg.window, sleep_cfg)
  mesh = sharding.make_mesh(config.MeshConfig(data=1), list(aot.devices(row))[:1])
  with jax.set_mesh(mesh):
    weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    rows = NamedSharding(mesh, P(sharding.RULES["batch"]))
    ids, share, real = (
      jax.ShapeDtypeStruct((batch, len(layout)), jnp.dtype(kind), sharding=rows)
      for kind in ("int32", "float32", "bool")
    )
    gradient = jax.jit(jax.grad(lambda w, b: model.loss(w, b, segments, cfg, sleep_cfg)[0]))
    began, began_cpu = time.monotonic(), time.process_time()
    lowered = gradient.lower(weights, windows.Batch(ids, ids, share, real))
    program = lowered.compile()
    cpu, wall = time.process_time() - began_cpu, time.monotonic() - began
  memory = program.memory_analysis()
  return {
    "StableHLO lines": len(lowered.as_text().splitlines()),
    "instructions": program.as_text().count(" = "),
    "program MB": memory.generated_code_size_in_bytes / 1e6,
    "temporary MB": memory.temp_size_in_bytes / 1e6,
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
    for case in args.parts if args.of == "layers" else LOOPS:
      if args.of == "layers":
        rows.append(compiled(case, row, window, args.batch))
      else:
        rows.append(compiled_loops(*case, row, window, args.batch))
      print(f"{case}, L = {window}: {rows[-1]['CPU s']:.0f} CPU s", file=sys.stderr, flush=True)
  kind = "one layer" if args.of == "layers" else "two layers under loops"
  title = f"The gradient of {kind} for {row.name}, batch {args.batch}"
  name, notes = ("layer_compile", NOTES) if args.of == "layers" else ("loop_compile", LOOP_NOTES)
  tables.save(args.out, name, title, {args.of: rows}, tables.finish(facts), notes)
  return 0


def _parts(text: str) -> tuple[str, ...]:
  names = tuple(text.split(";"))
  for name in names:
    if name not in PARTS:
      raise argparse.ArgumentTypeError(f"{name!r} is none of {'; '.join(PARTS)}")
  return names


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.layer_compile", __doc__)
  parser.add_argument("--of", choices=("layers", "loops"), default="layers", help="which table")
  parser.add_argument("--hardware", default="v5p:2x2x1", help="a TPU, as for launch.plan")
  parser.add_argument("--windows", type=flags.counts, default=(512,), help="values of L, with commas")
  parser.add_argument("--parts", type=_parts, default=tuple(PARTS), help="of the table, with semicolons")
  parser.add_argument("--batch", type=flags.count, default=8, help="sequences")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(command.run(main, None))
