"""Line charts and timelines as SVG text. Colours are the page's CSS variables: one drawing serves light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 38
MOST_POINTS = 500
COLOURS = 6  # --c1 .. --c6 of the page


@dataclass(frozen=True)
class Series:
    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`: something that happened there."""

    x: float
    text: str
    kind: str = "event"


def line_chart(
    series: Sequence[Series],
    *,
    marks: Sequence[Mark] = (),
    log_y: bool = False,
    unit: str,
    zero: bool = False,
    noisy: bool = True,
) -> str:
    """Steps across, values up, one line a series. unit: what the values are, written on their axis.

    Long noisy series are shown twice: every point faint, their running mean in full colour. `zero`: the axis begins at
    0. Non-finite values, and values at or below 0 on a logarithmic axis, break the line. Returns "" where no series has
    a point to show.
    """
    shown = [Series(s.name, *_drawable(s, log_y)) for s in series]
    shown = [s for s in shown if any(math.isfinite(y) for y in s.ys)]
    if not shown:
        return ""
    values = [y for s in shown for y in s.ys if math.isfinite(y)]
    steps = [x for s in shown for x in s.xs]
    x_axis = _Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT, False)
    y_axis = _Axis(*_padded([*values, 0.0] if zero else values, log_y), HEIGHT - BOTTOM, TOP, log_y)
    parts = [_grid(x_axis, y_axis, unit), _marks(marks, x_axis)]
    for i, s in enumerate(shown):
        colour = _colour(i)
        smooth = _running_mean(s.ys) if noisy and len(s.ys) > 40 else None
        if smooth:
            parts.append(_path(s.xs, s.ys, x_axis, y_axis, colour, "raw"))
        parts.append(_path(s.xs, smooth or s.ys, x_axis, y_axis, colour, "line", s.name))
    return _drawing(parts, [s.name for s in shown])


def stacked_chart(series: Sequence[Series], *, marks: Sequence[Mark] = (), unit: str) -> str:
    """Bands on top of each other, the first at the bottom: the upper edge is their sum. All have the same steps.

    Long series are drawn as means of equal runs of steps. Returns "" where there is nothing to stack, or a value is
    negative or not finite, which no band can show.
    """
    if len(series) < 2 or not series[0].xs or len({tuple(s.xs) for s in series}) > 1:
        return ""
    if not all(math.isfinite(y) and y >= 0 for s in series for y in s.ys):
        return ""
    runs = [_drawable(s, False) for s in series]
    xs = runs[0][0]
    edges = [[0.0] * len(xs)]
    for _, ys in runs:
        edges.append([below + y for below, y in zip(edges[-1], ys, strict=True)])
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, False)
    y_axis = _Axis(0.0, 1.05 * max(edges[-1]) or 1.0, HEIGHT - BOTTOM, TOP, False)
    parts = []
    for i, s in enumerate(series):
        corners = [*zip(xs, edges[i + 1], strict=True), *reversed([*zip(xs, edges[i], strict=True)])]
        points = "L".join(f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}" for x, y in corners)
        parts.append(f'<path class="band" d="M{points}Z" fill="{_colour(i)}"><title>{escape(s.name)}</title></path>')
    return _drawing([_grid(x_axis, y_axis, unit), *parts, _marks(marks, x_axis)], [s.name for s in series])


def _drawing(parts: Sequence[str], names: Sequence[str]) -> str:
    """The SVG around the parts, and below it which colour is what, where there are several."""
    keys = "".join(f'<li><i style="background:{_colour(i)}"></i>{escape(name)}</li>' for i, name in enumerate(names))
    legend = f'<ul class="legend">{keys}</ul>' if len(names) > 1 else ""
    label = escape(", ".join(names))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>{legend}'


def _colour(index: int) -> str:
    return f"var(--c{index % COLOURS + 1})"


def _marks(marks: Sequence[Mark], x_axis: "_Axis") -> str:
    """Those within the axis, as dashed lines with a title."""
    return "".join(
        f'<line class="mark {escape(mark.kind)}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{escape(mark.text)}</title></line>"
        for mark in marks
        if x_axis.low <= mark.x <= x_axis.high
        for x in [x_axis.place(mark.x)]
    )


