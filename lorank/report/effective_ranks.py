"""Effective ranks by kind of matrix, projection and depth, and the terminal's table of them."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.table import Table

Results = Mapping[str, Any]
Found = Mapping[str, Any]
Pick = Callable[[Found], Any]
ROWS = 12
"""Depths in the terminal's table."""


def short_names(roles: Iterable[str]) -> dict[str, str]:
    """Roles by the shortest ends of their names that are distinct.

    >>> list(short_names(["h.*.attn.c_proj", "h.*.attn.c_attn", "h.*.mlp.c_proj"]).values())
    ['attn.c_proj', 'c_attn', 'mlp.c_proj']
    """
    parts = {role: role.split(".") for role in roles}

    def short(role: str) -> str:
        for number in range(1, len(parts[role]) + 1):
            if sum(other[-number:] == parts[role][-number:] for other in parts.values()) == 1:
                return ".".join(parts[role][-number:])
        return role

    return {role: short(role) for role in parts}


class Quantity:
    """One kind of matrix: its name, and its r(α) / width at every projection and depth."""

    def __init__(self, name: str, results: Results, pick: Pick, rank: str = "rank"):
        self.name = name
        self.by_role: dict[str, dict[int, float]] = {}
        for one in results["projections"]:
            if (spectrum := pick(one)) is not None:
                self.by_role.setdefault(one["role"], {})[one["depth"]] = spectrum[rank] / spectrum["width"]

    def mean(self, role: str | None = None) -> float:
        """Mean over depths, of one role or of all; NaN if there is none."""
        values = [v for one, row in self.by_role.items() if role in (None, one) for v in row.values()]
        return statistics.fmean(values) if values else math.nan


def gradients(results: Results) -> dict[str, Pick]:
    """Name -> how to find it: gradients of W, or of each factor."""
    labels = sorted({label for one in results["projections"] for label in one["gradients"]})

    def pick(label: str) -> Pick:
        return lambda one: one["gradients"].get(label)

    return {"gradients" if labels == ["W"] else f"gradients of {label}": pick(label) for label in labels}


def quantities(results: Results) -> dict[str, Quantity]:
    """The quantities to show, in their order."""
    found = {
        "output": Quantity("outputs", results, lambda one: one["output"]),
        "input": Quantity("inputs", results, lambda one: one["input"]),
        "weight": Quantity("weights", results, lambda one: one["weight"]),
    }
    for name, pick in gradients(results).items():
        found[name] = Quantity(name, results, pick)
    found["difference"] = Quantity("Y − βY′", results, lambda one: one["difference"])
    found["rest"] = Quantity("  to Y's error", results, lambda one: one["difference"], "rank_at_output_error")
    return {key: one for key, one in found.items() if one.by_role}


def analysis_table(results: Results) -> Table:
    """Mean over depths of every quantity, then the outputs depth by depth; one column per projection."""
    found = quantities(results)
    names = short_names(dict.fromkeys(one["role"] for one in results["projections"]))
    shown = Table(
        title=f"r({results['alpha']:g}) in percent of the width, over {results['tokens']:,} tokens of {results['text']}",
        caption="means over blocks, then outputs by block; Y′ is Y one block before",
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
    )
    shown.add_column("")
    for name in names.values():
        shown.add_column(name, justify="right")
    role_of = {one["name"]: one["role"] for one in results["projections"]}
    reads = {one["role"]: role_of[one["reads"]] for one in results["projections"]}
    for key, one in found.items():
        shown.add_row(one.name, *(in_percent(one.mean(reads[role] if key == "input" else role)) for role in names))
    outputs = found["output"].by_role
    depths = sorted({depth for row in outputs.values() for depth in row})
    shown.add_section()
    step = max(1, math.ceil(len(depths) / ROWS))
    for depth in depths[::step]:
        shown.add_row(f"block {depth}", *(in_percent(outputs.get(role, {}).get(depth, math.nan)) for role in names))
    return shown


def budget_line(results: Results) -> str:
    """What the suggested ranks cost, as a phrase."""
    found, left = results["suggestion"], sum(results["left_out"].values())
    part = found["parameters"] / found["dense_parameters"] * 100
    others = [one["role"] for one in results["projections"] if one["name"] not in found["ranks"]]
    return (
        f"{found['parameters']:,} parameters in the factors, {part:.1f} % of the dense matrices'"
        + (f"; {', '.join(dict.fromkeys(others))} cannot be replaced and stay dense" if others else "")
        + (f"; {left:,} parameters of matrices that were left out stay as they are" if left else "")
    )


def loss_line(suggestion: Found) -> str:
    """What the suggested ranks lose, compared with a uniform rank, in two sentences."""
    lost, uniform = suggestion["lost"], suggestion["uniform_lost"]
    return (
        f"These ranks lose {in_percent(lost['mean'])} % of output energy on average (worst projection: "
        f"{in_percent(lost['worst'])} %). A uniform rank of {suggestion['uniform_rank']} at the same cost loses "
        f"{in_percent(uniform['mean'])} % (worst: {in_percent(uniform['worst'])} %)."
    )


def in_percent(value: float) -> str:
    """In percent, without the sign; two digits at least.

    >>> in_percent(0.0312), in_percent(0.312)
    ('3.1', '31')
    """
    return "—" if math.isnan(value) else f"{value * 100:.{0 if value >= 0.0995 else 1}f}"
