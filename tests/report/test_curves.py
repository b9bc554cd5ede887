"""The picture of loss curves: one SVG file that any program draws."""

import re
from typing import Any
from xml.etree import ElementTree

from lorank.report.curves import curves_svg

SVG = "{http://www.w3.org/2000/svg}"


def records(loss: float) -> list[dict[str, Any]]:
    train = [{"step": s, "tokens": 100 * s, "loss_nats_per_token": loss + 3 / s} for s in range(1, 20)]
    valid = [
        {"step": s, "tokens": 100 * s, "eval_loss_nats_per_token": loss + 1 / s, "eval_perplexity": 2.0}
        for s in (9, 19)
    ]
    return [*train, *valid]


def test_curves_are_a_picture_that_shows_each_run() -> None:
    text = curves_svg({"dense": records(4.0), "cola": records(3.5)}, title="Here & there")
    picture = ElementTree.fromstring(text)
    assert picture.tag == f"{SVG}svg" and float(picture.get("width") or 0) > 900
    words = [one.text for one in picture.iter(f"{SVG}text")]
    assert {"Here & there", "dense 4.053", "cola 3.553", "tokens", "loss, nats per token"} <= set(words)
    kinds = [one.get("class") for one in picture.iter() if one.get("class")]
    for style in ("g0", "s0"):  # a line, a faint one, and a dot for each evaluation
        assert [kinds.count(f"{kind} {style}") for kind in ("line", "faint", "dot")] == [1, 1, 2]


def test_the_picture_needs_nothing_that_few_programs_know() -> None:
    text = curves_svg({"dense": records(4.0), "cola": records(3.5)}, title="Title")
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style and "var(" not in style[1] and "--" not in style[1]
    day, night = style[1].split("@media (prefers-color-scheme: dark) {")  # which programs that do not know it leave out
    for rule in ("svg .line { fill: none; stroke: currentColor;", "svg .paper { fill: "):
        assert rule in day and rule in night
    assert ".s0 { color: #1a6fb0; }" in day and ".s0 { color: #6db3ec; }" in night
    assert "<script" not in text and not re.search(r"(src|href)\s*=", text)


def test_curves_of_a_run_without_evaluations() -> None:
    train = records(4.0)[:-2]
    picture = ElementTree.fromstring(curves_svg({"dense": train}, title="Title"))
    kinds = [one.get("class") for one in picture.iter() if one.get("class")]
    assert "line g0" in kinds and "faint g0" not in kinds
