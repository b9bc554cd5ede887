"""Reproductions on the terminal: which there are, what one needs and expects, and how it came out.

Everything shown is a dictionary of `lorank.comparison.repro` or `lorank.comparison.first_steps`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorank.report.tables import quantity

VERDICT = {True: Text("within", "green"), False: Text("OUTSIDE", "bold red"), None: Text("not judged", "dim")}


def list_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each: tokens, the published figure, and how near to it a run should come; then remarks."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "tokens", "perplexity", "within"):
        table.add_column(title, justify="left" if title == "name" else "right", no_wrap=True, min_width=len(title))
    table.add_column("reported by", overflow="fold")
    for row in rows:
        perplexity = "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        table.add_row(row["name"], quantity(row["positions"]), perplexity, _band(row["tolerance"]), row["source"])
    tolerances = [row["tolerance"] for row in rows if row["tolerance"]]
    remarks = [Text(f"{row['name']}: {row['remark']}", "dim") for row in rows if row["remark"]]
    return Group(
        table,
        "",
        *remarks,
        "",
        "Tokens include padding. Perplexities are the papers', on C4 by their own evaluator; none was reproduced here. "
        f"Within {_band(min(tolerances))}: the paper gives all settings, and groups that report the same baseline differ by up to 3.3 %. "
        f"Within {_band(max(tolerances))}: it does not give all, and a wrong learning rate costs about that much.",
        "",
        "lorank repro NAME shows one, --out DIR runs it, --first-steps tries it in seconds on a CPU.",
    )


def _band(tolerance: float | None) -> str:
    return "-" if tolerance is None else f"{tolerance * 100:g} %"


def card(one: Mapping[str, Any]) -> RenderableType:
    """The recipe in full, what its run needs, and what is expected."""
    settings = Table(box=None, pad_edge=False, show_header=False)
    for name, value in one["settings"].items():
        settings.add_row(name, str(value))
    return Group(
        settings,
        "",
        f"needs: a GPU with {one['peak_bytes'] / 2**30:.0f} GiB (calculated; less with --micro-batch-size below "
        f"{one['micro_batch_size']}), the hub for C4 and the tokenizer, and {one['flops']:.2g} FLOPs: {one['hours']:.1f} h on "
        f"{one['accelerator']} at 40 % of its peak, which a model of this size does not reach",
        f"expected: {expectation(one)}",
        f"run it: lorank repro {one['name']} --out runs/{one['name']}",
    )


def expectation(published: Mapping[str, Any]) -> str:
    """What is published, by whom, and how near to it a run should come."""
    perplexity, tolerance, source, remark = (published[n] for n in ("perplexity", "tolerance", "source", "remark"))
    if perplexity is None:
        return f"unknown; {source} {remark}"
    judged = f"to be reached within {_band(tolerance)}" if tolerance else "for orientation, not to be reached"
    return f"perplexity {perplexity} ({source}), {judged}{f': {remark}' if remark else ''}"


def outcome_table(outcome: Mapping[str, Any]) -> RenderableType:
    """The perplexities during the run and at its end, and whether the end is as published."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "here", "published", "difference", "within", ""):
        table.add_column(title, justify="left" if not title else "right")
    for step, perplexity in outcome["evaluations"]:
        table.add_row(f"step {step:,}", f"{perplexity:.2f}", "", "", "", "")
    expected, gap = outcome["published"], outcome["difference"]
    published = "-" if expected["perplexity"] is None else f"{expected['perplexity']:.2f}"
    difference = "" if gap is None else f"{gap * 100:+.1f} %"
    end = (f"{outcome['perplexity']:.2f}", published, difference, _band(expected["tolerance"]))
    table.add_row("the end", *end, VERDICT[outcome["within"]], style="bold")
    table.add_row("  unbiased", f"{outcome['unbiased']:.2f}", "", "", "", "")
    remark = f"; {expected['remark']}" if expected["remark"] else ""
    note = "Perplexity by the papers' evaluator: sum of N batch losses / (N + 1)."
    return Group(table, "", note, f"Published: {expected['source']}{remark}.")


def changes_table(found: Mapping[str, Any]) -> Table:
    """What the miniature changes; all else is the recipe's."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("changed for the first steps", "recipe", "here"):
        table.add_column(title, overflow="fold")
    for name, (before, after) in found["changes"].items():
        table.add_row(name, "-" if before is None else str(before), "-" if after is None else str(after))
    return table


def curve_table(found: Mapping[str, Any]) -> Table:
    """Every third loss next to the recorded one, and that of the validation text."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("nats per token", "here", "recorded", "difference"):
        table.add_column(title, justify="left" if title == "nats per token" else "right")
    last = len(found["losses"])
    for i, (ours, theirs) in enumerate(zip(found["losses"], found["recorded"], strict=True), 1):
        if i == last or i % 3 == 1:
            name = "validation" if i == last else f"step {i}"
            table.add_row(name, f"{ours:.4f}", f"{theirs:.4f}", f"{(ours / theirs - 1) * 100:+.3f} %")
    return table


def first_steps_line(found: Mapping[str, Any]) -> Text:
    """Name, the largest difference and where, and the verdict; for a curve that is off, the versions that may explain it."""
    step, losses = found["step"], found["losses"]
    where = " on the validation text" if step > found["steps"] else f" at step {step}" if found["deviation"] else ""
    line = Text.assemble(
        f"{found['name']:16}loss {losses[0]:.3f} to {losses[-1]:.3f}, ",
        f"at most {found['deviation'] * 100:.2g} % from the recorded curve{where}: ",
        VERDICT[found["within"]],
        f" {_band(found['tolerance'])}",
    )
    if not found["within"] and found["versions"]:
        other = ", ".join(f"{name} {was} (here {here})" for name, (was, here) in found["versions"].items())
        line.append(f"; recorded with {other}")
    return line
