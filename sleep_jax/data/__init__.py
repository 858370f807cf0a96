"""Training tasks; each is a pure function of (seed, index)."""
