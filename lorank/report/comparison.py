"""A comparison for its reader: report.html, one file with everything in it, and a table for the terminal.

Both show the dictionary of results.json (`lorank.comparison.results`). The page suits any browser, a telephone, day and night.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from lorank.report import figures
from lorank.report.markup import (
    between,
    cell,
    duration,
    escape,
    memory,
    name_cell,
    page,
    percent,
    section,
    settings_text,
    signed,
    table,
)
from lorank.report.tables import quantity

Row = Mapping[str, Any]
MATCHED = {
    "tokens": "tokens",
    "flops": "training FLOPs",
    "time": "training time",
    "params": "parameters",
    "memory": "memory (estimated)",
}


def comparison_page(results: Mapping[str, Any]) -> str:
    """report.html, which refers to nothing outside itself."""
    rows = [row for row in results["rows"] if row["loss"]]
    style = styles(results["rows"])
    sections = [
        _head(results, rows),
        _table(results, style),
        figures.curves(results, rows, style),
        figures.reach(results, rows, style),
        figures.pareto(rows, style),
        figures.tuning(results["rows"], style),
        figures.spectra(rows, style),
        _tasks(rows, style),
        _samples(rows, style),
        _reproduce(results),
    ]
    return page(_title(results), sections, f"Made by lorank {results['lorank']}; the same figures are in results.json.")


def styles(rows: Sequence[Row]) -> dict[str, str]:
    """Row -> classes of its line: methods in colour, dense rows grey, each with other dashes."""
    found, grey, colour = {}, 0, 0
    for row in rows:
        if row["kind"] == "method":
            found[row["name"]], colour = f"s{colour % 8}", colour + 1
        else:
            found[row["name"]], grey = ("g2" if row["kind"] == "control" else f"g{grey % 2}"), grey + 1
    return found


def _title(results: Mapping[str, Any]) -> str:
    names = [row["name"] for row in results["rows"] if row["kind"] == "method"]
    if not names:
        return "Dense models compared"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if len(names) < len(results["rows"]):
        return f"{listed} against dense training"
    return f"{listed} compared" if len(names) > 1 else f"{listed}, setting by setting"


def _head(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    base, by = results["settings"]["base"], results["match"]["by"]
    tokens = quantity(base["steps"] * base["batch_size"] * base["sequence_length"])
    facts = {
        "model": Path(base["model"]).name if base["model"] else f"Llama {base['size']}",
        "data": results["corpus"],
        "tokens per run": tokens if by not in ("flops", "time") else f"{tokens} for {results['rows'][0]['name']}",
        "equal for all": MATCHED[by],
        "seeds": ", ".join(map(str, results["seeds"])),
        "device": str(results["environment"].get("device", "unknown")),
    }
    listed = "".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in results["notes"])
    return (
        f'<h1>{escape(_title(results))}</h1>\n<p class="lead">{verdict(results, rows)}</p>\n'
        f'<div class="facts">{listed}</div>' + (f'\n<ul class="notes">{notes}</ul>' if notes else "")
    )


def verdict(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Who wins, how the first method compares with the dense rows, and how much compute it saves, in words and HTML."""
    methods = [row for row in rows if row["kind"] == "method"]
    if not methods:
        return "No run of a method has finished." if rows else "No run has finished."
    base = next((row for row in rows if row["name"] == results["baseline"]), None)
    said = [_winner(results, rows), _against(methods[0], base), *_controls(methods, rows), _saved(methods, base)]
    return " ".join(filter(None, said))


