"""Fast-weight update rules as array functions; they know nothing of the model.

Each rule is a folder with two public functions: the rule over a sequence, such as `kda`, and the rule for one
token, such as `kda_step`. `conv_gated_delta` is `gated_delta` together with its layer's short convolution,
norms and gates. `common` holds what the rules share, `measure` the tools that measure them.

All public functions keep the contract below. Their docstrings add only the equation and the arguments.

Axes: B batch, T sequence (at least 1 token), H heads, K key width, V value width.

Dtypes: q, k and v (or x) are in any floating point dtype; o has that of v (or x). Gates are float32. S is
float32, and everything is computed in float32. If one of the arrays is float64, S must be, and everything is
computed in float64. Scaling and normalising q and k is up to the caller.

Mask: False marks a pad, which has no effect at all. Whatever the arrays hold at a pad, NaN and infinity
included, S and the outputs at the other tokens are as if the pad were not there. o is 0 at a pad. No gradient
reaches an array at a pad, and a gradient that arrives at o there is dropped.

Gradients: they reach every array, through o and through S. Reverse mode, and reverse or forward mode over it,
work with every implementation but "pallas_tpu" and "pallas_tpu_fused", which have reverse mode once. Forward
mode alone (`jax.jvp`) works only with "reference" and is a TypeError with the others. Under `jax.checkpoint`
the outputs of "xla" and of the TPU kernels are named "fast_weight_o" and "fast_weight_S".

Meshes: on an explicit mesh B and H may be split. Nothing is communicated.

Implementations: "xla" (the default everywhere), "reference" (one token after the other, slow), and on their
platforms "pallas_tpu", "pallas_tpu_fused" and "pallas_gpu". A named implementation runs or raises an error.
With None, the platform's default runs.

One token: S is donated and updated in place. If the function is called outside `jax.jit`, the array that was
passed is gone afterwards. Inside, the outer program must donate S.

Errors, in one line that begins with the rule and names the argument:
  ValueError: a shape that does not fit, an axis other than B and H that is split over a mesh, an unknown
    implementation, a log decay above 0. Under `jax.jit` the values of the decay are not known and are not
    checked; a positive one then gives meaningless numbers.
  TypeError: a dtype that does not fit, above all an S that is not float32.
  NotImplementedError: the named implementation cannot run here, does not take these arrays or does not have
    this rule.

A rule of your own needs one declaration, a `kernels.common.op.Op`; `kernels.common.dispatch.call` then gives
it the same checks, mask, meshes and choice of implementation. A folder here is that and the public functions.
"""
