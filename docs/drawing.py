"""The map of the rooms as SVG: boxes in layers, and arrows for what the sources import.

An arrow that follows from others is left out: where cli imports train and train imports sizes, cli needs no arrow to sizes.
The layout is Sugiyama's: layers so that arrows lead down, an order in each layer with few crossings, then coordinates.
"""

from collections.abc import Collection, Mapping, Sequence
from html import escape
from itertools import pairwise

import rooms

Arrow = tuple[str, str]
WIDTH, HEIGHT, LAYER, GAP, LANE = 126, 40, 80, 16, 18
"""Pixels: a box; from layer to layer; between two boxes; and between two arrows that pass a layer."""


def svg(modules: Mapping[str, rooms.Module]) -> str:
    """The map of these modules. Dashed arrows are imports by name; red ones lead up or in a circle, against the plan."""
    found = {ends for ends in rooms.arrows(modules) if {*ends} <= rooms.ROW.keys()}
    place = {room: i for i, room in enumerate(rooms.ROW)}
    circles = [{*circle} for circle in rooms.circles(found)]
    up = {(a, b) for a, b in found if rooms.ROW[b] < rooms.ROW[a]}
    up |= {(a, b) for a, b in found if place[b] < place[a] and any({a, b} <= circle for circle in circles)}
    named = {(a, b) for a, b in rooms.named(modules) if {a, b} <= rooms.ROW.keys()} - found
    down = reduced(found - up)
    boxes = {module.room for module in modules.values()} & rooms.ROW.keys()
    laid_out = down | {(a, b) for a, b in named if rooms.ROW[a] < rooms.ROW[b]}
    chains, rows = layered(boxes, laid_out)
    x = coordinates(rows, chains)
    y = {node: i * LAYER + HEIGHT / 2 for i, row in enumerate(rows) for node in row}
    left, right = min(x.values()) - WIDTH / 2 - 8, max(x.values()) + WIDTH / 2 + 8
    parts = [
        f'<svg class="map" viewBox="{left:.0f} -4 {right - left:.0f} {len(rows) * LAYER - LAYER + HEIGHT + 8:.0f}"'
    ]
    parts += ['xmlns="http://www.w3.org/2000/svg" role="img" aria-label="Which rooms of lorank import which">', MARKERS]
    for arrow in sorted(laid_out | named | up):
        kind = "up" if arrow in up else "named" if arrow in named else "down"
        nodes = chains.get(arrow, arrow)
        parts.append(
            f'<path class="{kind}" d="{curve([(x[node], y[node]) for node in nodes])}"><title>{" → ".join(arrow)}</title></path>'
        )
    parts += [box(room, x[room], y[room], [m for m in modules.values() if m.room == room]) for room in sorted(boxes)]
    return "\n".join([*parts, "</svg>"])


MARKERS = "\n".join(
    f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path class="tip {kind}" d="M0 0.8 L8 4 L0 7.2 z"/></marker>'
    for kind in ("down", "named", "up")
)


def box(room: str, x: float, y: float, modules: Sequence[rooms.Module]) -> str:
    files, lines = len(modules), sum(module.lines for module in modules)
    size = f"{lines:,} lines" if files == 1 else f"{files} files, {lines:,} lines"
    kind = "room paper" if room in rooms.PAPERS else "room"
    return (
        f'<g class="{kind}"><title>{escape(rooms.ROWS[rooms.ROW[room]][room])}</title>'
        f'<rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y - 3:.0f}">{room}</text><text class="size" x="{x:.0f}" y="{y + 13:.0f}">{size}</text></g>'
    )


