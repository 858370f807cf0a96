"""What a local rule is: how S is written, and what the layer around it prepares for that.

A rule of your own is one `Rule` under a name, and the name is then a block's:

    rules.register("oja", Rule(update=oja))      # --config.model.blocks="('attn','oja')"

In a config file it is known to every command that reads the file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from sleep_jax import config, layers
from sleep_jax.kernels.conv_gated_delta import conv_gated_delta
from sleep_jax.kernels.delta import delta
from sleep_jax.kernels.gated_delta import gated_delta
from sleep_jax.kernels.gated_hebbian import gated_hebbian
from sleep_jax.kernels.gdn2 import gdn2
from sleep_jax.kernels.kda import kda

# (q, k, v, *gates, S, *, mask, implementation) -> (o, S): q, k [B, T, H, K], v, o [B, T, H, V], S [B, H, K,
# V].
Update = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
  """One way to write S, and what the layer around it prepares.

  The layer is that of Gated DeltaNet (arXiv 2412.06464), so that a comparison of rules compares rules.

  Attributes:
    update: (q, k, v, *gates, S, *, mask, implementation) -> (o, S), with q, k [B, T, H, K], v, o [B, T, H,
      V], S [B, H, K, V] float32, mask [B, T] bool or None (False: a pad, which leaves S as it was) and
      implementation the config's `fast.kernel`. The gates are float32: first the log decay g, if it has one,
      then b, or e and w.
    decay: of S at each token. `none`; `head`: g [B, T, H]; `channel`: g [B, T, H, K], through a layer that is
      as narrow as a value.
    write: how strongly a token writes. `scalar`: b [B, T, H]; `channel`: e [B, T, H, K], what is erased, and
      w [B, T, H, V], what is written.
    conv: `short`: a causal convolution on q, k and v; `dynamic`: on v alone, with taps of each token's own,
      as in Jet-Nemotron's blocks (arXiv 2508.15884).
    read_gate: activation of the gate on what is read.
    narrow_gate: that gate's projection goes through a layer that is as narrow as a value.
    gate_bias: that gate has a bias.
    fused: kernels that take the short convolution, SiLU, norms and gates along, by the name of the
      implementation: (qkv, taps, context, a, b, A_log, dt_bias, S, *, mask, implementation) -> (o, S,
        context).
  """

  update: Update
  decay: Literal["none", "head", "channel"] = "head"
  write: Literal["scalar", "channel"] = "scalar"
  conv: Literal["short", "dynamic"] = "short"
  read_gate: Callable[[jax.Array], jax.Array] = layers.silu
  narrow_gate: bool = False
  gate_bias: bool = False
  fused: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    config.one_of(self.decay, ("none", "head", "channel"), "rule.decay")
    config.one_of(self.write, ("scalar", "channel"), "rule.write")
    config.one_of(self.conv, ("short", "dynamic"), "rule.conv")


# For gdn2 there are two published layers: SiLU is its authors' choice, a sigmoid flash-linear-attention's.
RULES: dict[str, Rule] = {
  # S <- exp(g) S + b k (v - exp(g) S^T k)^T                                      (arXiv 2412.06464)
  "gdn": Rule(gated_delta, fused={"pallas_tpu_fused": conv_gated_delta}),
  # S <- exp(g) S + b k v^T                                         (equation 3 of arXiv 2605.26099)
  "hebbian": Rule(gated_hebbian),
  # as gdn; the layer around it convolves v alone                                 (arXiv 2508.15884)
  "jet": Rule(gated_delta, conv="dynamic"),
  # as gdn, without decay                                                         (arXiv 2406.06484)
  "delta": Rule(delta, decay="none"),
  # as gdn, with a decay per key channel                                          (arXiv 2510.26692)
  "kda": Rule(kda, decay="channel", read_gate=jax.nn.sigmoid, narrow_gate=True),
  # S <- Diag(exp(g)) S;  S <- S + k (w v - S^T (e k))^T                          (arXiv 2605.22791)
  "gdn2": Rule(gdn2, decay="channel", write="channel", narrow_gate=True, gate_bias=True),
}
BUILT_IN = frozenset(RULES)


def register(name: str, rule: Rule) -> None:
  """Makes `rule` a block that `model.blocks` can name.

  Registering a name again replaces the rule (a notebook's cell that is run twice); compiled programs are then
  forgotten, since they hold the rule that was there before.

  Raises:
    ConfigError: if the name belongs to a block of this package or is no identifier.
  """
  config.check(name.isidentifier(), "rule", f"must have an identifier as its name, got {name!r}")
  taken = name in BUILT_IN or name in config.ATTENTION
  config.check(not taken, "rule", f"{name!r} is a block of this package; choose another name")
  if name in RULES:
    jax.clear_caches()
  RULES[name] = rule
  config.register_block(name)
