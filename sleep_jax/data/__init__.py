"""Training tasks; each is a pure function of (seed, index)."""

import sleep_jax

sleep_jax.require("train", "grain", "array_record")
