"""What a caller's mistake is answered with; and a mesh changes where things run, not what they give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.gated_delta import gated_delta
from tests.kernels import cases
from tests.kernels.cases import every_rule, every_rule_slowly

SPECS = {4: P("data", None, "model", None), 3: P("data", None, "model")}


@every_rule
@pytest.mark.parametrize(
  ("name", "change", "error", "line"),
  [
    ("q", lambda x: x[0], ValueError, "q has shape (5, 3, 4), needs [B, T, H, K]"),
    ("k", lambda x: x[..., :3], ValueError, "k has shape (2, 5, 3, 3), needs [B, T, H, K] = (2, 5, 3, 4)"),
    ("v", lambda x: x[:, :4], ValueError, "v has shape (2, 4, 3, 6), needs [B, T, H, V] = (2, 5, 3, 6)"),
    ("b", lambda x: x[..., None], ValueError, "b has shape (2, 5, 3, 1), needs [B, T, H]"),
    (
      "S",
      lambda x: x.swapaxes(2, 3),
      ValueError,
      "S has shape (2, 3, 6, 4), needs [B, H, K, V] = (2, 3, 4, 6)",
    ),
    ("S", lambda x: x.astype(jnp.bfloat16), TypeError, "S has dtype bfloat16, needs float32"),
    ("b", lambda x: x.astype(jnp.bfloat16), TypeError, "b has dtype bfloat16, needs float32"),
    ("v", lambda x: x.astype(np.int32), TypeError, "v has dtype int32, needs a floating point dtype"),
    ("mask", lambda _: np.ones((2, 4), bool), ValueError, "mask has shape (2, 4), needs [B, T] = (2, 5)"),
    ("mask", lambda _: np.ones((2, 5), np.int32), TypeError, "mask has dtype int32, needs bool"),
    ("implementation", lambda _: "refrence", ValueError, "known: xla, reference; did you mean 'reference'?"),
  ],
)
def test_a_mistake_is_answered_with_one_line(rule, name, change, error, line):
  names = (*cases.OPS[rule].operands, "S")
  if name == "b" and rule == "gdn2":
    name, line = (
      "e",
      line.replace("b has", "e has").replace("(2, 5, 3, 1), needs [B, T, H]", "(2, 5, 3, 4, 1)"),
    )
  arguments = dict(zip(names, cases.random_inputs(rule, 2, 5, 3, 4, 6), strict=True))
  arguments[name] = change(arguments.get(name))
  with pytest.raises(error) as caught:
    cases.RULES[rule](**arguments)
  assert str(caught.value).startswith(f"{rule}: ") and line in str(caught.value)
  assert "\n" not in str(caught.value)


@every_rule
def test_no_tokens_is_an_error(rule):
  with pytest.raises(ValueError, match="T is 0"):
    cases.RULES[rule](*cases.random_inputs(rule, 2, 0, 3, 4, 6))


def test_float64_in_asks_for_a_float64_state():
  with jax.enable_x64(True):
    *tokens, S = cases.random_inputs("gated_delta", 1, 3, 1, 2, 2, dtype=np.float64)
    with pytest.raises(TypeError, match="S has dtype float32, needs float64"):
      gated_delta(*tokens, S.astype(np.float32))
    assert all(x.dtype == jnp.float64 for x in cases.jitted("gated_delta", "xla")(*tokens, S))


def problem(rule: str):
  """A loss with everything in it, inputs for 8 devices, and a mask."""
  *inputs, S = cases.random_inputs(rule, 8, 70, 4, 6, 5)
  mask = np.ones((8, 70), bool)
  mask[:3, :9] = False

  def loss(inputs, mask):
    o, S = cases.RULES[rule](*inputs, mask=mask)
    return jnp.sum(jnp.sin(o)) + jnp.sum(S**2), (o, S)

  return jax.value_and_grad(loss, has_aux=True), (*inputs, S), mask


def axes(x) -> P:
  return P("data", "model", None, None) if x.shape == (8, 4, 6, 5) else SPECS[x.ndim]


@every_rule_slowly
def test_eight_devices_give_what_one_gives(rule):
  """Rows over data, heads over model: outputs, state and gradients, each where its operand was."""
  grad, inputs, mask = problem(rule)
  want = [np.asarray(x) for x in jax.tree.leaves(cases.quick(grad)(inputs, mask))]
  mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices()[:8])
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, axes(x))) for x in inputs]
    got = cases.quick(grad)(placed, jax.device_put(mask, P("data", None)))
    (_, (o, S)), grads = got
    assert o.sharding.spec == SPECS[4] and S.sharding.spec == P("data", "model", None, None)
    assert [x.sharding.spec for x in grads] == [axes(x) for x in inputs]
    cases.assert_near(jax.tree.leaves(got), want, 5e-6)

    # A state that everybody holds whole, as zeros made without a sharding are, is split with the rest.
    placed[-1] = jax.device_put(inputs[-1], P())
    cases.assert_near(jax.tree.leaves(cases.quick(grad)(placed, mask)), want, 5e-6)


def test_nothing_is_communicated():
  """Rows and heads never meet: the program of eight devices holds no collective."""
  _, inputs, _ = problem("gated_delta")
  mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices()[:8])
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, axes(x))) for x in inputs]

    def run(*x):
      outputs, pull = jax.vjp(gated_delta, *x)
      return pull(outputs)

    text = cases.quick(run).lower(*placed).compile().as_text()
  for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    assert collective not in text


def test_a_mesh_split_that_cannot_run_is_an_error():
  _, inputs, _ = problem("gated_delta")
  mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices()[:8])
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, axes(x))) for x in inputs]
    q = jax.device_put(inputs[0], P("data", None, None, "model"))
    with pytest.raises(ValueError, match="q is split along K over 'model'; only B and H may be split"):
      jax.eval_shape(gated_delta, q, *placed[1:])
    k = jax.device_put(inputs[1], P("model", None, None, None))
    with pytest.raises(ValueError, match="k is split along B over 'model', others over 'data'"):
      jax.eval_shape(gated_delta, placed[0], k, *placed[2:])


def test_a_pod_can_be_checked_without_one():
  mesh = AbstractMesh((64, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  shapes = [(512, 70, 4, 6)] * 2 + [(512, 70, 4, 5)] + [(512, 70, 4)] * 2
  with jax.sharding.use_abstract_mesh(mesh):
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens = [struct(shape, sharding=NamedSharding(mesh, SPECS[len(shape)])) for shape in shapes]
    S = struct((512, 4, 6, 5), sharding=NamedSharding(mesh, P("data", "model", None, None)))
    o, S_after = jax.eval_shape(gated_delta, *tokens, S)
  assert o.sharding == tokens[2].sharding and S_after.sharding == S.sharding


@every_rule
def test_one_token_updates_the_state_where_it_lies(rule):
  """What the rule gives for T = 1; and the compiled program writes S into the memory that S came in."""
  op, (*tokens, S) = cases.OPS[rule], cases.random_inputs(rule, 2, 1, 3, 4, 6)
  want = [np.asarray(x) for x in cases.jitted(rule, "reference")(*tokens, S)]
  token = {name: jnp.asarray(x[:, 0]) for name, x in zip(op.operands, tokens, strict=True)}
  program = dispatch.update.lower(op, token, jnp.asarray(S)).compile()
  assert program.memory_analysis().alias_size_in_bytes == S.nbytes
  assert "input_output_alias" in program.as_text()
  o, S_after = dispatch.step(op, *token.values(), S)
  cases.assert_near([o[:, None], S_after], want, 2e-6)


@every_rule
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_one_token_on_a_mesh_of_eight_moves_no_state(rule, kind):
  """Rows over one axis, heads over the other: no communication, no copy of S, updated where it lies."""
  op, (*tokens, S) = cases.OPS[rule], cases.random_inputs(rule, 4, 1, 4, 6, 5)
  want = [np.asarray(x) for x in cases.jitted(rule, "reference")(*tokens, S)]
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data", "model")))  # noqa: E731
    token = {name: place(x[:, 0]) for name, x in zip(op.operands, tokens, strict=True)}
    program = dispatch.update.lower(op, token, S := place(S)).compile()
    text = program.as_text()
    assert program.memory_analysis().alias_size_in_bytes == S.nbytes // 8
    for moved in ("all-", "collective-", "f32[1,2,6,5]{3,2,1,0} copy("):
      assert moved not in text, moved
    o, after = dispatch.step(op, *token.values(), S)
  assert S.is_deleted() and after.sharding.spec[:2] == ("data", "model") == o.sharding.spec[:2]
  cases.assert_near([o[:, None], after], want, 2e-6)


def test_one_token_of_a_replicated_operand_is_split_as_the_state_is():
  """What is whole along an axis where S is split is split too; the widths may not be."""
  *tokens, S = cases.random_inputs("kda", 4, 1, 4, 6, 5)
  want = [np.asarray(x) for x in cases.jitted("kda", "reference")(*tokens, S)]
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    token = [jnp.asarray(x[:, 0]) for x in tokens]
    o, after = dispatch.step(
      cases.OPS["kda"], *token, jax.device_put(S, NamedSharding(mesh, P("data", "model")))
    )
    assert after.sharding.spec[:2] == ("data", "model")
    cases.assert_near([o[:, None], after], want, 2e-6)
    wide = jax.device_put(S, NamedSharding(mesh, P(None, None, "model")))
    with pytest.raises(ValueError, match="kda: S is split along K over 'model'; only B and H may be split"):
      dispatch.step(cases.OPS["kda"], *token, wide)


def test_a_positive_log_decay_is_refused_where_it_can_be_seen():
  inputs = cases.random_inputs("kda", 1, 3, 1, 2, 2)
  inputs[3][0, 1, 0, 1] = 0.5
  with pytest.raises(ValueError, match="kda: g reaches 0.5, needs <= 0"):
    cases.RULES["kda"](*inputs)


def test_an_implementation_of_another_platform_is_refused_in_one_line():
  inputs = cases.random_inputs("gated_delta", 1, 3, 1, 2, 2)
  for name, platform in (("pallas_tpu", "tpu"), ("pallas_gpu", "gpu")):
    with pytest.raises(NotImplementedError) as caught:
      gated_delta(*inputs, implementation=name)
    assert str(caught.value) == (
      f"gated_delta: {name!r} runs on {platform}, not on cpu; known here: xla, reference"
    )


def test_a_rule_without_a_named_implementation_is_refused_in_one_line(monkeypatch):
  """As `delta` on a TPU, where the name is known but this rule has no such kernel."""
  monkeypatch.setitem(dispatch.ORDER, "cpu", ("xla", "pallas_none"))
  with pytest.raises(NotImplementedError, match="^delta: has no implementation 'pallas_none', use 'xla'$"):
    cases.RULES["delta"](*cases.random_inputs("delta", 1, 3, 1, 2, 2), implementation="pallas_none")


def test_the_default_falls_back_with_one_warning(monkeypatch):
  """The first choice is not there: the second runs, and the log says so once, not at each call."""
  inputs = cases.random_inputs("gated_delta", 1, 3, 1, 2, 2)
  want = [np.asarray(x) for x in gated_delta(*inputs)]
  monkeypatch.setitem(dispatch.ORDER, "cpu", ("pallas_none", "xla"))
  monkeypatch.setitem(dispatch.DEFAULT, "cpu", ("pallas_none", "xla"))
  said = []
  monkeypatch.setattr(dispatch.logging, "warning", lambda text, *args: said.append(text % args))
  dispatch._warn_once.cache_clear()
  for _ in range(2):
    cases.assert_near(gated_delta(*inputs), want, 0.0)
  assert said == [
    "gated_delta: skipped pallas_none: gated_delta: has no implementation 'pallas_none', use 'xla'"
  ]
  monkeypatch.setitem(dispatch.DEFAULT, "cpu", ("pallas_none",))
  with pytest.raises(NotImplementedError, match="gated_delta: no implementation takes"):
    gated_delta(*inputs)


@every_rule
def test_forward_mode_alone_is_refused_in_one_line(rule):
  """Ours where the call is differentiated as it runs; inside `jax.jit` JAX says it, later and shorter."""
  inputs = tuple(cases.random_inputs(rule, 1, 3, 1, 2, 2))
  with pytest.raises(TypeError) as caught:
    jax.jvp(cases.RULES[rule], inputs, inputs)
  assert str(caught.value) == (
    f"{rule}: 'xla' has no forward-mode derivative (jax.jvp); "
    "use reverse mode (jax.vjp, jax.grad) or implementation='reference'"
  )
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jit(lambda x: jax.jvp(cases.RULES[rule], x, x))(inputs)
