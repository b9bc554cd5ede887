"""The charts of a comparison: loss curves, perplexity against cost, how the rows were tuned, what the weights learned."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorank.report.charts import Format, Series, line_chart, scatter_chart
from lorank.report.markup import bar_cell, cell, duration, is_number, name_cell, percent, section, table
from lorank.report.tables import quantity

Row = Mapping[str, Any]
Size = tuple[int, int]
WIDE, HALF, PHONE = (1018, 400), (478, 320), (334, 300)
PANEL, SMALL_PANEL = (246, 190), (164, 150)
"""Pixels of a chart, as wide as the page leaves them at desktop and at telephone width."""


def figure(
    draw: Callable[..., str],
    series: Sequence[Series],
    sizes: tuple[Size, Size],
    titles: tuple[str, str],
    formats: tuple[Format, Format],
    **options: Any,
) -> str:
    """A chart twice, for a desktop and for a telephone, so that its text is as large on both."""
    about = {"x_title": titles[0], "y_title": titles[1], "x_format": formats[0], "y_format": formats[1], **options}
    wide, narrow = (
        draw(series, size=size, what=kind, **about) for size, kind in zip(sizes, ("wide", "narrow"), strict=True)
    )
    kind = ' class="plain"' if sizes[0] == PANEL else ""
    return f'<figure{kind}><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'


def curves(results: Mapping[str, Any], rows: Sequence[Row], style: Mapping[str, str]) -> str:
    """Loss against tokens, FLOPs and time."""
    if not rows:
        return ""
    charts = []
    for key, title, show, size in (
        ("tokens", "tokens", quantity, WIDE),
        ("flops", "training FLOPs", quantity, HALF),
        ("seconds", "time of training", duration, HALF),
    ):
        timed = [row for row in rows if key != "seconds" or row["seconds"] is not None]
        series = [_averaged(row, key, style[row["name"]]) for row in timed]
        titles = (title, "loss, nats per token")
        charts += [figure(line_chart, series, (size, PHONE), titles, (show, "{:.3f}".format))] if series else []
    band = " Bands reach from the lowest to the highest seed." if len(results["seeds"]) > 1 else ""
    return section(
        "Loss against tokens, compute and time",
        f"Lines with dots: validation. Faint lines: training, first seed.{band}",
        charts[0],
        f'<div class="two">{"".join(charts[1:])}</div>',
    )


def _averaged(row: Row, key: str, style: str) -> Series:
    """A row's curve: the mean over its seeds, at the steps that all of them have."""
    done = [run for run in row["runs"] if run["status"] == "finished"]
    found = [
        dict(zip(run["curve"]["step"], zip(run["curve"][key], run["curve"]["loss"], strict=True), strict=True))
        for run in done
    ]
    points, band = [], []
    for step in found[0]:
        here = [curve[step] for curve in found if step in curve]
        if len(here) == len(found):
            x, losses = statistics.fmean(x for x, _ in here), [loss for _, loss in here]
            points.append((x, statistics.fmean(losses)))
            band.append((x, min(losses), max(losses)))
    training = done[0]["training"]
    faint = list(zip(training[key], training["loss"], strict=True))
    return Series(row["name"], style, points, band if len(done) > 1 else (), faint)


def reach(results: Mapping[str, Any], rows: Sequence[Row], style: Mapping[str, str]) -> str:
    """Tokens, FLOPs and time until a row has the baseline's final loss, as a table whose cells have bars."""
    base = next((row for row in rows if row["name"] == results["baseline"]), None)
    if base is None or len(rows) < 2:
        return ""
    whole = {"tokens": base["tokens"], "flops": base["training_flops"], "seconds": base["seconds"]}
    shows: dict[str, Callable[[float], str]] = {"tokens": quantity, "flops": quantity, "seconds": duration}
    lines = []
    for row in sorted(rows, key=lambda row: row["reach"]["flops"] if row.get("reach") else math.inf):
        cells = []
        for name, show in shows.items():
            if not row.get("reach"):
                cells.append(cell("not reached" if name == "tokens" else "", kind="none"))
            elif not whole[name] or not row["reach"][name]:  # not timed
                cells.append(cell("—"))
            else:
                share = row["reach"][name] / whole[name]
                cells.append(bar_cell(share, f"{share:.2f}", show(row["reach"][name]), style[row["name"]]))
        lines.append(name_cell(row["name"], style[row["name"]]) + "".join(cells))
    return section(
        f"Compute to reach the final loss of {base['name']}",
        f"As a share of what {base['name']} used. The learning rate has not fallen yet where a curve crosses the loss, so a run "
        "that was planned to end there would need less. All losses here are of evaluations in training.",
        table(["", "tokens", "training FLOPs", "time"], lines, stacks=True),
    )


