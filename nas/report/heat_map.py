"""Mixing weights as a heat map in the page: SVG of its own, coloured by the page's style sheet in light and dark."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from nas.analysis.drawing import operation_label, svg_text

LABELS = 92.0
"""Pixels left of the fields for the names of the rows."""
FIELDS = 252.0
ROW = 19.0
SWATCHES = 5
SMALLEST_SPAN = 1.25
"""Factor between an even mixture and the strongest colour, at least: smaller differences stay pale."""


def span_of(tables: Sequence[Mapping[str, Sequence[float]]]) -> float:
    """log2 of the largest factor between a weight in ``tables`` and an even mixture; their maps share it as scale."""
    steps = [abs(_steps(value, len(table))) for table in tables for row in table.values() for value in row if value > 0]
    return max([math.log2(SMALLEST_SPAN), *steps])


def heat_map(
    title: str,
    rows: Mapping[str, Sequence[float]],
    columns: Sequence[str],
    span: float,
    *,
    axis: str,
    boundaries: Sequence[int] = (),
) -> str:
    """Mixing weights by operation (rows) and by what ``columns`` name, as inline SVG.

    An even mixture has no colour; more of an operation is blue, less is orange, and full at ``span`` (log2 of a
    factor). The weight stands in each field's tooltip. boundaries: columns before which a new stage begins. Of
    numbered columns, as many are named as have room; others are all named, upright.
    """
    even, count = 1 / len(rows), len(columns)
    width, top = FIELDS / count, 16.0
    upright = not all(name.isdigit() for name in columns)
    foot = 34.0 if upright else 18.0
    bottom = top + ROW * len(rows)
    height = bottom + foot + 16 + 34
    key = hashlib.blake2b(repr((title, rows, columns)).encode("utf-8", "replace"), digest_size=4).hexdigest()
    parts = [
        f'<svg class="heat" role="img" aria-labelledby="heat-{key}-title heat-{key}-desc" '
        f'viewBox="0 0 {LABELS + FIELDS + 4:.0f} {height:.0f}">',
        f'<title id="heat-{key}-title">{svg_text(title)}</title>',
        f'<desc id="heat-{key}-desc">{svg_text(_in_words(rows, columns, axis))}</desc>',
    ]
    for line, (operation, values) in enumerate(rows.items()):
        y = top + ROW * line
        parts.append(_label(LABELS - 6, y + 13, operation_label(operation), "end"))
        for place, value in enumerate(values):
            parts.append(_field(LABELS + width * place, y, width, ROW, value, even, span, f"{axis} {columns[place]}"))
    # As many names as have room.
    for place in range(0, count, 1 if upright else max(1, math.ceil(16 / width))):
        x = LABELS + width * (place + 0.5)
        name = columns[place]
        parts.append(
            _label(x + 4, bottom + 30, name, upright=True) if upright else _label(x, bottom + 14, name, "middle")
        )
    for number, boundary in enumerate(boundaries, start=2):
        x = LABELS + width * boundary
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom:.1f}"/>')
        parts.append(_label(x + 4, 12, f"stage {number}"))
    parts.append(_label(LABELS + FIELDS / 2, bottom + foot + 10, axis, "middle"))
    parts += _legend(bottom + foot + 18, even, span)
    return "".join([*parts, "</svg>"])


def _field(x: float, y: float, width: float, height: float, value: float, even: float, span: float, what: str) -> str:
    share = max(-1.0, min(1.0, _steps(value, 1 / even) / span)) if value > 0 else -1.0
    kind = "more" if share > 0 else "less"
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width - 0.6, 0.6):.1f}" height="{height - 1:.1f}" '
        f'fill-opacity="{abs(share):.2f}"><title>{svg_text(what)}: {value:.3f}</title></rect>'
    )


def _legend(y: float, even: float, span: float) -> list[str]:
    width, parts = FIELDS / SWATCHES, [_label(LABELS - 6, y + 10, "weight", "end")]
    for place in range(SWATCHES):
        value = even * 2 ** (span * (2 * place / (SWATCHES - 1) - 1))
        x = LABELS + width * place
        parts.append(_field(x, y, width, 12, value, even, span, "weight"))
        parts.append(_label(x + width / 2, y + 25, f"{value:.3f}", "middle"))
    return parts


def _label(x: float, y: float, text: str, anchor: str = "", upright: bool = False) -> str:
    attributes = f' class="{anchor}"' if anchor else ""
    attributes += f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{svg_text(text)}</text>'


def _steps(value: float, operations: float) -> float:
    """log2 of the factor between a mixing weight and that of an even mixture of so many operations."""
    return math.log2(value * operations)


def _in_words(rows: Mapping[str, Sequence[float]], columns: Sequence[str], axis: str) -> str:
    """The gist of the picture for those who do not see it."""
    last = sorted(rows, key=lambda name: -rows[name][-1])
    parts = [f"{operation_label(name)}: {rows[name][0]:.3f} to {rows[name][-1]:.3f}" for name in last]
    return f"Weights at {axis} {columns[0]} and at {axis} {columns[-1]}. " + "; ".join(parts) + "."
