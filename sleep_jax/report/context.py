"""Loss on text by how much of it was read, of `scoring.by_context`: lines and tables."""

import re
from collections.abc import Mapping
from typing import Any

_AT = re.compile(r"loss_at_(\d+)_(\d+)")
GROUPS = {
  "new": "new in the text",
  "near": "seen within L",
  "evicted": "last seen L to 2 L ago",
  "long_evicted": "last seen more than 2 L ago",
  "evicted_names": "names that only earlier windows had",
}


def line(row: Mapping[str, Any]) -> str:
  """An evaluation on one line."""
  bits = "" if row["bits_a_byte"] is None else f", {row['bits_a_byte']:.3f} bits a byte"
  long_ago = row["loss_long_evicted"]
  evicted = "" if long_ago is None else f", {long_ago:.3f} nats where last seen more than 2 L ago"
  return f"{row['loss']:.3f} nats a token, perplexity {row['perplexity']:.2f}{bits}{evicted}"


def ranges(row: Mapping[str, Any]) -> list[tuple[int, int]]:
  """The ranges of positions that a row has."""
  return sorted((int(m[1]), int(m[2])) for m in map(_AT.fullmatch, row) if m)


def table(forms: Mapping[str, Mapping[str, Any]]) -> str:
  """Nats a token of several forms on the same tokens, as Markdown; perplexity in brackets.

  Args:
    forms: name -> row.
  """
  one = next(iter(forms.values()))
  keys = [("all tokens", "", "tokens_scored")]
  keys += [(f"after {a:,} - {b - 1:,} tokens", f"_at_{a}_{b}", f"tokens_at_{a}_{b}") for a, b in ranges(one)]
  keys += [(title, f"_{kind}", f"tokens_{kind}") for kind, title in GROUPS.items()]
  lines = [
    f"| nats a token (perplexity) | tokens | {' | '.join(forms)} |",
    f"|---|---:|{'---:|' * len(forms)}",
  ]
  for title, key, count in keys:
    cells = [
      "-" if row[f"loss{key}"] is None else f"{row[f'loss{key}']:.3f} ({row[f'perplexity{key}']:.2f})"
      for row in forms.values()
    ]
    lines.append(f"| {title} | {one[count]:,} | {' | '.join(cells)} |")
  bits = ["-" if row["bits_a_byte"] is None else f"{row['bits_a_byte']:.4f}" for row in forms.values()]
  lines.append(f"| bits a byte | {one['bytes_scored']:,} bytes | {' | '.join(bits)} |")
  return "\n".join(lines)
