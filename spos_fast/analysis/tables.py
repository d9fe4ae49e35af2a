"""The tables of the report as HTML: the comparison with its architectures, and the settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from spos_fast.analysis.drawing import bit_operations, milliseconds, short_number
from spos_fast.analysis.keys import choice_cell, choice_key
from spos_fast.analysis.run_data import RunData, Scored, Tested
from spos_fast.analysis.summary import Row, wilson_interval
from spos_fast.config_io import documented_fields, plain


def percent(value: float, images: int) -> str:
    """A share to one decimal, or two where there are enough images for the second to mean something."""
    return "no number" if math.isnan(value) else f"{100 * value:.{2 if images >= 5000 else 1}f}%"


def interval_text(result: Tested) -> str:
    """The 95% interval in words, without a sign for percent."""
    low, high = wilson_interval(result.accuracy, result.images)
    if math.isnan(low):
        return "no interval"
    digits = 2 if result.images >= 5000 else 1
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"


def comparison_table(rows: Sequence[Row], data: RunData) -> str:
    """One line an architecture; every number is a ``<data>`` element with the exact value of the run folder."""
    results = [row.result for row in rows if row.result]
    bounds = [end for result in results for end in wilson_interval(result.accuracy, result.images)]
    bounds = [end for end in bounds if not math.isnan(end)]
    low, high = (min(bounds), max(bounds)) if bounds else (0.0, 1.0)
    lines = []
    counted, timed = (any(getattr(row, name) is not None for row in rows) for name in ("bitops", "latency_ms"))
    for row in rows:
        best = ' class="best"' if row.label == "evolution" else ""
        note = f"<small>{escape(row.note)}</small>" if row.note else ""
        cells = [
            f'<th scope="row">{escape(row.title)}{note}</th>',
            f'<td class="number">{_scored(row.scored)}</td>',
            *_tested(row, low, high),
            f'<td class="number">{_count(row.macs)}</td>',
            f'<td class="number">{_count(row.params)}</td>',
            *([f'<td class="number">{_bitops(row.bitops)}</td>'] if counted else []),
            *([f'<td class="number">{_latency(row.latency_ms)}</td>'] if timed else []),
            f"<td>{strip(row.genes, data) if row.genes else '–'}</td>",
        ]
        lines.append(f'<tr{best} data-label="{escape(row.label)}">{"".join(cells)}</tr>')
    further = '<th scope="col" class="number">BitOps</th>' if counted else ""
    further += '<th scope="col" class="number">Latency,<br>predicted</th>' if timed else ""
    return f"""<div class="card"><div class="wide"><table>
<thead><tr><th scope="col">Architecture</th>
<th scope="col" class="number">Validation accuracy,<br>supernet's weights</th>
<th scope="col" class="number">Test accuracy,<br>retrained</th><th scope="col">95% interval</th>
<th scope="col" class="number">MACs</th><th scope="col" class="number">Params</th>{further}
<th scope="col">{escape(_listed(data.kinds).capitalize())} of every layer, first to last</th></tr></thead>
<tbody>
{chr(10).join(lines)}
</tbody></table></div>{choice_key(data)}</div>"""


def front_table(data: RunData) -> str:
    """The networks of the Pareto search's front, cheapest first, by the labels that retraining knows them by."""
    counted, timed = (
        any(getattr(member, name) is not None for member in data.front) for name in ("bitops", "latency_ms")
    )
    lines = []
    for number, member in enumerate(data.front):
        cells = [f'<th scope="row">pareto_{number}</th>', _scored(member), _count(member.macs), _count(member.params)]
        cells += [_bitops(member.bitops)] if counted else []
        cells += [_latency(member.latency_ms)] if timed else []
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells[1:])
        lines.append(f"<tr>{cells[0]}{numbers}<td>{strip(member.genes, data)}</td></tr>")
    names = ["Validation accuracy", "MACs", "Params"]
    names += ["BitOps"] * counted + ["Latency, predicted"] * timed
    head = "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
    layers = f"{escape(_listed(data.kinds).capitalize())} of every layer"
    return f"""<div class="card"><div class="wide"><table>
<thead><tr><th scope="col">Label</th>{head}<th scope="col">{layers}</th></tr></thead>
<tbody>
{chr(10).join(lines)}
</tbody></table></div></div>"""


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def strip(genes: Sequence[int], data: RunData) -> str:
    """An architecture as strips of cells, one a layer: its blocks, and below them its widths and bits."""
    edges = set(itertools.accumulate(data.stages))
    strips = []
    for kind in data.kinds:
        names, cells = data.names(kind), []
        chosen = data.of_kind(kind, genes)
        for layer, choice in enumerate(chosen):
            stage = ' class="stage"' if layer in edges else ""
            title = escape(f"layer {data.layer_names[layer]}: {names[choice]}")
            cells.append(choice_cell(kind, choice, names, f'{stage} title="{title}"'))
        described = escape(", ".join(names[choice] for choice in chosen))
        roomy = " roomy" if data.layers <= 12 else ""
        strips.append(f'<span class="strip{roomy}" role="img" aria-label="{described}">{"".join(cells)}</span>')
    return "<br>".join(strips)


