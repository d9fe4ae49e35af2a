"""Keys of the figures as HTML beside them: they wrap on a narrow screen, which a legend inside a drawing cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from spos_fast.analysis.run_data import RunData
from spos_fast.analysis.summary import Row, choice_tags
from spos_fast.analysis.svg import choice_colour
from spos_fast.spaces.bits import named_bits

SEARCH_KEY = (("evolution", "evolution", "line"), ("random search", "random", "dashed"))
COST_KEY = (
    ("evolution", "evolution", "dot"),
    ("random search", "random", "dot"),
    ("best of evolution", "evolution", "star"),
    ("best of random search", "random", "diamond"),
    ("Pareto front", "ink", "thin"),
)
# Kinds whose choices are more or less of something; those of others have a colour each.
SHADED = ("width", "bits")
PARETO_KEY = ("Pareto search", "pareto", "dot")


def choice_key(data: RunData) -> str:
    """What the cells of strips mean."""
    keys = []
    for kind in data.kinds:
        names = data.names(kind)
        cells = (
            f'<span><span class="strip roomy">{choice_cell(kind, index, names)}</span>{escape(name)}</span>'
            for index, name in enumerate(names)
        )
        keys.append(f'<div class="key">{"".join(cells)}</div>')
    return "".join(keys)


def choice_cell(kind: str, choice: int, names: Sequence[str], attributes: str = "") -> str:
    """One cell of a strip: a block's colour and letter, a bar as high as a width is wide, or bits, darker for more."""
    if kind == "width":
        level = 100 * (choice + 1) // len(names)
        return f'<i{attributes} style="background:linear-gradient(to top,var(--width) {level}%,var(--line) 0)"></i>'
    tag = escape(choice_tags(names)[choice])
    if kind == "bits":
        shade = choice_shade(kind, choice, names)
        mixed = f"color-mix(in srgb,var(--bits) {100 * shade:.0f}%,var(--paper))"
        return f'<i{attributes} style="background:{mixed};color:var(--{text_on(kind, shade)})">{tag}</i>'
    colour = choice_colour(choice)
    return f'<i{attributes} style="background:var(--{colour});color:var(--on-{colour})">{tag}</i>'


def choice_shade(kind: str, choice: int, names: Sequence[str]) -> float:
    """How dark a width or a pair of bit-widths is drawn, up to 1: by its place, or by its bit operations a
    multiply-accumulate on a scale of powers of two.
    """
    if kind == "width":
        return (choice + 1) / len(names)
    doublings = [1 + math.log2(weights * activations) for weights, activations in named_bits("bits", names)]
    return doublings[choice] / max(doublings)


def text_on(kind: str, shade: float) -> str:
    """Name of the colour of text on a shade of a kind's colour."""
    return f"on-{kind}" if shade >= 0.75 else "ink"


def row_style(row: Row, data: RunData) -> tuple[str, str, str]:
    """The (name, colour, shape) entry of an architecture in the curves of retraining."""
    if row.label in ("evolution", "random_search"):
        return (row.title, "evolution", "line") if row.label == "evolution" else (row.title, "random", "dashed")
    if row.label in data.baselines:
        return row.title, choice_colour(list(data.baselines).index(row.label)), "thin"
    if row.label.startswith("pareto_"):
        return "Pareto front", "pareto", "thin"
    return "random and custom ones", "muted", "dotted"
