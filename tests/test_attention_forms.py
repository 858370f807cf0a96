"""The forms of attention against `dense`, in values and gradients; which of them is taken; their memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sleep_jax import attention, config, generate, model, windows
from sleep_jax.attention import cudnn, forms
from sleep_jax.attention.blocked import Plan, blocked
from tests import hybrids
from tests.kernels import test_target

NEAR = {"float32": 3e-6, "bfloat16": 2e-2}  # of the largest entry; measured: 6e-7, and two roundings of 2^-8


def operands(B, T, S, heads, kv_heads, d, dtype="float32", seed=0):
  """q, k, v, and what the output is multiplied with before it is added up."""
  rng = np.random.default_rng(seed)
  shapes = (B, T, heads, d), (B, S, kv_heads, d), (B, S, kv_heads, d), (B, T, heads, d)
  return [jax.device_put(rng.normal(size=shape).astype(jnp.dtype(dtype))) for shape in shapes]


def left_pads(S, *pads):
  return np.arange(S) >= np.array(pads)[:, None]


def everything(form, arrays, valid):
  """Outputs at tokens, and the gradients of q, k and v, in float32."""
  q, k, v, weights = arrays
  T, S = q.shape[1], k.shape[1]
  counts = np.ones((q.shape[0], T), bool) if valid is None else valid[:, S - T :]

  def total(q, k, v):
    out = jnp.where(counts[:, :, None, None], form(q, k, v), 0)
    return jnp.sum((out * weights).astype(jnp.float32)), out

  grads, out = hybrids.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  assert out.dtype == q.dtype and [g.dtype for g in grads] == [x.dtype for x in (q, k, v)]
  return [np.asarray(x, np.float32) for x in (out, *grads)]


def judge(arrays, reach, valid):
  """`everything` by `dense`, in float32."""

  def form(q, k, v):
    T, S = q.shape[1], k.shape[1]
    seen = attention.allowed(jnp.arange(T) + S - T, jnp.arange(S), reach, valid)
    return attention.dense(q, k, v, seen)

  return everything(form, [x.astype(jnp.float32) for x in arrays], valid)


def assert_equal(form, shape, reach, valid, dtype="float32"):
  arrays = operands(*shape, dtype=dtype)
  got = everything(functools.partial(form, reach=reach, valid=valid), arrays, valid)
  hybrids.assert_near(got, judge(arrays, reach, valid), NEAR[dtype])


CASES = {  # B, T, S, query heads, key heads, width; reach; pads
  "causal": ((2, 37, 37, 3, 1, 64), None, None),
  "twelve heads on two": ((1, 40, 40, 12, 2, 128), None, None),
  "as many heads": ((1, 19, 19, 4, 4, 256), None, None),
  "one block": ((2, 5, 5, 2, 1, 64), None, left_pads(5, 0, 3)),
  "sliding": ((2, 37, 37, 4, 2, 96), 9, None),
  "behind what was kept": ((2, 20, 39, 6, 2, 64), 20, left_pads(39, 0, 25)),
  "behind what was kept, near": ((2, 33, 65, 3, 1, 64), 7, left_pads(65, 40, 4)),
  "left pads": ((3, 37, 37, 3, 1, 64), None, left_pads(37, 0, 5, 20)),
  "left pads, sliding": ((3, 37, 37, 12, 2, 64), 8, left_pads(37, 0, 5, 20)),
  "pads between": ((2, 37, 37, 3, 1, 64), 8, np.random.default_rng(3).random((2, 37)) < 0.7),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_blocked_equals_dense(case):
  shape, reach, valid = CASES[case]
  assert_equal(functools.partial(blocked, offset=shape[2] - shape[1], block=16), shape, reach, valid)


@pytest.mark.parametrize("case", ["twelve heads on two", "left pads, sliding", "as many heads"])
def test_blocked_equals_dense_in_bfloat16(case):
  shape, reach, valid = CASES[case]
  form = functools.partial(blocked, offset=0, block=16)
  assert_equal(form, shape, reach, valid, dtype="bfloat16")


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 40))])
def test_blocked_equals_dense_whatever_the_sizes(seed):
  rng = np.random.default_rng(seed)
  T, kv_heads, groups = (int(rng.integers(1, most)) for most in (60, 4, 5))
  S = T + int(rng.integers(0, 40))
  shape = (2, T, S, kv_heads * groups, kv_heads, 2 * int(rng.integers(1, 20)))
  reach = int(rng.integers(1, S + 2)) if rng.random() < 0.6 else None
  valid = rng.random((2, S)) < rng.random() if rng.random() < 0.6 else None
  block = int(rng.integers(1, 70))
  assert_equal(functools.partial(blocked, offset=S - T, block=block), shape, reach, valid)


@pytest.mark.parametrize("offset", [0, 3, 13])
@pytest.mark.parametrize("reach", [None, 6])
def test_the_place_of_a_piece_may_be_traced(offset, reach):
  """Against the whole: the rows behind the piece are in the cache, and not set yet."""
  q, k, v, _ = operands(2, 11, 24, 3, 1, 8)
  valid = left_pads(24, 0, 2)
  form = hybrids.jit(functools.partial(blocked, reach=reach, block=5))
  got = form(q, k, v, offset=jnp.int32(offset), valid=valid)
  seen = attention.allowed(offset + jnp.arange(11), jnp.arange(24), reach, valid)
  counts = np.any(seen, axis=(1, 3))
  hybrids.assert_near(np.asarray(got)[counts], np.asarray(attention.dense(q, k, v, seen))[counts], 3e-6)


def test_a_query_that_sees_nothing_gets_0_and_no_gradient():
  """A row of pads, and pads before the first token; numbers there as large as they like."""
  q, k, v, weights = operands(2, 20, 20, 3, 1, 8)
  valid = left_pads(20, 20, 6)
  q, k, v = (x * jnp.where(valid[:, :, None, None], 1, 1e15) for x in (q, k, v))

  def total(q, k, v):
    out = blocked(q, k, v, offset=0, valid=valid, block=8)
    return jnp.sum(out * weights), out

  grads, out = hybrids.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  for x in (out, *grads):
    np.testing.assert_array_equal(np.asarray(x)[~valid], 0)
    assert np.all(np.isfinite(x)) and np.any(np.asarray(x)[valid] != 0)


def test_tiles_that_nobody_sees_are_left_out():
  """Every tile with a pair that counts is there, and no other."""
  for T, S, queries, keys, reach in ((64, 64, 16, 16, None), (64, 127, 16, 16, 64), (50, 90, 7, 11, 5)):
    plan = Plan(queries, keys, reach, S - T, S - T)
    seen = np.asarray(attention.allowed(jnp.arange(T) + S - T, jnp.arange(S), reach, None))[0, 0]
    want = {(i // queries, j // keys) for i, j in np.argwhere(seen).tolist()}
    tiles = plan.tiles(T, S).tolist()
    assert set(map(tuple, tiles)) == want and len(tiles) == len(want)
  assert len(Plan(16, 16, None, 0, 0).tiles(64, 64)) == 10  # of 16: the triangle
  assert (
    len(Plan(16, 16, 16, 0, 0).tiles(1024, 1024)) == 127
  )  # of 4096: two a block of queries, but the first


def temporary(form, L):
  """Bytes beside arguments and results of the gradient."""
  x, kv = (jax.ShapeDtypeStruct((1, L, heads, 8), jnp.float32) for heads in (2, 1))

  def total(q, k, v):
    return jnp.sum(form(q, k, v) ** 2)

  lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, kv, kv)
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("reach", [None, 512])
def test_memory_grows_with_the_window_and_not_with_its_square(reach):
  attend = functools.partial(attention.attend, reach=reach)
  sizes = [temporary(functools.partial(attend, implementation="blocked"), L) for L in (1024, 2048, 4096)]
  grown = np.diff(sizes)
  assert grown[1] < 2.2 * grown[0], sizes  # twice as many tokens, twice the growth
  assert sizes[2] < 4 * 2 * 4096**2 / 8  # an eighth of the scores
  assert temporary(functools.partial(attend, implementation="dense"), 2048) > 4 * 2 * 2048**2


class TestChoice:
  """Which form is taken, for the devices that the program is for."""

  def forms_of(self, platform, monkeypatch, *, T=1024, S=None, **settings):
    """The forms tried in turn, none of which runs but the last one."""
    tried = []

    def run(name, q, **_):
      tried.append(name)
      if name in forms.KERNELS:
        raise NotImplementedError("not here")
      return q

    monkeypatch.setattr(forms, "_run", run)
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16) for n in (T, S or T))
    with jax.sharding.use_abstract_mesh(test_target.mesh(platform)):
      jax.eval_shape(functools.partial(attention.attend, **settings), q, k, k)
    return tried

  @pytest.mark.parametrize(
    ("platform", "long"),
    [("cpu", ["blocked"]), ("gpu", ["cudnn", "blocked"]), ("tpu", ["splash", "blocked"])],
  )
  def test_by_size_and_platform(self, platform, long, monkeypatch):
    for T, S, want in ((512, 512, ["dense"]), (24, 24, ["dense"]), (513, 513, long), (400, 799, long)):
      assert self.forms_of(platform, monkeypatch, T=T, S=S) == want
    for name in ("dense", "blocked"):
      assert self.forms_of(platform, monkeypatch, implementation=name) == [name]

  @pytest.mark.parametrize(("platform", "name"), [("gpu", "cudnn"), ("tpu", "splash")])
  def test_a_piece_of_an_open_window_has_no_fused_form(self, platform, name, monkeypatch):
    for named in (None, name):
      piece = {"offset": jnp.int32(3), "implementation": named}
      assert self.forms_of(platform, monkeypatch, **piece) == ["blocked"]
      assert self.forms_of(platform, monkeypatch, T=2, S=1024, **piece) == ["dense"]

  def test_a_named_form_runs_or_says_why_not(self, monkeypatch):
    with pytest.raises(
      NotImplementedError, match=r"attention: 'cudnn' runs on gpu, not on cpu; known here: dense"
    ):
      self.forms_of("cpu", monkeypatch, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="not here"):
      self.forms_of("tpu", monkeypatch, implementation="splash")
    with pytest.raises(ValueError, match="no implementation 'block'; did you mean \"blocked\""):
      self.forms_of("tpu", monkeypatch, implementation="block")

  def test_a_config_that_names_another_platforms_form_is_refused(self):
    cfg = config.AttentionConfig(implementation="splash")
    with pytest.raises(
      config.ConfigError, match=r"^model\.attention\.implementation: 'splash' runs on tpu, not"
    ):
      attention.check_form(cfg)
    with jax.sharding.use_abstract_mesh(test_target.mesh("tpu")):
      attention.check_form(cfg)
    attention.check_form(config.AttentionConfig(implementation="blocked"))
    with pytest.raises(
      config.ConfigError, match="implementation: unknown value 'flash'; did you mean \"splash\""
    ):
      config.AttentionConfig(implementation="flash")

  def test_where_scores_are_counted(self):
    assert attention.scores_at_once(512, 512) and not attention.scores_at_once(513, 513)
    assert attention.scores_at_once(4096, 4096, "dense") and not attention.scores_at_once(2, 2, "blocked")


@pytest.fixture
def by_jax(monkeypatch):
  """JAX's own arithmetic for what cuDNN is asked for."""

  def fused(q, k, v, reach, lengths):
    window = None if reach is None else (reach - 1, 0)
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=True, local_window_size=window, query_seq_lengths=lengths,
      key_value_seq_lengths=lengths, implementation="xla",
    )  # fmt: skip

  monkeypatch.setattr(cudnn, "fused", fused)


