"""Training speed on this machine: ours, the same model in PyTorch, and what a large product reaches.

    python -m benchmarks.training --preset=demo
    python -m benchmarks.training --preset=fig2b --batch=32

It keeps to one core unless told otherwise: on several, PyTorch's threads spin while they wait for each other,
and on a machine that does other work too its steps then take ten times as long, in CPU time as well.
Nothing is timed before the PyTorch model was shown to compute the same loss, gradients and optimizer step.
"""

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
from typing import Any

import jax
import numpy as np
import optax

from sleep_jax import config, model, optim, train, windows
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.cost import flops
from sleep_jax.kernels.measure import flags
from sleep_jax.runtime import heap
from sleep_jax.runtime.files import RunFailedError

OURS = "sleep_jax"
SCANNED = "sleep_jax, loops=scan"
ROUNDED = "sleep_jax, products of bfloat16"
PRODUCT = "matrix product"
BATCH = {"tiny": 16, "demo": 128, "fig2b": 32}
# Float32 in another order. A gradient that is a sum of cancelling terms (of the decay, at N = 1) keeps fewer
# digits; AdamW's first updates are the sign of a gradient, and are differences of weights around 1.
TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-5, "gradient": 1e-3, "update": 1e-2}
PRODUCT_SIZE = 2048


def main(argv: Sequence[str] | None = None) -> int:
  args = _arguments(argv)
  threads = measure.pin(args.threads)
  peers = args.peers and _have_peers()
  facts = tables.machine(("jax", "jaxlib", *(("torch", "transformers") if peers else ())))
  rows, differences, products, failed = [], [], [], None
  for num_passes in args.passes:
    print(f"N = {num_passes}: compiling", file=sys.stderr, flush=True)
    cfg, task = measure.rule110_config(
      args.preset,
      sleep={"num_passes": num_passes, "loops": "unroll"},
      train={"batch_size": args.batch or BATCH[args.preset], "microbatches": args.microbatches},
    )
    product, work = measure.matrix_product(args.product)
    try:
      with contenders(
        cfg,
        task,
        peers=peers,
        scan=args.scan,
        compiled=args.compile,
        rounded=args.rounded,
        shipped=args.shipped,
      ) as (steps, found):
        print(f"N = {num_passes}: timing", file=sys.stderr, flush=True)
        times = measure.interleave(steps | {PRODUCT: product}, args.rounds, least_s=args.turn)
    except RunFailedError as e:
      failed = RunFailedError(f"N = {num_passes}: {e}")
      break
    differences.append(found)
    products.append(times[PRODUCT])
    rows += table(cfg, task, times, work)
  if failed and not rows:
    raise failed
  peak = min(t.median("wall") for t in products), min(t.median("cpu") for t in products)
  facts = tables.finish(facts) | {
    "large product": f"{args.product}^3 float32 by XLA, in turn with the others:"
    f" {work / peak[0] / 1e9:.0f} GFLOP/s on {threads} core(s), "
    f"{work / peak[1] / 1e9:.0f} GFLOP a CPU second (best round)",
    "equality": _worst(differences) if peers else "PyTorch not installed, nothing compared",
    "batch": f"{cfg.train.batch_size} sequences of {len(task.layout)} tokens, in {args.microbatches} part(s);"
    f" {args.rounds} rounds",
  }
  other = "" if cfg.train.batch_size == BATCH[args.preset] else f"_batch{cfg.train.batch_size}"
  name = f"training_{args.preset}_{threads}core{other}"
  title = f"Training speed, Rule 110 preset `{args.preset}`, {threads} core(s)"
  tables.save(args.out, name, title, {"Step times": rows}, facts, NOTES)
  if failed:
    raise failed
  return 0


NOTES = (
  "A step is data, forward and backward pass through all N passes, clipping, Muon and AdamW. `×` is how"
  " many times longer than sleep_jax (ratio of medians of one run). Tokens count once, whatever N.",
  "`of product` compares the FLOPs that a step cannot do without, per CPU second, with those of the"
  " large matrix product: as `sleep_jax.flops` counts, less what is dropped of the last pass over a"
  " window. Norms, gates, convolutions and the optimizer are work too, but are not counted.",
  "Prefer CPU time: other processes move it less than wall time.",
  "PyTorch flushes subnormal numbers to zero; without that its triangular solves take several times longer.",
)


