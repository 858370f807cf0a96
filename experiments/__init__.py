"""One short absl main per experiment, and the configs they take."""

import sleep_jax

sleep_jax.require("train", "ml_collections")