def pareto(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    """Perplexity against compute and against memory."""
    if not rows:
        return ""
    figures, large = [], max(row["peak_memory_gib"] for row in rows) >= 2
    for key, title, show, times in (
        ("training_flops", "training FLOPs", quantity, 1),
        ("peak_memory_gib", "peak memory, GiB", "{:.3g}".format, 1)
        if large
        else ("peak_memory_gib", "peak memory, MiB", "{:.4g}".format, 1024),
    ):
        series = []
        for row in rows:
            ppl, x = row["perplexity"], row[key] * times
            band = [(x, ppl["low"], ppl["high"])] if ppl["low"] is not None else []
            series.append(Series(row["name"], style[row["name"]], [(x, ppl["mean"])], band))
        titles = (title, "validation perplexity")
        figures.append(figure(scatter_chart, series, (HALF, PHONE), titles, (show, "{:.4g}".format)))
    intervals = " Bars are 95 % intervals." if any(row["perplexity"]["low"] is not None for row in rows) else ""
    return section(
        "Perplexity against cost",
        f"Further left is cheaper, lower is better. No row is both cheaper and better than those on the dotted line.{intervals}",
        f'<div class="two">{"".join(figures)}</div>',
    )


def tuning(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    """Loss of each value that was tried, as a chart and as numbers."""
    parts = []
    for name in dict.fromkeys(name for row in rows for tried in row["tried"] for name in tried["settings"]):
        found = {row["name"]: _best_by_value(row, name) for row in rows}
        found = {one: best for one, best in found.items() if len(best) > 1}
        values = list(dict.fromkeys(value for best in found.values() for value in best))
        if not found:
            continue
        numbers = all(map(is_number, values))
        values = sorted(values) if numbers else values
        series = []
        for one, best in found.items():
            points = [(value, loss) for value in values if (loss := best.get(value)) is not None]
            mark = min(range(len(points)), key=lambda place: points[place][1], default=None)
            series.append(Series(one, style[one], points, mark=mark))
        titles, formats = (name, "validation loss, first seed"), ("{:g}".format, "{:.3f}".format)
        drawn = [one for one in series if one.points and numbers]
        if drawn:
            parts.append(figure(line_chart, drawn, (HALF, PHONE), titles, formats, log_x=min(values) > 0))
        lines = [
            name_cell(one, style[one]) + "".join(_loss_cell(best, value) for value in values)
            for one, best in found.items()
        ]
        parts.append(table(["", *(f"{name} {f'{value:g}' if numbers else value}" for value in values)], lines))
    if not parts:
        return ""
    return section(
        "How each row was tuned",
        "Ringed and bold: the value whose figures are shown above. At the end of a line, a better value may lie beyond.",
        f'<div class="two">{"".join(parts)}</div>',
    )


def _best_by_value(row: Row, name: str) -> dict[Any, float | None]:
    """Value of a setting -> lowest loss with it; None if every run failed."""
    best: dict[Any, float | None] = {}
    for tried in row["tried"]:
        value = tried["settings"].get(name)
        if is_number(value) or isinstance(value, str | bool):
            losses = [loss for loss in (tried["loss"], best.get(value)) if loss is not None]
            best[value] = min(losses, default=None)
    return best


def _loss_cell(best: Mapping[Any, float | None], value: Any) -> str:
    if value not in best:
        return cell("")
    loss = best[value]
    lowest = min((one for one in best.values() if one is not None), default=None)
    return cell("—" if loss is None else f"{loss:.4f}", kind="best" if loss is not None and loss == lowest else "")


def spectra(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    """Effective ranks as a table, singular values as small multiples."""
    rows = [row for row in rows if row.get("spectra")]
    if not rows:
        return ""
    projections = list(dict.fromkeys(name for row in rows for name in row["spectra"]))
    panels = []
    for projection in projections:
        series = []
        for row in rows:
            values = row["spectra"].get(projection, {}).get("spectrum", [])
            points = [(place / (len(values) - 1), value) for place, value in enumerate(values)]
            series.append(Series(row["name"], style[row["name"]], [point for point in points if point[1] > 1e-5]))
        titles, formats = ("index / width", projection), ("{:.2g}".format, "{:.2f}".format)
        look = {"y_range": (0.0, 1.03), "label_lines": False, "dots": False}
        panels.append(figure(line_chart, series, (PANEL, SMALL_PANEL), titles, formats, **look))
    lines = []
    for row in rows:
        ranks = [row["spectra"][name]["effective_rank"] if name in row["spectra"] else math.nan for name in projections]
        cells = [cell("—" if math.isnan(rank) else percent(rank)) for rank in ranks]
        lines.append(name_cell(row["name"], style[row["name"]]) + "".join(cells))
    return section(
        "What the weights learned",
        "Effective rank: the share of singular values that holds 95 % of a matrix's energy, mean over blocks, first seed. If a "
        "projection is not one linear map, as in CoLA, the matrix is the product B·A.",
        table(["", *projections], lines),
        '<p class="under gap">Singular values over the largest one, from first to last; lines as in the table.</p>',
        f'<div class="many">{"".join(panels)}</div>',
    )
