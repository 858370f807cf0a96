"""Reads a compiled program: which collectives run, how often and over how many bytes."""

import functools
import math
import re

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_RUNS = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_WIDTH = re.compile(r"\d+")


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Counts what a program communicates.

  A loop's body counts as often as the loop runs; where that does not show, once. What the compiler splits
  into several fusions, to overlap it with arithmetic, is one collective: they share a channel.

  Args:
    text: the program, as `compiled.as_text()` gives it.

  Returns:
    Kind -> times that it runs, and bytes of its results a device in all.
  """
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name = head[2]
      bodies[name], entry = [], name if head[1] else entry
    elif name:
      bodies[name].append(line)

  @functools.cache
  def inside(name: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, channel) -> times and bytes a time, of a computation and all that it calls."""
    found: dict[tuple[str, str], tuple[int, int]] = {}

    def add(key: tuple[str, str], times: int, size: int) -> None:
      known = found.get(key, (0, 0))
      found[key] = (max(known[0], times), max(known[1], size))

    for number, line in enumerate(bodies.get(name, ())):
      if run := _RUNS.search(line):
        channel = re.search(r"channel_id=(\d+)", line)
        add((run[2], channel[1] if channel else f"{name}:{number}"), 1, _bytes(run[1]))
      times = trips(line) if " while(" in line else 1
      for called in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?([%\w., -]+)", line):
        for other in re.findall(r"%([\w.-]+)", called):
          for key, (count, size) in inside(other).items():
            add(key, times * count, size)
    return found

  def trips(line: str) -> int:
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line):
      return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    body = "\n".join(bodies.get(condition[1], ())) if condition else ""
    bound = re.search(r"compare\([^,]*, %?([\w.-]+)\), direction=LT", body)
    value = bound and re.search(rf"%?{re.escape(bound[1])} = s32\[\]\S* constant\((\d+)\)", body)
    return int(value[1]) if value else 1

  totals: dict[str, tuple[int, int]] = {}
  for (kind, _), (times, size) in inside(entry).items():
    count, moved = totals.get(kind, (0, 0))
    totals[kind] = (count + times, moved + times * size)
  return totals


def _bytes(result: str) -> int:
  """Bytes of the largest array of a result: a collective that is started also returns its operand."""
  sizes = [0]
  for kind, dimensions in _SHAPE.findall(result):
    bits = 8 if kind == "pred" else int(_WIDTH.search(kind)[0])  # type: ignore[index]
    sizes.append(math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8)
  return max(sizes)
