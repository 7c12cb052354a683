"""A report as one HTML file: text, tables that sort and figures, with nothing fetched from anywhere."""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bdkd_dist.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS_PX_PER_IN = 96
LONG_CELL = 40
"""Characters from which on a cell's text wraps."""
NUMBER = re.compile(r"[+\-−]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?([\s%].*)?", re.IGNORECASE)
"""A cell that begins with a number, and may go on with its unit, its deviation or its interval."""
MISSING = ("", "–", "nan")
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --ground: #fff; --stripe: #f6f8fa;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4af; --line: #363d45; --ground: #15191e;
  --stripe: #1b2026; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.2rem; line-height: 1.3; }
p, figcaption { max-width: 46rem; margin: 0.75rem 0; overflow-wrap: anywhere; }
.lead { color: var(--soft); font-size: 1.05rem; }
figcaption { color: var(--soft); font-size: 0.875rem; line-height: 1.45; }
figure { margin: 1.25rem 0 2rem; }
.box { max-width: 100%; width: fit-content; overflow: auto; border: 1px solid var(--line); border-radius: 0.5rem; }
.rows { max-height: min(44rem, 85vh); }
.drawn { background: #fff; padding: 0.75rem; color-scheme: light; }
.drawn svg { display: block; height: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.7rem; text-align: left; font-weight: normal; white-space: nowrap; vertical-align: top; }
.long { white-space: normal; min-width: 18rem; max-width: 30rem; overflow-wrap: anywhere; }
.number { text-align: right; }
thead th { position: sticky; top: 0; padding: 0; background: var(--ground); box-shadow: inset 0 -1px var(--line);
  vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--stripe); }
button { all: unset; box-sizing: border-box; width: 100%; padding: 0.5rem 0.7rem; cursor: pointer; color: var(--soft);
  font-weight: 600; }
button:hover, [aria-sort] button { color: var(--ink); }
button:focus-visible, .box:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
[aria-sort=ascending] button::after { content: "\\2009\\2191"; }
[aria-sort=descending] button::after { content: "\\2009\\2193"; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.4rem; } h2 { margin-top: 2.25rem; }
  .drawn svg { min-width: min(var(--width), 46rem); } .long { min-width: 11rem; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --ground: #fff; --stripe: #fff; }
  main { max-width: none; padding: 0; } table { font-size: 0.65rem; } th, td { padding: 0.15rem 0.35rem; }
  button { padding: 0.15rem 0.35rem; } thead th { position: static; } .box { overflow: visible; border: 0; }
  .rows { max-height: none; } .drawn { padding: 0; } figure:has(svg), tr { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""
SCRIPT = """
for (const head of document.querySelectorAll("thead th"))
  head.firstElementChild.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], number = head.className === "number";
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const text = row.cells[head.cellIndex].textContent;
      return number ? parseFloat(text.replace("\\u2212", "-").replaceAll(",", "")) : text;
    };
    const order = (a, b) => {
      if (!number) return a.localeCompare(b, "en", {numeric: true}) * (down ? -1 : 1);
      return isNaN(a) - isNaN(b) || (isNaN(a) ? 0 : (a - b) * (down ? -1 : 1));
    };
    body.append(...[...body.rows].sort((one, other) => order(key(one), key(other))));
  });
"""
"""A click on a column's head, or Enter or Space on it, sorts; again, the other way. What is missing comes last."""


class Page:
    """A report, part after part, that a person can read in any browser, on a phone and on paper.

    The same parts give the same bytes. All text is plain and escaped here. The page may load nothing and run no
    script but its own (its Content-Security-Policy says so).

    Args:
        title: Its heading, and the browser's title.
        lead: A sentence or two below it.
    """

    def __init__(self, title: str, lead: str = ""):
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{escape(lead)}</p>')
        self._figures = 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def figure(self, figure: "Figure", caption: str, alt: str) -> None:
        """Add a figure as an inline SVG, on white whatever the page's colours.

        Args:
            figure: Is drawn once, now; letters become outlines, so it looks the same everywhere.
            caption: Below it; empty for none.
            alt: What it shows, for those who do not see it.
        """
        self._figures += 1
        width_px = round(figure.get_figwidth() * CSS_PX_PER_IN)
        head = f'<svg role="img" aria-label="{escape(alt)}" style="width:{width_px}px;--width:{width_px}px"'
        drawn = head + _svg(figure, f"f{self._figures}-").removeprefix("<svg")
        self._parts.append(
            f'<figure><div class="box drawn" tabindex="0">{drawn}</div>{_caption(caption)}</figure>',
        )

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Add a table; columns of numbers stand to the right and sort as numbers, by what their cells begin with.

        Args:
            columns: Their heads.
            rows: As many cells each. An empty cell, ``–`` or ``nan`` is a number that is not there.
            caption: Below it.
        """
        assert all(len(row) == len(columns) for row in rows), "a row has other columns"
        kinds = [' class="number"' if _is_number([row[n] for row in rows]) else "" for n in range(len(columns))]
        heads = (
            f'<th scope="col"{kind}><button type="button">{escape(column)}</button></th>'
            for column, kind in zip(columns, kinds, strict=True)
        )
        lines = (
            "<tr>" + "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)) + "</tr>" for row in rows
        )
        body = "\n".join(lines)
        label = escape(caption or ", ".join(columns))
        self._parts.append(
            f'<figure><div class="box rows" tabindex="0" role="region" aria-label="{label}"><table>\n'
            f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>{_caption(caption)}</figure>"
        )

    def html(self) -> str:
        """Return the whole page."""
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
        head = (
            '<meta charset="utf-8">',
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE}</style>",
        )
        body = ("<main>", *self._parts, "</main>", f"<script>{SCRIPT}</script>")
        return "\n".join(["<!doctype html>", '<html lang="en">', *head, "<body>", *body, "</body>", "</html>", ""])

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        atomic_write(path, self.html().encode())


def _svg(figure: "Figure", prefix: str) -> str:
    """Return a figure as an ``<svg>`` element of its own size, with ``prefix`` before every id in it."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "bdkd", "svg.fonttype": "path", "svg.image_inline": True}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r'(\bid="|\bhref="#|\burl\(#)', rf"\g<1>{prefix}", text)


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _cell(text: str, kind: str) -> str:
    kind = ' class="long"' if not kind and len(text) > LONG_CELL else kind
    return f"<td{kind}>{escape(text)}</td>"


def _is_number(cells: Sequence[str]) -> bool:
    """Whether a column holds numbers, and nothing but them."""
    there = [cell for cell in cells if cell not in MISSING]
    return bool(there) and all(NUMBER.fullmatch(cell) for cell in there)
