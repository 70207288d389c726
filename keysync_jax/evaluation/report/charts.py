"""Charts as inline SVG: no library, no script, the same bytes for the same numbers.

Colours come from the page's style (`.c0` to `.c7`); lines differ by dashes and points by shapes as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4")
SHAPES = 6
COLOURS = 8

WIDTH, HEIGHT = 560, 300
LETTER, LINE_HEIGHT = 7.3, 13.5
"""Pixels of a letter and of a line of the names in a plane, about."""

LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 42


@dataclass(frozen=True)
class Line:
    """A line of a chart; a y that is None leaves a gap. `kind` chooses colour and dashes."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    kind: int


@dataclass(frozen=True)
class Point:
    """A point of a plane with its intervals (low, high), where it has any."""

    name: str
    x: float
    y: float
    x_range: tuple[float, float] | None
    y_range: tuple[float, float] | None
    kind: int


class _Frame:
    """Axes: from numbers to pixels."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], width: int = WIDTH, height: int = HEIGHT
    ) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height

    def at_x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def drawn(self, x_title: str, y_title: str) -> list[str]:
        """Grid, ticks and titles."""
        parts = ['<g class="axes">']
        bottom, top = self.height - BOTTOM, TOP
        for tick in ticks(*self.x, count=max(3, self.width // 90)):
            at = _n(self.at_x(tick))
            parts.append(f'<line x1="{at}" y1="{top}" x2="{at}" y2="{bottom}"/>')
            parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{_tick(tick)}</text>')
        for tick in ticks(*self.y, count=max(3, self.height // 50)):
            at = _n(self.at_y(tick))
            parts.append(f'<line x1="{LEFT}" y1="{at}" x2="{self.width - RIGHT}" y2="{at}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">{_tick(tick)}</text>')
        middle = _n((LEFT + self.width - RIGHT) / 2)
        place = f'x="{middle}" y="{self.height - 6}"'
        parts.append(f'<text class="title" {place} text-anchor="middle">{escape(x_title)}</text>')
        half = _n((top + bottom) / 2)
        parts.append(
            f'<text class="title" transform="translate(13 {half}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_title)}</text></g>"
        )
        return parts

    def svg(self, parts: Sequence[str], label: str) -> str:
        head = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">'
        return "\n".join([head, *parts, "</svg>"])


def lines(
    drawn: Sequence[Line],
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """A chart of lines."""
    xs = [x for line in drawn for x in line.x]
    ys = [y for line in drawn for y in line.y if y is not None]
    frame = _Frame((min(xs), max(xs)), y_range or _widened(0.0, max(ys, default=1.0)), width, height)
    parts = frame.drawn(x_title, y_title)
    for line in drawn:
        dash = DASHES[line.kind % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        path = _path(frame, line)
        parts.append(
            f'<path class="line c{line.kind % COLOURS}" d="{path}"{style}>'
            f"<title>{escape(line.name)}</title></path>"
        )
    return frame.svg(parts, f"{y_title} against {x_title}")


def _path(frame: _Frame, line: Line) -> str:
    words, pen = [], "M"
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pen = "M"
            continue
        words.append(f"{pen}{_n(frame.at_x(x))} {_n(frame.at_y(y))}")
        pen = "L"
    return "".join(words)


def plane(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Points with crosses of their intervals, each with its name."""
    xs = [value for p in points for value in (p.x, *(p.x_range or ()))]
    ys = [value for p in points for value in (p.y, *(p.y_range or ()))]
    frame = _Frame(_widened(min(0.0, *xs), max(xs)), _widened(min(0.0, *ys), max(ys)), 640, 420)
    parts = frame.drawn(x_title, y_title)
    # Names keep clear of each other and of all points: (left, right, height) of what is there.
    places = [(frame.at_x(p.x), frame.at_y(p.y)) for p in points]
    taken = [(x - 7, x + 7, y) for x, y in places]
    for point in points:
        x, y = frame.at_x(point.x), frame.at_y(point.y)
        parts.append(f'<g class="point c{point.kind % COLOURS}"><title>{escape(point.name)}</title>')
        if point.x_range:
            low, high = (_n(frame.at_x(v)) for v in point.x_range)
            parts.append(f'<line x1="{low}" y1="{_n(y)}" x2="{high}" y2="{_n(y)}"/>')
        if point.y_range:
            low, high = (_n(frame.at_y(v)) for v in point.y_range)
            parts.append(f'<line x1="{_n(x)}" y1="{low}" x2="{_n(x)}" y2="{high}"/>')
        parts.append(marker(x, y, point.kind))
        left, height = _free_place(taken, x, y, point.name, frame.width)
        place = f'x="{_n(left)}" y="{_n(height)}" dy=".32em"'
        parts.append(f"<text {place}>{escape(point.name)}</text></g>")
    return frame.svg(parts, f"{y_title} against {x_title}")


def _free_place(
    taken: list[tuple[float, float, float]], x: float, y: float, name: str, width: int
) -> tuple[float, float]:
    """Left end and height of a name beside its point, where nothing is; that place is taken then."""
    reach = LETTER * len(name)
    sides = [left for left in (x + 10, x - 10 - reach) if left > LEFT and left + reach < width]
    heights = [y + step * LINE_HEIGHT for step in (0, -1, 1, -2, 2, -3, 3)]
    free = (
        (left, height)
        for height in heights
        for left in sides or [x + 10]
        if not any(
            abs(height - other) < LINE_HEIGHT and left < end and start < left + reach
            for start, end, other in taken
        )
    )
    left, height = next(free, (x + 10, y))
    taken.append((left, left + reach, height))
    return left, height


def marker(x: float, y: float, kind: int) -> str:
    """A shape about a place; six of them."""
    shape = kind % SHAPES
    if shape == 0:
        return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="5"/>'
    star = [(6 * math.sin(k * math.pi / 2.5), -6 * math.cos(k * math.pi / 2.5)) for k in range(5)]
    shapes: dict[int, list[tuple[float, float]]] = {
        1: [(-5, -5), (5, -5), (5, 5), (-5, 5)],
        2: [(0, -6.5), (6, 4.5), (-6, 4.5)],
        3: [(0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)],
        4: [(0, 6.5), (6, -4.5), (-6, -4.5)],
        5: star,
    }
    places = " ".join(f"{_n(x + a)},{_n(y + b)}" for a, b in shapes[shape])
    return f'<polygon points="{places}"/>'


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Names with a piece of their line."""
    items = []
    for name, kind in names:
        dash = DASHES[kind % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        piece = f'<path class="line c{kind % COLOURS}" d="M1 5L33 5"{style}/>'
        items.append(f'<li><svg viewBox="0 0 34 10" class="key">{piece}</svg>{escape(name)}</li>')
    return '<ul class="legend">' + "".join(items) + "</ul>"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * ((high - low) or 1.0)
    return (low if low == 0 else low - margin, high + margin)


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "−") if abs(value) > 1e-9 else "0"


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
