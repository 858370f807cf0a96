"""The forms of attention at several window lengths: milliseconds and temporary memory, forward and gradient.

    python -m benchmarks.attention --threads=2
    python -m benchmarks.attention --dtype=bfloat16 --heads=16 --kv_heads=16 --width=128

Beside them stands `jax.nn.dot_product_attention` as XLA compiles it. All forms of a length take turns. The
table shows up to which length `dense` is the fastest; `attention.forms.SHORT` is the square of that length.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import attention
from sleep_jax.attention import forms
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.kernels.common import target
from sleep_jax.kernels.measure import flags

LENGTHS = (256, 1024, 2048, 4096)
MODES = ("forward", "gradient")
PEER = "jax.nn, xla"
NOTES = (
  "Causal attention of whole windows, one layer. `gradient` is of q, k and v, its forward pass included.",
  "MB are the compiler's own: what it sets aside beside arguments and results.",
  "`× dense` compares medians by the clock within a length; above 1 is slower.",
)


def main(argv: Sequence[str] | None = None) -> int:
  args = _arguments(argv)
  threads = measure.pin(args.threads)
  facts = tables.machine()
  rows: list[dict[str, Any]] = []
  for length in args.lengths:
    for mode in MODES:
      print(f"L = {length}, {mode}", file=sys.stderr, flush=True)
      rows += measured(length, mode, args)
  facts = tables.finish(facts) | {
    "shape": f"batch {args.batch}, {args.heads} heads on {args.kv_heads}, {args.width} wide, {args.dtype}, "
    f"reach {args.reach or 'the window'}; {threads} core(s)"
  }
  name = f"attention_{target.platform()}_{args.dtype}" + (f"_reach{args.reach}" if args.reach else "")
  tables.save(args.out, name, "Forms of attention", {"Forms": rows}, facts, NOTES)
  return 0


def contenders(args: argparse.Namespace) -> dict[str, Callable[..., jax.Array]]:
  """(q, k, v) -> output, by name: the forms that this platform has, and the peer."""
  names = forms.FORMS.get(target.platform(), forms.FORMS["cpu"])
  ours = {name: functools.partial(attention.attend, reach=args.reach, implementation=name) for name in names}
  window = None if args.reach is None else (args.reach - 1, 0)
  peer = functools.partial(
    jax.nn.dot_product_attention, is_causal=True, local_window_size=window, implementation="xla"
  )
  return ours | {PEER: peer}


def measured(length: int, mode: str, args: argparse.Namespace) -> list[dict[str, Any]]:
  """One row a form; one that does not take the shape has none."""
  inputs = operands(length, args)
  calls, sizes = {}, {}
  for name, form in contenders(args).items():
    try:
      calls[name], sizes[name] = compiled(form, mode, inputs)
    except NotImplementedError as reason:
      print(f"left out: {name}: {reason}", file=sys.stderr)
  times = measure.interleave(calls, args.rounds, least_s=args.turn)
  base = times["dense"].median("wall")
  return [
    {
      "L": length,
      "mode": mode,
      "form": name,
      "wall ms": 1e3 * t.median("wall"),
      "CPU ms": 1e3 * t.median("cpu"),
      "× dense": t.median("wall") / base,
      "MB": sizes[name] / 1e6,
    }
    for name, t in times.items()
  ]


def operands(length: int, args: argparse.Namespace) -> tuple[jax.Array, ...]:
  """q, k, v [B, L, heads, width]."""
  draw = lambda seed, heads: jax.random.normal(  # noqa: E731
    jax.random.key(seed), (args.batch, length, heads, args.width), args.dtype
  )
  return draw(0, args.heads), draw(1, args.kv_heads), draw(2, args.kv_heads)


def compiled(
  form: Callable[..., jax.Array], mode: str, inputs: tuple[jax.Array, ...]
) -> tuple[Callable[[], Any], int]:
  """A call of the compiled program that was made once, and the bytes that it sets aside."""

  def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(form(q, k, v).astype(jnp.float32) ** 2)

  program = form if mode == "forward" else jax.grad(total, argnums=(0, 1, 2))
  made = jax.jit(lambda *x: program(*x)).lower(*inputs).compile()

  def run() -> Any:
    return jax.block_until_ready(made(*inputs))

  run()
  return run, made.memory_analysis().temp_size_in_bytes


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.attention", __doc__)
  parser.add_argument("--lengths", type=flags.counts, default=LENGTHS)
  for name, default in (("batch", 1), ("heads", 12), ("kv_heads", 2), ("width", 64)):
    parser.add_argument(f"--{name}", type=flags.count, default=default)
  parser.add_argument("--reach", type=flags.count, help="newest keys that a query sees; all if not given")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--threads", type=flags.count, help="cores; all if not given")
  parser.add_argument("--rounds", type=flags.count, default=7)
  parser.add_argument(
    "--turn", type=flags.from_zero, default=measure.LEAST_S, help="seconds of work in one turn"
  )
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  args = parser.parse_args(argv)
  if args.heads % args.kv_heads:
    parser.error(f"--kv_heads must divide --heads = {args.heads}, got {args.kv_heads}")
  return args


if __name__ == "__main__":
  sys.exit(command.run(main, None))
