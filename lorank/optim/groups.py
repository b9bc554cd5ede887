"""Which parameters of a model a low-rank optimizer projects: the matrices of its blocks, never embeddings or the head."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorank.conversion import Patterns, choose_sites, linear_layers
from lorank.parametrization import Rank, check_rank, check_table, rank_at


def ranks(
    model: nn.Module, rank: Rank, *, targets: Patterns = None, exclude: Patterns = None
) -> dict[nn.Parameter, int]:
    """The rank of each matrix that is projected, at most its narrower side.

    Raises:
        ValueError: the rank is none, or a pattern matches nothing.
    """
    check_rank(rank)
    chosen = choose_sites(linear_layers(model), targets, exclude)
    check_table(rank, chosen)
    found = {}
    for site in chosen:
        parameter = model.get_submodule(site.name).weight
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
            found[parameter] = min(rank_at(rank, site), site.d_in, site.d_out)
    return found


def split(groups: Iterable[dict[str, Any]], ranks: dict[nn.Parameter, int]) -> list[dict[str, Any]]:
    """The groups, each taken apart by rank; those with a rank come first."""
    taken: dict[tuple[int, int | None], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            key = (index, ranks.get(p))
            taken.setdefault(key, {**group, "params": [], "rank": key[1]})["params"].append(p)
    return sorted(taken.values(), key=lambda group: group["rank"] is None)


def low_rank_groups(
    model: nn.Module, rank: Rank, *, targets: Patterns = None, exclude: Patterns = None
) -> list[dict[str, Any]]:
    """Parameter groups of a model for any optimizer of `lorank.optim`: ``{"params", "rank"}``, rank None for the rest.

    `rank`, `targets` and `exclude` mean what they do in `lorank.convert`: an integer, a fraction of the narrower side or a
    table; regular expressions on names of linear layers.

    Raises:
        ValueError: the rank is none, or a pattern matches nothing.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return split([{"params": trained}], ranks(model, rank, targets=targets, exclude=exclude))