def _winner(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The row with the lowest loss, dense ones included."""
    first, *others = sorted(rows, key=lambda row: row["loss"]["mean"])
    if len(results["rows"]) == 1:
        best = f", its best, with {escape(settings_text(first['settings']))}" if len(first["tried"]) > 1 else ""
        return f"<b>{escape(first['name'])}</b> reaches a validation perplexity of <b>{_ppl(first)}</b>{best}."
    said = f"<b>{escape(first['name'])}</b> has the lowest validation perplexity, <b>{_ppl(first)}</b>"
    if not others:
        return f"{said}."
    found = results.get("winner") or {}
    sure = _surely(found.get("difference")) if found.get("name") == first["name"] else ""
    return f"{said}, before {escape(others[0]['name'])} with {_ppl(others[0])}. {sure}".strip()


def _against(method: Row, base: Row | None) -> str:
    """The first method and the baseline."""
    if base is None or base is method:
        return ""
    gap = method["difference"]
    change = math.expm1(gap["mean"]) if gap else method["perplexity"]["mean"] / base["perplexity"]["mean"] - 1
    return (
        f"{escape(method['name'])} reaches {_ppl(method)}, {percent(abs(change), 1)} {'above' if change > 0 else 'below'} "
        f"{escape(base['name'])} ({_ppl(base)}), with {percent(method['training_flops'] / base['training_flops'])} of its "
        f"training FLOPs and {percent(method['parameters'] / base['parameters'])} of its parameters. {_surely(gap)}"
    ).strip()


def _controls(methods: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The best narrower dense model, and the methods that it beats."""
    controls = sorted((row for row in rows if row["kind"] == "control"), key=_loss)
    if not controls:
        return []
    best = controls[0]
    beaten = [escape(row["name"]) for row in methods if _loss(best) < _loss(row)]
    judged = f", better than {', '.join(beaten)}" if beaten else ""
    return [
        f"A plain dense model, made narrower until it has the {escape(best['like'])}, reaches {_ppl(best)}{judged}."
    ]


def _saved(methods: Sequence[Row], base: Row | None) -> str:
    """The method that reaches the baseline's final loss with the fewest FLOPs."""
    there = [row for row in methods if row.get("reach") and row is not base]
    if base is None or not there:
        return ""
    first = min(there, key=lambda row: row["reach"]["flops"])
    share = percent(first["reach"]["flops"] / base["training_flops"])
    return (
        f"{escape(first['name'])} reaches the final loss of {escape(base['name'])} with {share} of its training FLOPs."
    )


def _ppl(row: Row) -> str:
    return f"{row['perplexity']['mean']:.2f}"


def _loss(row: Row) -> float:
    """Loss above the baseline's, over the seeds that both have finished."""
    return row["difference"]["mean"] if row["difference"] else 0.0


def _surely(gap: Mapping[str, Any] | None) -> str:
    if not gap or gap["low"] is None:
        return ""
    sure = gap["low"] > 0 or gap["high"] < 0
    return (
        f"Over {gap['number']} seeds the difference in loss is {signed(gap['mean'])} nats (95 % interval "
        f"{signed(gap['low'])} to {signed(gap['high'])}), {'more than chance' if sure else 'which may be chance'}."
    )


def _table(results: Mapping[str, Any], style: Mapping[str, str]) -> str:
    rows, by, seeds = results["rows"], results["match"]["by"], len(results["seeds"])
    lowest = min((row["loss"]["mean"] for row in rows if row["loss"]), default=0)
    ratio = [f"{MATCHED[by]}, ratio"] if by != "tokens" else []
    titles = ["", "perplexity", f"loss − {results['baseline']}, nats", *ratio, "parameters", "training FLOPs"]
    titles += ["training time", "peak memory", "settings"]
    lines = []
    for row in rows:
        name = name_cell(row["name"], style[row["name"]])
        if not row["loss"]:
            failed = any(tried["status"] == "failed" for tried in row["tried"])
            said = "failed, see the notes above" if failed else "not finished"
            lines.append(f'{name}<td class="none" colspan="{len(titles) - 1}">{said}</td>')
            continue
        ppl, gap, number, tried = row["perplexity"], row["difference"], row["loss"]["number"], len(row["tried"])
        under = [between(ppl, "{:.2f}"), f"{number} of {seeds} seeds" if number < seeds else ""]
        equal = results["match"]["ratios"].get(row["name"])
        cells = [
            cell(_ppl(row), "; ".join(filter(None, under)), "best" if row["loss"]["mean"] == lowest else ""),
            cell(signed(gap["mean"]), between(gap, "{:+.3f}")) if gap else cell("—"),
            *([cell(f"{equal:.4f}" if equal else "—")] if ratio else []),
            cell(quantity(row["parameters"])),
            cell(quantity(row["training_flops"]), f"{quantity(row['flops_per_token'])} a token"),
            cell(duration(row["seconds"]), f"{quantity(row['tokens_per_second'])} tokens/s")
            if row["seconds"]
            else cell("—"),
            cell(memory(row["peak_memory_gib"])),
            cell(
                settings_text({"lr": row["lr"], **row["settings"]}),
                f"best of {tried}{', edge' if row['edge'] else ''}" if tried > 1 else row["rate"],
                "free",
            ),
        ]
        lines.append(name + "".join(cells))
    chosen = "".join(f" {row['name']}: {row['chosen']}." for row in rows if row["chosen"] != "as it is")
    intervals = (
        f"Second lines: 95 % intervals over {seeds} seeds by Student's t. A seed decides initial values and the order of the "
        "training data, but not which text is held out. The difference is paired by seed. "
        if seeds > 1
        else ""
    )
    small = (
        f"{intervals}FLOPs include recomputation and the optimizer's products. Time is that of training steps alone, by the median "
        "step (the curves include slow steps), and says something only if the machine did no other work. Memory is its measured "
        f"growth.{chosen}"
    )
    return f'<h2>Results</h2>\n{table(titles, lines, stacks=True)}\n<p class="under small">{escape(small)}</p>'


def _tasks(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    rows = [row for row in rows if row.get("tasks")]
    names = list(dict.fromkeys((task, metric) for row in rows for task, one in row["tasks"].items() for metric in one))
    if not names:
        return ""
    lines = []
    for row in rows:
        found = [row["tasks"].get(task, {}).get(metric, math.nan) for task, metric in names]
        lines.append(name_cell(row["name"], style[row["name"]]) + "".join(cell(f"{value:.4g}") for value in found))
    titles = ["", *(f"{task} {metric.partition(',')[0]}" for task, metric in names)]
    return section("Tasks", "By lm-evaluation-harness, first seed.", table(titles, lines))


def _samples(rows: Sequence[Row], style: Mapping[str, str]) -> str:
    if not rows:
        return ""
    shown = "".join(
        f'<figure><h3><i class="key {style[row["name"]]}"></i>{escape(row["name"])}</h3>'
        f"<pre>{escape(row['sample'].strip())}</pre></figure>"
        for row in rows
    )
    under = "From an empty prompt at temperature 0.8, first seed, not selected."
    return section("Text they generate", under, f'<div class="samples">{shown}</div>')


def _reproduce(results: Mapping[str, Any]) -> str:
    about = yaml.safe_dump(results["environment"], sort_keys=False, allow_unicode=True)
    asked = yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True)
    runs = [f"{run['folder']}  {run['status']}" for row in results["rows"] for run in row["runs"]]
    blocks = {
        "Settings of the comparison": asked,
        "Environment": about,
        "Runs shown; each folder holds its recipe.yaml": "\n".join(runs),
    }
    return "<h2>How to repeat it</h2>\n" + "".join(
        f"<details><summary>{title}</summary><pre>{escape(text.strip())}</pre></details>"
        for title, text in blocks.items()
    )


def comparison_table(results: Mapping[str, Any]) -> Table:
    """One line per row, the best first; narrow enough for 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    several, by = len(results["seeds"]) > 1, results["match"]["by"]
    titles = ["", "ppl", *(["95 % CI"] if several else []), f"Δ nats\n{results['baseline']}", "params", "FLOPs\n/token"]
    titles += ["tokens\n/s", "MiB", *([f"{by}\nratio"] if by != "tokens" else []), "settings"]
    for title in titles:
        free = title in ("", "settings")
        table.add_column(title, justify="left" if free else "right", no_wrap=not free, vertical="top", overflow="fold")
    rows = sorted(results["rows"], key=lambda row: row["loss"]["mean"] if row["loss"] else math.inf)
    for row in rows:
        if not row["loss"]:
            table.add_row(
                row["name"], "failed" if any(t["status"] == "failed" for t in row["tried"]) else "not finished"
            )
            continue
        ppl, gap, ratio = row["perplexity"], row["difference"], results["match"]["ratios"].get(row["name"])
        table.add_row(
            row["name"],
            f"{ppl['mean']:.2f}",
            *([f"{ppl['low']:.3g}–{ppl['high']:.3g}" if ppl["low"] is not None else "-"] if several else []),
            f"{gap['mean']:+.3f}" if gap else "-",
            quantity(row["parameters"]),
            quantity(row["flops_per_token"]),
            "-" if row["tokens_per_second"] is None else quantity(row["tokens_per_second"]),
            f"{row['peak_memory_gib'] * 1024:,.0f}",
            *([f"{ratio:.3f}" if ratio else "-"] if by != "tokens" else []),
            settings_text({"lr": row["lr"], **row["settings"]}),
        )
    return table
