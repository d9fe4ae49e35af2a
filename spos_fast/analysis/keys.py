"""Keys of the figures as HTML beside them: they wrap on a narrow screen, which a legend inside a drawing cannot."""

from __future__ import annotations

from html import escape

from spos_fast.analysis.run_data import RunData
from spos_fast.analysis.summary import Row, choice_tags
from spos_fast.analysis.svg import choice_colour

SEARCH_KEY = (("evolution", "evolution", "line"), ("random search", "random", "dashed"))
COST_KEY = (
    ("evolution", "evolution", "dot"),
    ("random search", "random", "dot"),
    ("best of evolution", "evolution", "star"),
    ("best of random search", "random", "diamond"),
    ("Pareto front", "ink", "thin"),
)


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
