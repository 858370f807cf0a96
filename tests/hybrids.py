"""Small hybrids for the tests: configs that fit `oracle.random_params`, batches, and programs compiled once.

The oracle is float64 and the package float32, so parameters are rounded to float32 before either sees them:
what is left is the rounding inside the package.
"""

import functools
from typing import Any

import jax
import numpy as np

from sleep_jax import config, model, windows
from sleep_jax.fast_weights import FastWeights
from tests import oracle

VOCAB, WIDTH = 11, 12
HYBRID = ("attn", "gdn", "attn", "hebbian")

# These programs run a few times: compiling them without optimising takes a third of the time.
QUICK = {"xla_backend_optimization_level": 0}


def jit(function, **settings: Any):
  """`jax.jit` for what runs a few times."""
  return jax.jit(function, compiler_options=QUICK, **settings)


def model_config(pattern=HYBRID, **changes: Any) -> config.ModelConfig:
  """The config of `oracle.random_params` with its default sizes; nested changes as in `config.replace`."""
  cfg = config.ModelConfig(
    vocab_size=VOCAB,
    embed_dim=WIDTH,
    mlp_dim=16,
    blocks=pattern,
    window=4,
    attention=config.AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    fast=config.FastConfig(num_heads=2, key_dim=3, value_dim=5),
  )
  return config.replace(cfg, **changes)


def random_params(cfg: config.ModelConfig, seed: int = 0) -> dict[str, Any]:
  """`oracle.random_params` for a config, rounded to float32."""
  drawn = oracle.random_params(
    seed,
    cfg.blocks,
    vocab=cfg.vocab_size,
    width=cfg.embed_dim,
    mlp_width=cfg.mlp_dim,
    heads=cfg.attention.num_heads,
    kv_heads=cfg.num_kv_heads,
    head_dim=cfg.head_dim,
    fast_heads=cfg.fast.num_heads,
    key_width=cfg.fast.key_dim,
    value_width=cfg.fast.value_dim,
    conv_size=cfg.fast.conv_size,
    qk_norm=cfg.attention.qk_norm,
  )
  # Rounded by NumPy and put there: `jnp.asarray` compiles a program for each shape.
  return jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), drawn))


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
  """Tokens [rows, length]."""
  return np.random.default_rng(seed).integers(0, VOCAB, (rows, length), dtype=np.int32)


def random_batch(length: int, scored, *, pads=(0, 0), seed: int = 1) -> tuple[windows.Batch, np.ndarray]:
  """A batch with len(pads) rows, `pads[i]` of them on the left of row i, and the layout of its loss.

  Every row but the first leaves out some of the scored positions, as real batches do.
  """
  rng, rows = np.random.default_rng(seed), len(pads)
  inputs, targets = rng.integers(0, VOCAB, (2, rows, length), dtype=np.int32)
  layout = np.isin(np.arange(length), scored)
  mask = layout * (rng.random((rows, length)) < 0.7)
  mask[0] = layout
  valid = np.arange(length) >= np.asarray(pads)[:, None]
  mask = (mask * valid).astype(np.float32)
  return windows.Batch(inputs, targets, mask, valid if any(pads) else None), layout


@functools.cache
def reader(segments: windows.Plan, cfg: config.ModelConfig, sleep_cfg: config.SleepConfig):
  """Compiled once a config: (params, batch) -> logits [B, M, vocab], state at the end."""
  return jit(lambda params, batch: model.forward(params, batch, segments, cfg, sleep_cfg))


@functools.cache
def program(segments: windows.Plan, cfg: config.ModelConfig, sleep_cfg: config.SleepConfig):
  """Compiled once a config: (params, batch) -> loss, its gradients, logits [B, M, vocab]."""

  def run(params, batch):
    (loss, logits), grads = jax.value_and_grad(model.loss, has_aux=True)(
      params, batch, segments, cfg, sleep_cfg
    )
    return loss, grads, logits

  return jit(run)


def oracle_settings(cfg: config.ModelConfig, sleep_cfg: config.SleepConfig, batch: windows.Batch) -> dict:
  """What `oracle.forward` needs to know of the same run."""
  return {
    "pattern": cfg.blocks,
    "window": cfg.window,
    "num_passes": sleep_cfg.num_passes,
    "valid": batch.valid,
    "rope_theta": cfg.attention.rope_theta,
    "qk_norm": cfg.attention.qk_norm,
    "conv_context": cfg.fast.conv_context,
    "always": sleep_cfg.when == "always",
    "looped": (sleep_cfg.first_block, sleep_cfg.last_block or len(cfg.blocks)),
  }


def from_oracle(state: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
  """The oracle's state as {block: {"S", "context"}}, the contexts of q, k and v side by side."""
  return {
    i: {"S": S}
    | ({"context": np.concatenate([state["conv"][i][x] for x in "qkv"], -1)} if state["conv"][i] else {})
    for i, S in state["S"].items()
  }


def as_dicts(fast: dict[str, FastWeights]) -> dict[str, dict[str, np.ndarray]]:
  """The package's fast weights in the form of `from_oracle`."""
  return {
    i: {name: np.asarray(x) for name, x in (("S", s.S), ("context", s.context)) if x is not None}
    for i, s in fast.items()
  }


def distance(got, want) -> float:
  """Largest difference of two arrays, relative to the largest entry of `want`; inf if a NaN is in it."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, (got.shape, want.shape)
  far = np.max(np.abs(got - want), initial=0) / max(np.max(np.abs(want), initial=0), 1e-30)
  return float("inf") if np.isnan(far) else float(far)


def assert_near(got, want, tolerance: float) -> None:
  """Every array of a tree within `tolerance` of the other's, relative to its largest entry."""
  far = {
    jax.tree_util.keystr(path): x
    for path, x in jax.tree_util.tree_leaves_with_path(jax.tree.map(distance, got, want))
    if x > tolerance
  }
  assert not far, f"relative distances {far}, allowed {tolerance}"


def assert_same(got, want) -> None:
  """Every array of a tree equal to the other's, to the bit; dtypes too."""
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype, (jax.tree_util.keystr(path), x.dtype, y.dtype)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
