"""Draw a chart as SVG: the one renderer of curves, for the HTML report and for the pictures in Prefect's UI.

The colors are attributes, on white, because a picture in the UI may stand on a dark page. In the HTML report the classes override them,
with the page's own colors.
"""

from __future__ import annotations

from xml.sax.saxutils import quoteattr

from flows.report.figures import Chart

STROKE, OTHER_STROKE = "#2563eb", "#ea580c"
LEFT, TOP, RIGHT, BOTTOM = 56, 12, 20, 28  # px around the box, for the labels of the axes


def svg(drawn: Chart, label: str) -> str:
    """Return the chart as SVG. `label` describes it to screen readers."""
    left, top, width, height = -LEFT, -TOP, drawn.width + LEFT + RIGHT, drawn.height + TOP + BOTTOM
    parts = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="{left} {top} {width} {height}" font-family="sans-serif" font-size="11" fill="#475569"'
        f' role="img" aria-label={quoteattr(label)}>',
        f'<rect class="paper" x="{left}" y="{top}" width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for y, text in drawn.up:
        parts.append(f'<line class="grid" x1="0" x2="{drawn.width}" y1="{y}" y2="{y}" stroke="#e2e8f0"/>')
        parts.append(f'<text class="note" x="-7" y="{y + 4}" text-anchor="end">{text}</text>')
    for x, text in drawn.across:
        parts.append(f'<text class="note" x="{x}" y="{drawn.height + 18}" text-anchor="middle">{text}</text>')
    for name, points in drawn.lines.items():
        held_out = name == "eval_loss"
        css, stroke = ("other", OTHER_STROKE) if held_out else ("first", STROKE)
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline class="{css}" points="{line}" fill="none" stroke="{stroke}" stroke-width="2"/>')
        if held_out:
            parts += [f'<circle class="{css}" cx="{x}" cy="{y}" r="3" fill="{stroke}"/>' for x, y in points]
    return "".join([*parts, "</svg>"])
