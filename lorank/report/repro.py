"""Reproductions on the terminal: which there are, what one takes and expects, and how it came out."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorank.accelerators import Fleet, find_accelerator
from lorank.plan.counts import Counts
from lorank.race import repro
from lorank.report.tables import quantity

VERDICT = {True: Text("within", "green"), False: Text("OUTSIDE", "bold red"), None: Text("not judged", "dim")}


def list_table(found: list[repro.Reproduction]) -> RenderableType:
    """One line for each: tokens, the published figure, and how near to it a run is to come; then remarks."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "tokens", "perplexity", "within", "reported by"):
        table.add_column(
            title, justify="right" if title in ("tokens", "perplexity", "within") else "left", no_wrap=True
        )
    for one in found:
        p = one.published
        perplexity = "-" if p.perplexity is None else f"{p.perplexity:.2f}"
        table.add_row(one.name, quantity(_positions(one)), perplexity, _band(p.tolerance), p.source)
    remarks = [Text(f"{one.name}: {one.published.remark}", "dim") for one in found if one.published.remark]
    return Group(
        table,
        "",
        *remarks,
        "",
        "Tokens count padding. Perplexities are the papers', on C4 by their own evaluator; none was reproduced here. "
        f"Within {_band(repro.IN_FULL)}: the paper gives all settings, and groups that report the same baseline differ by up to "
        f"3.3 %. Within {_band(repro.IN_PART)}: it does not, and a wrong learning rate costs about that.",
        "",
        "lorank repro NAME shows one, --out DIR runs it, --first-steps tries it in seconds on a CPU.",
    )


def _positions(one: repro.Reproduction) -> int:
    return one.recipe.steps * one.recipe.batch_size * one.recipe.sequence_length


def _band(tolerance: float | None) -> str:
    return "-" if tolerance is None else f"{tolerance * 100:g} %"


def card(one: repro.Reproduction, counts: Counts) -> RenderableType:
    """The recipe in full, what it takes, and what is expected."""
    flops, h100 = counts.flops_per_token * _positions(one), find_accelerator("h100")
    hours = Fleet(accelerator=h100, devices=1).run(flops, one.recipe.precision).hours
    settings = Table(box=None, pad_edge=False, show_header=False)
    shown = {name: value for name, value in one.recipe.to_dict().items() if value not in (None, [], {})}
    for name, value in shown.items():
        settings.add_row(name, str(value))
    micro = one.recipe.micro_batch_size
    return Group(
        settings,
        "",
        f"needs: a GPU with {counts.memory.peak_bytes / 2**30:.0f} GiB (counted; less with --micro-batch-size below {micro}), "
        f"the hub for C4 and the tokenizer, and {flops:.2g} FLOPs: {hours:.1f} h on {h100.name} if it reached 40 % of its peak, "
        "of which so small a model falls short",
        f"expected: {expectation(one)}",
        f"run it: lorank repro {one.name} --out runs/{one.name}",
    )


def expectation(one: repro.Reproduction) -> str:
    """What is published, whose it is, and how near to it a run is to come."""
    p = one.published
    if p.perplexity is None:
        return f"nothing is published at this size on C4: {p.source} {p.remark}"
    judged = f"to be met within {_band(p.tolerance)}" if p.tolerance else "to look at, not to be met"
    return f"perplexity {p.perplexity} ({p.source}), {judged}{f': {p.remark}' if p.remark else ''}"


def outcome_table(outcome: repro.Outcome) -> RenderableType:
    """The perplexities on the way and at the end, and whether the end is as published."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "here", "published", "difference", "within", ""):
        table.add_column(title, justify="left" if not title else "right")
    for step, perplexity in outcome.evaluations:
        table.add_row(f"step {step:,}", f"{perplexity:.2f}", "", "", "", "")
    p = outcome.expected
    difference = "" if outcome.difference is None else f"{outcome.difference * 100:+.1f} %"
    published = "-" if p.perplexity is None else f"{p.perplexity:.2f}"
    end = (f"{outcome.perplexity:.2f}", published, difference, _band(p.tolerance), VERDICT[outcome.within])
    table.add_row("the end", *end, style="bold")
    table.add_row("  unbiased", f"{outcome.unbiased:.2f}", "", "", "", "")
    source = f"Published: {p.source}{f'; {p.remark}' if p.remark else ''}."
    return Group(table, "", "Perplexity as the papers' evaluator has it: sum of N batch losses / (N + 1).", source)


def changes_table(changes: Mapping[str, tuple[Any, Any]]) -> Table:
    """What a miniature changes; all else is the recipe's."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("changed for the first steps", "recipe", "here"):
        table.add_column(title, overflow="fold")
    for name, (before, after) in changes.items():
        table.add_row(name, "-" if before is None else str(before), "-" if after is None else str(after))
    return table


def curve_table(found: repro.Curve, expected: repro.Curve) -> Table:
    """Every third loss beside the recorded one, and that of the validation text."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("nats per token", "here", "recorded", "difference"):
        table.add_column(title, justify="left" if title == "nats per token" else "right")
    for i, (ours, theirs) in enumerate(zip(found.losses, expected.losses, strict=True), 1):
        if i == len(found.losses) or i % 3 == 1:
            name = "validation" if i == len(found.losses) else f"step {i}"
            table.add_row(name, f"{ours:.4f}", f"{theirs:.4f}", f"{(ours / theirs - 1) * 100:+.3f} %")
    return table


def first_steps_line(one: repro.Reproduction, found: repro.Curve, expected: repro.Curve) -> Text:
    """Name, the largest difference and where, and the verdict; a curve that is off with the versions that may be to blame."""
    (worst, step), tolerance = repro.deviation(found, expected), repro.tolerance_of(one.recipe)
    where = " on the validation text" if step > repro.STEPS else f" at step {step}" if worst else ""
    verdict = VERDICT[worst <= tolerance]
    line = Text.assemble(
        f"{one.name:16}loss {found.losses[0]:.3f} to {found.losses[-1]:.3f}, ",
        f"at most {worst * 100:.2g} % from the recorded curve{where}: ",
        verdict,
        f" {_band(tolerance)}",
    )
    if worst > tolerance and found.versions != expected.versions:
        other = ", ".join(
            f"{k} {v} (here {found.versions.get(k)})"
            for k, v in expected.versions.items()
            if found.versions.get(k) != v
        )
        line.append(f"; recorded with {other}")
    return line
