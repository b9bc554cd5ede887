"""Charts as inline SVG: curves, points and small multiples, with names at the lines and values under the pointer.

Colours are classes (s0, s1, ...) that the page's style sheet resolves for light and dark. Each chart carries its points
in `data-points`, from which the page's script fills the tooltip; without a script the chart is complete but silent.
"""

import html
import itertools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

Format = Callable[[float], str]
LATE = 0.06
"""Part of a run, at its beginning, whose steep losses do not decide how high a chart reaches."""
LEAST_SPAN = 0.3
"""Of a cost axis, as a part of its largest value, so that almost equal costs do not look far apart."""


class Series(NamedTuple):
    """A named line or point."""

    name: str
    style: str
    """Classes: colour, and dash."""
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high), drawn behind."""
    faint: Sequence[tuple[float, float]] = ()
    """A second line, thin and behind: training loss."""
    mark: int | None = None
    """Of the points, the one to ring."""


class Axis(NamedTuple):
    """A scale from numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers inside the axis, about `count` of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                found = [m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high * 1.0001]
                if len(found) >= 3:
                    return found if len(found) <= count + 3 else found[:: math.ceil(len(found) / count)]
        rough = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(rough))
        step = min((m * size for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / rough)))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def whole_number(x: float) -> str:
    """A format for an axis of blocks, rounds or tasks: between two of them a tick has no number."""
    return f"{x:.0f}" if abs(x - round(x)) < 1e-6 else ""


def line_chart(
    series: Sequence[Series],
    *,
    size: tuple[int, int],
    x_title: str,
    y_title: str,
    x_format: Format,
    y_format: Format,
    log_x: bool = False,
    label_lines: bool = True,
    dots: bool = True,
    y_range: tuple[float, float] | None = None,
    late: float = LATE,
    what: str = "",
) -> str:
    """Curves over a common x, each with its name at its end. What is left of the share `late` of x may be cut off at the top."""
    width, height = size
    room = (max((len(one.name) for one in series), default=0) * 7.8 + 16) if label_lines else 14
    ends = [x for one in series for x, _ in one.points]
    if not ends:
        return ""
    begin = -math.inf if log_x else late * max(ends)
    ys = [y for one in series for x, y in one.points if x >= begin]
    ys += [y for one in series for x, *edge in one.band if x >= begin for y in edge]
    lowest = min(ys + [y for one in series for x, y in one.faint if x >= begin])
    low, high = y_range or _padded(lowest, max(ys), 0.06)
    x_low, x_high = _log_padded(min(ends), max(ends)) if log_x else (0.0, max(ends) or 1.0)
    across = Axis(x_low, x_high, 46, width - room, log_x)
    up = Axis(low, high, height - 40, 22)
    parts = _frame(across, up, size, x_title, y_title, x_format)
    clip = f"c{zlib.crc32(repr((x_title, size, what)).encode())}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{across.start}" y="{up.end - 6:g}" width="{across.end - across.start + 5:g}" '
        f'height="{up.start - up.end + 6:g}"/></clipPath><g clip-path="url(#{clip})">'
    )
    for one in series:
        if one.band:
            around = [(x, edge) for x, _, edge in one.band] + [(x, edge) for x, edge, _ in reversed(one.band)]
            parts.append(f'<path class="band {one.style}" d="{_path(around, across, up)}Z"/>')
    parts += [f'<path class="faint {one.style}" d="{_path(one.faint, across, up)}"/>' for one in series if one.faint]
    for one in series:
        parts.append(f'<path class="line {one.style}" d="{_path(one.points, across, up)}"/>')
        if dots and len(one.points) <= 30:
            parts += [_dot(across(x), up(y), one.style, 2.6) for x, y in one.points]
        if one.mark is not None:
            x, y = one.points[one.mark]
            parts.append(f'<circle class="ring {one.style}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="6.5"/>')
    parts.append("</g>")
    if label_lines:
        tails = [(across(one.points[-1][0]), up(one.points[-1][1]), one) for one in series if one.points]
        early = [tail for tail in tails if tail[0] < across.end - 40]  # labelled where they end
        late_ones = [tail for tail in tails if tail not in early]
        parts += _labels(late_ones, across.end + 8, (up.end, up.start))
        lines = [spot for one in series for spot in _along([(across(x), up(y)) for x, y in one.points])]
        lines += [(across.end + 10 + 8 * k, y) for _, y, one in late_ones for k in range(len(one.name))]
        parts += _point_labels(early, (across.start, width - 14), (up.end - 14, up.start), lines)
    points = [
        [one.name, one.style, [[round(across(x), 1), round(up(y), 1), x_format(x), y_format(y)] for x, y in one.points]]
        for one in series
    ]
    return _svg(parts, size, points, "x", f"{y_title} against {x_title}, {what}")


