"""One self-contained HTML page about some runs: claim, curves, tables, what sleep did, how to repeat it.

Everything is inside the file: no script, no font, no image is loaded, and a content security policy says
so to the browser. Text that comes from runs is escaped. Light or dark follows the reader's system.
"""

import base64
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleep_jax.report import claims, diagram
from sleep_jax.report.curves import settings
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import Run, RunError, command_line, flatten, is_number, is_whole, public_env
from sleep_jax.report.tables import MISSING, cells, equal_compute_table, summary_table

STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --page: #fff; --quiet: #5d636e; --line: #d9dce1;
  --box: #f4f5f7; --accent: #0b4fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --page: #171717; --quiet: #a2a7b0; --line: #3a3d43; --box: #222326;
    --accent: #8fbcff; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--quiet); margin: 0 0 0.6rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 0.6rem; }
.claim { font-size: 1.35rem; line-height: 1.4; font-weight: 600; margin: 0 0 0.8rem; max-width: 54rem; }
.compute { font-size: 1.05rem; margin: 0 0 0.8rem; max-width: 54rem; }
p, li, figcaption { max-width: 46rem; }
.quiet, figcaption, .caveats { color: var(--quiet); font-size: 0.92rem; }
.caveats { padding-left: 1.1rem; margin: 0.4rem 0 0; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; vertical-align: bottom; line-height: 1.25; }
th, td { padding: 0.35rem 0.55rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.missing { color: var(--quiet); font-style: italic; }
pre { background: var(--box); padding: 0.8rem 1rem; border-radius: 6px; overflow-x: auto;
  font-size: 0.84rem; }
pre.command { white-space: pre-wrap; }
summary { cursor: pointer; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CAPTIONS = {  # of a drawing, by its name
  "sleep_changes": "Relative change of S in each pass over each window, |S after - S before| / |S after|, at "
  "the end of training. 0: the pass changed nothing. 1: its write is as large as S. More: it also undid what "
  "was there.",
  "costs": "Measured at the end of training, one sequence at a time.",
}


def write_html(
  path: str | os.PathLike,
  runs: Sequence[Run],
  curves: Sequence[Drawing] = (),
  about_sleep: Sequence[Drawing] = (),
  *,
  title: str = "Does sleep help? Runs compared",
  command: str | None = None,
) -> Path:
  """Writes the page.

  Args:
    path: of the file; its folder is made if absent.
    runs: finished or not, one or many. Every sentence and number comes from them.
    curves: figures of accuracy.
    about_sleep: figures of what sleep does and costs, beside its diagram.
    title: of the page.
    command: how to make these runs. None: the command that the first run recorded.

  Returns:
    The path.

  Raises:
    RunError: there are no runs.
  """
  if not runs:
    raise RunError("a report needs at least one run")
  sections = [
    _head(title, runs),
    _method(runs),
    _curves(curves),
    _tables(runs),
    _sleep(about_sleep),
    _repeat(runs, command),
  ]
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    f"<title>{_text(title)}</title>\n<style>{STYLE}{diagram.style()}</style>\n</head>\n<body>\n"
    + "\n".join(filter(None, sections))
    + "\n</body>\n</html>\n"
  )
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding="utf-8")
  return path


def _head(title: str, runs: Sequence[Run]) -> str:
  compute = claims.compute_claim(runs)
  notes = "".join(f"<li>{_prose(note)}</li>" for note in claims.caveats(runs))
  return "\n".join((
    f"<header>\n<h1>{_text(title)}</h1>",
    f'<p class="claim">{_prose(claims.claim(runs))}</p>',
    f'<p class="compute">{_prose(compute)}</p>' if compute else "",
    f'<ul class="caveats">{notes}</ul>' if notes else "",
    "</header>",
  ))  # fmt: skip


def _curves(drawn: Sequence[Drawing]) -> str:
  if not drawn:
    return ""
  images = "\n".join(map(_figure, drawn))
  return f"<section>\n<h2>Accuracy against what training took</h2>\n{images}\n</section>"


def _figure(drawing: Drawing) -> str:
  data = base64.b64encode(drawing.svg().encode()).decode()
  image = f'<img alt="{_text(drawing.alt)}" src="data:image/svg+xml;base64,{data}">'
  caption = CAPTIONS.get(drawing.name, "")
  return f"<figure>\n{image}\n{f'<figcaption>{_text(caption)}</figcaption>' if caption else ''}\n</figure>"


