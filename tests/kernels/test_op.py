"""An op declares itself, and gets checks, mask, mesh and the one-token step from that alone."""

import doctest
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.common.op import Derived, Op
from tests.kernels import cases


def oja(q, k, v, b, S):
  """S <- S + b (k - S v) v^T, token by token, with an output that is read before the write."""

  def step(S, token):
    q, k, v, b = token
    back = k - jnp.einsum("bhkv,bhv->bhk", S, v)
    return S + b[..., None, None] * back[..., :, None] * v[..., None, :], jnp.einsum("bhkv,bhk->bhv", S, q)

  S, o = jax.lax.scan(step, S, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, b)))
  return jnp.moveaxis(o, 0, 1), S


def oja_step(q, k, v, b, S):
  o, S = oja(*(x[:, None] for x in (q, k, v, b)), S)
  return o[:, 0], S


OJA = Op(
  "oja",
  operands={"q": "BTHK", "k": "BTHK", "v": "BTHV", "b": "BTH"},
  float32=("b",),
  implementations={"xla": oja},
  step=oja_step,
)


def inputs(B=4, T=6, H=2, K=3, V=5) -> list[np.ndarray]:
  rng, sizes = np.random.default_rng(0), {"B": B, "T": T, "H": H, "K": K, "V": V}
  return [(0.3 * rng.normal(size=OJA.shape(name, sizes))).astype(np.float32) for name in (*OJA.operands, "S")]


def test_a_rule_of_ones_own_is_checked():
  *tokens, S = inputs()
  for change, error, line in (
    ((*tokens[:3], tokens[3][..., 0], S), ValueError, "oja: b has shape (4, 6), needs [B, T, H]"),
    ((*tokens[:3], tokens[3].astype(np.int32), S), TypeError, "oja: b has dtype int32, needs float32"),
    ((*tokens, S.astype(jnp.bfloat16)), TypeError, "oja: S has dtype bfloat16, needs float32"),
  ):
    with pytest.raises(error, match=f"^{re.escape(line)}"):
      dispatch.call(OJA, *change)
  with pytest.raises(NotImplementedError, match="^oja: has no implementation 'reference', use 'xla'$"):
    dispatch.call(OJA, *tokens, S, implementation="reference")


def test_a_rule_of_ones_own_has_a_mask():
  """NaN at pads on the left: the rows equal those without pads."""
  *tokens, S = inputs()
  mask = np.arange(6) >= np.array([[0], [2], [2], [2]])
  poisoned = [np.where(np.expand_dims(mask, tuple(range(2, x.ndim))), x, np.nan) for x in tokens]
  o, S_out = dispatch.call(OJA, *poisoned, S, mask=mask)
  o_alone, S_alone = dispatch.call(OJA, *(x[1:, 2:] for x in tokens), S[1:])
  cases.assert_near([o[1:, 2:], S_out[1:]], [np.asarray(o_alone), np.asarray(S_alone)], 1e-6)


def test_a_rule_of_ones_own_runs_on_a_mesh():
  """A sequence and one token: as on one device, and o and S are split as the operands are."""
  *tokens, S = inputs()
  want = [np.asarray(x) for x in dispatch.call(OJA, *tokens, S)]
  mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices()[:8])
  with jax.set_mesh(mesh):
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    got = dispatch.call(OJA, *(place(x, "data", None, "model") for x in tokens), place(S, "data", "model"))
    assert got[0].sharding.spec[:3] == ("data", None, "model") and got[1].sharding.spec[:2] == (
      "data",
      "model",
    )
    S = place(S, "data", "model")
    for t in range(6):
      o, S = dispatch.step(OJA, *(place(x[:, t], "data", "model") for x in tokens), S)
    cases.assert_near([*got, o, S], [*want, want[0][:, -1], want[1]], 1e-6)


def test_an_op_without_a_step_says_so():
  op = Op("still", operands={"v": "BTHV"}, implementations={})
  with pytest.raises(NotImplementedError, match="^still: has no form for one token$"):
    dispatch.step(op, np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 2, 2), np.float32))


@pytest.mark.parametrize(
  ("fields", "line"),
  [
    ({"operands": {"q": "BTHK", "S": "BHKV"}}, "mine: 'S' belongs to every op, operands needs another name"),
    ({"operands": {"q": "TBHK"}}, "mine: q has axes [T, B, H, K], needs B, T as the first two"),
    ({"float32": ("g",)}, "mine: float32 names 'g', the operands are q, v"),
    ({"log_decay": "g"}, "mine: log_decay names 'g', the operands are q, v"),
    ({"at_pads": {"mask": 0.0}}, "mine: at_pads names 'mask', the operands are q, v"),
    ({"before": {"q": "context"}}, "mine: before names 'context', the operands are q, v"),
    ({"same_dtype": {"v": "x"}}, "mine: same_dtype names 'x', the operands are q, v"),
  ],
)
def test_a_wrong_declaration_is_refused_in_one_line(fields, line):
  with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
    Op("mine", **{"operands": {"q": "BTHK", "v": "BTHV"}, "implementations": {}} | fields)


def test_a_derived_axis_is_computed_and_checked():
  op = Op(
    "wide",
    operands={"x": "BTHX"},
    derived={"X": Derived("K + V", lambda sizes: sizes["K"] + sizes["V"])},
    implementations={},
  )
  assert op.shape("x", dict(zip("BTHKV", (1, 2, 3, 4, 5), strict=True))) == (1, 2, 3, 9)
  with pytest.raises(ValueError, match=r"^wide: x has shape \(1, 2, 3, 8\), needs K \+ V = 9 as its X$"):
    dispatch.call(op, np.zeros((1, 2, 3, 8), np.float32), np.zeros((1, 3, 4, 5), np.float32))


@pytest.mark.parametrize("rule", cases.OPS)
def test_a_folder_declares_its_op_and_its_examples_run(rule):
  """Name and public functions go together; every implementation that is named has its file."""
  api = importlib.import_module(f"sleep_jax.kernels.{rule}.api")
  op = cases.OPS[rule]
  assert op.name == rule and hasattr(api, rule) and hasattr(api, f"{rule}_step") == (op.step is not None)
  for name, function in op.implementations.items():
    assert name in {name for names in dispatch.ORDER.values() for name in names}
    assert importlib.util.find_spec(function.split(":")[0]), function
  done = doctest.testmod(api)
  assert done.attempted >= 4 and not done.failed


def test_the_readmes_rule_of_ones_own_runs(tmp_path):
  """Its block as it stands, against the sum of all writes."""
  readme = pathlib.Path(dispatch.__file__).parents[1] / "README.md"
  block = readme.read_text(encoding="utf-8").split("## A rule of your own")[1].split("```python\n")[1]
  (tmp_path / "mine.py").write_text(block.split("```")[0], encoding="utf-8")
  spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
  mine = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(mine)
  *tokens, S = inputs()
  q, k, v, b = tokens
  o, S_out = mine.update(*tokens, S)
  want = S + np.einsum("bth,bthk,bthv->bhkv", b, k, v)
  cases.assert_near([S_out, o[:, -1]], [want, np.einsum("bhkv,bhk->bhv", want, q[:, -1])], 1e-6)
