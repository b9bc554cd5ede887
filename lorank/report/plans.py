"""Dry runs and forecasts: tables for the terminal, narrow enough for 80 columns, and records for programs."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorank.report.markup import visible
from lorank.report.tables import quantity
from lorank.sizes import SIZES

if TYPE_CHECKING:
    from lorank.plan.counts import Counts
    from lorank.plan.dry_run import Plan
    from lorank.plan.fits import Depth, Fits
    from lorank.plan.forecast import Forecast

# ---- a dry run


def plan_tables(plan: "Plan") -> RenderableType:
    """Which module becomes what, what moves which parameter, then parameters, FLOPs and memory next to the dense twin's."""
    parts: list[RenderableType] = []
    if plan.rows:
        parts += [_modules(plan), ""]
    if plan.treatments:
        parts += [_treatments(plan), ""]
    totals = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "dense", "this recipe", "ratio") if plan.dense else ("", "this recipe"):
        totals.add_column(title, justify="left" if not title else "right")

    def line(label: str, of: Callable[["Counts"], float], show: Callable[[float], str]) -> None:
        ours = of(plan.model)
        if plan.dense is None:
            return totals.add_row(label, show(ours))
        dense = of(plan.dense)
        ratio = f"{ours / dense:.3f}" if dense else ""
        totals.add_row(label, show(dense), show(ours), ratio)

    count = lambda n: f"{n:,.0f}"  # noqa: E731

    def gib(size: float) -> str:
        return f"{size / 2**20:.2f} MiB" if size < 2**23 else f"{size / 2**30:.3f} GiB"

    line("parameters", lambda c: c.parameters.total, count)
    line("  in the blocks", lambda c: c.parameters.blocks, count)
    line("training FLOPs / token", lambda c: c.flops_per_token, quantity)
    if (extent := plan.extent) is not None:
        whole = lambda c: plan.positions * c.flops_per_token + extent.steps * c.step_flops  # noqa: E731
        line("training FLOPs, optimizer's too", whole, quantity)
    named = {"total": "memory", "peak": "memory at the peak of a step"}
    for part in ("weights", "gradients", "optimizer", "activations", "total", "peak"):
        line(named.get(part, f"  {part}"), partial(_bytes_of, part), gib)
    recomputed = "blocks recompute part of their forward pass; its FLOPs are counted" if plan.checkpoint else ""
    run = "" if extent is None else f"text: {visible(plan.text)}\n{extent}"
    note = Text("\n".join(filter(None, (recomputed, plan.population, run))))
    return Group(*parts, totals, note)


def _bytes_of(part: str, counts: "Counts") -> float:
    return getattr(counts.memory, f"{part}_bytes")


def _modules(plan: "Plan") -> Table:
    modules = Table(box=None, pad_edge=False, header_style="bold")
    modules.add_column("projection", overflow="fold")
    modules.add_column("×", justify="right")
    modules.add_column("in → out", no_wrap=True)
    modules.add_column("becomes", overflow="fold")
    modules.add_column("parameters, all depths", justify="right", no_wrap=True)
    for row in plan.rows:
        change = f"{row.parameters_before:,} → {row.parameters_after:,}"
        modules.add_row(row.role.partition(".*.")[2] or row.role, str(row.depths), row.before, row.after, change)
    return modules


def _treatments(plan: "Plan") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("parameter", "×", "shape", "stepped by"):  # names are there to be copied, so the last one wraps
        whole = title != "stepped by"
        table.add_column(title, overflow="fold", no_wrap=whole, justify="right" if title == "×" else "left")
    for row in plan.treatments:
        table.add_row(row.role, str(row.depths), row.shape, row.treatment)
    return table


# ---- forecasts