def scatter_chart(
    series: Sequence[Series],
    *,
    size: tuple[int, int],
    x_title: str,
    y_title: str,
    x_format: Format,
    y_format: Format,
    what: str = "",
) -> str:
    """One point per series, its interval, its name, and the Pareto front: points that no other beats in both directions."""
    width, height = size
    points = [(x, y) for one in series for x, y in one.points]
    if not points:
        return ""
    lows = [low for one in series for _, low, _ in one.band] + [y for _, y in points]
    highs = [high for one in series for _, _, high in one.band] + [y for _, y in points]
    nearest, furthest = min(x for x, _ in points), max(x for x, _ in points)
    middle, half = (nearest + furthest) / 2, max(furthest - nearest, LEAST_SPAN * furthest) / 2
    across = Axis(*_padded(middle - half, middle + half, 0.16), 46, width - 16)
    least, most = min(y for _, y in points), max(y for _, y in points)
    reach = most - least or most
    up = Axis(*_padded(max(min(lows), least - reach), min(max(highs), most + reach), 0.14), height - 40, 22)
    parts = _frame(across, up, size, x_title, y_title, x_format)
    front, strokes = pareto_front(points), []  # names should not lie on strokes
    if len(front) > 1:
        steps = [front[0]]
        for (_, y), (next_x, next_y) in itertools.pairwise(front):
            steps += [(next_x, y), (next_x, next_y)]
        parts.append(f'<path class="front" d="{_path(steps, across, up)}"/>')
        strokes += _along([(across(x), up(y)) for x, y in steps])
    tails = []
    for one in series:
        for x, low, high in one.band:
            ends = up(max(low, up.low)), up(min(high, up.high))
            parts.append(
                f'<line class="bar {one.style}" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
            strokes += _along([(across(x), end) for end in ends])
        for x, y in one.points:
            parts.append(_dot(across(x), up(y), one.style, 6))
            tails.append((across(x), up(y), one))
    parts += _point_labels(tails, (across.start, across.end), (up.end - 14, up.start), strokes)
    data = [
        [one.name, one.style, [[round(across(x), 1), round(up(y), 1), x_format(x), y_format(y)] for x, y in one.points]]
        for one in series
    ]
    return _svg(parts, size, data, "xy", f"{y_title} against {x_title}, {what}")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats or equals in both coordinates, from left to right.

    >>> pareto_front([(1, 5), (2, 3), (3, 4), (4, 1)])
    [(1, 5), (2, 3), (4, 1)]
    """
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _log_padded(low: float, high: float) -> tuple[float, float]:
    room = (high / low) ** 0.06 if high > low else 1.5
    return low / room, high * room


def _path(points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    return "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points) if points else ""


def _dot(x: float, y: float, style: str, radius: float) -> str:
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _frame(across: Axis, up: Axis, size: tuple[int, int], x_title: str, y_title: str, x_format: Format) -> list[str]:
    """Grid lines, ticks and the titles of both axes."""
    parts = []
    for y in up.ticks(max(3, round(abs(up.end - up.start) / 60))):
        parts.append(f'<line class="grid" x1="{across.start}" x2="{across.end:g}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(_text(across.start - 8, up(y) + 4, f"{y:g}", "tick right"))
    for x in across.ticks(max(3, round((across.end - across.start) / 90))):
        parts.append(
            f'<line class="mark" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{up.start}" y2="{up.start + 4}"/>'
        )
        parts.append(_text(across(x), up.start + 18, x_format(x), "tick middle"))
    parts.append(f'<line class="base" x1="{across.start}" x2="{across.end:g}" y1="{up.start}" y2="{up.start}"/>')
    parts.append(_text(across.end, size[1] - 4, x_title, "title right"))
    parts.append(_text(2, 11, y_title, "title"))
    return parts


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near those wanted, at least `gap` apart if there is room, in the same order.

    >>> spread([10, 12, 50], 10, 0, 100)
    [6.0, 16.0, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    groups: list[list[float]] = []  # [centre, members]
    for place in order:
        groups.append([wanted[place], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (b, m), (a, n) = groups.pop(), groups.pop()
            groups.append([(a * n + b * m) / (n + m), n + m])
    found = [0.0] * len(wanted)
    places = iter(order)
    for centre, members in groups:
        first = centre - gap * (members - 1) / 2
        first = min(max(first, low), high - gap * (members - 1))
        for k in range(int(members)):
            found[next(places)] = float(round(first + gap * k))
    return found


def _labels(tails: Sequence[tuple[float, float, Series]], x: float, limits: tuple[float, float]) -> list[str]:
    parts = []
    for (end, wanted, one), y in zip(tails, spread([y for _, y, _ in tails], 15, *limits), strict=True):
        if abs(y - wanted) > 4 or x - end > 12:
            parts.append(f'<path class="leader" d="M{end + 4:.1f} {wanted:.1f}L{x - 2:.1f} {y:.1f}"/>')
        parts.append(_text(x, y + 4, one.name, f"name {one.style}"))
    return parts


def _along(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points on a line, close together."""
    found = []
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        pieces = max(1, round(math.hypot(next_x - x, next_y - y) / 8))
        found += [(x + (next_x - x) * k / pieces, y + (next_y - y) * k / pieces) for k in range(pieces)]
    return found


class _Spot(NamedTuple):
    """A place for a point's name."""

    x: float
    y: float
    kind: str
    """Class of the text, which says where it begins."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    far: bool
    """So far from the point that it needs a line to it."""


def _spots(x: float, y: float, name: str) -> list[_Spot]:
    """Around the point, then further away."""
    wide, found = len(name) * 7.2, []
    for reach in (0, 18, 36, 60):
        for aside, below in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            at_x, at_y = x + aside * (10 + reach), y + 4 + below * (15 + reach)
            left = at_x - wide * (1 - aside) / 2
            kind = {1: "name", 0: "name middle", -1: "name right"}[aside]
            found.append(_Spot(at_x, at_y, kind, (left, at_y - 11, left + wide, at_y + 3), reach > 0))
    return found


def _point_labels(
    tails: Sequence[tuple[float, float, Series]],
    limits: tuple[float, float],
    heights: tuple[float, float],
    lines: Sequence[tuple[float, float]] = (),
) -> list[str]:
    """Names next to their points, as far as possible without covering each other, points or lines, and nearer to their own
    point than to others: each takes the best place that the others leave, in a few rounds."""
    placed: dict[int, _Spot] = {}

    def cost(k: int, spot: _Spot) -> float:
        left, top, right, bottom = spot.box
        apart = [math.hypot(max(left - x, 0, x - right), max(top - y, 0, y - bottom)) for x, y, _ in tails]
        covered = sum(distance < 6 for distance in apart)
        strange = sum(distance < min(apart[k], 24) for other, distance in enumerate(apart) if other != k)
        boxes = [other.box for place, other in placed.items() if place != k]
        over = sum(left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in boxes)
        crossed = sum(left - 5 < x < right + 5 and top - 4 < y < bottom + 4 for x, y in lines) / 2
        outside = left < limits[0] or right > limits[1] + 16 or top < heights[0] or bottom > heights[1]
        return 6 * over + 3 * covered + (1 if spot.far else 2) * strange + crossed + 9 * outside + apart[k] / 24

    for _ in range(4):
        for k in sorted(range(len(tails)), key=lambda k: tails[k][1]):
            x, y, one = tails[k]
            placed[k] = min(_spots(x, y, one.name), key=lambda spot: cost(k, spot))
    parts = []
    for k, spot in placed.items():
        x, y, one = tails[k]
        if spot.far:
            near_x, near_y = min(max(x, spot.box[0]), spot.box[2]), min(max(y, spot.box[1]), spot.box[3])
            parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{near_x:.1f} {near_y:.1f}"/>')
        parts.append(_text(spot.x, spot.y, one.name, f"{spot.kind} {one.style}"))
    return parts


def _svg(parts: Sequence[str], size: tuple[int, int], points: object, mode: str, label: str) -> str:
    width, height = size
    data = html.escape(json.dumps(points, separators=(",", ":")), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label, quote=True)}" '
        f'data-mode="{mode}" data-points="{data}">{"".join(parts)}<line class="hair" y1="22" y2="{height - 40}"/></svg>'
    )