def settings_tables(data: RunData) -> str:
    """Every setting that the run folder stores; those that differ from the default are bold."""
    values = plain(data.config)
    tables = []
    for section in data.sections:
        lines = []
        for name, _, default, description in documented_fields(type(getattr(data.config, section))):
            value = values[section][name]
            changed = ' class="changed"' if value != (list(default) if isinstance(default, tuple) else default) else ""
            lines.append(
                f'<tr{changed} title="{escape(description)}"><th scope="row">{escape(name)}</th>'
                f"<td>{escape(_plain_text(value))}</td></tr>"
            )
        tables.append(f'<div class="card"><h3>{escape(section)}</h3><table>{"".join(lines)}</table></div>')
    return f'<div class="settings">{"".join(tables)}</div>'


def _plain_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 and value.is_integer() else f"{value:g}"
    return str(value) if value != "" else "–"


def _scored(scored: Scored | None) -> str:
    if scored is None:
        return "–"
    return f'<data value="{scored.accuracy!r}">{percent(scored.accuracy, scored.images)}</data>'


def _tested(row: Row, low: float, high: float) -> tuple[str, str]:
    result = row.result
    if result is None:
        return f'<td class="number">{_state(row)}</td>', "<td></td>"
    value = f'<data value="{result.accuracy!r}">{percent(result.accuracy, result.images)}</data>'
    return (
        f'<td class="number measured">{value}</td>',
        f"<td>{_interval_glyph(row, low, high)}<small>{interval_text(result)}</small></td>",
    )


def _interval_glyph(row: Row, low: float, high: float) -> str:
    """The interval drawn on a scale that all rows share."""
    assert row.result is not None
    left, right = wilson_interval(row.result.accuracy, row.result.images)
    if math.isnan(left):
        return ""
    scale = 128 / max(high - low, 1e-9)
    x1, x2, dot = (2 + (value - low) * scale for value in (left, right, row.result.accuracy))
    colour = "evolution" if row.label == "evolution" else "random"
    return (
        f'<svg class="interval" viewBox="0 0 132 14" aria-hidden="true" fill="var(--{colour})" '
        f'stroke="var(--{colour})">'
        f'<path d="M0 7H132" stroke="var(--line)"/><path d="M{x1:.1f} 7H{x2:.1f}" stroke-width="3" opacity=".55"/>'
        f'<circle cx="{dot:.1f}" cy="7" r="4.5" stroke="none"/></svg>'
    )


def _state(row: Row) -> str:
    if row.retrained is None:
        return "–"
    if not row.retrained.metrics:
        return "<small>training began</small>"
    last = row.retrained.metrics[-1]
    return f"<small>training: step {last.step:,} of {last.steps:,}</small>"


def _count(value: int | None) -> str:
    return "–" if value is None else f'<data value="{value}" title="{value:,}">{short_number(value)}</data>'


def _bitops(value: int | None) -> str:
    return "–" if value is None else f'<data value="{value}" title="{value:,}">{bit_operations(value)}</data>'


def _latency(value: float | None) -> str:
    return "–" if value is None else f'<data value="{value!r}">{milliseconds(value)}</data>'
