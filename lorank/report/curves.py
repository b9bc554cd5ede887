"""Loss curves as a picture: an SVG file for any browser or drawing program."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorank.report.charts import Series, line_chart
from lorank.report.tables import quantity

SIZE = WIDTH, HEIGHT = 960, 500
MARGIN = 40
"""Around the chart; the title is above it, the note below."""


def curves_svg(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str, flops: Mapping[str, float] | None = None
) -> str:
    """Training loss (faint) and validation loss (dots) against tokens, one colour per run; "dense" is grey.

    Args:
        runs: name -> records of metrics.jsonl.
        flops: name -> training FLOPs of the whole run; with them, losses are drawn against FLOPs.
    """
    colours = iter(f"s{k}" for k in range(8))
    series = []
    for name, records in runs.items():
        cost = 1.0 if flops is None else flops[name] / records[-1]["tokens"]
        train, valid = (
            [(cost * r["tokens"], r[loss]) for r in records if loss in r]
            for loss in ("loss_nats_per_token", "eval_loss_nats_per_token")
        )
        points = valid or train
        style = "g0" if name == "dense" else next(colours)
        series.append(Series(f"{name} {points[-1][1]:.3f}", style, points, faint=train if valid else ()))
    about: dict[str, Any] = {
        "x_title": "training FLOPs" if flops else "tokens",
        "y_title": "loss, nats per token",
        "what": title,
    }
    chart = line_chart(series, size=SIZE, x_format=quantity, y_format="{:.3f}".format, **about)
    return framed(chart, title=title, note="Lines with dots: validation. Faint lines: training.")


def framed(chart: str, *, title: str, note: str) -> str:
    """A chart of `SIZE` as a whole file, between a title and a note."""
    width, height = WIDTH + 2 * MARGIN, HEIGHT + 3 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<style>\n{_style()}\n</style>\n"
        f'<rect class="paper" width="{width}" height="{height}"/>\n'
        f'<text class="heading" x="{MARGIN}" y="{MARGIN}">{html.escape(title)}</text>\n'
        f'<svg x="{MARGIN}" y="{1.6 * MARGIN:g}" width="{WIDTH}" height="{HEIGHT}"'
        f"{chart.removeprefix('<svg')}\n"
        f'<text x="{MARGIN}" y="{height - MARGIN / 2:g}">{html.escape(note)}</text>\n'
        "</svg>\n"
    )


def _style() -> str:
    """The rules for charts in page.css by day and, where the reader's screen is dark, by night. Every variable is replaced, since few
    drawing programs know them; these also leave out what is for dark screens."""
    css = Path(__file__).with_name("page.css").read_text()
    day, night = (
        dict(re.findall(r"(--\w+): (#\w+)", part)) for part in css.partition("* {")[0].split("@media", maxsplit=1)
    )
    return f"{_rules(css, day)}\n@media (prefers-color-scheme: dark) {{\n{_rules(css, night)}\n}}"


def _rules(css: str, colours: Mapping[str, str]) -> str:
    rules = re.sub(r"--c: var\((--\w+)\)", lambda found: f"color: {colours[found[1]]}", css)
    rules = rules.replace("var(--c)", "currentColor")
    rules = "\n".join(line for line in rules.splitlines() if re.match(r"svg [^c]|\.[sg]\d", line))
    rules = re.sub(r"var\((--\w+)\)", lambda found: colours[found[1]], rules)
    heading = f"svg text.heading {{ font-size: 17px; font-weight: 650; fill: {colours['--ink']}; }}"
    paper = f"svg .paper {{ fill: {colours['--panel']}; }}"
    return f'{rules}\nsvg {{ font-family: system-ui, "DejaVu Sans", sans-serif; }}\n{heading}\n{paper}'
