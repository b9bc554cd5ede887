"""The report of a comparison is whole, honest and needs nothing but itself."""

import copy
import io
import json
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lorank.report import figures
from lorank.report.comparison import comparison_page, comparison_table, styles, verdict

NASTY = '</pre><script src="http://evil.example/x.js">alert(1)</script><img src=//evil.example> & "quotes"'


def row(name: str, kind: str, loss: float, *, seeds: int = 3, flops: float = 1e12) -> dict[str, Any]:
    """A row as results.json has it."""
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
        "format": 2,
        "lorank": "0.1.0",
        "settings": {"base": {"model": None, "size": "tiny", "steps": 40, "batch_size": 8, "sequence_length": 256}},
        "corpus": f"text: {NASTY}",
        "seeds": [0, 1, 2],
        "baseline": "dense",
        "match": {"by": "tokens", "ratios": {one["name"]: 1.0 for one in rows}},
        "rows": rows,
        "environment": {"device": "x86_64", "url": "see https://example.org"},
        "notes": [f"dense failed: {NASTY}."],
    }


def test_no_text_becomes_markup_and_nothing_is_fetched(results: dict[str, Any]) -> None:
    page = comparison_page(results)
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
    page = comparison_page(results)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "max-width: 720px" in page
    assert page.count('class="wide"') == page.count('class="narrow"') >= 7
    css = page.partition("<style>")[2].partition("</style>")[0]
    light, dark = css.split("prefers-color-scheme: dark")
    assert set(re.findall(r"--\w+(?=:)", light)) == set(re.findall(r"--\w+(?=:)", dark.partition("* {")[0]))


def test_every_chart_is_well_formed_and_knows_its_points(results: dict[str, Any]) -> None:
    charts = re.findall(r"<svg.*?</svg>", comparison_page(results), re.S)
    assert len(charts) == 2 * (3 + 2 + 1 + 1)
    for chart in charts:
        tree = ElementTree.fromstring(chart)
        assert tree.get("aria-label") and tree.get("role") == "img"
        series = json.loads(tree.get("data-points") or "")
        width, height = map(float, (tree.get("viewBox") or "").split()[2:])
        assert series and all(0 <= x <= width for _, _, points in series for x, *_ in points)
        assert all(y <= height for _, _, points in series for _, y, *_ in points)


def test_the_verdict_is_careful(results: dict[str, Any]) -> None:
    rows = results["rows"]
    said = verdict(results, rows)
    assert "10.5 % above dense (60.34)" in said and "60 % of its training FLOPs" in said
    assert "Over 3 seeds the difference in loss is +0.100 nats" in said and "more than chance" in said
    assert said.startswith(
        "<b>dense-muon</b> has the lowest validation perplexity, <b>54.60</b>, before dense with 60.34."
    )
    assert "better than cola" in said and "reaches the final loss" not in said
    rows[0]["reach"] = {"tokens": 2e4, "flops": 3e11, "seconds": 9.0}
    assert "cola reaches the final loss of dense with 30 % of its training FLOPs." in verdict(results, rows)
    rows[0]["difference"]["low"] = -0.01
    assert "may be chance" in verdict(results, rows)
    rows[0]["difference"].update(low=None, high=None)
    assert "seeds" not in verdict(results, rows)
    rows[4]["difference"]["mean"] = 0.35
    assert "better than" not in verdict(results, rows)
    assert verdict(results, rows[2:]) == "No run of a method has finished."
    assert verdict(results, []) == "No run has finished."


def test_without_dense_rows_nothing_is_compared_with_dense(results: dict[str, Any]) -> None:
    results["rows"] = results["rows"][:2]
    assert "against dense" not in comparison_page(results)
    results.update(rows=results["rows"][:1], baseline="cola")
    assert "<h1>cola, setting by setting</h1>" in comparison_page(results)
    said = verdict(results, results["rows"])
    assert said == "<b>cola</b> reaches a validation perplexity of <b>66.69</b>, its best, with lr 0.003."


def test_what_failed_or_has_not_run_yet_has_its_row(results: dict[str, Any]) -> None:
    for one, status in zip(results["rows"][1:3], ("failed", "not started"), strict=True):
        one.update(loss=None, perplexity=None, settings=None, difference=None, edge=[])
        one["tried"] = [{"settings": {"lr": 3e-3}, "status": status, "loss": None}]
        one["runs"] = [{"seed": 0, "folder": "runs/x", "status": status}]
    page = comparison_page(results)
    assert "failed, see the notes above" in page and ">not finished<" in page
    assert len(comparison_table(results).columns[0]._cells) == 5
    nothing = copy.deepcopy(results)
    for one in nothing["rows"]:
        one.update(results["rows"][2] | {"name": one["name"], "kind": one["kind"]})
    assert "No run has finished." in comparison_page(nothing)


def test_what_was_matched_is_shown_with_how_well(results: dict[str, Any]) -> None:
    results["match"] = {"by": "flops", "ratios": {"cola": 1.0, "dense": 0.9987}}
    page = comparison_page(results)
    assert "training FLOPs, ratio" in page and '<td data-title="training FLOPs, ratio">0.9987</td>' in page
    assert "best of 3, edge" in page


def test_control_characters_are_seen_and_do_nothing(results: dict[str, Any]) -> None:
    results["rows"][0]["sample"] = "a\x00b\x1b[31m\x7f\x9b\rtab\there\nnext"
    page = comparison_page(results)
    assert "a␀b␛[31m␡\\x9b␍tab\there\nnext" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_on_a_telephone_each_cell_says_what_it_is(results: dict[str, Any]) -> None:
    found = re.search(r'<table class="stacks">(.*?)</table>', comparison_page(results), re.S)
    assert found is not None
    head, _, body = found[1].partition("<tbody>")
    titles = re.findall(r'<th scope="col">(.*?)</th>', head)
    for line in re.findall(r"<tr>(.*?)</tr>", body):
        assert re.findall(r'<td data-title="(.*?)"', line) == titles[1:] and line.count("<td") == len(titles) - 1


def test_the_terminal_has_80_columns(results: dict[str, Any]) -> None:
    results["match"]["by"] = "flops"
    shown = Console(file=io.StringIO(), width=80)
    shown.print(comparison_table(results))
    said = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said and "Δ nats" in said and all(len(line) <= 80 for line in said.splitlines())
    assert "lr 0.003" in " ".join(said.split())


def test_dense_rows_are_grey_and_methods_coloured(results: dict[str, Any]) -> None:
    found = styles(results["rows"])
    assert found == {"cola": "s0", "<b>low</b>": "s1", "dense": "g0", "dense-muon": "g1", "dense-small": "g2"}


def test_what_was_tried_may_be_words_or_both() -> None:
    """Then there is a table and no chart."""
    for values in (["adamw", "muon"], ["auto", 3], [True, False]):
        tried = [{"settings": {"kind": value}, "loss": 3.0 - i} for i, value in enumerate(values)]
        page = figures.tuning([{"name": "cola", "tried": tried}], {"cola": "s0"})
        assert "<svg" not in page and all(f"kind {value}" in page for value in values) and "2.0000" in page


def test_what_it_takes_to_reach_the_baseline_has_bars(results: dict[str, Any]) -> None:
    rows = results["rows"]
    rows[0]["reach"] = {"tokens": 2e4, "flops": 3e11, "seconds": 9.0}
    shown = figures.reach(results, rows, styles(rows))
    assert "Compute to reach the final loss of dense" in shown and "not reached" in shown
    assert re.findall(r"width:([\d.]+)%", shown) == ["50.0", "30.0", "45.0"]