def _table(*columns: str) -> Table:
    """Names to the left, where long ones may wrap, figures to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))  # remarks may wrap
    return table


def _under(title: str, table: Table) -> Group:
    return Group(Text(title, "bold"), table)


def forecast_tables(found: "Sequence[Forecast]", fits: "Fits | None" = None) -> RenderableType:
    """Parameters and FLOPs, memory, the run, and what fits; a row for each forecast."""
    parts: list[RenderableType] = [_parameters(found), "", _flops(found), "", _memory(found), "", _run(found)]
    if any(f.traffic for f in found):
        parts += ["", _shared(found)]
    if any(f.file for f in found):
        parts = [_settings(found), "", *parts]
    if fits:
        parts += ["", _fits(found, fits)]
    return Group(*parts, "", *_assumptions(found), *(_fit_notes(fits) if fits else ()))


def _names(found: "Sequence[Forecast]") -> list[str]:
    files = [f.file for f in found if f.file]
    if files:
        stems = [Path(file).stem for file in files]
        return stems if len(set(stems)) == len(stems) else [_shape(file) for file in files]
    several = len({f.shape for f in found}) > 1
    return [f"{_shape(f.shape)} {f.title}" if several else f.title for f in found]


def _shape(name: str) -> str:
    """Of a path its last two parts are enough to tell it from others."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _first(found: "Sequence[Forecast]", one: "Forecast") -> "Forecast | None":
    """The dense row of the same shape."""

    def shape(f: "Forecast") -> tuple[Any, ...]:
        return f.shape, f.recipe.vocab_size, f.recipe.sequence_length

    return next((f for f in found if shape(f) == shape(one) and f.title == "dense"), None)


def _title(what: str, found: "Sequence[Forecast]") -> str:
    shapes = {f.shape for f in found}
    return f"{what}, {_shape(found[0].shape)}" if len(shapes) == 1 else what


def _settings(found: "Sequence[Forecast]") -> Group:
    """Where recipes differ that no other table says."""
    table = _table("method", "rank", "a step", "at a time", "precision", "optimizer")
    for name, f in zip(_names(found), found, strict=True):
        r, rank = f.recipe, "-" if f.rank is None else f"{f.rank:g}" if isinstance(f.rank, int | float) else f.rank
        rank = rank if isinstance(rank, str) else "table"
        step = f"{r.batch_size} × {r.sequence_length}"
        table.add_row(name, f.title, rank, step, str(r.micro_batch_size), r.precision, f.rule)
    return _under("Recipes, in sequences × tokens", table)


def _parameters(found: "Sequence[Forecast]") -> Group:
    table = _table("total", "trainable", "in the blocks", "÷ dense")
    for name, f in zip(_names(found), found, strict=True):
        dense = _first(found, f)
        ratio = f"{f.counts.parameters.total / dense.counts.parameters.total:.3f}" if dense else "-"
        table.add_row(name, *(f"{n:,}" for n in f.counts.parameters), ratio)
    return _under(_title("Parameters", found), table)


def _flops(found: "Sequence[Forecast]") -> Group:
    table = _table("forward", "backward", "again", "optimizer", "sum", "a step", "÷ dense")
    for name, f in zip(_names(found), found, strict=True):
        dense, each = _first(found, f), f.flops_per_step / f.tokens_per_step
        table.add_row(
            name,
            *(quantity(n / f.counts.tokens) if n else "-" for n in f.counts.flops),
            quantity(f.optimizer_flops / f.tokens_per_step) if f.optimizer_flops else "-",
            quantity(each),
            quantity(f.flops_per_step),
            f"{each * dense.tokens_per_step / dense.flops_per_step:.3f}" if dense else "-",
        )
    return _under("FLOPs per token, and of a step", table)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}" if size < 1000 * 2**30 else f"{size / 2**30:,.0f}"


def _memory(found: "Sequence[Forecast]") -> Group:
    r, title = found[0].recipe, "Memory of one device in GiB"
    several = not found[0].file and len({f.recipe.micro_batch_size for f in found}) > 1
    if not found[0].file:
        title += (
            f", {'' if several else f'{r.micro_batch_size} '}sequences of {r.sequence_length} at a time, {r.precision}"
        )
    rules = {f.rule for f in found}
    moments = "optimizer" if found[0].file or len(rules) > 1 else rules.pop()
    table = _table(*(["at a time"] if several else []), "weights", "gradients", moments, "activations", "peak", "when")
    for name, f in zip(_names(found), found, strict=True):
        m = f.counts.memory
        parts = (m.weights_bytes, m.gradients_bytes, m.optimizer_bytes, m.activations_bytes, m.peak_bytes)
        table.add_row(name, *([f"{f.recipe.micro_batch_size}"] if several else []), *map(_gib, parts), m.peak_when)
    return _under(title, table)


