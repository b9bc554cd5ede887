"""What the study found so far: docs/study.md and its pictures, made from the files in results/ alone.

python benchmarks/study/report.py
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fits import Points, crossing, exponent
from grid import SEEDS, SIZES, TEXTS
from run import RESULTS, lines_of

from lorank.comparison.results import compute_to_reach
from lorank.comparison.statistics import Interval, mean_interval
from lorank.report.charts import Series, line_chart
from lorank.report.curves import SIZE, framed
from lorank.report.tables import quantity
from lorank.train.folder import write_whole

DOCS = Path(__file__).parents[2] / "docs"
Line = Mapping[str, Any]


class Row(NamedTuple):
    """A row with its best learning rate: that of the lowest loss with the first seed."""

    name: str
    rate: float
    rates: list[float]
    """All that were tried."""
    runs: dict[int, Line]
    """Seed -> run at the best rate."""

    @property
    def losses(self) -> dict[int, float]:
        return {seed: run["validation_loss_nats_per_token"] for seed, run in self.runs.items()}

    @property
    def flops(self) -> float:
        return next(iter(self.runs.values()))["training_flops"]

    @property
    def inside(self) -> bool:
        return min(self.rates) < self.rate < max(self.rates)

    def curves(self) -> dict[str, Any]:
        """As `compute_to_reach` reads them."""
        runs = []
        for seed, run in self.runs.items():
            steps = [*map(int, run["curve"])]
            share = [step / run["steps"] for step in steps]
            costs = {"tokens": run["tokens"], "flops": run["training_flops"], "seconds": math.nan}
            curve = {name: [whole * part for part in share] for name, whole in costs.items()}
            runs.append({"seed": seed, "curve": {**curve, "loss": [*run["curve"].values()]}})
        return {"runs": runs}


def rows_of(lines: Sequence[Line]) -> dict[str, Row]:
    """Name -> row, best first."""
    found = {}
    for name in dict.fromkeys(line["row"] for line in lines):
        runs = [line for line in lines if line["row"] == name]
        first = {run["settings"]["lr"]: run for run in runs if run["seed"] == SEEDS[0]}
        if first:
            rate = min(first, key=lambda lr: first[lr]["validation_loss_nats_per_token"])
            best = {run["seed"]: run for run in runs if run["settings"]["lr"] == rate}
            found[name] = Row(name, rate, sorted(first), dict(sorted(best.items())))
    return dict(sorted(found.items(), key=lambda item: statistics.fmean(item[1].losses.values())))


def difference(row: Row, other: Row) -> Interval | None:
    """Loss of `row` minus that of `other`, paired by seed."""
    pairs = [row.losses[seed] - other.losses[seed] for seed in row.losses if seed in other.losses]
    return mean_interval(pairs) if pairs else None


def reach(row: Row, other: Row) -> float | None:
    """FLOPs until `row` has the last loss of `other`, as a share of the FLOPs of `other`."""
    targets = {run["seed"]: run["curve"]["loss"][-1] for run in other.curves()["runs"]}
    found = compute_to_reach(row.curves(), targets)
    return None if found is None else found["flops"] / other.flops


def seconds_of(size: str) -> dict[str, float]:
    """Row -> seconds of a step, as speed.py has measured them; empty if it has not."""
    path = RESULTS / f"speed-{size}.json"
    return json.loads(path.read_text())["seconds"] if path.exists() else {}


def at_equal_time(rows: Mapping[str, Row], seconds: Mapping[str, float]) -> str | None:
    """How far dense-muon is when cola+muon has finished."""
    if not {"cola+muon", "dense-muon"} <= rows.keys() & seconds.keys():
        return None
    cola, dense = rows["cola+muon"], rows["dense-muon"]
    steps = next(iter(cola.runs.values()))["steps"] * seconds["cola+muon"] / seconds["dense-muon"]
    reached = []
    for run in dense.runs.values():
        points = [(int(step), loss) for step, loss in run["curve"].items()]
        after = next((k for k, (step, _) in enumerate(points) if step >= steps), None)
        if not after:
            return None
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        reached.append(y0 + (y1 - y0) * (steps - x0) / (x1 - x0))
    last = statistics.fmean([*run["curve"].values()][-1] for run in cola.runs.values())
    return (
        f"A step of dense-muon takes {seconds['dense-muon'] / seconds['cola+muon']:.2f} times as long as one of cola+muon on one core of this "
        f"machine. When cola+muon ends, at {last:.3f} nats per token, dense-muon has done {steps:.0f} steps and is at "
        f"{statistics.fmean(reached):.3f}, with its learning rate not yet at the end."
    )


def over_sizes(text: str, found: Mapping[str, Mapping[str, Row]]) -> str | None:
    """Loss against compute of one text, over sizes -> rows, of rows that have all seeds at each size; None if there are none."""
    rows: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for of_size in found.values():
        for name, row in of_size.items():
            for seed, loss in row.losses.items():
                rows.setdefault(name, {}).setdefault(seed, []).append((row.flops, loss))
    whole: dict[str, Points] = {}
    for name, seeds in rows.items():
        kept = {seed: points for seed, points in seeds.items() if len(points) == len(found) > 1}
        if len(kept) == len(SEEDS):
            whole[name] = kept
    if not whole:
        return None
    lines = ["| row | seeds | b in loss = exp(a) FLOPs^-b | crosses dense-muon at |", "|---|---|---|---|"]
    for name, points in whole.items():
        b = exponent(points)
        shown = crosses(points, whole["dense-muon"]) if name != "dense-muon" and "dense-muon" in whole else ""
        lines.append(f"| {name} | {len(points)} | {b.mean:.3f}{interval(b.low, b.high, '{:.3f}'.format)} | {shown} |")
    sizes = ", ".join(found)
    return (
        f"### Loss against compute, {text}\n\nOver {sizes}, at equal tokens (`benchmarks/study/fits.py`).\n\n"
        + "\n".join(lines)
        + "\n"
    )


def crosses(row: Points, other: Points) -> str:
    """The FLOPs at which two rows have the same loss."""
    at = crossing(row, other)
    if at is None:
        return "the slopes cannot be told apart"
    return quantity(math.exp(at.mean)) + interval(math.exp(at.low), math.exp(at.high), quantity)


def interval(low: float, high: float, form: Callable[[float], str]) -> str:
    return "" if math.isnan(low) else f" ({form(low)} to {form(high)})"


def table(rows: Mapping[str, Row], seconds: Mapping[str, float]) -> str:
    """Rows of a size and a text as Markdown."""
    titles = ["row", "in blocks", "FLOPs", "rate", "seeds", "perplexity", "against dense-muon", "FLOPs to dense's loss"]
    titles += ["time to it"] if seconds else []
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    muon, dense = rows.get("dense-muon"), rows.get("dense")
    for row in rows.values():
        run, loss = next(iter(row.runs.values())), statistics.fmean(row.losses.values())
        gap = difference(row, muon) if muon and row is not muon else None
        share = reach(row, dense) if dense else None
        cells = [
            row.name,
            f"{run['block_parameters']:,}",
            quantity(row.flops),
            f"{row.rate:g}" + ("" if row.inside else " (edge)"),
            str(len(row.runs)),
            f"{math.exp(loss):.2f}",
            "" if gap is None else said(gap),
            ("not reached" if dense else "") if share is None else f"{share:.2f}",
        ]
        if seconds:
            cells.append(time_to(row, dense, seconds))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def time_to(row: Row, dense: Row | None, seconds: Mapping[str, float]) -> str:
    """Until `row` has the last loss of dense with AdamW, as a share of the time of that run."""
    if dense is None or not {row.name, "dense"} <= seconds.keys() or (share := reach(row, dense)) is None:
        return ""
    steps = share * dense.flops / row.flops  # as a share of the row's
    return f"{steps * seconds[row.name] / seconds['dense']:.2f}"


def said(gap: Interval) -> str:
    """A difference of losses as one of perplexities in percent, with its interval."""
    mean, low, high = (100 * math.expm1(x) for x in (gap.mean, gap.low, gap.high))
    return f"{mean:+.1f} %" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def picture(rows: Mapping[str, Row], title: str) -> str:
    """Validation loss against training FLOPs, means over seeds."""
    colours, series = iter(f"s{k}" for k in range(8)), []
    for name, row in list(rows.items())[:8]:
        runs = [run["curve"] for run in row.curves()["runs"]]
        points = [
            (x, statistics.fmean(losses))
            for x, *losses in zip(runs[0]["flops"], *(run["loss"] for run in runs), strict=True)
        ]
        style = {"dense": "g0"}.get(name) or next(colours)
        series.append(Series(f"{name} {points[-1][1]:.3f}", style, points))
    chart = line_chart(
        series,
        size=SIZE,
        x_title="training FLOPs",
        y_title="validation loss, nats per token",
        x_format=quantity,
        y_format="{:.3f}".format,
        what=title,
    )
    return framed(chart, title=title, note="Evaluations in training, on the first 65,000 tokens of the held-out text.")


def verdict(rows: Mapping[str, Row]) -> list[str]:
    """What a size and a text say, in sentences."""
    if not {"cola+muon", "dense-muon"} <= rows.keys():
        return []
    cola, found = rows["cola+muon"], []
    for name, words in (("dense-muon", "equal tokens"), ("dense-small-muon", "equal tokens and FLOPs")):
        finished = name in rows and rows[name].inside and cola.inside
        if finished and (gap := difference(cola, rows[name])) is not None:
            alone = math.isnan(gap.high)
            better, worse = (gap.mean < 0, gap.mean > 0) if alone else (gap.high < 0, gap.low > 0)
            judged = "better than" if better else "worse than" if worse else "not distinguishable from"
            seeds = " (one seed)" if alone else ""
            found.append(f"At {words} cola+muon is {judged} {name}: {said(gap)} perplexity{seeds}.")
    if "dense" in rows and (share := reach(cola, rows["dense"])) is not None:
        found.append(f"It reaches the last loss of the tuned AdamW dense model with {share:.2f} of that model's FLOPs.")
    return found


def published(rows: Mapping[str, Row]) -> str:
    """nanoGPT's setting: what was published beside what was found, at equal training FLOPs."""
    lines = ["| row | in blocks | steps | rate | seeds | validation loss | against dense |", "|" + "---|" * 7]
    for row in rows.values():
        run, loss = next(iter(row.runs.values())), mean_interval([*row.losses.values()])
        gap = difference(row, rows["dense"]) if row.name != "dense" else None
        cells = [row.name, f"{run['block_parameters']:,}", f"{run['steps']:,}", f"{row.rate:g}", str(len(row.runs))]
        cells += [f"{loss.mean:.4f}" + ("" if math.isnan(loss.low) else f" ({loss.low:.4f} to {loss.high:.4f})")]
        lines.append("| " + " | ".join([*cells, "" if gap is None else said(gap)]) + " |")
    return "\n".join(["## A published figure\n", PUBLISHED, "", *lines, ""])


