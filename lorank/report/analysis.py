"""analysis.html: how many dimensions a model uses, and where."""

import math
import statistics
from collections.abc import Mapping, Sequence

from lorank.report.charts import Series, line_chart, whole_number
from lorank.report.effective_ranks import (
    Found,
    Pick,
    Quantity,
    Results,
    budget_line,
    gradients,
    in_percent,
    loss_line,
    quantities,
    short_names,
)
from lorank.report.figures import PANEL, SMALL_PANEL, figure
from lorank.report.markup import cell, escape, page, percent, section, table
from lorank.report.tables import quantity

TITLE = "Effective rank, layer by layer"
DEEPEST = 0.6
"""Strength of the colour at 100 %, so that light and dark letters can still be read on it."""
FLOOR = 1e-4
"""The charts of spectra end at this fraction of the largest singular value."""


def analysis_page(results: Results) -> str:
    """The page of an analysis (results.json); it needs nothing outside itself."""
    found = quantities(results)
    names = short_names(dict.fromkeys(one["role"] for one in results["projections"]))
    sections = [
        _head(results, found, names),
        _maps(results, found, names),
        _spectra(results, names),
        _differences(results, found, names),
        _suggestion(results, names),
    ]
    made = f"Made by lorank {results['lorank']}; all singular values are in results.json."
    return page(TITLE, sections, made)


def _head(results: Results, found: Mapping[str, Quantity], names: Mapping[str, str]) -> str:
    facts = {
        "model": results["model"],
        "architecture": results["model_type"].removeprefix("lorank_"),
        "method": results["method"],
        "parameters": quantity(results["parameters"]),
        "text": results["text"],
        "tokens": f"{results['tokens']:,}",
        "of them for gradients": f"{results['gradient_tokens']:,}",
    }
    listed = "".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in results["notes"])
    return (
        f'<h1>{TITLE}</h1>\n<p class="lead">{_verdict(results, found, names)}</p>\n'
        f'<div class="facts">{listed}</div>' + (f'\n<ul class="notes">{notes}</ul>' if notes else "")
    )


def _sentence(text: str) -> str:
    """The same with a capital first; the rest is unchanged (gradients of A)."""
    return text[:1].upper() + text[1:]


def _verdict(results: Results, found: Mapping[str, Quantity], names: Mapping[str, str]) -> str:
    """The main figures as sentences in HTML."""
    outputs = found["output"]
    means = {role: outputs.mean(role) for role in names}
    least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    said = (
        f"{percent(results['alpha'])} of the energy of a projection's outputs lies in <b>{in_percent(outputs.mean())} %</b> of their "
        f"dimensions, from {in_percent(means[least])} % in {escape(names[least])} to {in_percent(means[most])} % in {escape(names[most])}. "
    )
    others = [
        f"{escape(one.name)} need {in_percent(one.mean())} %"
        for key, one in found.items()
        if key not in ("output", "difference", "rest")
    ]
    said += f"{_sentence('; '.join(others))}. " if others else ""
    chained = [one for one in results["projections"] if one["difference"] is not None and one["output"]["rank"]]
    if chained:
        ratio = sum(one["difference"]["rank_at_output_error"] for one in chained) / sum(
            one["output"]["rank"] for one in chained
        )
        judged = "would save rank" if ratio < 0.95 else "would save little" if ratio < 1 else "would save no rank"
        said += (
            f"Given the block before, the same error needs {percent(ratio)} of the outputs' own rank: in this model a chain as in "
            f"CR-Net {judged}."
        )
    return said