def _run(found: "Sequence[Forecast]") -> Group:
    budgets, fleets = {f.tokens for f in found}, {f.fleet.devices for f in found}
    on = name = found[0].fleet.accelerator.name
    if fleets != {1}:
        on = f"{max(fleets)} × {name}" if len(fleets) == 1 else f"{name} devices"
    title = f"A run of {quantity(found[0].tokens)} tokens on {on}" if len(budgets) == 1 else f"A run on {on}"
    more = [*(["tokens"] if len(budgets) > 1 else []), *(["devices"] if len(fleets) > 1 else [])]
    gather = any(f.gathered_bytes for f in found)
    table = _table(
        *more, "steps", "sent per step", *(["optimizer, FSDP2"] if gather else []), "time", "energy", "price", ""
    )
    for name, f in zip(_names(found), found, strict=True):
        hours, energy, dollars = f.run
        table.add_row(
            name,
            *([quantity(f.tokens)] if len(budgets) > 1 else []),
            *([str(f.fleet.devices)] if len(fleets) > 1 else []),
            f"{f.steps:,}",
            f"{quantity(f.all_reduce_bytes)}B" if f.fleet.devices > 1 else "-",
            *([f"{quantity(f.gathered_bytes)}B" if f.gathered_bytes else "-"] if gather else []),
            _duration(hours),
            f"{quantity(energy * 1000)}Wh" if energy >= 1 else f"{energy * 1000:.3g} Wh",
            f"${dollars:,.0f}" if dollars >= 100 else f"${dollars:.2f}",
            "" if f.fits else f"does not fit in {f.fleet.accelerator.memory_gib:g} GiB",
        )
    return _under(title, table)


def _shared(found: "Sequence[Forecast]") -> Group:
    """What devices that share a model send each other."""
    table = _table("dense", "between layers", "at bottleneck", "parameters on each")
    lines, several = [], len({(f.recipe.precision, f.counts.tokens) for f in found}) > 1
    for name, f in zip(_names(found), found, strict=True):
        assert f.traffic is not None
        t, size = f.traffic, (4 if f.recipe.precision == "fp32" else 2) * f.counts.tokens
        numbers = (t.dense, t.between, t.cut)
        table.add_row(name, *("-" if n is None else f"{n:,}" for n in (*numbers, t.parameters)))
        table.add_row("  GiB", *("" if n is None else f"{n * size / 2**30:.3f}" for n in numbers), "")
        if t.refusal:
            lines.append(f"{name} cannot be shared by {t.processes} devices: {t.refusal}.")
        if t.cut is not None and t.dense is not None and not t.pays:
            lines.append(
                f"{name}: not advised, because a cut at the bottleneck sends {t.cut / t.dense:.2f} times what the dense model does; it "
                f"sends less if the ranks of a block, here {t.cut:,} together, are below {t.dense:,} (7 r < 2 d)."
            )
    first = found[0]
    per = "a micro-batch" if several else f"{first.counts.tokens:,} tokens in {first.recipe.precision}"
    lines += [
        "As much again backward. At the bottleneck each norm adds one number a token. After the last block the width is gathered "
        "once; the final norm and the head are whole on each device, and so are bottlenecks, also those that cola-m keeps.",
        "The other tables are those of devices that have the whole model.",
    ]
    title = f"Shared by {first.traffic.processes if first.traffic else 0} devices: numbers sent per token and block, and for {per}"
    return Group(Text(title, "bold"), table, *map(Text, lines))


def _duration(hours: float) -> str:
    for unit, size in (("years", 24 * 365.25), ("days", 24), ("h", 1)):
        if hours >= 2 * size:
            return f"{hours / size:,.1f} {unit}"
    return (
        f"{hours * 60:.1f} min"
        if hours >= 1 / 20
        else f"{hours * 3600:,.0f} s"
        if hours >= 1 / 360
        else f"{hours * 3600:.2g} s"
    )


def _fits(found: "Sequence[Forecast]", fits: "Fits") -> Group:
    table = _table("micro-batch", "largest Llama", "this shape")
    for name, fit in zip(_names(found), fits.rows, strict=True):
        batch = f"{fit.micro_batch}{', all' if fit.is_whole else ''}" if fit.micro_batch else "none"
        more = "+" if fit.size == fits.largest else ""
        table.add_row(name, batch, f"{fit.size}{more}" if fit.size else "none", _depth(fit.depth))
    return _under(f"What fits in {fits.gib:g} GiB", table)


