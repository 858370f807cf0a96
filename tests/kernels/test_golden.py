"""Every rule and implementation against values computed by published code (tests/data/golden/README.md).

Outputs, final states and the gradients of all inputs. Tolerances are relative to the largest entry of each
array: 1e-12 in float64; 2e-5 in float32, 1e-4 where the decay is strong.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import cases

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
RULE = {  # rule of the fixture -> ours
  "gated_delta_rule": "gated_delta",
  "gated_hebbian": "gated_hebbian",
  "linear_attention": "gated_hebbian",
  "mamba2_ssd": "gated_hebbian",
  "delta_rule": "delta",
  "kda": "kda",
  "gdn2": "gdn2",
}
# The longest and the strongest decay; the others are slow tests.
FLOAT64_QUICK = ("weak_decay_long", "strong_decay")


def load(quick: tuple[str, ...] = ()) -> list:
  """All cases; those with a decay per channel compile longest and are slow tests unless named in `quick`."""
  found = []
  for folder in ("gated_delta_rule", "kda_and_gdn2", "mamba2_gated_hebbian"):
    with open(GOLDEN / folder / "cases.json", encoding="utf-8") as file:
      for name, case in json.load(file)["cases"].items():
        slow = [pytest.mark.slow] * (folder == "kda_and_gdn2" and name not in quick)
        found.append(pytest.param(folder, name, case, id=name, marks=slow))
  return found


@functools.cache
def arrays(folder: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / folder / "expected.npz", allow_pickle=False) as file:
    return dict(file)


def l2_normalised(x):
  return x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-6)


def model(case: dict, implementation: str):
  """The fixture's operator in terms of our rule: a function of the fixture's inputs, in their order."""
  rule = functools.partial(cases.RULES[RULE[case["rule"]]], implementation=implementation)

  def run(*inputs):
    x = dict(zip(case["inputs"], inputs, strict=True))
    if case["rule"] == "mamba2_ssd":
      heads = functools.partial(jnp.repeat, repeats=case["H"] // case["groups"], axis=2)
      x |= {"q": heads(x["C"]), "k": heads(x["B"]), "v": x["x"], "g": x["A"] * x["dt"], "b": x["dt"]}
    q, k, v = x["q"], x["k"], x["v"]
    if case["l2norm_inside"]:
      q, k = l2_normalised(q), l2_normalised(k)
    ones = jnp.ones(v.shape[:3], v.dtype)
    b = x.get("beta", x.get("b", ones))
    S = x.get("initial_state", jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), v.dtype))
    gates = (b,) if case["rule"] == "delta_rule" else (x.get("g", 0 * ones), b)
    if case["rule"] == "gdn2":
      gates = x["g"], x["b"], x["w"]
    return rule(q * case["scale"], k, v, *gates, S)

  return run


def result(folder: str, name: str, case: dict, implementation: str, dtype) -> None:
  stored = arrays(folder)
  put = lambda key: jax.device_put(np.asarray(stored[f"{name}.{key}"], dtype))  # noqa: E731
  inputs = tuple(put(f"in.{key}") for key in case["inputs"])
  cotangents = tuple(put(f"cot.{key}") for key in ("o", "final_state"))
  got = cases.pulled(model(case, implementation))(inputs, cotangents)
  keys = ["out.o", "out.final_state", *(f"grad.{key}" for key in case["inputs"])]
  assert all(x.dtype == dtype for x in got)
  tolerance = 1e-12 if dtype == jnp.float64 else 1e-4 if name.endswith("strong_decay") else 2e-5
  cases.assert_near(got, [stored[f"{name}.{key}"] for key in keys], tolerance)


@pytest.mark.parametrize(
  ("folder", "name", "case"), load(("kda_scale_one_no_l2", "kda_single_token", "gdn2_strong_decay"))
)
@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)])
def test_float32(folder, name, case, implementation):
  result(folder, name, case, implementation, jnp.float32)


@pytest.mark.parametrize(("folder", "name", "case"), load())
def test_reference_float64(folder, name, case):
  with jax.enable_x64(True):
    result(folder, name, case, "reference", jnp.float64)


@pytest.mark.parametrize(
  ("folder", "name", "case"),
  [
    pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] * (case.id not in FLOAT64_QUICK))
    for case in load()
  ],
)
def test_chunked_float64(folder, name, case):
  """What float32 hides: the chunked form itself is exact."""
  with jax.enable_x64(True):
    result(folder, name, case, "xla", jnp.float64)