@each_case
def test_cudnn_is_asked_for_the_same(case, by_jax):
  shape, reach, valid = CASES[case]
  assert_equal(cudnn.cudnn, shape, reach, valid)


def test_cudnn_gives_0_to_rows_of_pads(by_jax):
  q, k, v, _ = operands(2, 6, 6, 2, 1, 8)
  out = cudnn.cudnn(q, k, v, valid=left_pads(6, 6, 2))
  np.testing.assert_array_equal(out[0], 0)
  assert np.all(np.isfinite(out)) and np.all(np.asarray(out)[1, 2:] != 0)


def test_without_cudnn_the_named_form_says_so_and_the_default_goes_on(monkeypatch):
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)
  arrays = jax.eval_shape(lambda: operands(1, 600, 600, 2, 1, 64, "bfloat16")[:3])
  with jax.sharding.use_abstract_mesh(test_target.mesh("gpu")):
    with pytest.raises(NotImplementedError, match="^cudnn: "):
      jax.eval_shape(functools.partial(attention.attend, implementation="cudnn"), *arrays)
    assert jax.eval_shape(attention.attend, *arrays).shape == (1, 600, 2, 64)


SETTINGS = {
  "hard": {"blocks": ("attn", "gdn", "nope")},
  "sliding": {"blocks": ("swa", "attn"), "eviction": "sliding"},
}


