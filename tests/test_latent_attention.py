"""Multi-head latent attention: against its equations in NumPy, in every way to read a text.

`pretrained/test_delta_net_peers` compares a whole model that has it with transformers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import attention, config, model, sharding
from sleep_jax.config import ConfigError, MeshConfig
from tests import hybrids

NEAR = 2e-6
HEADS, WIDTH, LATENT, WINDOW = 2, 7, 5, 4
# (channels of a key that all heads share, width of a value); 7 is a whole key.
SHAPES = [(3, 4), (0, 7), (6, 1)]
KEY = jax.random.key(0)


@functools.cache
def made(shared=3, value=4, eviction="hard", **changes):
  """A config whose attention has a latent, and the float32 weights of one layer of it."""
  said = {"num_heads": HEADS, "num_kv_heads": None, "head_dim": WIDTH, "qk_norm": False}
  said |= {"latent_dim": LATENT, "shared_dim": shared, "value_dim": value, "latent_norm_eps": 0.1}
  cfg = hybrids.model_config(("kda", "nope"), attention=said, eviction=eviction, **changes)
  weights = model.init(cfg, KEY)["blocks"]["1"]["mixer"]
  return cfg, weights | {"latent_norm": jnp.linspace(0.5, 2.0, LATENT)}


def by_the_equations(weights, x, valid, reach):
  """Float64, a head and a query at a time: [B, T, D]. A query sees at most `reach` keys, and no pads."""
  w = {name: np.asarray(value, float) for name, value in weights.items()}
  down = np.where(valid[..., None], x, 0.0) @ w["kv_down"]
  c, shared = down[..., :LATENT], down[..., LATENT:]
  c = c / np.sqrt(np.mean(c**2, axis=-1, keepdims=True) + 0.1) * w["latent_norm"]
  out = np.zeros_like(x, float)
  for h in range(HEADS):
    q, up = np.asarray(x, float) @ w["q"][:, h], c @ w["kv_up"][:, h]
    own = WIDTH - shared.shape[-1]
    k, v = np.concatenate([up[..., :own], shared], axis=-1), up[..., own:]
    for b, t in np.ndindex(*x.shape[:2]):
      seen = [s for s in range(max(0, t - reach + 1), t + 1) if valid[b, s]]
      if seen:
        scores = np.exp(k[b, seen] @ q[b, t] / np.sqrt(WIDTH))
        out[b, t] += (scores / scores.sum()) @ v[b, seen] @ w["o"][h]
  return out


def text(length):
  x = np.random.default_rng(length).normal(size=(2, length, hybrids.WIDTH)).astype(np.float32)
  return x, np.arange(length) >= np.array([[0], [2]])


@pytest.mark.parametrize(("shared", "value"), SHAPES)
@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_a_window_is_read_as_the_equations_say(shared, value, implementation):
  cfg, weights = made(shared, value)
  assert weights["kv_down"].shape == (hybrids.WIDTH, LATENT + shared)
  assert weights["kv_up"].shape == (LATENT, HEADS, WIDTH - shared + value)
  assert weights["o"].shape == (HEADS, value, hybrids.WIDTH)
  cfg = config.replace(cfg, attention={"implementation": implementation})
  x, valid = text(WINDOW)
  got = hybrids.jit(lambda w, x: attention.read_window(w, x, cfg, valid=valid, rotated=False))(weights, x)
  want = by_the_equations(weights, x, valid, WINDOW)
  hybrids.assert_near(np.where(valid[..., None], got, 0), np.where(valid[..., None], want, 0), NEAR)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_token_by_token_and_in_pieces_it_is_the_window(eviction):
  """Under sliding eviction behind a window that was read before."""
  cfg, weights = made(eviction=eviction)
  x, valid = text(2 * WINDOW)
  decode = hybrids.jit(
    lambda w, x, cache, valid: attention.decode(w, x, cache, cfg, valid=valid, rotated=False)
  )
  behind = hybrids.jit(
    lambda w, x, kept, valid: attention.read_behind(w, x, kept, cfg, valid=valid, rotated=False)
  )
  before, own = slice(0, WINDOW), slice(WINDOW, 2 * WINDOW)
  if eviction == "sliding":
    want = by_the_equations(weights, x, valid, WINDOW)[:, own]
    nothing = attention.init_kept(cfg, 2)
    _, kept = behind(weights, x[:, before], nothing, valid[:, before])
    whole, _ = behind(weights, x[:, own], kept, valid[:, own])
    hybrids.assert_near(whole, want, NEAR)
  else:
    want, kept = by_the_equations(weights, x[:, own], valid[:, own], WINDOW), None
  for cuts in ((1, 1, 1, 1), (3, 1), (2, 2)):
    cache, at, parts = attention.init_cache(cfg, 2, kept, rotated=False), WINDOW, []
    for size in cuts:
      part = slice(at, at + size)
      out, cache = decode(weights, x[:, part], cache, valid[:, part])
      parts.append(out)
      at += size
    hybrids.assert_near(np.concatenate(parts, axis=1), want, NEAR)


def test_products_are_rounded_where_the_config_says_so():
  cfg, weights = made()
  x, valid = text(WINDOW)
  read = hybrids.jit(
    lambda w, cfg: attention.read_window(w, x, cfg, valid=valid, rotated=False), static_argnums=1
  )
  rounded, exact = read(weights, config.replace(cfg, matmul_dtype="bfloat16")), read(weights, cfg)
  assert 1e-4 < hybrids.distance(rounded, exact) < 0.03


def test_eight_devices_read_as_one():
  cfg, _ = made(vocab_size=12, embed_dim=16)
  weights, tokens = model.init(cfg, KEY), hybrids.random_tokens(4, WINDOW)
  run = lambda w: model.predict(w, tokens, model.init_state(cfg, 4), cfg)  # noqa: E731
  want = hybrids.jit(run)(weights)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=4, model=2))):
    placed = jax.jit(lambda: model.init(cfg, KEY))()
    assert not placed["blocks"]["1"]["mixer"]["kv_up"].sharding.is_fully_replicated
    got = hybrids.jit(run)(placed)
  hybrids.assert_near(got, want, 1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"blocks": ("kda", "attn")}, r"^model.blocks\[1\]: must be 'nope' with a latent .*, got 'attn'$"),
    ({"attention": {"shared_dim": 7}}, r"^model.attention.shared_dim: must be below 7 \(head_dim\), got 7$"),
    ({"attention": {"value_dim": 8}}, r"^model.attention.value_dim: must be at most 7 \(head_dim\), got 8$"),
    (
      {"attention": {"num_kv_heads": 1}},
      "^model.attention.num_kv_heads: must be num_heads = 2 with a latent",
    ),
    ({"attention": {"qk_norm": True}}, "^model.attention.qk_norm: must be False with a latent"),
    ({"attention": {"gate": True}}, "^model.attention.gate: must be False with a latent"),
    ({"attention": {"bias": True}}, "^model.attention.bias: must be False with a latent"),
    ({"attention": {"latent_dim": None}}, "^model.attention.shared_dim: needs model.attention.latent_dim$"),
    (
      {"attention": {"latent_dim": None, "shared_dim": 0}},
      "^model.attention.value_dim: needs model.attention.latent_dim$",
    ),
  ],
)
def test_what_does_not_go_with_a_latent_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    config.replace(made()[0], **changes)
