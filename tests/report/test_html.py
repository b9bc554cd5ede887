"""The report is whole, honest and needs nothing but itself; its charts put things where they belong."""

import copy
import itertools
import json
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from lorank.report import figures
from lorank.report.charts import Axis, Series, line_chart, scatter_chart, spread
from lorank.report.comparison import comparison_table
from lorank.report.html import styles, verdict, write_report

NASTY = '</pre><script src="http://evil.example/x.js">alert(1)</script><img src=//evil.example> & "quotes"'


def row(name: str, kind: str, loss: float, *, seeds: int = 3, flops: float = 1e12) -> dict[str, Any]:
    """A contestant as results.json has it."""
    steps = list(range(1, 41))
    curve = {
        "step": steps,
        "tokens": [1000 * s for s in steps],
        "flops": [flops * s / 40 for s in steps],
        "seconds": [0.5 * s for s in steps],
        "loss": [loss + 3 * math.exp(-s / 8) for s in steps],
    }
    run = {"status": "finished", "loss": loss, "curve": curve, "training": curve, "folder": f"runs/{name}"}
    half = 0.02 if seeds > 1 else None
    return {
        "name": name,
        "method": name,
        "kind": kind,
        "chosen": "as it is",
        "like": "training FLOPs per token of cola" if kind == "control" else "",
        "settings": {"lr": 3e-3},
        "lr": 3e-3,
        "rate": "the best of its sweep",
        "edge": ["lr"] if name == "cola" else [],
        "tried": [
            {"settings": {"lr": lr}, "status": "finished", "loss": loss + gap}
            for lr, gap in ((1e-3, 0.2), (3e-3, 0.0), (9e-3, 0.4))
        ],
        "runs": [{**run, "seed": seed} for seed in range(seeds)],
        "loss": {"mean": loss, "low": half and loss - half, "high": half and loss + half, "number": seeds},
        "perplexity": {
            "mean": math.exp(loss),
            "low": half and math.exp(loss - half),
            "high": half and math.exp(loss + half),
        },
        "difference": {"mean": 0.1, "low": half and 0.05, "high": half and 0.15, "number": seeds},
        "training_flops": flops,
        "flops_per_token": flops / 4e4,
        "tokens": 4e4,
        "seconds": 20.0,
        "parameters": 1e6,
        "tokens_per_second": 2000.0,
        "peak_memory_gib": 0.3 + loss / 100,
        "sample": NASTY,
        "spectra": {"q_proj": {"effective_rank": 0.3, "spectrum": [1 / (k + 1) for k in range(60)]}},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    rows = [
        row("cola", "method", 4.2, flops=6e11),
        row("<b>low</b>", "method", 4.4, flops=6e11),
        row("dense", "dense", 4.1),
        row("dense-muon", "dense", 4.0),
        row("dense-small", "control", 4.15, flops=6e11),
    ]
    for one in rows:
        one["difference"]["mean"] = one["loss"]["mean"] - 4.1
    rows[2]["difference"] = None
    return {
        "format": 1,
        "lorank": "0.1.0",
        "settings": {"base": {"model": None, "size": "tiny", "steps": 40, "batch_size": 8, "sequence_length": 256}},
        "corpus": f"text: {NASTY}",
        "seeds": [0, 1, 2],
        "baseline": "dense",
        "match": {"by": "tokens", "ratios": {one["name"]: 1.0 for one in rows}},
        "contestants": rows,
        "environment": {"device": "x86_64", "url": "see https://example.org"},
        "notes": [f"dense failed: {NASTY}."],
    }


def test_nothing_is_asked_of_the_network_and_no_text_becomes_markup(results: dict[str, Any]) -> None:
    page = write_report(results)
    tags = re.findall(r"<[a-zA-Z!/][^>]*>", page)
    for tag in tags:
        assert not re.match(r"<(link|img|iframe|object|embed|base|audio|video|source)\b", tag), tag
        assert not re.search(r"\s(src|href|srcset|xlink:href|action)\s*=", tag), tag
    assert [tag for tag in tags if tag.startswith("<script")] == ["<script>"]
    css = re.search(r"<style>(.*?)</style>", page, re.S)
    assert css and not re.search(r"url\(|@import|@font-face", css[1])
    script = page.rpartition("<script>")[2]
    assert not re.search(r"fetch|XMLHttp|import\(|innerHTML|https?:", script)
    assert "evil.example" in page and "<img" not in page and "<b>low</b>" not in page


def test_the_page_suits_a_telephone_and_the_night(results: dict[str, Any]) -> None:
    page = write_report(results)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "max-width: 720px" in page
    assert page.count('class="wide"') == page.count('class="narrow"') >= 7
    css = page.partition("<style>")[2].partition("</style>")[0]
    light, dark = css.split("prefers-color-scheme: dark")
    assert set(re.findall(r"--\w+(?=:)", light)) == set(re.findall(r"--\w+(?=:)", dark.partition("* {")[0]))


def test_every_chart_is_well_formed_and_knows_its_points(results: dict[str, Any]) -> None:
    charts = re.findall(r"<svg.*?</svg>", write_report(results), re.S)
    assert len(charts) == 2 * (3 + 2 + 1 + 1)
    for chart in charts:
        tree = ElementTree.fromstring(chart)
        assert tree.get("aria-label") and tree.get("role") == "img"
        series = json.loads(tree.get("data-points") or "")
        width, height = map(float, (tree.get("viewBox") or "").split()[2:])
        assert series and all(0 <= x <= width for _, _, points in series for x, *_ in points)
        assert all(y <= height for _, _, points in series for _, y, *_ in points)


def test_the_verdict_is_careful(results: dict[str, Any]) -> None:
    rows = results["contestants"]
    said = verdict(results, rows)
    assert "10.5 % above dense (60.34)" in said and "60 % of its training FLOPs" in said
    assert "Over 3 seeds the difference in loss is +0.100 nats" in said and "more than chance" in said
    assert "dense-muon reaches 54.60" in said and "cola has yet to beat that" in said
    rows[0]["difference"]["low"] = -0.01
    assert "cannot be told from chance" in verdict(results, rows)
    rows[0]["difference"].update(low=None, high=None)
    assert "seeds" not in verdict(results, rows)
    rows[4]["difference"]["mean"] = 0.2
    assert "has yet to beat" not in verdict(results, rows)
    assert verdict(results, rows[2:]) == "No run of a method has finished."
    assert verdict(results, []) == "No run has finished."


def test_what_failed_or_is_not_there_yet_has_its_row(results: dict[str, Any]) -> None:
    for one, status in zip(results["contestants"][1:3], ("failed", "not started"), strict=True):
        one.update(loss=None, perplexity=None, settings=None, difference=None, edge=[])
        one["tried"] = [{"settings": {"lr": 3e-3}, "status": status, "loss": None}]
        one["runs"] = [{"seed": 0, "folder": "runs/x", "status": status}]
    page = write_report(results)
    assert "failed: see the notes above" in page and ">not finished<" in page
    assert len(comparison_table(results).columns[0]._cells) == 5
    nothing = copy.deepcopy(results)
    for one in nothing["contestants"]:
        one.update(results["contestants"][2] | {"name": one["name"], "kind": one["kind"]})
    assert "No run has finished." in write_report(nothing)


def test_what_was_matched_is_shown_with_how_well(results: dict[str, Any]) -> None:
    results["match"] = {"by": "flops", "ratios": {"cola": 1.0, "dense": 0.9987}}
    page = write_report(results)
    assert "training FLOPs, ratio" in page and '<td data-title="training FLOPs, ratio">0.9987</td>' in page
    assert "best of 3, edge" in page


def test_control_characters_are_seen_and_do_nothing(results: dict[str, Any]) -> None:
    results["contestants"][0]["sample"] = "a\x00b\x1b[31m\x7f\x9b\rtab\there\nnext"
    page = write_report(results)
    assert "a␀b␛[31m␡\\x9b␍tab\there\nnext" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_on_a_telephone_every_cell_of_the_results_says_what_it_is(results: dict[str, Any]) -> None:
    found = re.search(r'<table class="stacks">(.*?)</table>', write_report(results), re.S)
    assert found is not None
    head, _, body = found[1].partition("<tbody>")
    titles = re.findall(r'<th scope="col">(.*?)</th>', head)
    for line in re.findall(r"<tr>(.*?)</tr>", body):
        assert re.findall(r'<td data-title="(.*?)"', line) == titles[1:] and line.count("<td") == len(titles) - 1


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
def test_names_of_curves_that_end_together_do_not_cover_each_other(width: int) -> None:
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


def test_the_terminal_has_80_columns(results: dict[str, Any]) -> None:
    from io import StringIO

    from rich.console import Console

    results["match"]["by"] = "flops"
    shown = Console(file=StringIO(), width=80)
    shown.print(comparison_table(results))
    said = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said and "Δ nats" in said and all(len(line) <= 80 for line in said.splitlines())
    assert "lr 0.003" in " ".join(said.split())


def test_dense_rows_are_grey_and_methods_coloured(results: dict[str, Any]) -> None:
    found = styles(results["contestants"])
    assert found == {"cola": "s0", "<b>low</b>": "s1", "dense": "g0", "dense-muon": "g1", "dense-small": "g2"}


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


def test_what_was_tried_may_be_words_or_both() -> None:
    """Of which there is a table and no chart."""
    for values in (["adamw", "muon"], ["auto", 3], [True, False]):
        tried = [{"settings": {"kind": value}, "loss": 3.0 - i} for i, value in enumerate(values)]
        page = figures.tuning([{"name": "cola", "tried": tried}], {"cola": "s0"})
        assert "<svg" not in page and all(f"kind {value}" in page for value in values) and "2.0000" in page
