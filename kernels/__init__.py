"""Fast-weight update rules as array functions; they know nothing of the model.

One folder per rule (`gated_delta`, `gated_hebbian`, `delta`), each with a slow `reference`, a fast `xla`
form and one public function. `chunk` holds the algebra that the rules share, `dispatch` the checks, the
choice of an implementation and the mesh. `python -m kernels.bench` times them against each other.
"""
