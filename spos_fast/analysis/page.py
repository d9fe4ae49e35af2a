"""The HTML that all reports share: one file without scripts and without anything to load, and the cards of figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_STYLE = Path(__file__).with_name("report.css")

_SHAPES = {
    "line": '<path d="M0 7H24" stroke-width="2.4"/>',
    "thin": '<path d="M0 7H24" stroke-width="1.4"/>',
    "dashed": '<path d="M0 7H24" stroke-width="2.2" stroke-dasharray="9 4"/>',
    "dotted": '<path d="M0 7H24" stroke-width="1.6" stroke-dasharray="2 2.5"/>',
    "dot": '<circle cx="12" cy="7" r="3" stroke="none"/>',
    "diamond": '<path d="M12 1.5L17.5 7L12 12.5L6.5 7Z" stroke="var(--ink)"/>',
    "star": '<path d="M12 .5l1.6 4.7 5 .1-4 3 1.5 4.7-4.1-2.8-4.1 2.8 1.5-4.7-4-3 5-.1z" stroke="var(--ink)"/>',
}
DASHES: dict[str, object] = {"line": "-", "thin": "-", "dashed": (0, (5, 2)), "dotted": (0, (1, 1.5))}
WIDTHS = {"line": 2.4, "thin": 1.5, "dashed": 2.2, "dotted": 1.5}


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page from parts of HTML; empty ones are left out."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_STYLE.read_text()}</style>
</head>
<body>
<main>
{chr(10).join(section for section in sections if section)}
</main>
</body>
</html>
"""


def card(title: str, drawing: str, caption: str = "", below: str = "", wide: bool = False) -> str:
    """A figure with its title, its key (``below``) and its caption (HTML is escaped); a wide one may be scrolled."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    drawn = f'<div class="wide">{drawing}</div>' if wide else drawing
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="card">{head}{drawn}{below}{text}</figure>'


def figure_key(entries: Iterable[tuple[str, str, str]]) -> str:
    """A key of (name, colour, shape) entries; shapes are line, thin, dashed, dotted, dot, diamond, star."""
    parts = (
        f'<span><svg class="swatch" viewBox="0 0 24 14" aria-hidden="true" fill="var(--{colour})" '
        f'stroke="var(--{colour})">{_SHAPES[shape]}</svg>{escape(name)}</span>'
        for name, colour, shape in entries
    )
    return f'<div class="key">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table in a card: the first column names the row, the others are numbers. Text is escaped."""
    titles = "".join(
        f'<th scope="col"{" class=number" if index else ""}>{escape(t)}</th>' for index, t in enumerate(head)
    )
    lines = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f'<td class="number">{escape(value)}</td>' for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    below = f'<p class="note">{escape(caption)}</p>' if caption else ""
    return (
        f'<div class="card"><div class="wide"><table>\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>{below}</div>"
    )


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Key numbers: name, value, and what it rests on."""
    cells = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="below">{escape(below)}</dd></div>'
        for name, value, below in entries
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""