def _maps(results: Results, found: Mapping[str, Quantity], names: Mapping[str, str]) -> str:
    grids = []
    for number, (key, one) in enumerate((key, one) for key, one in found.items() if key not in ("difference", "rest")):
        columns = {role: name for role, name in names.items() if role in one.by_role}
        if key == "input":
            columns = {role: _readers(results, role, names) for role in columns}
        style = f"s{(0, 2, 1, 3, 4, 5, 6, 7)[number % 8]}"
        under = {"output": "Y", "input": "X, once for all projections that read it", "weight": "W"}.get(
            key, "of the loss"
        )
        head = f"<h3>{escape(_sentence(one.name))}<small>{under}</small></h3>"
        grids.append(f"<div>{head}{_heat_map(one, columns, style)}</div>")
    return section(
        "Effective rank by depth and projection",
        f"r({results['alpha']:g}): how many singular values hold {percent(results['alpha'])} of the sum of their squares, in percent of "
        "the width of activations or of the narrower side of matrices. Rows are blocks, first to last. All maps have the same "
        "scale: a stronger colour means more dimensions.",
        f'<div class="maps">{"".join(grids)}</div>',
    )


def _readers(results: Results, role: str, names: Mapping[str, str]) -> str:
    """The projections that read what this one reads."""
    first = next(one for one in results["projections"] if one["role"] == role and one["input"] is not None)
    same = [names[one["role"]] for one in results["projections"] if one["reads"] == first["name"]]
    return ", ".join(same)


def _broken(name: str) -> str:
    """A heading that may wrap in a narrow column; several names wrap between them."""
    return escape(name) if "," in name else escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _heat_map(one: Quantity, columns: Mapping[str, str], style: str) -> str:
    depths = sorted({depth for row in one.by_role.values() for depth in row})
    head = "".join(f'<th scope="col">{_broken(name)}</th>' for name in columns.values())
    rows = []
    for depth in depths:
        cells = []
        for role in columns:
            value = one.by_role[role].get(depth)
            if value is None:
                cells.append('<td class="none">—</td>')
                continue
            mix = DEEPEST * math.sqrt(min(1.0, value))  # so that small parts differ as well
            title = f"block {depth}, {columns[role]}: {percent(value, 1)}"
            cells.append(f'<td style="--part:{mix:.0%}" title="{escape(title)}">{in_percent(value)}</td>')
        rows.append(f'<tr><th scope="row">{depth}</th>{"".join(cells)}</tr>')
    return f'<div class="heat {style}"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _spectra(results: Results, names: Mapping[str, str]) -> str:
    """Singular values over the largest one as small charts; the logarithm is averaged over blocks."""
    kinds: dict[str, Pick] = {
        "outputs": lambda one: one["output"],
        "inputs": lambda one: read[one["reads"]]["input"],
        "weights": lambda one: one["weight"],
        **gradients(results),
    }
    read = {one["name"]: one for one in results["projections"]}
    styles = dict(zip(kinds, ("s0", "s2", "s1", "s3", "s4", "s5", "s6"), strict=False))
    panels = []
    for role, name in names.items():
        here = [one for one in results["projections"] if one["role"] == role]
        series = []
        for kind, style in styles.items():
            curves = [spectrum["singular_values"] for one in here if (spectrum := kinds[kind](one)) is not None]
            points = _mean_curve(curves)
            if points:
                series.append(Series(kind, style, points))
        look = {"y_range": (math.log10(FLOOR), 0.05), "label_lines": False, "dots": False}
        titles, formats = ("index / width", f"{name}: log₁₀ σ/σ₁"), ("{:.2g}".format, _power)
        panels.append(figure(line_chart, series, (PANEL, SMALL_PANEL), titles, formats, **look))
    return section(
        "Singular values",
        "Relative to the largest one, from the first to the last; mean of the logarithm over blocks. The outputs of a projection "
        "that widens have no more dimensions than its inputs: their curve falls off there.",
        legend(styles),
        f'<div class="many">{"".join(panels)}</div>',
    )


def _power(value: float) -> str:
    return f"{10**value:.2g}" if value >= math.log10(FLOOR) else f"below {FLOOR:g}"


def _mean_curve(curves: Sequence[Sequence[float]], points: int = 60) -> list[tuple[float, float]]:
    curves = [curve for curve in curves if len(curve) > 1 and curve[0] > 0]
    found = []
    for k in range(points) if curves else ():
        part = k / (points - 1)
        values = [curve[round(part * (len(curve) - 1))] / curve[0] for curve in curves]
        mean = statistics.fmean(math.log10(max(value, 1e-12)) for value in values)
        found.append((part, mean))
    return found