def _fit_notes(fits: "Fits") -> tuple[str, ...]:
    return (
        "Micro-batch: it divides a device's part of --batch-size; all: it is the whole part, and more of a larger batch might "
        "fit.",
        f"Models: with one sequence at a time and the row's method and settings. Llama: of the named sizes {', '.join(SIZES)}. "
        "This shape: its own widths with the most layers (-: their number cannot be set). +: the most that was tried, "
        f"{fits.largest} or {fits.deepest} times the shape's own layers.",
    )


def _depth(depth: "Depth | None") -> str:
    if depth is None:
        return "-"
    more = "+" if depth.is_bound else ""
    return f"{depth.layers}{more} layers, {quantity(depth.parameters)}" if depth.layers else "none"


def _assumptions(found: "Sequence[Forecast]") -> list[str]:
    fleet = max((f.fleet for f in found), key=lambda fleet: fleet.devices)
    a = fleet.accelerator
    known = {"fp32": "fp32 (multiplied in TF32)"}
    rates = {known.get(f.recipe.precision, "bf16"): a.rate(f.recipe.precision) for f in found}
    lines = [
        "Counted: FLOPs of matrix products and attention (again: recomputed); bytes of tensors, without a kernel's scratch "
        "memory and an allocator's waste.",
    ]
    for f in {f.title: f for f in found if f.left_dense}.values():
        part = sum(f.left_dense.values()) / f.counts.parameters.blocks
        lines.append(
            f"Dense in {f.title}, because no linear layer applies them: {', '.join(f.left_dense)}; {part:.1%} of its blocks."
        )
    if any(f.optimizer_flops for f in found):
        lines.append(
            "Optimizer: its own matrix products on all devices, divided by the tokens of a step, those of a refresh spread "
            "over the steps between two; eigenvectors, QR and Fourier transforms not counted."
        )
    if moving := list(dict.fromkeys(f.title for f in found if f.moves_between_steps)):
        lines.append(f"Not counted: what happens between the steps of {', '.join(moving)}.")
    if starting := list(dict.fromkeys(f.title for f in found if f.starts_dense)):
        lines.append(
            f"Every step of {', '.join(starting)} is counted as one of its warm start, in which all weights are trained."
        )
    if fleet.devices > 1:
        lines.append(f"Sent per step: 2 (p - 1) / p of the gradients' bytes, p = {fleet.devices} devices in a ring.")
    lines += [
        f"{a.name}, by its data sheet unless given: {', '.join(f'{rate / 1e12:,.10g} TFLOP/s in {name}' for name, rate in rates.items())}, "
        f"{a.memory_gib:g} GB, {a.watts:g} W.",
        f"Assumed: {fleet.utilisation:.0%} of that rate for every method (the narrow products of low-rank factors may reach "
        f"less), ${a.dollars_per_hour:.2f} per device and hour, full board power, no waiting for the network.",
    ]
    if found[0].budget_is_default:
        each = f"{found[0].tokens_per_parameter} for each parameter of the dense model"
        each = "those of each recipe's steps, padding included" if found[0].file else each
        lines.append(f"Tokens: {each}, unless --tokens, --steps or the like say otherwise.")
    return lines


# ---- for programs


def forecasts_json(found: "Sequence[Forecast]", fits: "Fits | None" = None) -> str:
    """One record for each forecast; its last entries say what fits."""
    return json.dumps({"forecasts": _records(found, fits)}, indent=2)


def forecasts_csv(found: "Sequence[Forecast]", fits: "Fits | None" = None) -> str:
    """The same, one line each below a line of names."""
    return records_csv(_records(found, fits))


def _records(found: "Sequence[Forecast]", fits: "Fits | None") -> list[dict]:
    rows = [f.to_dict() for f in found]
    for row, fit in zip(rows, fits.rows if fits else (), strict=False):
        layers, parameters, is_bound = fit.depth or (None, None, None)
        row |= {
            "fits_gib": fits.gib if fits else None,
            "largest_micro_batch": fit.micro_batch,
            "largest_micro_batch_is_a_devices_batch": fit.is_whole,
            "largest_llama_size": fit.size,
            "most_layers": layers,
            "most_layers_parameters": parameters,
            "most_layers_is_a_bound": is_bound,
        }
    return rows


def records_csv(rows: Sequence[dict]) -> str:
    """Records with the same keys as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")