def curve(points: Sequence[tuple[float, float]]) -> str:
    """From below the first box to above the last, vertical where it passes a layer."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    half = HEIGHT / 2 if y1 > y0 else -HEIGHT / 2
    text, here = f"M{x0:.1f} {y0 + half:.1f}", (x0, y0 + half)
    for x, y in points[1:]:
        bend = (here[1] + y - half) / 2
        text += f" C{here[0]:.1f} {bend:.1f} {x:.1f} {bend:.1f} {x:.1f} {y - half:.1f}"
        here = x, y + half
        if (x, y) != (x1, y1):
            text += f" V{here[1]:.1f}"
    return text


def reduced(arrows: set[Arrow]) -> set[Arrow]:
    """The arrows without those that a path of others replaces.

    >>> sorted(reduced({("a", "b"), ("b", "c"), ("a", "c")}))
    [('a', 'b'), ('b', 'c')]
    """
    kept = set(arrows)
    for arrow in sorted(arrows):
        if _leads(kept - {arrow}, *arrow):
            kept.remove(arrow)
    return kept


def _leads(arrows: set[Arrow], start: str, end: str) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        here = waiting.pop()
        new = {b for a, b in arrows if a == here} - seen
        seen |= new
        waiting += new
    return end in seen


def layered(nodes: Collection[str], arrows: set[Arrow]) -> tuple[dict[Arrow, list[str]], list[list[str]]]:
    """(each arrow as a chain of nodes from layer to layer, the layers). An arrow that passes a layer has a node there."""
    height = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for a, b in arrows:
            height[a] = max(height[a], height[b] + 1)
    layer = {node: max(height.values()) - height[node] for node in nodes}
    for _ in nodes:  # what is used more than it uses goes up to its users
        for node in sorted(nodes):
            above = [layer[a] for a, b in arrows if b == node]
            if len(above) > sum(a == node for a, _ in arrows):
                layer[node] = max(above) + 1
    chains = {(a, b): [a, *(f"{a}>{b}@{i}" for i in range(layer[a] + 1, layer[b])), b] for a, b in sorted(arrows)}
    rows: list[list[str]] = [[] for _ in range(max(layer.values()) + 1)]
    for node in sorted(nodes, key=[*rooms.ROW].index):
        rows[layer[node]].append(node)
    for (a, _), chain in chains.items():
        for i, point in enumerate(chain[1:-1], layer[a] + 1):
            rows[i].append(point)
    return chains, in_order(rows, {pair for chain in chains.values() for pair in pairwise(chain)})


def in_order(rows: list[list[str]], links: set[Arrow]) -> list[list[str]]:
    """Each layer sorted by the mean place of its neighbours above or below, until no sweep leaves fewer crossings."""
    best, fewest = rows, crossings(rows, links)
    for sweep in range(60):
        downwards = sweep % 2 == 0
        rows = [*rows]
        for i in range(1, len(rows)) if downwards else range(len(rows) - 2, -1, -1):
            fixed = rows[i - 1 if downwards else i + 1]
            place = {node: (k + 0.5) / len(fixed) for k, node in enumerate(fixed)}
            keys = {}
            for k, node in enumerate(rows[i]):
                near = [place[a if b == node else b] for a, b in links if node in (a, b) and {a, b} & place.keys()]
                keys[node] = sum(near) / len(near) if near else (k + 0.5) / len(rows[i])
            rows[i] = sorted(rows[i], key=keys.__getitem__)
        if (now := crossings(rows, links)) < fewest:
            best, fewest = rows, now
    return best


def crossings(rows: Sequence[Sequence[str]], links: set[Arrow]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        above, below = ({node: k for k, node in enumerate(row)} for row in (upper, lower))
        ends = [(above[a], below[b]) for a, b in links if a in above and b in below]
        total += sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(ends) for c, d in ends[:i])
    return total


def coordinates(rows: Sequence[Sequence[str]], chains: Mapping[Arrow, Sequence[str]]) -> dict[str, float]:
    """The middle of each node: near the mean of its neighbours, in the order of its layer and clear of the next."""
    near: dict[str, list[str]] = {node: [] for row in rows for node in row}
    for chain in chains.values():
        for a, b in pairwise(chain):
            near[a].append(b)
            near[b].append(a)
            if ">" in a and ">" in b:  # keeps long arrows straight
                near[a] += [b] * 5
                near[b] += [a] * 5
    x = dict.fromkeys(near, 0.0)
    for _ in range(200):
        for row in rows:
            mean = {node: sum(x[other] for other in near[node]) / len(near[node]) for node in row if near[node]}
            x.update(apart(row, {node: mean.get(node, x[node]) for node in row}))
    return x


def apart(row: Sequence[str], wanted: Mapping[str, float]) -> dict[str, float]:
    """The places nearest to those wanted, in least squares, that keep the order and the distances (pooled neighbours)."""
    offset, offsets = 0.0, {}
    for before, node in zip(["", *row], row, strict=False):
        if before:
            widths = [LANE if ">" in one else WIDTH + GAP for one in (before, node)]
            offset += sum(widths) / 2
        offsets[node] = offset
    pools: list[tuple[float, int]] = []
    for node in row:
        mean, count = wanted[node] - offsets[node], 1
        while pools and pools[-1][0] > mean:
            other, many = pools.pop()
            mean, count = (mean * count + other * many) / (count + many), count + many
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return {node: mean + offsets[node] for node, mean in zip(row, means, strict=True)}
