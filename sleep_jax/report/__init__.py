"""From metrics.jsonl to tables, figures and sentences. Imports no jax."""
