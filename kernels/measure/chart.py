"""Draws a table of `kernels.bench`: one panel a rule and mode, one group of bars a shape.

    python -m kernels.chart kernels/results/cpu.csv --column=cpu_min

writes kernels/results/cpu.png. Nothing is drawn that is not in the CSV.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import sleep_jax
from sleep_jax.kernels.measure import flags

sleep_jax.require("figures", "matplotlib")

from matplotlib.figure import Figure  # noqa: E402

COLUMNS = {
  "cpu_min": "CPU time in ms, least of the rounds",
  "cpu_median": "CPU time in ms, median",
  "wall_min": "wall time in ms, least of the rounds",
  "wall_median": "wall time in ms, median",
}
COLOURS = {  # dark: ours; light: others'
  "xla": "#0b5394",
  "reference": "#7f9fbf",
  "pallas_tpu": "#274e13",
  "pallas_gpu": "#274e13",
  "torch_chunk_64": "#e6b8af",
  "torch_chunk_tuned": "#dd7e6b",
  "torch_recurrent": "#f6cf8f",
  "fla_triton": "#a64d79",
}


def draw(table: Path, column: str = "cpu_min") -> Path:
  """Draws TABLE.csv and returns the path of TABLE.png.

  Args:
    table: written by `kernels.bench`.
    column: a key of `COLUMNS`.

  Raises:
    ValueError: the table is empty, or is none of the benchmark's.
  """
  with open(table, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  missing = [name for name in ("rule", "shape", "mode", "name", column) if not rows or name not in rows[0]]
  if missing:
    raise ValueError(
      f"{table}: has no {', '.join(missing)}, needs the CSV of kernels.bench with a row at least"
    )
  rules, modes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("rule", "mode"))
  names = list(dict.fromkeys(contestant(row) for row in rows))
  figure = Figure(figsize=(1.5 + 4 * len(modes), 1 + 2.6 * len(rules)), layout="constrained")
  panels = figure.subplots(len(rules), len(modes), squeeze=False)
  for rule, line in zip(rules, panels, strict=True):
    for mode, axes in zip(modes, line, strict=True):
      _panel(axes, [row for row in rows if (row["rule"], row["mode"]) == (rule, mode)], names, column)
      axes.set_title(f"{rule}, {mode}", loc="left", fontsize=10)
  figure.supylabel(f"{COLUMNS[column]} (log scale)", fontsize=9)
  handles = {bar.get_label(): bar for axes in panels.flat for bar in axes.containers}
  figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)), fontsize=8)
  out = table.with_suffix(".png")
  figure.savefig(out, dpi=120, metadata={"Software": None})
  return out


def contestant(row: dict[str, str]) -> str:
  """The name without the length of chunk in parentheses."""
  return row["name"].split(" ")[0]


def _panel(axes, rows: Sequence[dict[str, str]], names: Sequence[str], column: str) -> None:
  shapes = list(dict.fromkeys(row["shape"] for row in rows))
  width = 0.8 / len(names)
  for place, name in enumerate(names):
    mine = [row for row in rows if contestant(row) == name]
    if not mine:
      continue
    x = [shapes.index(row["shape"]) + (place - (len(names) - 1) / 2) * width for row in mine]
    axes.bar(x, [float(row[column]) for row in mine], width, label=name, color=COLOURS.get(name, "#999999"))
  axes.set_xticks(range(len(shapes)), shapes)
  axes.set_yscale("log")
  axes.grid(axis="y", color="#dddddd", linewidth=0.6)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = flags.Parser("kernels.chart", __doc__)
  parser.add_argument("table", type=Path, help="the CSV")
  parser.add_argument("--column", choices=COLUMNS, default="cpu_min")
  options = parser.parse_args(arguments)
  try:
    print(draw(options.table, options.column))
  except (OSError, ValueError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()
