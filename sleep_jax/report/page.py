"""One self-contained HTML page about some runs: claim, curves, tables, what sleep did, how to repeat it.

Everything is inside the file: no script, no font, no image is loaded, and a content security policy says
so to the browser. Text that comes from runs is escaped. Light or dark follows the reader's system.
"""

import base64
import html
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleep_jax.report import claims, figures
from sleep_jax.report.runs import (
  MISSING,
  Run,
  RunError,
  cells,
  equal_compute_table,
  flatten,
  is_number,
  settings,
  summary_table,
)

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
svg text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
svg .small { font-size: 11.5px; fill: var(--quiet); }
svg .box { fill: var(--box); stroke: var(--line); }
svg .cell { fill: var(--line); }
svg .line { fill: none; stroke: var(--quiet); stroke-width: 1.4; }
svg .fast { fill: var(--page); stroke: var(--accent); stroke-width: 2; }
svg .strong { fill: none; stroke: var(--accent); stroke-width: 2; }
svg .name { fill: var(--accent); font-weight: 600; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Of env.json: what a reader needs to repeat a run, and not whose machine it was.
ENV_KEYS = ("versions", "git", "platform", "backend", "devices", "processes", "started")


def write_html(
  path: str | os.PathLike,
  runs: Sequence[Run],
  *,
  title: str = "Does sleep help? Runs compared",
  command: str | None = None,
) -> Path:
  """Writes the page.

  Args:
    path: of the file; its folder is made if absent.
    runs: finished or not, one or many. Every sentence and number comes from them.
    title: of the page.
    command: how to make these runs. None: the command that the first run recorded.

  Returns:
    The path.

  Raises:
    RunError: there are no runs.
  """
  if not runs:
    raise RunError("a report needs at least one run")
  sections = [_head(title, runs), _curves(runs), _tables(runs), _sleep(runs), _repeat(runs, command)]
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
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


def _curves(runs: Sequence[Run]) -> str:
  drawn = drawings(runs)
  if not drawn:
    return ""
  return (
    "<section>\n<h2>Accuracy against what training took</h2>\n"
    + "\n".join(map(_figure, drawn))
    + "\n</section>"
  )


def drawings(runs: Sequence[Run]) -> list[figures.Drawing]:
  """The curves that these runs allow, none if no run has been evaluated.

  Figure 2a for the tasks that N = 1 alone was run on, if they differ in their depth t; figure 2b for the
  paper's layout at t = 32; the plain curves for every other task.
  """
  tasks: dict[tuple, list[Run]] = {}
  for run in runs:
    if run.evals:
      tasks.setdefault(run.task, []).append(run)
  rest = list(tasks.values())
  result = []
  plain = [members for members in rest if {r.num_passes for r in members} == {1}]
  if len({members[0].rollout_steps for members in plain} - {None}) > 1:
    result.append(figures.figure_2a([r for members in plain for r in members]))
    rest = [members for members in rest if members not in plain]
  other = [members for members in rest if not figures.on_paper_layout(members[0])]
  result += [figures.figure_2b(members) for members in rest if figures.on_paper_layout(members[0])]
  for number, members in enumerate(other, 1):
    name = f"demo_curves_{number}" if len(other) > 1 else "demo_curves"
    result.append(figures.demo_curves(members, name))
    if not any(r.accelerated for r in members) and all("cpu_s" in row for r in members for row in r.evals):
      result.append(figures.demo_curves(members, name.replace("curves", "compute"), by="cpu_s"))
  return result


def _figure(drawing: figures.Drawing, caption: str = "") -> str:
  data = base64.b64encode(drawing.svg().encode()).decode()
  image = f'<img alt="{_text(drawing.alt)}" src="data:image/svg+xml;base64,{data}">'
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


def _sleep(runs: Sequence[Run]) -> str:
  first = runs[0]
  counted = [r.last("sleep").get("windows") for r in runs] + [r.get("data.num_strings") for r in runs]
  windows = next((w for w in counted if isinstance(w, int) and w > 0), 3)
  passes = sorted({r.num_passes for r in runs if r.num_passes})
  times = f"{passes[0]}" if len(passes) == 1 else "N"
  parts = ["<section>\n<h2>What happens when the model sleeps</h2>", _diagram(windows, times)]
  width = first.get("model.window")
  where = f"{windows} windows" + (f" of {width} tokens" if is_number(width) else "")
  often = "once" if passes == [1] else f"{times} times"
  here = f" (here N = {_listed(passes)})" if len(passes) > 1 else ""
  parts.append(
    f"<p>The model reads {where}. Before a window is evicted, its blocks run over it {often}{here} and "
    "write into the fast weights S. Hidden states and attention cache are then dropped: only S goes on. The "
    "answer is one ordinary pass, awake, which finds the windows in S alone. N = 1 is the plain hybrid.</p>"
  )
  try:
    drawing = figures.sleep_changes(runs)
  except RunError:
    parts.append('<p class="quiet">How much S changed in each pass: not measured.</p>')
  else:
    parts.append(_figure(drawing, CHANGE_CAPTION))
  return "\n".join([*parts, "</section>"])


CHANGE_CAPTION = (
  "Relative change of S in each pass over each window, |S after - S before| / |S after|, at the end of "
  "training (first run of each N). 1: the pass wrote all there is. 0: it changed nothing."
)
TIP = '<path d="M0 0 L8 4 L0 8 z" fill="var(--{colour})"/>'
MARKER = (
  '<marker id="{colour}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
)
LOOP = "h9 a6 6 0 0 0 6 -6 v-6 a6 6 0 0 0 -6 -6 h-6"
# One column: what is read, the blocks, and an arrow down to them. `x` is its middle.
COLUMN = """
<text x="{x}" y="16" text-anchor="middle">{title}</text>
<rect class="box" x="{left}" y="25" width="140" height="28" rx="5"/>{content}
<path class="line" d="M{x} 54 V79" marker-end="url(#quiet)"/>
<rect class="box" x="{blocks}" y="82" width="100" height="34" rx="5"/>
<text x="{x}" y="104" text-anchor="middle">blocks</text>
<rect class="fast" x="{state}" y="153" width="34" height="34" rx="4"/>
<text class="name" x="{x}" y="175" text-anchor="middle">S</text>"""


def _diagram(windows: int, times: str) -> str:
  """The method as inline SVG: windows in a row, blocks looped over each, S from left to right, the answer."""
  shown = list(range(1, windows + 1)) if windows <= 3 else [1, 2, windows]
  step, parts = 210, []

  def column(x: int, title: str, content: str) -> str:
    return COLUMN.format(x=x, left=x - 70, blocks=x - 50, state=x - 17, title=title, content=content)

  for place, window in enumerate(shown):
    x = 71 + place * step
    cells = (
      f'<rect class="cell" x="{x - 61 + 15.5 * i}" y="32" width="11" height="14" rx="2"/>' for i in range(8)
    )
    skipped = place + 1 < len(shown) and shown[place + 1] != window + 1
    parts += [
      column(x, f"window {window}", "".join(cells)),
      f'<path class="line" d="M{x + 51} 108 {LOOP}" marker-end="url(#quiet)"/>',
      f'<text class="name" x="{x + 74}" y="104">&#215; {html.escape(times)}</text>',
      f'<path class="strong" d="M{x} 117 V149" marker-end="url(#accent)"/>',
      f'<text class="small" x="{x + 8}" y="137">writes</text>',
      f'<path class="strong" d="M{x + 18} 170 H{x + step - 21}" marker-end="url(#accent)"/>',
      f'<text x="{x + step // 2}" y="44" text-anchor="middle">&#8230;</text>' if skipped else "",
    ]
  x = 71 + len(shown) * step
  parts += [
    column(x, "question", f'<text class="small" x="{x}" y="43" text-anchor="middle">windows are gone</text>'),
    f'<path class="strong" d="M{x} 152 V120" marker-end="url(#accent)"/>',
    f'<text class="small" x="{x + 8}" y="140">reads</text>',
    f'<path class="line" d="M{x + 51} 99 H{x + 76}" marker-end="url(#quiet)"/>',
    f'<text x="{x + 82}" y="104">answer</text>',
    f'<text class="small" x="{x}" y="210" text-anchor="middle">awake: one pass</text>',
    '<text class="small" x="1" y="210">asleep: h and the cache</text>',
    '<text class="small" x="1" y="225">are dropped, S stays</text>',
  ]
  heads = "".join(f"{MARKER}{TIP}</marker>".format(colour=colour) for colour in ("quiet", "accent"))
  return (
    f'<div class="scroll"><svg viewBox="0 0 {x + 135} 232" width="{x + 135}" role="img" aria-label="Windows '
    "are read one after the other; over each the blocks run N times and write into S; S alone reaches the "
    f'question, which is answered in one pass."><defs>{heads}</defs>{"".join(parts)}\n</svg></div>'
  )


def _repeat(runs: Sequence[Run], command: str | None) -> str:
  first = runs[0]
  recorded = command or _command(first)
  typed = f'<pre class="command">{_text(recorded)}</pre>' if recorded else ""
  labels = "".join(
    f"<li>{_text(label)}: {_text(_listed([r.name for r in members]))}</li>"
    for label, members in settings(runs)
  )
  env = {key: first.env[key] for key in ENV_KEYS if key in first.env}
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


def _command(run: Run) -> str:
  """What the run recorded, as one would type it; "" if it did not."""
  words = run.env.get("command")
  if isinstance(words, str):
    return words
  if not isinstance(words, list) or not words:
    return ""
  words = [str(word) for word in words]
  script = Path(words[0])
  if script.suffix == ".py" and script.parent.name == "experiments":  # started with -m, which Python replaces
    words[:1] = ["python", "-m", f"experiments.{script.stem}"]
  return shlex.join(words)


def _listed(items: Sequence[Any]) -> str:
  return ", ".join(map(str, items))


def _prose(text: str) -> str:
  """Escaped, with spaces that do not break inside "N = 4" and "98.1 %"."""
  tied = re.sub(r"\b([Nt]) = (?=\d)", "\\1\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}", text)
  return html.escape(re.sub(r"(?<=\d) (?=%|[kMB] |CPU s)", "\N{NO-BREAK SPACE}", tied))


def _text(value: Any) -> str:
  return html.escape(str(value))
