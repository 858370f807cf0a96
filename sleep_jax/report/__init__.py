"""From metrics.jsonl to tables, figures and sentences. Imports no jax."""

import sleep_jax

sleep_jax.require("figures", "matplotlib")
