"""The largest sizes that tasks accept. Anything larger would not fit into memory, or would not end."""

from sleep_jax.config import at_least, check

LENGTH = 1 << 20  # tokens of a sequence
SEED = 2**31 - 1  # of a stream: seeds beyond 32 bits would repeat the streams of smaller ones
GROUPED = 1024  # batches that are made at once
HOPS = 1 << 16
STEPS = 1 << 16  # of a rule that is rolled out


def within(value: int, least: int, most: int, field: str) -> None:
  """Raises `ConfigError` unless `least <= value <= most`."""
  at_least(value, least, field)
  check(value <= most, field, f"must be at most {most}, got {value if value < 10**20 else 'far more'}")