def score_bar(value: float, interval: tuple[float, float] | None, ticks: Sequence[tuple[float, str, str]]) -> str:
    """A score between 0 and 1 as a bar, its interval as a whisker, other levels as ticks (value, class, what it is)."""
    width, height = 220, 22
    parts = [
        f'<rect class="rail" x="0" y="7" width="{width}" height="8" rx="4"/>',
        f'<rect class="fill" x="0" y="7" width="{max(value, 0) * width:.1f}" height="8" rx="4"/>',
    ]
    if interval:
        low, high = (min(max(end, 0.0), 1.0) * width for end in interval)
        parts.append(f'<path class="whisker" d="M{low:.1f} 11H{high:.1f}M{low:.1f} 8V14M{high:.1f} 8V14"/>')
    for level, kind, what in ticks:
        x = min(max(level, 0.0), 1.0) * width
        parts.append(
            f'<line class="tick {escape(kind)}" x1="{x:.1f}" x2="{x:.1f}" y1="3" y2="19">'
            f"<title>{escape(what)} {percent(level)}</title></line>"
        )
    return f'<svg class="bar" viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(parts)}</svg>'


def timeline(events: Sequence[tuple[float, str, str]], start: float, end: float) -> str:
    """Events (seconds, kind, text) along a line from `start` to `end`."""
    width, height, left, right = 1000, 54, 12, 988
    span = max(end - start, 1e-9)
    parts = [f'<line class="axis" x1="{left}" x2="{right}" y1="20" y2="20"/>']
    for seconds, kind, text in events:
        x = left + (right - left) * min(max((seconds - start) / span, 0), 1)
        parts.append(
            f'<circle class="event {escape(kind)}" cx="{x:.1f}" cy="20" r="7"><title>{escape(text)}</title></circle>'
        )
    parts.append(
        f'<text x="{left}" y="48">0 s</text><text x="{right}" y="48" text-anchor="end">{duration(end - start)}</text>'
    )
    box = f'viewBox="0 0 {width} {height}"'
    return f'<svg class="timeline" {box} role="img" aria-label="events in time">{"".join(parts)}</svg>'


def percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """4.2 s, 3 min 05 s, 7 h 12 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"


def number(value: float) -> str:
    """Short and readable: 12,300; 0.0042; 3.1e-05."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


class _Axis:
    """Maps [low, high] onto pixels [start, end]."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def place(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5)

    def ticks(self, count: int) -> list[float]:
        if self.log and self.high / self.low >= 100:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            stride = max(1, math.ceil((last - first + 1) / count))
            return [10.0**e for e in range(first, last + 1, stride)]
        step = _round_step((self.high - self.low) / count) if self.high > self.low else 1.0
        first = math.ceil(self.low / step - 1e-9)
        found = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [t for t in found if not self.log or t > 0] or [self.low]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * (1 - 1e-9)), 10 * power)


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    room = 0.05 * (high - low) or max(abs(high) * 0.05, 1e-9)
    return (0.0 if 0 <= low < 0.3 * high else low - room), high + room


def _drawable(series: Series, log: bool) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points (means of equal runs); what cannot be drawn becomes NaN."""
    ys = [y if math.isfinite(y) and (y > 0 or not log) else math.nan for y in series.ys]
    size = math.ceil(len(ys) / MOST_POINTS) or 1
    if size == 1:
        return list(series.xs), ys
    runs = range(0, len(ys), size)
    return [_mean(series.xs[i : i + size]) for i in runs], [_mean(ys[i : i + size]) for i in runs]


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _running_mean(ys: Sequence[float]) -> list[float]:
    """Centred mean over about a twentieth of the run; a NaN stays one."""
    half = max(1, len(ys) // 40)
    return [_mean(ys[max(0, i - half) : i + half + 1]) if math.isfinite(y) else math.nan for i, y in enumerate(ys)]


def _grid(x_axis: _Axis, y_axis: _Axis, unit: str) -> str:
    parts = []
    for value in y_axis.ticks(5):
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_axis.ticks(6):
        x = x_axis.place(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="unit" x="{LEFT + 4}" y="{TOP + 8}">{escape(unit)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    return "".join(parts)


def _path(
    xs: Sequence[float], ys: Sequence[float], x_axis: _Axis, y_axis: _Axis, colour: str, kind: str, name: str = ""
) -> str:
    commands, pen_down, alone = [], False, []
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if not math.isfinite(y):
            pen_down = False
            continue
        place = f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}"
        commands.append(f"{'L' if pen_down else 'M'}{place}")
        if not pen_down and (i + 1 == len(ys) or not math.isfinite(ys[i + 1])):
            alone.append(place.split())  # a single point draws no line
        pen_down = True
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in alone)
    title = f"<title>{escape(name)}</title>" if name else ""
    return f'<path class="{kind}" d="{"".join(commands)}" stroke="{colour}">{title}</path>{dots}'
