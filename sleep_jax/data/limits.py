"""The largest sizes that tasks accept. Anything larger would not fit into memory, or would not end."""

from sleep_jax.config import at_least, check, shown

LENGTH = 1 << 20  # tokens of a sequence
GROUPED = 1024  # batches that are made at once
HOPS = 1 << 16
STEPS = 1 << 16  # of a rule that is rolled out
STREAM = 2**31  # sequences of a stream that the device makes: their index is an int32


def within(value: int, least: int, most: int, field: str) -> None:
  """Raises `ConfigError` unless `least <= value <= most`."""
  at_least(value, least, field)
  check(value <= most, field, f"must be at most {most}, got {shown(value)}")
