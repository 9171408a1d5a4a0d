"""Charts as inline SVG: line charts and stacked bars, with the value of a point shown under the mouse."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
MAX_BARS, MAX_HOVERS = 160, 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    label: its name in the legend.
    points: (step, value) pairs in order of step.
    color: CSS color.
    dots: True draws each point as a dot too, for curves of a few points.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    dots: bool = False


def line_chart(title: str, unit: str, series: Sequence[Series]) -> str:
    """A panel with one line a series over steps.

    title, unit: shown above the plot.
    series: at least one, each with at least one point.
    """
    legend = [(line.label, line.color) for line in series]
    return _panel(title, unit, legend, _lines(series, "step", whole=True))


def picture(title: str, x_label: str, series: Sequence[Series]) -> str:
    """A whole SVG file with one line a series over numbers that are no steps; arguments as of line_chart.

    title: what is plotted, with its unit. x_label: over what, with its unit.
    """
    legend = "".join(
        f'<text x="{LEFT + 12}" y="{18 * i + 28}" fill="{line.color}" style="fill:{line.color};font-weight:600">'
        f"{html.escape(line.label)}</text>"
        for i, line in enumerate(series)
    )
    body = _lines(series, x_label, whole=False)
    style = "text{font:11px system-ui,sans-serif;fill:#64748b}.grid{stroke:#e2e8f0}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 {WIDTH} {HEIGHT + 24}"><style>{style}</style>'
        f'<rect y="-24" width="{WIDTH}" height="{HEIGHT + 24}" fill="#fff"/>'
        f'<text x="{LEFT}" y="-8" style="font-size:13px;fill:#1e293b">{html.escape(title)}</text>{body}{legend}</svg>\n'
    )


def _lines(series: Sequence[Series], x_label: str, whole: bool) -> str:
    points = [point for line in series for point in line.points]
    x, y = _Axis.over([p[0] for p in points], whole=whole), _Axis.over([p[1] for p in points])
    marks = []
    for line in series:
        place = [(_x(x, step), _y(y, value)) for step, value in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in place)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="1.8"/>')
        if line.dots or len(place) == 1:
            marks += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{line.color}"/>' for a, b in place]
    marks += [hover for line in series for hover in _hovers(line, x, y)]
    return _frame(x, y, x_label=x_label) + "".join(marks)


def stacked_bars(title: str, unit: str, steps: Sequence[int], phases: dict[str, Sequence[float]]) -> str:
    """A panel with one bar a step, each phase's share on top of the one before; many steps are averaged in groups.

    steps: the step of each bar.
    phases: name to values, aligned with `steps`.
    """
    size = math.ceil(len(steps) / MAX_BARS)
    groups = [range(i, min(i + size, len(steps))) for i in range(0, len(steps), size)]
    means = {name: [sum(values[i] for i in g) / len(g) for g in groups] for name, values in phases.items()}
    totals = [sum(values[g] for values in means.values()) for g in range(len(groups))]
    x, y = _Axis.over([steps[0] - 0.5 * size, steps[-1] + 0.5], whole=True), _Axis.over([0.0, *totals])
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = min(0.84 * slot, 60)
    marks, base = [], [0.0] * len(groups)
    for (name, values), color in zip(means.items(), _colors(len(means)), strict=True):
        for g, value in enumerate(values):
            top, bottom = _y(y, base[g] + value), _y(y, base[g])
            tip = html.escape(f"step {steps[groups[g][-1]]}: {name} {value:.3g} {unit}")
            marks.append(
                f'<rect x="{LEFT + (g + 0.5) * slot - width / 2:.1f}" width="{width:.1f}" y="{top:.1f}" '
                f'height="{max(bottom - top, 0):.1f}" fill="{color}" opacity="0.85"><title>{tip}</title></rect>'
            )
            base[g] += value
    labels = [(LEFT + (g + 0.5) * slot, f"{steps[groups[g][-1]]}") for g in _spread(len(groups), 8)]
    legend = list(zip(means, _colors(len(means)), strict=True))
    return _panel(title, unit, legend, _frame(x, y, labels) + "".join(marks))


@dataclass(frozen=True, kw_only=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]

    @staticmethod
    def over(values: Sequence[float], whole: bool = False) -> "_Axis":
        low, high = min(values), max(values)
        if low == high:
            margin = 1.0 if whole else abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        gap = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        if whole:
            gap = max(1.0, round(gap))
            first = math.ceil(low / gap)
            ticks = [gap * i for i in range(first, math.floor(high / gap) + 1)]
        else:
            ticks = [gap * i for i in range(math.floor(low / gap), math.ceil(high / gap) + 1)]
            low, high = ticks[0], ticks[-1]
        return _Axis(low=low, high=high, ticks=tuple(ticks))


def _x(axis: _Axis, value: float) -> float:
    return LEFT + (value - axis.low) / (axis.high - axis.low) * (WIDTH - LEFT - RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (value - axis.low) / (axis.high - axis.low) * (HEIGHT - TOP - BOTTOM)


def _frame(x: _Axis, y: _Axis, x_labels: list[tuple[float, str]] | None = None, x_label: str = "step") -> str:
    parts = []
    for tick in y.ticks:
        height = _y(y, tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    labels = x_labels if x_labels is not None else [(_x(x, tick), _short(tick)) for tick in x.ticks]
    parts += [f'<text x="{a:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{text}</text>' for a, text in labels]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{x_label}</text>')
    return "".join(parts)


def _hovers(line: Series, x: _Axis, y: _Axis) -> list[str]:
    spots = []
    for index in _spread(len(line.points), MAX_HOVERS):
        step, value = line.points[index]
        tip = html.escape(f"step {step:g}: {line.label} {value:.4g}")
        place = f'cx="{_x(x, step):.1f}" cy="{_y(y, value):.1f}"'
        spots.append(f'<circle {place} r="7" fill="transparent"><title>{tip}</title></circle>')
    return spots


def _panel(title: str, unit: str, legend: list[tuple[str, str]], body: str) -> str:
    keys = "".join(f'<span><i style="background:{color}"></i>{html.escape(label)}</span>' for label, color in legend)
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> <small>{html.escape(unit)}</small>"
        f'<div class="legend">{keys}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{body}</svg></figure>'
    )


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread, the last one among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _short(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:.6g}"
