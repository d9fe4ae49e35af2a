"""Keys of the figures as HTML beside them: they wrap on a narrow screen, which a legend inside a drawing cannot."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from spos_fast.analysis.run_data import RunData
from spos_fast.analysis.summary import Row, choice_tags
from spos_fast.analysis.svg import choice_colour

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

SEARCH_KEY = (("evolution", "evolution", "line"), ("random search", "random", "dashed"))
COST_KEY = (
    ("evolution", "evolution", "dot"),
    ("random search", "random", "dot"),
    ("best of evolution", "evolution", "star"),
    ("best of random search", "random", "diamond"),
    ("Pareto front", "ink", "thin"),
)


def figure_key(entries: Iterable[tuple[str, str, str]]) -> str:
    """A key of (name, colour, shape) entries; shapes are line, thin, dashed, dotted, dot, diamond, star."""
    parts = (
        f'<span><svg class="swatch" viewBox="0 0 24 14" aria-hidden="true" fill="var(--{colour})" '
        f'stroke="var(--{colour})">{_SHAPES[shape]}</svg>{escape(name)}</span>'
        for name, colour, shape in entries
    )
    return f'<div class="key">{"".join(parts)}</div>'


def choice_key(data: RunData) -> str:
    """What the colours and the letters of the choices mean."""
    names = max(data.choices, key=len)
    cells = (
        f'<span><span class="strip roomy">{choice_cell(index, tag)}</span>{escape(name)}</span>'
        for index, (name, tag) in enumerate(zip(names, choice_tags(names), strict=True))
    )
    return f'<div class="key">{"".join(cells)}</div>'


def choice_cell(choice: int, tag: str, attributes: str = "") -> str:
    """One coloured cell of a strip."""
    colour = choice_colour(choice)
    return f'<i{attributes} style="background:var(--{colour});color:var(--on-{colour})">{escape(tag)}</i>'


def row_style(row: Row, data: RunData) -> tuple[str, str, str]:
    """The (name, colour, shape) entry of an architecture in the curves of retraining."""
    if row.label in ("evolution", "random_search"):
        return (row.title, "evolution", "line") if row.label == "evolution" else (row.title, "random", "dashed")
    for choice, name in enumerate(data.choices[0]):
        if row.label == f"all_{name}":
            return row.title, choice_colour(choice), "thin"
    return "random and custom ones", "muted", "dotted"