def legend(styles: Mapping[str, str]) -> str:
    keys = "".join(f'<span><i class="key {style}"></i>{escape(name)}</span>' for name, style in styles.items())
    return f'<div class="legend">{keys}</div>'


def _differences(results: Results, found: Mapping[str, Quantity], names: Mapping[str, str]) -> str:
    """Rank of what a block changes, and rank of the outputs themselves, by depth."""
    if "difference" not in found:
        return ""
    styles = {"Y, the outputs": "s0", "Y − βY′, by its own energy": "g0", "Y − βY′, for the outputs' error": "s1"}
    kinds = [found[key] for key in ("output", "difference", "rest")]
    highest = 100 * max(value for one in kinds for row in one.by_role.values() for value in row.values())
    panels = []
    for role, name in names.items():
        series = []
        for (label, style), one in zip(styles.items(), kinds, strict=True):
            points = [(float(depth), 100 * value) for depth, value in sorted(one.by_role.get(role, {}).items())]
            series.append(Series(label, style, points))
        titles, formats = ("block", f"{name}, % of width"), (whole_number, "{:.3g} %".format)
        look = {"y_range": (0.0, 1.08 * highest), "label_lines": False}
        drawn = [one for one in series if one.points]
        panels.append(figure(line_chart, drawn, (PANEL, SMALL_PANEL), titles, formats, **look))
    lines = [
        f'<th scope="row">{escape(name)}</th>'
        + "".join(cell(text) for text in _changes([one for one in results["projections"] if one["role"] == role]))
        for role, name in names.items()
    ]
    return section(
        "From block to block",
        f"Y are the outputs of a projection, Y′ those of the same one a block earlier, β the number that makes Y − βY′ smallest. "
        f"By its own energy: r({results['alpha']:g}) of the difference. For the outputs' error: the rank at which βY′ plus the leading "
        f"part of the difference misses as much of Y as Y's own r({results['alpha']:g}) does, {percent(1 - results['alpha'])}. Where it "
        "is below that of Y, a chain as in CR-Net saves rank.",
        legend(styles),
        f'<div class="many">{"".join(panels)}</div>',
        table(["", "β, mean", "energy of Y − βY′ over that of Y", "rank of Y", "rank for the same error"], lines),
    )


def _changes(ones: Sequence[Found]) -> list[str]:
    ones = [one for one in ones if one["difference"] is not None]
    if not ones:
        return ["—"] * 4
    mean = lambda pick: statistics.fmean(map(pick, ones))  # noqa: E731
    return [
        f"{round(mean(lambda one: one['difference']['beta']), 2) + 0.0:.2f}".replace("-", "−"),
        percent(mean(lambda one: one["difference"]["part_of_output_energy"])),
        f"{mean(lambda one: one['output']['rank']):.0f}",
        f"{mean(lambda one: one['difference']['rank_at_output_error']):.0f}",
    ]


def _suggestion(results: Results, names: Mapping[str, str]) -> str:
    found = results["suggestion"]
    if not found:
        return ""
    depths = sorted({one["depth"] for one in results["projections"]})
    ranks = {(one["role"], one["depth"]): found["ranks"].get(one["name"], "—") for one in results["projections"]}
    refused = found["no_recipe"]
    start = (
        f"There is no recipe, because lorank pretrain cannot train this model: {refused}."
        if refused
        else "This is a start, not a result: train it with lorank pretrain suggested.yaml and compare."
    )
    lines = [
        f'<th scope="row">{depth}</th>' + "".join(cell(str(ranks.get((role, depth), "—"))) for role in names)
        for depth in depths
    ]
    return section(
        "Ranks for the budget",
        "Chosen one rank at a time, by how much of the outputs' energy it saves per parameter: "
        f"{budget_line(results)}. {loss_line(found)} {start}",
        table(["block", *names.values()], lines),
    )