@contextlib.contextmanager
def contenders(
  cfg: config.Config,
  task: train.DeviceTask,
  *,
  peers: bool,
  scan: bool = True,
  compiled: bool = False,
  rounded: bool = False,
  shipped: bool = True,
) -> Iterator[tuple[dict[str, Callable[[], Any]], dict[str, float]]]:
  """One training step each, in a process of its own; and how far PyTorch's numbers are from ours.

  Args:
    peers: with the PyTorch model, which needs torch and transformers.
    scan: ours also with loops that are not written out.
    compiled: PyTorch also through `torch.compile`.
    rounded: both also with products of bfloat16, ours by `model.matmul_dtype`, PyTorch by its autocast. These
      are not compared with each other: each rounds in its own places.
    shipped: PyTorch also with transformers' chunk of 64 tokens, which takes the most memory: 11 GB for fig2b,
      N = 4, batch 128.

  Raises:
    RunFailedError: if the two models do not compute the same.
  """
  found = compared(cfg, task) if peers else {}
  require_equal(found)
  makers: dict[str, tuple] = {OURS: (_jax_step, cfg, task)}
  if scan:
    makers[SCANNED] = (_jax_step, config.replace(cfg, sleep={"loops": "scan"}), task)
  if rounded:
    makers[ROUNDED] = (_jax_step, config.replace(cfg, model={"matmul_dtype": "bfloat16"}), task)
  if peers:
    makers["PyTorch, chunk = window"] = (_torch_alone, cfg, task, None)
    if shipped:
      makers["PyTorch, chunk = 64"] = (_torch_alone, cfg, task, 64)
    if compiled:
      makers["PyTorch, compiled"] = (_torch_alone, cfg, task, None, True)
    if rounded:
      makers["PyTorch, autocast to bfloat16"] = (_torch_alone, cfg, task, None, False, True)
  with contextlib.ExitStack() as stack:
    steps = {}
    for name, (make, *args) in makers.items():
      try:
        steps[name] = stack.enter_context(contextlib.closing(measure.Elsewhere(make, *args)))
      except RunFailedError as e:
        raise RunFailedError(f"{name}: {e}") from None
    yield steps, found


def require_equal(found: dict[str, float]) -> None:
  """Raises `RunFailedError` if one of the `differences` is more than rounding, or not a number."""
  wrong = {name: value for name, value in found.items() if not value <= TOLERANCE[name]}
  if wrong:
    raise RunFailedError(f"the PyTorch model differs from ours: {wrong}, tolerated is {TOLERANCE}")


def compared(cfg: config.Config, task: train.DeviceTask) -> dict[str, float]:
  """`differences`, found in a process of its own, which gives back what both models take.

  Raises:
    RunFailedError: if that process is killed.
  """
  with futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    try:
      return pool.submit(differences, cfg, task).result()
    except process.BrokenProcessPool:
      raise RunFailedError("the process that compares PyTorch with us was killed; does memory end?") from None


def differences(cfg: config.Config, task: train.DeviceTask) -> dict[str, float]:
  """The largest differences between PyTorch and us, on the same weights and the same batch.

  Returns:
    loss and grad_norm (relative); gradient (the largest entry of a difference over the largest entry of that
    weight's gradient, worst weight); update (the same of what two steps of the optimizer add to a weight).
  """
  import torch

  from sleep_jax.benchmarks import torch_model

  segments = windows.plan(task.layout, cfg.model.window, cfg.sleep)
  values = measure.quick(lambda: model.init(cfg.model, jax.random.key(cfg.seed)))()
  batch = measure.quick(lambda: task.batch(jax.random.key(cfg.seed + 1), 0, cfg.train.batch_size))()
  grad = measure.quick(
    lambda w: jax.value_and_grad(model.loss, has_aux=True)(w, batch, segments, cfg.model, cfg.sleep)
  )
  (loss, _), grads = grad(values)

  weights = torch_model.from_jax(values)
  fields = {"inputs": torch.int64, "targets": torch.int64, "loss_mask": torch.float32}
  same = {name: torch.from_numpy(np.array(getattr(batch, name))).to(kind) for name, kind in fields.items()}
  peer_loss = torch_model.Model(cfg, task.layout, None).loss(weights, same)
  peer_loss.backward()
  peer_grads = {name: w.grad for name, w in zip(weights, weights.values(), strict=True)}
  return {
    "loss": abs(peer_loss.item() - float(loss)) / float(loss),
    "grad_norm": abs(_norm(peer_grads) / _norm(torch_model.from_jax(grads)) - 1),
    "gradient": _apart(torch_model.from_jax(grads), peer_grads),
    "update": _apart(*_updates(cfg, values, grads)),
  }


