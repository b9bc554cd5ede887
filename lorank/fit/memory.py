"""What a fit holds in memory, from shapes alone: the model may be on the meta device.

    model     all parameters
    factors   what is found for all projections
    sums      16 Σ d_in² over the projections of one block, or of the blocks that are visited together: XᵀX and its root, in double precision

The last counts every projection as if it read an input that no other reads, so it is an upper bound. Activations of the text, one
projection's decomposition, and the copy of the model that a structure with `needs_parent` keeps are not among them.
"""

from typing import NamedTuple

from torch import nn

from lorank.conversion import sites_to_convert
from lorank.fit.budget import Policy, check_policy, choose_ranks
from lorank.fit.calibration import blocks_with, joined
from lorank.fit.door import as_structure
from lorank.fit.structure import Structure
from lorank.method import Patterns
from lorank.sites import places


class Needed(NamedTuple):
    """Bytes."""

    model: int
    factors: int
    sums: int

    @property
    def total(self) -> int:
        return sum(self)


def needed(
    model: nn.Module,
    method: Structure | type[Structure] | str,
    *,
    budget: float | str | None = None,
    policy: Policy = "uniform",
    targets: Patterns = None,
    exclude: Patterns = None,
) -> Needed:
    """Bytes that `lorank.fit` with text would hold; arguments as there, but policy "energy", which needs the weights.

    Raises:
        ValueError: as `lorank.fit`, or policy is "energy".
    """
    structure = as_structure(method)
    check_policy(structure, policy, budget)
    if policy == "energy":
        raise ValueError(
            "policy must be 'uniform' or 'break-even' here, because energy needs the weights, got 'energy'"
        )
    sites = sites_to_convert(model, structure.method(1), targets, exclude)
    structure = structure.before(model, [], sites)
    groups = structure.gathered(sites)
    ranks = choose_ranks(structure, sites, budget if budget is not None else structure.usual, policy, dict)
    factors = sum(
        structure.parameters(ranks[site.name], site.d_in, site.d_out, len(group)) * site.linear.weight.element_size()
        for group in groups
        for site in group
    )
    width = {site.name: site.d_in for site in sites}
    chain = blocks_with(model, [place for place in places(model) if place.name in width])
    visits = joined(chain, [[site.name for site in group] for group in groups])
    sums = max(16 * sum(width[place.name] ** 2 for place in visit.places) for visit in visits)
    return Needed(sum(p.nbytes for p in model.parameters()), factors, sums)
