"""What lies at a pad has no effect: in no operand, of no rule, in no implementation, not even NaN.

Outputs at tokens, S, the context of a convolution and all gradients equal, to the bit, those of the same
arrays with ordinary numbers at the pads. That a pad is as good as no token is in test_rules.py and
test_conv_gated_delta.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.conv_gated_delta import api as conv
from sleep_jax.kernels.conv_gated_delta import pallas_tpu_fused
from sleep_jax.kernels.gated_delta import pallas_tpu
from tests.kernels import cases

SIZES = {"B": 4, "T": 10, "H": 2, "K": 4, "V": 3, "c": 4}
MASK = np.ones((4, 10), bool)
MASK[0, :4] = False  # on the left, as batches have them
MASK[1] = False  # a row of nothing else
MASK[2, [2, 5, 6, 9]] = False  # in the middle and at the end
POISONS = (np.nan, np.inf, -np.inf, 1e30, -1e30)
INTERPRETED = {
  ("gated_delta", "pallas_tpu"): functools.partial(pallas_tpu.gated_delta, interpret=True),
  ("conv_gated_delta", "pallas_tpu_fused"): functools.partial(
    pallas_tpu_fused.conv_gated_delta, interpret=True
  ),
}
PROGRAMS = [(rule, name) for rule in cases.OPS for name in cases.IMPLEMENTATIONS]
PROGRAMS += [pytest.param(*names, marks=pytest.mark.slow) for names in INTERPRETED]


def inputs_of(rule: str) -> dict[str, np.ndarray]:
  op, rng = cases.OPS[rule], np.random.default_rng(0)
  arrays = {}
  for name in (*op.operands, "S"):
    x = rng.normal(size=op.shape(name, SIZES))
    if name == op.log_decay:
      x = -np.abs(x)
    arrays[name] = (0.5 * x).astype(np.float32)
  return arrays


def cotangents_of(rule: str) -> list[np.ndarray]:
  """Of o, S and, where a convolution goes on, its context."""
  op, rng = cases.OPS[rule], np.random.default_rng(1)
  shapes = [[SIZES[axis] for axis in "BTHV"], op.shape("S", SIZES)]
  if "context" in op.operands:
    shapes.append(op.shape("context", SIZES))
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def program(rule: str, implementation: str):
  """(inputs, cotangents) -> outputs and gradients of the inputs; compiled once for all poisons."""
  op, known = cases.OPS[rule], dispatch.ORDER["cpu"]
  if interpreted := INTERPRETED.get((rule, implementation)):
    op, known = dataclasses.replace(op, implementations={implementation: interpreted}), (implementation,)

  def run(inputs, cotangents):
    def call(*arrays):
      arguments = {"mask": jnp.asarray(MASK), "implementation": implementation}
      if rule == "conv_gated_delta":
        return conv.conv_gated_delta(*arrays, **arguments)
      return dispatch.call(op, *arrays, **arguments)

    outputs, pull = jax.vjp(call, *inputs)
    return *outputs, *pull(tuple(cotangents))

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(dispatch.ORDER, "cpu", known)
    patch.setattr(conv, "SPEC", op)
    inputs = jax.device_put(list(inputs_of(rule).values()))
    return cases.quick(run).lower(inputs, jax.device_put(list(cotangents_of(rule)))).compile()


def results(rule: str, implementation: str, inputs: dict[str, np.ndarray], cotangents) -> list[np.ndarray]:
  """Outputs, then gradients; o without its pads, which stand for nothing."""
  run = program(rule, implementation)
  got = run(*jax.device_put((list(inputs.values()), list(cotangents))))
  o, *rest = map(np.asarray, got)
  return [o[MASK], *rest]


@pytest.mark.parametrize(("rule", "implementation"), PROGRAMS)
def test_nothing_at_a_pad_has_an_effect(rule, implementation):
  """Each operand of tokens poisoned alone, then all of them and the gradient that arrives at o."""
  op, inputs, cotangents = cases.OPS[rule], inputs_of(rule), cotangents_of(rule)
  tokens = [name for name in op.operands if "T" in op.axes(name)]
  want = results(rule, implementation, inputs, cotangents)
  assert all(np.all(np.isfinite(x)) for x in want)
  for poison in POISONS:
    for names in (*((name,) for name in tokens), (*tokens, "o")):
      poisoned, arriving = dict(inputs), list(cotangents)
      for name in names:
        x = (arriving[0] if name == "o" else inputs[name]).copy()
        x[~MASK] = poison
        if name == "o":
          arriving[0] = x
        else:
          poisoned[name] = x
      got = results(rule, implementation, poisoned, arriving)
      for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=f"{poison} in {', '.join(names)}")
      gradients = dict(zip(inputs, got[-len(inputs) :], strict=True))
      for name in tokens:
        np.testing.assert_array_equal(gradients[name][~MASK], 0)
  np.testing.assert_array_equal(want[1][1], inputs["S"][1])  # nothing but pads: S keeps every bit


@pytest.mark.parametrize("rule", [rule for rule, op in cases.OPS.items() if op.log_decay])
def test_a_positive_log_decay_is_refused_at_a_token_and_not_at_a_pad(rule):
  op, named = cases.OPS[rule], {name: jnp.asarray(x) for name, x in inputs_of(rule).items()}
  named["mask"] = jnp.asarray(MASK)
  g = named["g"].at[~MASK].set(1e30)
  dispatch.check(op, named | {"g": g})
  with pytest.raises(ValueError, match=f"^{rule}: g reaches 0.25, needs <= 0"):
    dispatch.check(op, named | {"g": g.at[3, 5].set(0.25)})


def test_without_tracing_too_and_o_is_zero_at_a_pad():
  """Outside `jax.jit` the values of g are looked at."""
  inputs = inputs_of("gated_delta")
  for name in ("q", "k", "v", "g", "b"):
    inputs[name][~MASK] = 1e30
  o, S = cases.RULES["gated_delta"](*inputs.values(), mask=MASK)
  np.testing.assert_array_equal(o[~MASK], 0)
  assert np.all(o[MASK] != 0) and np.all(np.isfinite(o)) and np.all(np.isfinite(S))
