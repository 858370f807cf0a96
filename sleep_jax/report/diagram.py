"""The method as one picture in SVG: windows in a row, blocks looped over each, S from left to right.

`inline` takes its colours from the page around it, `standalone` brings a light background of its own.
"""

import html

# Colours by name: of the standalone picture; a page defines the same names as CSS variables.
LIGHT = {
  "ink": "#1b1d21", "page": "#ffffff", "quiet": "#5d636e", "line": "#d9dce1", "box": "#f4f5f7",
  "accent": "#0b4fa8",
}  # fmt: skip
STYLE = """
svg text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: {ink}; }
svg .small { font-size: 11.5px; fill: {quiet}; }
svg .head { font-weight: 600; }
svg .box { fill: {box}; stroke: {line}; }
svg .cell { fill: {line}; }
svg .line { fill: none; stroke: {quiet}; stroke-width: 1.4; }
svg .faint { fill: none; stroke: {line}; stroke-width: 1.4; }
svg .fast { fill: {page}; stroke: {accent}; stroke-width: 2; }
svg .strong { fill: none; stroke: {accent}; stroke-width: 2; }
svg .name { fill: {accent}; font-weight: 600; }
"""
MARKER = (
  '<marker id="{name}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
  '<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
)
STEP, MIDDLE = 200, 84  # from window to window; the middle of the first one
LOOP = "h9 a6 6 0 0 0 6 -6 v-6 a6 6 0 0 0 -6 -6 h-6"
# One column: what is read, the blocks, and an arrow down to them. `x` is its middle.
COLUMN = """
<text x="{x}" y="58" text-anchor="middle">{title}</text>
<rect class="box" x="{left}" y="67" width="140" height="28" rx="5"/>{content}
<path class="line" d="M{x} 96 V121" marker-end="url(#quiet)"/>
<rect class="box" x="{blocks}" y="124" width="100" height="34" rx="5"/>
<text x="{x}" y="146" text-anchor="middle">blocks</text>
<rect class="fast" x="{state}" y="201" width="34" height="34" rx="4"/>
<text class="name" x="{x}" y="223" text-anchor="middle">S</text>"""
ALT = (
  "Windows are read one after the other; over each the blocks run N times and write into S, then the window "
  "is evicted; S alone reaches the question, which is answered in one pass."
)


def inline(windows: int, times: str) -> str:
  """The picture for a page that has CSS variables of the names in `LIGHT` and the rules of `style`.

  Args:
    windows: that are slept on; of many, the first two and the last are shown.
    times: how many passes, as text.
  """
  return _svg(windows, times, {name: f"var(--{name})" for name in LIGHT}, "")


def standalone(windows: int = 2, times: str = "N") -> str:
  """The picture as a file of its own, on white."""
  background = '<rect width="100%" height="100%" fill="{page}"/>'.format(**LIGHT)
  return _svg(windows, times, LIGHT, f"<style>{style(LIGHT)}</style>{background}") + "\n"


def style(colours: dict[str, str] | None = None) -> str:
  """The picture's CSS; without colours, in a page's variables."""
  text = STYLE
  for name in LIGHT:
    text = text.replace(f"{{{name}}}", colours[name] if colours else f"var(--{name})")
  return text


def _svg(windows: int, times: str, colours: dict[str, str], start: str) -> str:
  shown = list(range(1, windows + 1)) if windows <= 3 else [1, 2, windows]
  parts = []
  for place, window in enumerate(shown):
    x = MIDDLE + place * STEP
    cells = "".join(
      f'<rect class="cell" x="{x - 61 + 15.5 * i}" y="74" width="11" height="14" rx="2"/>' for i in range(8)
    )
    skipped = place + 1 < len(shown) and shown[place + 1] != window + 1
    parts += [
      _column(x, f"window {window}", cells),
      f'<path class="line" d="M{x + 51} 150 {LOOP}" marker-end="url(#quiet)"/>',
      f'<text class="name" x="{x + 73}" y="146">&#215; {html.escape(times)}</text>',
      f'<path class="strong" d="M{x} 159 V197" marker-end="url(#accent)"/>',
      f'<text class="small" x="{x + 9}" y="182">writes</text>',
      f'<path class="strong" d="M{x + 18} 218 H{x + STEP - 21}" marker-end="url(#accent)"/>'
      if place + 1 < len(shown)
      else "",
      f'<text x="{x + STEP // 2}" y="86" text-anchor="middle">&#8230;</text>' if skipped else "",
    ]
  last = MIDDLE + (len(shown) - 1) * STEP
  x = last + STEP + 20
  parts.append(f'<path class="strong" d="M{last + 18} 218 H{x - 21}" marker-end="url(#accent)"/>')
  border = (last + x) // 2 + 6
  nothing = f'<text class="small" x="{x}" y="85" text-anchor="middle">the windows are gone</text>'
  parts += [
    _column(x, "question", nothing),
    f'<path class="strong" d="M{x} 200 V162" marker-end="url(#accent)"/>',
    f'<text class="small" x="{x + 9}" y="184">reads</text>',
    f'<path class="line" d="M{x + 51} 141 H{x + 76}" marker-end="url(#quiet)"/>',
    f'<text x="{x + 82}" y="146">answer</text>',
    f'<path class="faint" d="M{border} 8 V262" stroke-dasharray="4 4"/>',
    f'<text class="head" x="14" y="22">Asleep: {html.escape(times)} passes over a full window</text>',
    '<text class="small" x="14" y="258">Then hidden states and attention cache are dropped; S stays.</text>',
    f'<text class="head" x="{border + 14}" y="22">Awake: one pass</text>',
    f'<text class="small" x="{border + 14}" y="258">The same cost for every N.</text>',
  ]
  arrows = "".join(MARKER.format(name=name, colour=colours[name]) for name in ("quiet", "accent"))
  width = x + 142
  space = 'xmlns="http://www.w3.org/2000/svg" ' if start else ""  # a page needs none
  return (
    f'<svg {space}viewBox="0 0 {width} 270" width="{width}" role="img" '
    f'aria-label="{ALT}">{start}<defs>{arrows}</defs>{"".join(parts)}\n</svg>'
  )


def _column(x: int, title: str, content: str) -> str:
  return COLUMN.format(x=x, left=x - 70, blocks=x - 50, state=x - 17, title=title, content=content)
