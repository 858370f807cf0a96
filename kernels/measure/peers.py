"""Other projects' functions for the same rules, for `kernels.bench`.

On a CPU they are the plain PyTorch functions of transformers, on a GPU the Triton kernels of
flash-linear-attention. Those that are not installed take no part.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

TRANSFORMERS = {  # rule -> module, chunked function, recurrent function
  "gated_delta": (
    "qwen3_next.modeling_qwen3_next",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
  ),
  "kda": (
    "kimi_linear.modeling_kimi_linear",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
  ),
}
FLA = {  # rule -> module and function below fla.ops
  "gated_delta": ("gated_delta_rule", "chunk_gated_delta_rule"),
  "gated_hebbian": ("simple_gla", "chunk_simple_gla"),
  "delta": ("delta_rule", "chunk_delta_rule"),
  "kda": ("kda", "chunk_kda"),
  "gdn2": ("gdn2", "chunk_gdn2"),
}
TRANSFORMERS_NAMES = ("torch_chunk_64", "torch_chunk_tuned", "torch_recurrent")
NAMES = (*TRANSFORMERS_NAMES, "fla_triton")

Run = Callable[[], Sequence]


def contestants(
  names: Sequence[str],
  rule: str,
  mode: str,
  inputs: dict[str, np.ndarray],
  cotangents: Sequence,
  time: Callable,
) -> dict[str, Run]:
  """The peers among `names` that can run here, each as a function that returns when its work is done.

  Args:
    names: out of `NAMES`.
    rule: theirs and ours.
    mode: "forward": o and S; "grad": the gradients of all inputs, in our order.
    inputs, cotangents: from `kernels.measure.shapes.make_inputs`.
    time: of one call of a run, in milliseconds; chooses the tuned chunk.
  """
  found: dict[str, Run] = {}
  for wanted, make in (
    ([name for name in names if name in TRANSFORMERS_NAMES], _transformers),
    ([name for name in names if name == "fla_triton"], _fla),
  ):
    if not wanted:
      continue
    try:
      found |= make(wanted, rule, mode, inputs, cotangents, time)
    except (ImportError, RuntimeError, LookupError, AssertionError) as reason:
      print(f"{rule}: without {', '.join(wanted)}: {reason}", file=sys.stderr)
  return found


def _transformers(names, rule, mode, inputs, cotangents, time) -> dict[str, Run]:
  if rule not in TRANSFORMERS:
    raise LookupError("transformers has no function for it")
  import torch  # pyright: ignore[reportMissingImports]

  module, chunk, recurrent = TRANSFORMERS[rule]
  module = importlib.import_module(f"transformers.models.{module}")
  chunk, recurrent = (_plain(module, name) for name in (chunk, recurrent))
  torch.set_flush_denormal(True)
  if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))

  def run(f: Callable, **options) -> Run:  # scales q itself, so it is given q without its scale
    scale, names = inputs["q"].shape[-1] ** 0.5, {"q": "query", "k": "key", "v": "value", "b": "beta"}
    return _torch_run(f, "cpu", mode, inputs, cotangents, names, options, scale)

  T = inputs["q"].shape[1]
  found = {}
  if "torch_chunk_64" in names:
    found["torch_chunk_64"] = run(chunk, chunk_size=64)
  if "torch_chunk_tuned" in names:
    lengths = {C for C in (16, 32, T, -(-T // 2), -(-T // 3)) if 8 <= C <= 64} or {T}
    tried = {C: run(chunk, chunk_size=C) for C in sorted(lengths)}
    best = min(tried, key=lambda C: min(time(tried[C]) for _ in range(2)))
    found[f"torch_chunk_tuned ({best})"] = tried[best]
  if "torch_recurrent" in names:
    found["torch_recurrent"] = run(recurrent)
  return found


def _plain(module, name: str) -> Callable:
  """The PyTorch function itself: transformers wraps it, to take flash-linear-attention's where that is."""
  return inspect.unwrap(getattr(module, name))


def _fla(names, rule, mode, inputs, cotangents, time) -> dict[str, Run]:
  del names, time  # one only, nothing to choose
  import torch  # pyright: ignore[reportMissingImports]

  if not torch.cuda.is_available():
    raise RuntimeError("torch sees no GPU")
  module, name = FLA[rule]
  kernel = getattr(importlib.import_module(f"fla.ops.{module}"), name)
  if rule == "gated_hebbian":  # has no write strength of its own

    def kernel(q, k, v, g, beta, *, of=kernel, **options):
      return of(q=q, k=k, v=beta[..., None] * v, g=g, **options)

  names = {"e": "b"} if rule == "gdn2" else {"b": "beta"}
  run = _torch_run(kernel, "cuda", mode, inputs, cotangents, names, {"scale": 1.0}, 1.0)
  run()  # refuses what it does not take: some of them float32
  return {"fla_triton": run}


def _torch_run(f, device, mode, inputs, cotangents, names, options, scale) -> Run:
  """f on torch tensors: outputs or gradients, in float32, on a GPU as tensors and left there.

  Args:
    names: ours -> theirs, where they differ.
    options: further arguments of f.
    scale: that q is multiplied by on its way in, and its gradient on the way out.
  """
  import torch  # pyright: ignore[reportMissingImports]

  def tensor(x: np.ndarray) -> torch.Tensor:
    y = torch.tensor(x.astype(np.float32), device=device)
    return y.to(torch.bfloat16) if x.dtype == jnp.bfloat16 else y

  arrays = inputs | {"q": (inputs["q"] * scale).astype(inputs["q"].dtype)}
  leaves = {name: tensor(x).requires_grad_(mode == "grad") for name, x in arrays.items()}
  given = [tensor(x) for x in cotangents]

  def run():
    arguments = {names.get(name, name): x for name, x in leaves.items() if name != "S"}
    with torch.set_grad_enabled(mode == "grad"):
      found = f(**arguments, initial_state=leaves["S"], output_final_state=True, **options)[:2]
    if mode == "grad":
      first, *others = torch.autograd.grad(found, list(leaves.values()), given)
      found = [first * scale, *others]
    if device == "cuda":
      torch.cuda.synchronize()
      return found
    return [x.float().numpy() for x in found]

  return run
