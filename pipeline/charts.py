"""Charts of values over time as inline SVG: no script, no file beside the page.

Colours are the variables ``--ink``, ``--line``, ``--a`` and ``--b`` of the page's style.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
MAX_STEPS = 280  # more can't be told apart in the width
COLOURS = ("var(--a)", "var(--b)")
# Seconds of a tick on the time axis, and how it is written.
TICKS_S = (
    1,
    2,
    5,
    10,
    30,
    60,
    120,
    300,
    600,
    1800,
    3600,
    7200,
    21600,
    43200,
    86400,
    172800,
    604800,
)


@dataclass(frozen=True)
class Series:
    """A quantity over time, constant between two times.

    Attributes:
        values: (end of the interval in seconds, value in it), in order of time.
    """

    name: str
    values: Sequence[tuple[float, float]]


def step_chart(title: str, series: Sequence[Series], end_s: float, top: float = 0.0) -> str:
    """Return a figure with one step line a series, two at most.

    Args:
        title: what is drawn, with its unit.
        series: their times start at 0.
        end_s: where the time axis ends.
        top: where the value axis ends; 0: above the highest value.
    """
    drawn = [Series(each.name, thinned(each.values, end_s)) for each in series]
    highest = max((value for each in drawn for _, value in each.values), default=0.0)
    ticks = value_ticks(top or highest)
    scale_x = (WIDTH - LEFT - RIGHT) / max(end_s, 1e-9)
    scale_y = (HEIGHT - TOP - BOTTOM) / ticks[-1]
    parts = [_value_axis(ticks, scale_y), _time_axis(end_s, scale_x)]
    for colour, each in zip(COLOURS, drawn, strict=False):
        parts.append(_step_line(each, colour, scale_x, scale_y))
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(each.name)}</span>'
        for colour, each in zip(COLOURS, drawn, strict=False)
        if len(drawn) > 1
    )
    return (
        f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def thinned(values: Sequence[tuple[float, float]], end_s: float) -> list[tuple[float, float]]:
    """Return at most ``MAX_STEPS`` values: means over equal spans, weighted by time."""
    span_s = end_s / MAX_STEPS
    found: list[tuple[float, float]] = []
    begin_s = area = filled_s = 0.0
    for time_s, value in values:
        area += value * (time_s - begin_s)
        filled_s += time_s - begin_s
        begin_s = time_s
        if filled_s >= span_s and filled_s > 0:
            found.append((time_s, area / filled_s))
            area = filled_s = 0.0
    if filled_s > 0:  # too short a rest to be told apart
        end_before_s, mean_before = found.pop() if found else (0.0, 0.0)
        start_s = found[-1][0] if found else 0.0
        area += mean_before * (end_before_s - start_s)
        found.append((begin_s, area / (begin_s - start_s)))
    return found


def value_ticks(highest: float) -> list[float]:
    """Return 3 to 6 round values from 0 to ``highest`` or a little more."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * 5 >= highest)
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def time_text(seconds: float) -> str:
    """Return a time since the start in its natural unit."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:g} {unit}"
    return f"{seconds:g} s"


def _value_axis(ticks: list[float], scale_y: float) -> str:
    lines = []
    for tick in ticks:
        y = HEIGHT - BOTTOM - tick * scale_y
        lines.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>'
        )
    return "".join(lines)


def _time_axis(end_s: float, scale_x: float) -> str:
    step_s = next((tick for tick in TICKS_S if end_s / tick <= 6), end_s / 5)
    times = [step_s * i for i in range(int(end_s / step_s + 1e-9) + 1)]
    return "".join(
        f'<text x="{LEFT + time_s * scale_x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{time_text(time_s)}</text>"
        for time_s in times
    )


def _step_line(series: Series, colour: str, scale_x: float, scale_y: float) -> str:
    if not series.values:
        return ""
    path = f"M{LEFT} {HEIGHT - BOTTOM - series.values[0][1] * scale_y:.1f}"
    for time_s, value in series.values:
        path += f"V{HEIGHT - BOTTOM - value * scale_y:.1f}H{LEFT + time_s * scale_x:.1f}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