def _updates(cfg: config.Config, values: model.Params, grads: model.Params) -> tuple[Any, Any]:
  """What two optimizer steps with the same gradients add to the weights: ours, and PyTorch's.

  Muon is compared in float32: in bfloat16 both round, each its own way.
  """
  from sleep_jax.benchmarks import torch_model

  cfg = config.replace(cfg, optim={"newton_schulz_dtype": "float32"})
  tx = optim.make(cfg.optim, model.declare(cfg.model), cfg.train.steps)

  @measure.quick
  def twice(w, grads):
    opt_state, start = tx.init(w), w
    for _ in range(2):
      updates, opt_state = tx.update(grads, opt_state, w)
      w = optax.apply_updates(w, updates)
    return jax.tree.map(lambda after, before: after - before, w, start)

  peer = torch_model.from_jax(values)
  before = {name: w.detach().clone() for name, w in peer.items()}
  optimizer = torch_model.Optimizer(cfg, peer)
  for _ in range(2):
    for name, g in torch_model.from_jax(grads).items():
      peer[name].grad = g.detach()
    optimizer.step()
  return torch_model.from_jax(twice(values, grads)), {
    name: w.detach() - before[name] for name, w in peer.items()
  }


def table(
  cfg: config.Config, task: train.DeviceTask, times: dict[str, measure.Times], product: float
) -> list[dict[str, Any]]:
  """One row a contender: times, speed, ratio to ours and share of the large product's speed."""
  tokens = cfg.train.batch_size * len(task.layout)
  rate = product / times[PRODUCT].median("cpu")  # FLOPs a CPU second
  work = needed_flops(cfg, task) * cfg.train.batch_size
  ours = times[OURS]
  rows = []
  for name, t in times.items():
    if name == PRODUCT:
      continue
    rows.append(
      {
        "N": cfg.sleep.num_passes,
        "model": name,
        "tokens/s": round(tokens / t.median("wall")),
        "wall ms": t.median("wall") * 1e3,
        "wall min": t.least("wall") * 1e3,
        "CPU ms": t.median("cpu") * 1e3,
        "CPU min": t.least("cpu") * 1e3,
        "× wall": t.median("wall") / ours.median("wall"),
        "× CPU": t.median("cpu") / ours.median("cpu"),
        "of product": f"{work / t.median('cpu') / rate:.0%}",
      }
    )
  return rows


def needed_flops(cfg: config.Config, task: train.DeviceTask) -> float:
  """FLOPs of a training step a sequence, without what nobody reads.

  Of the last pass over a window only S is kept, so that of a last fast-weight block the gate, the output and
  the MLP are computed for nothing; XLA leaves them out where passes are written out, PyTorch because
  `torch_model` does.
  """
  segments = windows.plan(task.layout, cfg.model.window, cfg.sleep)
  counted = flops.per_sequence(segments, cfg.model, cfg.sleep).train
  if cfg.model.blocks[-1] == "attn":
    return counted
  last = model.declare(cfg.model)["blocks"][str(len(cfg.model.blocks) - 1)]
  dropped = sum(
    math.prod(w.shape) for w in (last["mixer"]["gate"], last["mixer"]["o"], *last["mlp"].values())
  )
  tokens = sum(s.length * s.count for s in segments if s.asleep)
  return counted - flops.TRAIN_FACTOR * 2 * dropped * tokens


