"""Results as Markdown to read and CSV to compute with, and what must stand beside every number."""

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

import sleep_jax

Row = Mapping[str, object]


def markdown(rows: Sequence[Row]) -> str:
  """A table of rows with the same keys; numbers are right-aligned."""
  names = list(rows[0])
  numeric = [all(isinstance(row[name], (int, float)) or row[name] is None for row in rows) for name in names]
  lines = [f"| {' | '.join(names)} |", f"|{'|'.join('---:' if right else '---' for right in numeric)}|"]
  lines += [f"| {' | '.join(_text(row[name]) for name in names)} |" for row in rows]
  return "\n".join(lines)


def comma_separated(rows: Sequence[Row]) -> str:
  """The same as CSV, floats with six digits, None empty."""
  out = io.StringIO()
  writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
  writer.writeheader()
  for row in rows:
    writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
  return out.getvalue()


def save(
  folder: Path,
  name: str,
  title: str,
  tables: Mapping[str, Sequence[Row]],
  facts: Mapping[str, str],
  notes: Sequence[str],
) -> list[Path]:
  """Writes NAME.md with all tables, and one CSV a table (NAME.csv, or NAME_TABLE.csv of several).

  Args:
    tables: heading -> rows; what stands before its colon names the CSV.
    facts: of `machine`, with what else a reader needs.
    notes: one sentence each.
  """
  folder.mkdir(parents=True, exist_ok=True)
  parts, paths = [f"# {title}"], []
  for heading, rows in tables.items():
    parts += [f"## {heading}", markdown(rows)]
    suffix = f"_{heading.split(':')[0].lower()}" if len(tables) > 1 else ""
    paths.append(folder / f"{name}{suffix}.csv")
    paths[-1].write_text(comma_separated(rows), encoding="utf-8")
  parts += ["## How it was measured", "\n".join(f"* {key}: {value}" for key, value in facts.items())]
  parts += ["## Notes", "\n".join(f"* {note}" for note in notes)] if notes else []
  text = "\n\n".join(parts) + "\n"
  paths.append(folder / f"{name}.md")
  paths[-1].write_text(text, encoding="utf-8")
  print(text)
  return paths


def machine(packages: Sequence[str] = ("jax", "jaxlib")) -> dict[str, str]:
  """Machine, versions, command, date and commit; no name of a host or a user."""
  versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  command = " ".join(["python -m", _module(), *sys.argv[1:]])
  return {
    "machine": f"{_cpu()}, {cores} of {os.cpu_count()} core(s), {platform.system()} {platform.machine()}",
    "devices": ", ".join(sorted({d.device_kind for d in jax.devices()})),
    "versions": ", ".join(
      [f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in versions.items())]
    ),
    "command": f"`{command}`",
    "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "not set"),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "commit": _commit(),
    "load before and after": f"{_load()}",
  }


def finish(facts: dict[str, str]) -> dict[str, str]:
  """`facts` with the load average at the end added to that at the beginning."""
  return facts | {
    "load before and after": f"{facts['load before and after']} and {_load()} runnable processes (1 min)"
  }


def _text(x: object) -> str:
  if x is None:
    return "–"
  if isinstance(x, float):
    return f"{x:.3g}" if abs(x) < 100 else f"{x:,.0f}"
  return f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)


def _module() -> str:
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  return spec.name if spec else Path(sys.argv[0]).name


def _installed(name: str) -> bool:
  try:
    importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


def _cpu() -> str:
  try:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return platform.processor() or platform.machine()
  values = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
  found = {key.strip(): value.strip() for key, value in values.items()}
  name = found.get("model name", platform.machine())
  widest = next(
    (flag for flag in ("amx_tile", "avx512f", "avx2") if flag in found.get("flags", "").split()), ""
  )
  where = [f"model {found['model']}"] if "model" in found else []
  return ", ".join([name, *where, *([widest] if widest else [])])


def _load() -> str:
  return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _commit() -> str:
  if not (Path(__file__).parents[1] / ".git").exists():
    return f"sleep_jax {sleep_jax.__version__}, not in its repository"

  def git(*args: str) -> str:
    done = subprocess.run(
      ["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()

  changed = [
    line[3:] for line in git("status", "--porcelain", "--", "../sleep_jax", "../kernels").splitlines()
  ]
  return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
