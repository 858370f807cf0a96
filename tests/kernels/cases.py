"""What the kernel tests share: random inputs, outputs and gradients of a rule, distances."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from sleep_jax.kernels.common.op import declared
from sleep_jax.kernels.delta import delta
from sleep_jax.kernels.gated_delta import gated_delta
from sleep_jax.kernels.gated_hebbian import gated_hebbian
from sleep_jax.kernels.gdn2 import gdn2
from sleep_jax.kernels.kda import kda

RULES = {"gated_delta": gated_delta, "gated_hebbian": gated_hebbian, "delta": delta, "kda": kda, "gdn2": gdn2}
OPS = declared()
IMPLEMENTATIONS = ("xla", "reference")

every_rule = pytest.mark.parametrize("rule", RULES)
# For tests that compile a gradient: kda is gdn2 with one gate for both, so it waits for the slow tests.
every_rule_but_kda = pytest.mark.parametrize(
  "rule", [pytest.param(rule, marks=[pytest.mark.slow] * (rule == "kda")) for rule in RULES]
)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# For tests that compile much: the rule with everything in it always, the others with the slow tests.
every_rule_slowly = pytest.mark.parametrize(
  "rule", ["gated_delta", *(pytest.param(rule, marks=pytest.mark.slow) for rule in list(RULES)[1:])]
)


def random_inputs(rule: str, B, T, H, K, V, *, seed=0, decay=1.0, dtype=np.float32) -> list[np.ndarray]:
  """The rule's operands, then S; keys of length 1, a tenth of the gates on erasing and writing exactly 0."""
  rng = np.random.default_rng(seed)
  sizes = dict(zip("BTHKV", (B, T, H, K, V), strict=True))
  q, k = rng.normal(size=(2, B, T, H, K))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  x = {"q": q / K**0.5, "k": k}
  op = OPS[rule]
  for name in (*op.operands, "S"):
    shape = op.shape(name, sizes)
    if name == op.log_decay:
      x[name] = -decay * rng.exponential(size=shape)
    elif name in op.float32:
      x[name] = rng.uniform(size=shape) * (rng.uniform(size=shape) > 0.1)
    elif name in "vS":
      x[name] = rng.normal(size=shape)
  return [x[name].astype(dtype) for name in (*op.operands, "S")]


def outputs_and_gradients(f: Callable, inputs, seed: int = 1) -> list[np.ndarray]:
  """o, S and the gradient of every input, from random cotangents of o and S."""
  rng = np.random.default_rng(seed)
  o, S = jax.eval_shape(f, *inputs)
  cotangents = tuple(rng.normal(size=x.shape).astype(x.dtype) for x in (o, S))
  return [np.asarray(x) for x in pulled(f)(jax.device_put(tuple(inputs)), cotangents)]


def quick(f: Callable) -> Callable:
  """`jax.jit` for a program that runs once: not optimising it saves two thirds of the time."""
  return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def pulled(f: Callable) -> Callable:
  """The jitted function (inputs, cotangents) -> outputs and gradients."""

  def run(inputs, cotangents):
    outputs, pull = jax.vjp(f, *inputs)
    return *outputs, *pull(cotangents)

  return quick(run)


@functools.cache
def function(rule: str, implementation: str) -> Callable:
  """The public function with a fixed implementation; one object, so that nothing is traced twice."""
  return functools.partial(RULES[rule], implementation=implementation)


@functools.cache
def jitted(rule: str, implementation: str) -> Callable:
  return quick(function(rule, implementation))


def double(rule: str, inputs) -> list[np.ndarray]:
  """Outputs and gradients of the reference in float64, at the values that the inputs hold."""
  with jax.enable_x64(True):
    return outputs_and_gradients(function(rule, "reference"), [np.asarray(x, np.float64) for x in inputs])


def distance(got, want) -> list[float]:
  """Largest difference relative to the largest entry, array by array."""
  return [
    float(np.max(np.abs(np.asarray(x, np.float64) - y)) / max(np.max(np.abs(y)), 1e-30))
    for x, y in zip(got, want, strict=True)
  ]


def assert_near(got, want, tolerance: float) -> None:
  far = distance(got, want)
  assert max(far) <= tolerance, f"relative distances {far}, allowed {tolerance}"  # NaN fails too
