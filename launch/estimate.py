"""What a step costs, counted from shapes: bytes a device, floating-point operations, the least time.

Weights and the optimizer's state are exact. What a gradient keeps is counted on what autodiff keeps, whole on
every device of the mesh axis `model`: a compiler may need less, and scratch memory beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from sleep_jax import blocks, model, params, train
from sleep_jax.config import Config
from sleep_jax.cost import flops, footprint
from sleep_jax.launch import aot
from sleep_jax.launch.hardware import Hardware
from sleep_jax.launch.problem import Problem, check_division

# Forward passes beside the first, at most.
RECOMPUTED = {"none": 0, "block": 1, "pass": 2, "window": 3, "offload": 2}
BACKWARD = flops.TRAIN_FACTOR - 1  # of a backward pass, in forward passes

_gradient, _on_host = functools.cache(footprint.gradient), functools.cache(footprint.on_host)


@dataclasses.dataclass(frozen=True)
class Work:
  """What a step computes and moves, and the least time that this takes.

  Attributes:
    useful: FLOPs of a step, without recomputation and pads.
    executed: with both.
    seconds: limit -> the least seconds a step: `arithmetic`, `memory` (weights read for every pass of every
      part of the batch, and updated once), `links` (what the collectives of the compiled program move).
  """

  useful: float
  executed: float
  seconds: dict[str, float]

  @property
  def limit(self) -> str:
    """What the step takes longest for."""
    return max(self.seconds, key=lambda name: self.seconds[name])

  @property
  def least(self) -> float:
    """Seconds a step, on hardware that is never waited for."""
    return self.seconds[self.limit]


def bytes_by_kind(asked: Problem, row: Hardware, *, affine: bool = False) -> dict[str, int]:
  """Bytes a device that a step needs, by kind.

  Args:
    affine: what a gradient keeps is continued from one and two sequences, which is quicker for many sizes.

  Raises:
    ConfigError: where the devices or the batch do not divide.
  """
  cfg = asked.cfg
  data, axis = check_division(cfg.mesh, cfg.train, row)
  parts, state = cfg.train.microbatches, _state(cfg, data, axis)
  weights = aot.shard_bytes(state.params)
  every = cfg.optim.trained == ("*",)
  kept = _of_part(_gradient, asked, data, affine)
  return {
    "weights": weights,
    "optimizer": aot.shard_bytes((state.opt_state, state.average)),
    "gradients": weights * (1 if parts == 1 else 2) if every else 0,  # of a part, and the sum
    "kept for the gradient": kept,
  }


def bytes_on_host(asked: Problem, row: Hardware) -> int:
  """Bytes a device that a step keeps in the host's memory (`sleep.remat` = `offload`)."""
  data, _ = check_division(asked.cfg.mesh, asked.cfg.train, row)
  return _of_part(_on_host, asked, data, affine=True) if asked.cfg.sleep.remat == "offload" else 0


def _of_part(count: Callable[..., int], asked: Problem, data: int, affine: bool) -> int:
  """What `count` counts for the sequences that a device reads at once, of `data` along the mesh's axis."""
  cfg = asked.cfg
  first = next((i for i, counts in enumerate(asked.layout) if counts), len(asked.layout) - 1)
  size = cfg.train.batch_size // cfg.train.microbatches // data
  of = functools.partial(count, cfg.model, cfg.sleep, asked.tokens, asked.tokens - first)
  return of(1) + (size - 1) * (of(2) - of(1)) if affine and size > 2 else of(size)


def _state(cfg: Config, data: int, model_axis: int) -> train.TrainState:
  """The state as shapes with the shardings of a mesh, none of whose devices is needed."""
  mesh = AbstractMesh((data, model_axis), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.eval_shape(functools.partial(train.init_state, cfg, train.optimization(cfg).tx))


def work(asked: Problem, row: Hardware, collectives: Mapping[str, Any] | None = None) -> Work:
  """What a step costs on some hardware.

  Args:
    collectives: kind -> [times, bytes a device], of the compiled program. None: not known.

  Raises:
    ConfigError: where the devices or the batch do not divide.
  """
  cfg = asked.cfg
  model_axis = check_division(cfg.mesh, cfg.train, row)[1]
  useful, once = (
    flops.per_sequence(segments, cfg.model, cfg.sleep) * cfg.train.batch_size
    for segments in (asked.segments, asked.read)
  )
  again = RECOMPUTED[cfg.sleep.remat]
  executed = once.train + once.asleep * again + once.awake * min(again, 1)
  reads = _reads(asked) * cfg.train.microbatches * (1 + BACKWARD / 2 + again) / model_axis
  total = footprint.size(footprint.weights(cfg.model)) + footprint.optimizer(cfg.model, cfg.optim)
  seconds = {
    "arithmetic": executed / (row.chips * row.chip.peak),
    "memory": (reads * row.chip.devices + 2 * total / row.chips) / row.chip.bandwidth,
  }
  if collectives is not None:
    moved = sum(size for _, size in collectives.values())
    seconds["links"] = moved * row.chip.devices / row.chip.link
  return Work(useful.train, executed, seconds)


def _reads(asked: Problem) -> float:
  """Bytes of weights that one forward pass over all windows reads, in the dtype of the activations."""
  cfg = asked.cfg
  width = 2 if cfg.model.dtype == "bfloat16" else 4
  kinds = [(kind, i not in cfg.model.without_mlp) for i, kind in enumerate(cfg.model.blocks)]
  sizes = [params.count(blocks.declare_block(cfg.model, *kind)) for kind in kinds]
  whole = params.count(model.declare(cfg.model))
  first, last = cfg.sleep.looped(len(kinds))
  total = 0.0
  for segment in asked.read:
    passes = sum(sizes) + (cfg.sleep.num_passes - 1) * sum(sizes[first:last])
    once = passes if segment.asleep else cfg.model.predict_passes * sum(sizes)
    total += segment.count * (once + (whole - sum(sizes) if segment.reads else 0))
  return total * width
