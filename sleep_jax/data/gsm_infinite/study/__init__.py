"""A study of the generator: what its texts hold, beside what the original generator's hold."""
