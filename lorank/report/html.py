"""report.html: one file with everything in it, for any browser and for a telephone, by day and by night."""

import html
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lorank.report.charts import Format, Series, line_chart, scatter_chart
from lorank.report.tables import quantity

WIDE, HALF, PANEL, PHONE = (1018, 400), (478, 320), (214, 170), (334, 300)
Row = Mapping[str, Any]


def write_report(results: Mapping[str, Any]) -> str:
    """The page of a comparison's results (results.json), without a single reference to anything outside it."""
    rows = [row for row in results["contestants"] if row["loss"]]
    style = styles(results["contestants"])
    sections = [
        _head(results, rows),
        _table(results, style),
        _curves(results, rows, style),
        _pareto(rows, style),
        _tuning(results["contestants"], style),
        _spectra(rows, style),
        _tasks(rows, style),
        _samples(rows, style),
        _reproduce(results),
    ]
    here = Path(__file__)
    css, script = here.with_name("page.css").read_text(), here.with_name("page.js").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(_title(results))}</title>\n<style>\n{css}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + f"\n<footer>Made by lorank {_e(results['lorank'])}; the same figures are in results.json.</footer>\n</main>"
        + f'<div class="tip"></div>\n<script>\n{script}</script></body></html>\n'
    )


def styles(rows: Sequence[Row]) -> dict[str, str]:
    """Contestant -> class: dense ones grey with dashes of their own, methods in colour."""
    found, grey, colour = {}, 0, 0
    for row in rows:
        if row["kind"] == "method":
            found[row["name"]], colour = f"s{colour % 8}", colour + 1
        else:
            found[row["name"]], grey = ("g2" if row["kind"] == "control" else f"g{grey % 2}"), grey + 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def _title(results: Mapping[str, Any]) -> str:
    names = [row["name"] for row in results["contestants"] if row["kind"] == "method"] or ["dense"]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} against dense training" if names != ["dense"] else "Dense models compared"