def _jax_step(cfg: config.Config, task: train.DeviceTask) -> Callable[[], Any]:
  """Ours as it trains, one step a call."""
  cfg = config.replace(cfg, train={"steps_per_dispatch": 1})
  _, tx, one_step = train.optimization(cfg)
  held = [measure.quick(lambda: train.init_state(cfg, tx))()]
  segments = windows.plan(task.layout, cfg.model.window, cfg.sleep)
  dispatch = train.make_dispatch(cfg, task, one_step, segments).lower(held[0]).compile()
  heap.keep(dispatch.memory_analysis().temp_size_in_bytes)

  def step():
    held[0], measured = dispatch(held[0])
    return jax.device_get(measured)

  step()
  return step


def _torch_alone(*args: Any) -> Callable[[], Any]:
  """`_torch_step` in a process of its own: a thread for each of its cores, subnormal numbers are zero."""
  from sleep_jax.benchmarks import torch_model

  torch_model.set_up(measure.pin(None))
  return _torch_step(*args)


def _torch_step(
  cfg: config.Config,
  task: train.DeviceTask,
  chunk: int | None,
  compiled: bool = False,
  rounded: bool = False,
) -> Callable[[], Any]:
  """The PyTorch model as one would train it."""
  import torch

  from sleep_jax.benchmarks import torch_model

  net = torch_model.Model(cfg, task.layout, chunk)
  weights = torch_model.from_jax(model.init(cfg.model, jax.random.key(cfg.seed)))
  optimizer = torch_model.Optimizer(cfg, weights)
  generator, parts = torch.Generator().manual_seed(cfg.seed), cfg.train.microbatches
  loss_of = torch.compile(net.loss, dynamic=False) if compiled else net.loss

  def step():
    batch = torch_model.make_batch(cfg.data, cfg.train.batch_size, generator)
    loss = 0.0
    for i in range(parts):
      with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        mean = loss_of(weights, {name: x[i::parts] for name, x in batch.items()})
      (mean / parts).backward()  # every sequence has as many targets
      loss += mean.item() / parts
    optimizer.step()
    optimizer.forget_gradients()
    return loss

  return step


def _norm(values: dict[str, Any]) -> float:
  return math.sqrt(sum(float(x.detach().double().square().sum()) for x in values.values()))


def _apart(ours: dict[str, Any], peer: dict[str, Any]) -> float:
  """The largest difference over the largest entry of ours, worst weight."""
  return max(
    ((peer[name] - x).abs().max() / x.abs().max().clamp_min(1e-30)).item() for name, x in ours.items()
  )


def _worst(found: Sequence[dict[str, float]]) -> str:
  worst = {name: max(f[name] for f in found) for name in found[0]}
  return (
    "largest relative difference of PyTorch from sleep_jax on the same weights and batch, over all N: "
    + ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
  )


def _have_peers() -> bool:
  missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
  if missing:
    print(f"{' and '.join(missing)} not installed (make peers): ours alone is timed", file=sys.stderr)
  return not missing


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.training", __doc__)
  parser.add_argument("--preset", choices=sorted(BATCH), default="demo")
  parser.add_argument("--passes", type=flags.counts, default=(1, 2, 4), help="values of N, with commas")
  parser.add_argument(
    "--batch", type=flags.count, help="sequences a step; without it the preset's, 32 for fig2b"
  )
  parser.add_argument(
    "--microbatches", type=flags.count, default=1, help="parts of a step's batch, one after the other"
  )
  parser.add_argument("--rounds", type=flags.count, default=9)
  parser.add_argument(
    "--turn", type=flags.from_zero, default=measure.LEAST_S, help="seconds of work in a turn, at least"
  )
  parser.add_argument("--threads", type=flags.count, default=1, help="cores to use")
  parser.add_argument(
    "--product", type=flags.count, default=PRODUCT_SIZE, help="size of the large matrix product"
  )
  parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave PyTorch out")
  parser.add_argument("--no-scan", dest="scan", action="store_false", help="leave loops=scan out")
  parser.add_argument(
    "--no-shipped", dest="shipped", action="store_false", help="leave PyTorch with chunks of 64 out"
  )
  parser.add_argument("--rounded", action="store_true", help="ours and PyTorch with products of bfloat16 too")
  parser.add_argument(
    "--compile", action="store_true", help="PyTorch through torch.compile too (needs a C++ compiler)"
  )
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(command.run(main, None))
