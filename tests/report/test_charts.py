"""Charts put things where they belong."""

import itertools
from typing import Any
from xml.etree import ElementTree

import pytest

from lorank.report.charts import Axis, Series, line_chart, scatter_chart, spread


def test_names_keep_off_the_lines_of_a_pareto_plot() -> None:
    """A point whose right, where names go first, is crossed by another's bar."""
    about: dict[str, Any] = {"size": (478, 320), "x_title": "x", "y_title": "y", "x_format": str, "y_format": str}
    series = [Series("dense-small", "g2", [(10.0, 5.0)]), Series("m", "s0", [(10.8, 4.0)], [(10.8, 1.0, 9.0)])]
    tree = ElementTree.fromstring(scatter_chart(series, **about))
    [name] = [one for one in tree.iter("text") if one.text == "dense-small"]
    [bar] = [one for one in tree.iter("line") if "bar" in (one.get("class") or "")]
    x, wide, at = float(name.get("x") or 0), 11 * 7.2, float(bar.get("x1") or 0)
    left = (
        x - wide
        if "right" in (name.get("class") or "")
        else x - wide / 2
        if "middle" in (name.get("class") or "")
        else x
    )
    assert not left < at < left + wide


@pytest.mark.parametrize("width", [334, 478])
def test_names_at_one_end_do_not_cover_each_other(width: int) -> None:
    about: dict[str, Any] = {"size": (width, 300), "x_title": "x", "y_title": "y", "x_format": str, "y_format": str}
    ends = {
        "cola": (9.7, 5.24),
        "dense": (16.4, 5.26),
        "dense-small": (9.7, 5.22),
        "low-rank": (12.0, 5.25),
        "dense-muon": (79, 5.16),
    }
    series = [Series(name, "s0", [(x / 2, y + 0.3), (x, y)]) for name, (x, y) in ends.items()]
    tree = ElementTree.fromstring(line_chart(series, **about))
    boxes = []
    for text in (one for one in tree.iter("text") if one.text in ends):
        x, y, wide = float(text.get("x") or 0), float(text.get("y") or 0), len(text.text or "") * 7.2
        kind = text.get("class") or ""
        left = x - (wide if "right" in kind else wide / 2 if "middle" in kind else 0)
        boxes.append((left, y - 11, left + wide, y + 3))
    assert len(boxes) == 5
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_ticks_are_round_and_inside() -> None:
    assert Axis(0, 97, 0, 100).ticks(5) == [0, 20, 40, 60, 80]
    assert Axis(3.87, 4.31, 0, 100).ticks(4) == pytest.approx([3.9, 4.0, 4.1, 4.2, 4.3])
    assert Axis(8e-4, 1.2e-2, 0, 100, log=True).ticks(5) == pytest.approx([1e-3, 3e-3, 1e-2])
    assert Axis(1, 100, 0, 200, log=True)(10) == pytest.approx(100)
    assert all(2.8999e-3 <= tick <= 3.1001e-3 for tick in Axis(2.9e-3, 3.1e-3, 0, 100, log=True).ticks(5))


def test_labels_keep_apart_and_stay_inside() -> None:
    found = spread([10, 11, 12, 90], 15, 0, 100)
    assert found == sorted(found) and all(b - a >= 15 for a, b in itertools.pairwise(found))
    assert found[0] >= 0 and found[-1] <= 100
    assert spread([50], 15, 0, 100) == [50] and spread([], 15, 0, 100) == []


def test_single_points_and_nothing_at_all_still_draw() -> None:
    about: dict[str, Any] = {"size": (400, 300), "x_title": "x", "y_title": "y", "x_format": str, "y_format": str}
    assert line_chart([], **about) == "" and scatter_chart([], **about) == ""
    for draw in (line_chart, scatter_chart):
        ElementTree.fromstring(draw([Series("one", "s0", [(5.0, 2.0)])], **about))
    ElementTree.fromstring(line_chart([Series("one", "s0", [(0.1, 2.0)])], log_x=True, **about))
    ElementTree.fromstring(line_chart([Series("one", "s0", [(0.0, 2.0), (0.0, 1.0)])], **about))