def _head(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    base = results["settings"]["base"]
    shape = base["model"] or f"Llama {base['size']}"
    matched = {
        "flops": "training FLOPs",
        "time": "training time",
        "params": "parameters",
        "memory": "memory, as estimated",
    }
    by = results["match"]["by"]
    facts = {
        "model": shape,
        "data": results["corpus"],
        "tokens per run": "by FLOPs" if by == "flops" else "by time" if by == "time" else quantity(_tokens(base)),
        "equal": matched.get(by, "tokens"),
        "seeds": ", ".join(map(str, results["seeds"])),
        "device": str(results["environment"].get("device", "unknown")),
    }
    listed = "".join(f"<span>{name} <b>{_e(value)}</b></span>" for name, value in facts.items())
    notes = "".join(f"<li>{_e(note)}</li>" for note in results["notes"])
    return (
        f'<h1>{_e(_title(results))}</h1>\n<p class="lead">{verdict(results, rows)}</p>\n<div class="facts">{listed}</div>'
        + (f'\n<ul class="notes">{notes}</ul>' if notes else "")
    )


def verdict(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What the first method's row says beside the dense ones, in words and HTML."""
    base = next((row for row in rows if row["name"] == results["baseline"]), None)
    method = next((row for row in rows if row["kind"] == "method"), None)
    if method is None:
        return "No run of a method has finished yet." if rows else "No run has finished yet."
    said = f"<b>{_e(method['name'])}</b> reaches a validation perplexity of <b>{method['perplexity']['mean']:.2f}</b>"
    if base is not None and base is not method:
        change = method["perplexity"]["mean"] / base["perplexity"]["mean"] - 1
        flops = method["training_flops"] / base["training_flops"]
        said += (
            f", {abs(change):.1%} {'above' if change > 0 else 'below'} {_e(base['name'])} ({base['perplexity']['mean']:.2f}), "
            f"with {flops:.0%} of its training FLOPs and {method['parameters'] / base['parameters']:.0%} of its parameters. "
        )
        gap = method["difference"] or {}
        if gap.get("low") is not None:
            sure = gap["low"] > 0 or gap["high"] < 0
            said += (
                f"Over {gap['number']} seeds the difference in loss is {_signed(gap['mean'])} nats, 95 % interval "
                f"{_signed(gap['low'])} to {_signed(gap['high'])}: "
                + ("more than chance. " if sure else "it cannot be told from chance. ")
            )
    else:
        said += ". "
    control = next((row for row in rows if row["kind"] == "control"), None)
    if control is not None:
        better = control["perplexity"]["mean"] < method["perplexity"]["mean"]
        said += (
            "A plain dense model made narrower, so that a token costs it as much as the cheapest method, reaches "
            f"{control['perplexity']['mean']:.2f}{': the method has yet to beat that' if better else ''}."
        )
    return said


def _table(results: Mapping[str, Any], style: Mapping[str, str]) -> str:
    rows = results["contestants"]
    lowest = min((row["loss"]["mean"] for row in rows if row["loss"]), default=0)
    several, by = len(results["seeds"]) > 1, results["match"]["by"]
    titles = [
        "",
        "perplexity",
        f"loss − {results['baseline']}",
        "parameters",
        "FLOPs / token",
        "training FLOPs",
        "training time",
    ]
    titles += ["tokens / s", "peak memory", "settings"]
    if by != "tokens":
        titles.insert(1, f"{by} / {rows[0]['name']}")
    lines = []
    for row in rows:
        name = f'<th scope="row"><i class="key {style[row["name"]]}"></i>{_e(row["name"])}</th>'
        if not row["loss"]:
            failed = sum(run["status"] == "failed" for run in row["tried"])
            lines.append(
                f'<tr>{name}<td colspan="{len(titles) - 1}">{"failed" if failed else "not finished"}</td></tr>'
            )
            continue
        ppl, gap = row["perplexity"], row["difference"]
        count = row["loss"]["number"]
        missing = f"{count} of {len(results['seeds'])} seeds" if count < len(results["seeds"]) else ""
        cells = [
            _cell(
                f"{ppl['mean']:.2f}",
                _between(ppl, "{:.2f}") or missing,
                "best" if row["loss"]["mean"] == lowest else "",
            ),
            _cell(_signed(gap["mean"]), _between(gap, "{:+.3f}")) if gap else _cell("—"),
            _cell(quantity(row["parameters"])),
            _cell(quantity(row["flops_per_token"])),
            _cell(quantity(row["training_flops"])),
            _cell(duration(row["seconds"])),
            _cell(f"{row['tokens_per_second']:,.0f}"),
            _cell(memory(row["peak_memory_gib"])),
            _cell(*_settings(row)),
        ]
        if by != "tokens":
            ratio = results["match"]["ratios"].get(row["name"])
            cells.insert(0, _cell(f"{ratio:.4f}" if ratio else "—"))
        lines.append(f"<tr>{name}{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{_e(title)}</th>' for title in titles)
    chosen = "; ".join(f"{row['name']}: {row['chosen']}" for row in rows if row["chosen"] != "as it is")
    under = (
        f"Small print: 95 % intervals over {len(results['seeds'])} seeds by Student's t; perplexity's is that of the mean loss, "
        "the difference is paired by seed. "
        if several
        else ""
    )
    under += "FLOPs count recomputation but no optimizer; time is that of training steps alone; memory is its measured growth. "
    return (
        f'<h2>Results</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f'\n<p class="under" style="margin-top:10px">{_e(under)}{_e(chosen)}</p>'
    )


def _curves(results: Mapping[str, Any], rows: Sequence[Row], style: Mapping[str, str]) -> str:
    if not any(row["runs"][0].get("curve", {}).get("loss") for row in rows):
        return ""
    charts = []
    for place, (key, title, show) in enumerate(
        (
            ("tokens", "tokens", quantity),
            ("flops", "training FLOPs", quantity),
            ("seconds", "time of training", duration),
        )
    ):
        series = [_averaged(row, key, style[row["name"]]) for row in rows]
        charts.append(
            _figure(
                line_chart, series, WIDE if place == 0 else HALF, title, "loss, nats per token", show, "{:.3f}".format
            )
        )
    band = " Bands reach from the lowest to the highest seed." if len(results["seeds"]) > 1 else ""
    return (
        '<h2>Loss against tokens, compute and time</h2>\n<p class="under">Line with dots: validation. Faint: training.'
        f'{band}</p>\n{charts[0]}\n<div class="two">{charts[1]}{charts[2]}</div>'
    )


def _averaged(row: Row, key: str, style: str) -> Series:
    """A contestant's curve: the mean over its seeds, at the steps that all of them have."""
    curves = [run["curve"] for run in row["runs"] if run["status"] == "finished"]
    training = next(run["training"] for run in row["runs"] if run["status"] == "finished")
    points, band = [], []
    for step in curves[0]["step"]:
        here = [
            (curve[key][at], curve["loss"][at])
            for curve in curves
            if step in curve["step"]
            for at in [curve["step"].index(step)]
        ]
        if len(here) == len(curves):
            x, losses = statistics.fmean(x for x, _ in here), [loss for _, loss in here]
            points.append((x, statistics.fmean(losses)))
            band.append((x, min(losses), max(losses)))
    faint = list(zip(training[key], training["loss"], strict=True))
    return Series(row["name"], style, points, band if len(curves) > 1 else (), faint)


def _pareto(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    if not rows:
        return ""
    figures = []
    for key, title, show in (
        ("training_flops", "training FLOPs", quantity),
        ("peak_memory_gib", "peak memory", memory),
    ):
        series = []
        for row in rows:
            ppl, x = row["perplexity"], row[key]
            band = [(x, ppl["low"], ppl["high"])] if ppl["low"] is not None else []
            series.append(Series(row["name"], style[row["name"]], [(x, ppl["mean"])], band))
        figures.append(_figure(scatter_chart, series, HALF, title, "validation perplexity", show, "{:.4g}".format))
    return (
        '<h2>What the perplexity costs</h2>\n<p class="under">Further left is cheaper, lower is better. The dotted line joins '
        f'those that none beats at both.</p>\n<div class="two">{"".join(figures)}</div>'
    )


def _tuning(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    names = {
        name for row in rows for tried in row["tried"] for name, value in tried["settings"].items() if _is_number(value)
    }
    figures = []
    for name in sorted(names):
        series = []
        for row in rows:
            best: dict[float, float] = {}
            for tried in row["tried"]:
                if tried["loss"] is not None and _is_number(tried["settings"].get(name)):
                    value = tried["settings"][name]
                    best[value] = min(tried["loss"], best.get(value, math.inf))
            if len(best) > 1:
                points = sorted(best.items())
                mark = min(range(len(points)), key=lambda place: points[place][1])
                series.append(Series(row["name"], style[row["name"]], points, mark=mark))
        log = all(x > 0 for one in series for x, _ in one.points)
        if series:
            figures.append(
                _figure(
                    line_chart,
                    series,
                    HALF,
                    name,
                    "validation loss, first seed",
                    "{:g}".format,
                    "{:.3f}".format,
                    log_x=log,
                )
            )
    if not figures:
        return ""
    figures = (
        figures if len(figures) > 1 else [figures[0].replace(f"0 0 {HALF[0]} {HALF[1]}", f"0 0 {HALF[0]} {HALF[1]}")]
    )
    return (
        '<h2>How each row was tuned</h2>\n<p class="under">Ringed: the value whose figures are shown above. A ring at the end of '
        f'a line says that a better value may lie beyond.</p>\n<div class="two">{"".join(figures)}</div>'
    )


def _spectra(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    rows = [row for row in rows if row.get("spectra")]
    if not rows:
        return ""
    projections = list(dict.fromkeys(name for row in rows for name in row["spectra"]))
    panels = []
    for projection in projections:
        series = []
        for row in rows:
            if projection in row["spectra"]:
                spectrum = row["spectra"][projection]["spectrum"]
                last = len(spectrum) - 1
                points = [(place / last, value) for place, value in enumerate(spectrum)]
                kept = [point for point in points if point[1] > 1e-5]
                series.append(Series(row["name"], style[row["name"]], kept))
        panels.append(
            _figure(
                line_chart,
                series,
                PANEL,
                "index / width",
                projection,
                "{:g}".format,
                "{:.2g}".format,
                label_lines=False,
                plain=True,
            )
        )
    head = "".join(f'<th scope="col">{_e(name)}</th>' for name in projections)
    lines = "".join(
        f'<tr><th scope="row"><i class="key {style[row["name"]]}"></i>{_e(row["name"])}</th>'
        + "".join(
            _cell(f"{row['spectra'][name]['effective_rank']:.0%}" if name in row["spectra"] else "—")
            for name in projections
        )
        + "</tr>"
        for row in rows
    )
    return (
        '<h2>What the weights learned</h2>\n<p class="under">Effective rank: the share of singular values that holds 95 % of a '
        "matrix's energy, mean over blocks, first seed. Of CoLA and its like it is the product B·A that is looked at.</p>\n"
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table></div>\n'
        '<p class="under" style="margin:18px 0 4px">Singular values over the largest one, from first to last.</p>'
        f'<div class="many">{"".join(panels)}</div>'
    )


def _tasks(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    rows = [row for row in rows if row.get("tasks")]
    names = list(
        dict.fromkeys((task, metric) for row in rows for task, found in row["tasks"].items() for metric in found)
    )
    if not names:
        return ""
    head = "".join(f'<th scope="col">{_e(task)}<br>{_e(metric.partition(",")[0])}</th>' for task, metric in names)
    lines = "".join(
        f'<tr><th scope="row"><i class="key {style[row["name"]]}"></i>{_e(row["name"])}</th>'
        + "".join(_cell(f"{row['tasks'].get(task, {}).get(metric, math.nan):.4g}") for task, metric in names)
        + "</tr>"
        for row in rows
    )
    return (
        '<h2>Tasks</h2>\n<p class="under">By lm-evaluation-harness, first seed.</p>\n'
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _samples(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    if not rows:
        return ""
    figures = "".join(
        f'<figure><h3><i class="key {style[row["name"]]}"></i>{_e(row["name"])}</h3><pre>{_e(row["sample"].strip())}</pre></figure>'
        for row in rows
    )
    return (
        '<h2>What they write</h2>\n<p class="under">Sampled from nothing at temperature 0.8, with the run\'s own seed; not '
        f'selected.</p>\n<div class="samples">{figures}</div>'
    )


def _reproduce(results: Mapping[str, Any]) -> str:
    about = yaml.safe_dump(results["environment"], sort_keys=False, allow_unicode=True)
    asked = yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True)
    folders = "\n".join(f"{run['folder']}  {run['status']}" for row in results["contestants"] for run in row["runs"])
    blocks = {
        "Settings of the comparison": asked,
        "Environment": about,
        "Runs shown, each with its recipe.yaml": folders,
    }
    return "<h2>To do it again</h2>\n" + "".join(
        f"<details><summary>{title}</summary><pre>{_e(text.strip())}</pre></details>" for title, text in blocks.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def _figure(
    draw: Callable[..., str],
    series: Sequence[Series],
    size: tuple[int, int],
    x_title: str,
    y_title: str,
    x_format: Format,
    y_format: Format,
    plain: bool = False,
    **options: Any,
) -> str:
    """A chart twice, for a desktop and for a telephone, so that its type has the same size on both."""
    about = {"x_title": x_title, "y_title": y_title, "x_format": x_format, "y_format": y_format, **options}
    if plain:
        return f'<figure class="plain">{draw(series, size=size, what=y_title, **about)}</figure>'
    wide, narrow = (draw(series, size=one, what=kind, **about) for one, kind in ((size, "wide"), (PHONE, "narrow")))
    return f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'


def _e(text: object) -> str:
    return html.escape(str(text))


def _cell(text: str, small: str = "", kind: str = "") -> str:
    under = f"<small>{_e(small)}</small>" if small else ""
    return f"<td{f' class={kind!r}' if kind else ''}>{_e(text)}{under}</td>"


def _between(values: Mapping[str, float | None], show: str) -> str:
    return (
        ""
        if values["low"] is None
        else f"{show.format(values['low'])} to {show.format(values['high'])}".replace("-", "−")
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _settings(row: Row) -> tuple[str, str]:
    shown = [
        f"{name} {value:g}" if _is_number(value) else f"{name} {value}"
        for name, value in (row["settings"] or {}).items()
    ]
    tried = len(row["tried"])
    return ", ".join(shown) or "—", f"best of {tried}{', at the edge' if row['edge'] else ''}" if tried > 1 else ""


def _tokens(base: Mapping[str, Any]) -> float:
    return base["steps"] * base["batch_size"] * base["sequence_length"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def duration(seconds: float) -> str:
    """Seconds as a reader says them.

    >>> duration(42), duration(200), duration(5000)
    ('42 s', '3.3 min', '1.4 h')
    """
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.3g} {unit}" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}"
    return f"{seconds:.3g} s"


def memory(gib: float) -> str:
    """GiB, or MiB where that is little.

    >>> memory(0.25), memory(12)
    ('256 MiB', '12 GiB')
    """
    return f"{gib:.3g} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"