def _tables(runs: Sequence[Run]) -> str:
  equal = [row for row in equal_compute_table(runs) if row["equal_cpu_s"] is not None]
  parts = [
    "<section>\n<h2>What each run reached and cost</h2>",
    _table(summary_table(runs)),
    '<p class="quiet">At the last evaluation. Exact: every answer of a sequence is right. Best constant: the '
    "same answer every time, on the same held-out set. CPU s: spent on training until then, without "
    "compiling, evaluating and saving; where an accelerator does the work, no measure of compute.</p>",
  ]
  if len(equal) > 1:
    parts += [
      "<h2>At equal compute</h2>",
      _table(equal),
      '<p class="quiet">Each run at its last evaluation within the budget; nothing is interpolated.</p>',
    ]
  return "\n".join([*parts, "</section>"])


def _table(rows: Sequence[dict[str, Any]]) -> str:
  headers, body = cells(rows)
  lines = ["".join(f'<th scope="col">{_text(header)}</th>' for header in headers)]
  for line in body:
    marked = (' class="missing"' if cell == MISSING else "" for cell in line)
    lines.append("".join(f"<td{mark}>{_text(cell)}</td>" for mark, cell in zip(marked, line, strict=True)))
  return (
    '<div class="scroll"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"
  )


def _method(runs: Sequence[Run]) -> str:
  first = runs[0]
  counted: list[Any] = [r.last("sleep").get("windows") for r in runs]
  windows = next((w for w in counted if is_whole(w) and w > 0), None)
  passes = sorted({r.num_passes for r in runs if r.num_passes})
  times = f"{passes[0]}" if len(passes) == 1 else "N"
  picture = diagram.inline(windows or 3, times)
  parts = ["<section>\n<h2>What happens when the model sleeps</h2>", f'<div class="scroll">{picture}</div>']
  width = first.get("model.window")
  where = f"{windows} windows" if windows else "one window after the other"
  where += f" of {width} tokens" if windows and is_number(width) else ""
  often = "once" if passes == [1] else f"{times} times"
  here = f" (here N = {_listed(passes)})" if len(passes) > 1 else ""
  parts.append(
    f"<p>The model reads {where}. Before a window is evicted, its blocks run over it {often}{here} and "
    "write into the fast weights S. Hidden states and attention cache are then dropped: only S goes on. The "
    "answer is one ordinary pass, awake, which reads the windows from S alone. N = 1 is the plain hybrid.</p>"
  )
  return "\n".join([*parts, "</section>"])


def _sleep(drawn: Sequence[Drawing]) -> str:
  parts = ["<section>\n<h2>What each pass changed, and what it cost</h2>", *map(_figure, drawn)]
  if not any(drawing.name == "sleep_changes" for drawing in drawn):
    parts.append('<p class="quiet">How much S changed in each pass: not measured.</p>')
  return "\n".join([*parts, "</section>"])


def _repeat(runs: Sequence[Run], command: str | None) -> str:
  first = runs[0]
  recorded = command or command_line(first)
  typed = f'<pre class="command">{_text(recorded)}</pre>' if recorded else ""
  labels = "".join(
    f"<li>{_text(label)}: {_text(_listed([r.name for r in members]))}</li>"
    for label, members in settings(runs)
  )
  env = {key: value for key, value in public_env(first).items() if key != "command"}
  versions = "\n".join(f"{key}: {value}" for key, value in flatten(env).items() if value != "null")
  made_with = f"<pre>{_text(versions)}</pre>" if versions else '<p class="quiet">Not recorded.</p>'
  return "\n".join((
    "<section>\n<h2>How to repeat it</h2>",
    typed or '<p class="quiet">The command was not recorded.</p>',
    f"<ul>{labels}</ul>" if len(runs) > 1 else "",
    f"<details><summary>Config of {_text(first.name)}</summary>\n"
    f"<pre>{_text(json.dumps(first.config, indent=2))}</pre></details>",
    f"<details open><summary>Versions</summary>\n{made_with}</details>",
    "</section>",
  ))  # fmt: skip


def _listed(items: Sequence[Any]) -> str:
  return ", ".join(map(str, items))


def _prose(text: str) -> str:
  """Escaped, with spaces that do not break inside "N = 4" and "98.1 %"."""
  tied = re.sub(r"\b([Nt]) = (?=\d)", "\\1\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}", text)
  return html.escape(re.sub(r"(?<=\d) (?=%|[kMB] |CPU s)", "\N{NO-BREAK SPACE}", tied))


def _text(value: Any) -> str:
  return html.escape(str(value))