PUBLISHED = """nanoGPT's readme gives a validation loss of 1.88 for characters of Shakespeare on a CPU: 4 layers, 4 heads, width 128, 64 characters of
context, 2,000 steps of 12 sequences. `dense` has these settings, `dense-tuned` the best rate of those tried. Low-rank rows will take
as many steps as give them the same training FLOPs. "Against dense" compares perplexities."""


STARTS = {"": "Blocks that begin as the identity", "drawn": "Outputs as they are drawn"}
"""Folder of results -> what its runs start from."""


def both_starts() -> str:
    """What zero outputs change, for each row and rate that was trained from both starts with the first seed."""
    lines = ["| size, text | row | rate | as drawn | zero outputs | |", "|" + "---|" * 6]
    for size, text in itertools.product(SIZES, TEXTS):
        zero, drawn = (lines_of(RESULTS / folder / f"{size}-{text}.jsonl") for folder in STARTS)
        for run in zero.values():
            other = drawn.get(run["run"])
            if other is None or run["seed"] != SEEDS[0] or run["shape"] != other["shape"]:
                continue
            losses = [one["validation_loss_nats_per_token"] for one in (other, run)]
            change = said(mean_interval([losses[1] - losses[0]]))
            cells = [
                f"{size}, {text}",
                run["row"],
                f"{run['settings']['lr']:g}",
                *(f"{math.exp(x):.2f}" for x in losses),
                change,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def page() -> str:
    """docs/study.md."""
    parts = [(Path(__file__).with_name("page.md")).read_text(encoding="utf-8"), both_starts()]
    for folder, title in STARTS.items():
        found: dict[str, dict[str, Mapping[str, Row]]] = {}
        parts.append(f"## {title}\n")
        for size, text in itertools.product(SIZES, TEXTS):
            if rows := rows_of([*lines_of(RESULTS / folder / f"{size}-{text}.jsonl").values()]):
                seconds = seconds_of(size)
                found.setdefault(text, {})[size] = rows
                name = "-".join(filter(None, ["study", folder, size, text])) + ".svg"
                write_whole(DOCS / name, picture(rows, f"{size}, {text}: validation loss against training FLOPs"))
                heading = f"### {size}, {text}" + (", as drawn" if folder else "")
                parts.append(f"{heading}\n\n![Loss against FLOPs]({name})\n\n{table(rows, seconds)}\n")
                sentences = [*verdict(rows), *filter(None, [at_equal_time(rows, seconds)])]
                parts += [" ".join(sentences) + "\n"] if sentences else []
        parts += filter(None, (over_sizes(text, sizes) for text, sizes in found.items()))
    if nano := rows_of([*lines_of(RESULTS / "nano-shakespeare.jsonl").values()]):
        parts.append(published(nano))
    return "\n".join(parts)


if __name__ == "__main__":
    write_whole(DOCS / "study.md", page())