@functools.cache
def trained(name, form, remat):
  """Loss, gradients and logits of a batch with pads; two windows slept on, then one that answers."""
  sizes = {"swa_window": 3, "implementation": form}
  cfg = hybrids.model_config(window=5, attention=sizes, **SETTINGS[name])
  sleep_cfg = config.SleepConfig(num_passes=2, remat=remat)
  batch, layout = hybrids.random_batch(14, (12, 13), pads=(0, 7))
  segments = windows.plan(layout, cfg.window, sleep_cfg)
  return hybrids.program(segments, cfg, sleep_cfg)(model.init(cfg, jax.random.key(0)), batch)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_mixer_reads_the_same(eviction):
  """A whole window, and the same tokens in two pieces; gradients of weights and inputs too."""
  valid, found = left_pads(12, 0, 5), {}
  for form in ("dense", "blocked"):
    sizes = {"implementation": form}
    cfg = hybrids.model_config(("attn",), window=12, attention=sizes, eviction=eviction)
    weights = hybrids.random_params(cfg)["blocks"]["0"]["mixer"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, cfg.embed_dim)), jnp.float32)

    def read(weights, x, cfg=cfg):
      if cfg.eviction == "hard":
        out = attention.read_window(weights, x, cfg, valid=valid)
      else:
        out, _ = attention.read_behind(weights, x, attention.init_kept(cfg, 2), cfg, valid=valid)
      cache, pieces = attention.init_cache(cfg, 2), []
      for part in (slice(0, 7), slice(7, 12)):
        piece, cache = attention.decode(weights, x[:, part], cache, cfg, valid=valid[:, part])
        pieces.append(piece)
      outs = jnp.where(valid[..., None], jnp.stack([out, jnp.concatenate(pieces, axis=1)]), 0)
      return jnp.sum(jnp.sin(outs[0])), outs

    found[form] = hybrids.jit(jax.grad(read, argnums=(0, 1), has_aux=True))(weights, x)
  hybrids.assert_near(found["blocked"], found["dense"], 1e-5)
  hybrids.assert_near(found["blocked"][1][1], found["blocked"][1][0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [("sliding", "window"), ("hard", "none"), ("hard", "window")])
def test_a_model_learns_the_same(name, remat):
  got = trained(name, "blocked", remat)
  assert np.isfinite(got[0])
  hybrids.assert_near(got, trained(name, "dense", remat), 1e-4)


def test_short_windows_are_read_by_the_program_that_always_read_them():
  def text(form):
    cfg = hybrids.model_config(("attn",), window=60, attention={"implementation": form})
    weights = hybrids.random_params(cfg)["blocks"]["0"]["mixer"]
    read = functools.partial(attention.read_window, cfg=cfg, valid=left_pads(60, 0, 7))
    return str(jax.make_jaxpr(read)(weights, jnp.zeros((2, 60, cfg.embed_dim))))

  assert text(None) == text("dense") != text("blocked")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_reads_the_same(name):
  """Prompts of unequal length, in pieces and whole windows; then a row reads pads while the other goes on."""
  sleep_cfg, found = config.SleepConfig(num_passes=2), {}
  for form in ("dense", "blocked"):
    cfg = hybrids.model_config(
      window=8, attention={"swa_window": 3, "implementation": form}, **SETTINGS[name]
    )
    weights = model.init(cfg, jax.random.key(0))
    tokens = hybrids.random_tokens(2, 21)
    session = generate.read(
      weights, [tokens[0], tokens[1, :16]], generate.start(cfg, sleep_cfg, 2), cfg, sleep_cfg
    )
    valid = np.array([[True] * 3, [False] * 3])
    session = generate.read(weights, tokens[:, :3], session, cfg, sleep_cfg, valid=valid)
    found[form] = generate.read(weights, tokens[:, :6], session, cfg, sleep_cfg).logits
  hybrids.assert_near(found["blocked"], found["dense"], 1e-5)


@pytest.mark.parametrize(("shape", "kv_heads"), [((2, 2), 2), ((2, 4), 2), ((1, 8), 4)])
def test_on_a_mesh_each_device_has_its_own_rows_and_heads(shape, kv_heads):
  """Heads of keys that the devices cannot share out are repeated; nothing is communicated."""
  q, k, v, weights = operands(2, 21, 21, 8, kv_heads, 8)
  valid = left_pads(21, 0, 6)
  devices = jax.devices()[: shape[0] * shape[1]]
  mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Explicit,) * 2, devices=devices)
  want = judge([q, k, v, weights], 9, valid)
  wide, whole = P("data", None, "model", None), P("data", None, None, None)
  split = wide if kv_heads % shape[1] == 0 else whole
  form = functools.partial(attention.attend, reach=9, implementation="blocked")

  def total(q, k, v, valid):
    out = form(q, k, v, valid=valid)
    assert jax.typeof(out).sharding.spec == wide
    counts = jnp.where(valid[:, :, None, None], out, 0)
    return jnp.sum(counts * weights), counts

  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, spec) for x, spec in ((q, wide), (k, split), (v, split))]
    weights = jax.device_put(weights, wide)
    valid = jax.device_put(valid, P("data", None))
    run = hybrids.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    grads, out = run(*placed, valid)
    forward = hybrids.jit(form).lower(*placed, valid=valid).compile().as_text()
  assert not any(word in forward for word in ("all-reduce(", "all-gather(", "all-to-all("))
  hybrids.assert_near([np.asarray(x) for x in (out, *grads)], want, NEAR["float32"])
