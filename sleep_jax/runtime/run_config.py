"""The configuration of a run: what makes a folder, and each checkpoint in it, this run's and no other's."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sleep_jax.runtime import metrics
from sleep_jax.runtime.files import shown

_ABSENT = object()
_MAX_NAMED = 10  # keys named in one message


class RunConfig:
  """A run's configuration, as JSON, and the rule by which a stored one is the same run's.

  A run may be made longer, and a newer program may know fields that an older one did not. Both are decided
  here alone, for config.json and for the checkpoints' manifests alike.
  """

  def __init__(
    self,
    config: Mapping[str, Any],
    *,
    may_change: Collection[str] = (),
    may_grow: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
  ):
    """
    Args:
      config: nested mappings, sequences, strings, numbers, booleans and None.
      may_change: dotted keys in which a stored configuration may differ.
      may_grow: dotted keys of numbers that may be smaller in a stored configuration.
      defaults: values for fields added after a run began, nested like `config`. A stored configuration that
        lacks such a field is read as if it had this value. None: every field must be there.

    Raises:
      ValueError: if it cannot be written as JSON.
    """
    self.values = _as_json(config)
    self._may_change, self._may_grow = frozenset(may_change), frozenset(may_grow)
    self._defaults = dict(_dotted(_as_json(defaults or {})))

  def is_new_to(self, stored: Mapping[str, Any]) -> bool:
    """Whether anything differs from a stored configuration, even if it may."""
    return json.dumps(stored, sort_keys=True) != json.dumps(self.values, sort_keys=True)

  def differences(self, stored: Mapping[str, Any], where: str) -> str | None:
    """One clause about all that makes a stored configuration another run's; None if it is this one's.

    Args:
      stored: as read from JSON.
      where: what stored it, for the message.
    """
    old, new = dict(_dotted(stored)), dict(_dotted(self.values))
    old |= {key: value for key, value in self._defaults.items() if key in new and key not in old}
    faults = []
    for key in {**old, **new}:
      then, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
      if _same(then, now) or key in self._may_change or (key in self._may_grow and _grew(then, now)):
        continue
      faults.append(f"{shown(key)}: {_told(then)} in the {where}, {_told(now)} asked for")
    more = f"; and {len(faults) - _MAX_NAMED} more" if len(faults) > _MAX_NAMED else ""
    return "; ".join(faults[:_MAX_NAMED]) + more if faults else None


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """The configuration as it reads back from JSON; NaN and infinity as the strings that `metrics` uses."""
  try:
    return json.loads(metrics.dumps(config))
  except (TypeError, ValueError) as e:
    raise ValueError(f"the configuration cannot be written as JSON: {e}") from e


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _dotted(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _same(a: Any, b: Any) -> bool:
  return a == b and isinstance(a, bool) == isinstance(b, bool)  # 1 == True, but they are not one setting


def _grew(then: Any, now: Any) -> bool:
  return all(isinstance(x, int | float) and not isinstance(x, bool) for x in (then, now)) and then < now


def _told(value: Any) -> str:
  return "absent" if value is _ABSENT else f"{json.dumps(value):.200}"
