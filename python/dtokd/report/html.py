"""Parts of pages as HTML text: the style, tables, pictures; no library, no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from .chart import COLOURS

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #62666d; --back: #fff; --line: #dcdfe4;
  --s0: #0b62c4; --s1: #c2410c; --s2: #15803d; --s3: #7c3aed; --s4: #a16207; --s5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #9aa0a8; --back: #16181b; --line: #363a40;
  --s0: #6cb1ff; --s1: #ff9b6a; --s2: #62d58a; --s3: #b79bff; --s4: #e6bd4f; --s5: #55cfe6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p { max-width: 48rem; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .7rem; min-width: 0; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .mark { stroke: var(--soft); stroke-dasharray: 4 4; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; color: var(--soft); }
polyline.dashed { stroke-dasharray: 6 4; }
.legend i { display: inline-block; width: 1.1em; height: .25em; margin-right: .4em; vertical-align: middle; }
.legend i.dashed { clip-path: polygon(0 0, 40% 0, 40% 100%, 60% 100%, 60% 0, 100% 0, 100% 100%, 0 100%); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; } .pictures img { max-width: 100%; border-radius: 4px; }
td { overflow-wrap: anywhere; } summary { cursor: pointer; margin-top: 2rem; font-weight: 600; }
""" + "".join(f"polyline.s{i} {{ stroke: var(--s{i}); }} circle.s{i} {{ fill: var(--s{i}); }} "
              f".legend i.s{i} {{ background: var(--s{i}); }}\n" for i in range(COLOURS))  # fmt: skip


def document(title: str, parts: Iterable[str]) -> str:
    """A page of this style."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def pictures(folder: Path, title: str, most: int | None = None) -> str:
    """The pictures that `dtokd detect` drew, as a part of the page itself."""
    files = sorted(folder.glob("*.jpg"))[:most]
    if not files:
        return ""
    data = {f.stem: base64.b64encode(f.read_bytes()).decode() for f in files}
    images = "".join(f'<img alt="image {name}" src="data:image/jpeg;base64,{d}">' for name, d in data.items())
    return (
        f"<h2>{escape(title)}</h2><p>Objects in green, detections above 0.3 in orange.</p>"
        f'<div class="pictures">{images}</div>'
    )


def fold(title: str, inner: str, shown: bool = False) -> str:
    """A part of a page that can be folded; it is open at first where `shown`."""
    return f"<details{' open' if shown else ''}><summary>{escape(title)}</summary>{inner}</details>"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """The first row is the head."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
