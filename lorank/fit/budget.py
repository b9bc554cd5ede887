"""One rank for each projection, so that all factors together fit a budget.

uniform      every matrix keeps the same part c of its parameters, for two factors  r = ⌊c m n / (m + n)⌋
energy       ranks go where they keep the most energy per parameter, as `lorank analyze --budget` chooses them
break-even   the largest rank at which the form is smaller than the matrix; no budget
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from lorank.analysis.ranks import check_budget, suggest_ranks, table_of
from lorank.fit.structure import Structure
from lorank.method import Site

Policy = Literal["uniform", "energy", "break-even"]


def check_policy(structure: Structure, policy: str, budget: float | str | None) -> None:
    """Raises ValueError for an unknown policy, or one that the structure has not, or a budget that it does not use."""
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be 'uniform', 'energy' or 'break-even', got {policy!r}")
    if policy == "energy" and not structure.has_spectrum:
        raise ValueError(
            f"policy must be 'uniform' or 'break-even' with {structure.name}, because singular values do not give its error, got 'energy'"
        )
    if policy == "break-even" and budget is not None:
        raise ValueError(f"budget must be left out with policy 'break-even', which has none, got {budget}")


def choose_ranks(
    structure: Structure,
    sites: Sequence[Site],
    budget: float | str | None,
    policy: Policy,
    spectra: Callable[[], Mapping[str, Tensor]],
) -> dict[str, int]:
    """The rank of each projection, by name.

    Args:
        budget: a part of the parameters of these matrices such as 0.5, or a number of parameters such as "10M".
        spectra: gives the singular values of what the factors of each projection approximate; called for policy "energy".

    Raises:
        ValueError: a budget that cannot be read, or that no ranks fit.
    """
    shapes = [(site.d_in, site.d_out) for site in sites]
    members = {site.name: len(group) for group in structure.gathered(sites) for site in group}

    def within(site: Site, room: float) -> int:
        return max(1, structure.rank_within(room, site.d_in, site.d_out, members[site.name]))

    def cost(rank: int) -> int:
        """Parameters if all projections have that rank."""
        return sum(structure.parameters(rank, site.d_in, site.d_out, members[site.name]) for site in sites)

    if policy == "break-even":
        return {site.name: within(site, site.d_in * site.d_out - 1) for site in sites}
    wanted = check_budget(str(budget), shapes)
    if cost(1) > wanted:
        raise ValueError(
            f"budget must be at least {cost(1):,} parameters with these settings of {structure.name}, got {budget} ({wanted:,})"
        )
    if policy == "energy":
        values = spectra()
        described = [
            {
                **site._asdict(),
                "d_in": site.d_in,
                "d_out": site.d_out,
                "output": {"singular_values": values[site.name].tolist()},
            }
            for site in sites
        ]
        return suggest_ranks(described, str(wanted - cost(0)) if cost(0) else str(budget)).ranks
    part = wanted / sum(d_in * d_out for d_in, d_out in shapes) * (1 + 1e-12)
    return {site.name: within(site, part * site.d_in * site.d_out) for site in sites}


def table(sites: Sequence[Site], ranks: Mapping[str, int]) -> int | dict[str, int]:
    """These ranks as the setting of a method: one number if they are equal, else {pattern: rank}."""
    if len(set(ranks.values())) == 1:
        return next(iter(ranks.values()))
    described: list[dict[str, Any]] = [site._asdict() for site in sites]
    return table_of(described, [ranks[site.name] for site in sites])
