"""Fast-weight update rules as array functions; they know nothing of the model.

One folder per rule (`gated_delta`, `gated_hebbian`, `delta`, `kda`, `gdn2`), each with a slow `reference`, a
fast `xla` form and two public functions: the rule over a sequence, and `RULE_step` for one token. `chunk` is
the algebra of the rules with one decay per head, `channel` that of the rules with a decay per key channel,
`tiling` what both share. `conv_gated_delta` is a rule behind its layer's short convolution, norms and gates.
`dispatch` has the checks, the choice of an implementation and the mesh.
`python -m kernels.bench` times them against each other.
"""
