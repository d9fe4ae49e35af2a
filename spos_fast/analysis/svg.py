"""Matplotlib figures as inline SVG that takes its colours and its font from the page, so that one drawing serves the
light page, the dark page and print.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# A colour of a figure is the name of a CSS variable of the page. Matplotlib is given the value beside it, which is
# replaced in its output; the values only have to differ from each other.
COLOURS = {
    "ink": "#1a2430",
    "muted": "#5d6875",
    "line": "#d9dee4",
    "paper": "#fefefe",
    "evolution": "#00785f",
    "random": "#868d97",
    "pareto": "#b3541e",
    "width": "#7a4fa3",
    "on-width": "#fdfdfd",
    "bits": "#24619c",
    "on-bits": "#fcfdfd",
    **{f"choice-{index}": f"#c0010{index}" for index in range(8)},
    **{f"on-choice-{index}": f"#c0020{index}" for index in range(8)},
}
CHOICE_COLOURS = 8
# Light colours, on which text is dark in either mode of the page.
DARK_ON = ("choice-0", "choice-3", "choice-5")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "spos_fast",  # the same figure gives the same bytes
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout does not depend on installed fonts
}
_VARIABLES = {value: f"var(--{name})" for name, value in COLOURS.items()}


def choice_colour(index: int) -> str:
    """Name of the colour of a choice; they repeat after :data:`CHOICE_COLOURS`."""
    return f"choice-{index % CHOICE_COLOURS}"


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element, one unit of which is a pixel at its natural size.

    Args:
        figure: drawn with the values of :data:`COLOURS`, 72 dots an inch.
        name: unique in the page; begins the ids in the figure.
        description: for screen readers; read instead of the drawing.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    # Matplotlib numbers the groups of every figure alike; two figures in one page would share those ids.
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text).replace("xlink:href", "href")
    # Hundredths of a pixel are enough, and coordinates are most of the file.
    text = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    text = re.sub(r' (?:x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: _VARIABLES.get(m[0], m[0]), text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    width, height = (size * 72 for size in figure.get_size_inches())
    head = (
        f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="--natural-width: {width:g}px">'
    )
    return re.sub(r"\s*\n\s*", "\n", head + text[text.index(">") + 1 :]).strip()


def standalone_svg(element: str) -> str:
    """What :func:`inline_svg` gave, as a file of its own: in the colours of the light page, on its paper."""
    colours = "".join(f"--{name}:{value};" for name, value in COLOURS.items() if f"var(--{name})" in element)
    head, _, body = element.partition(">")
    size = re.search(r"viewBox=\"0 0 (\S+) (\S+)\"", head)
    if size is None:
        raise ValueError("element: expected what inline_svg returns")
    width, height = size.groups()
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">\n'
        f"<style>:root{{--font:system-ui,sans-serif;{colours}}}</style>\n"
        f'<rect width="100%" height="100%" fill="{COLOURS["paper"]}"/>\n{body.strip()}\n'
    )
