"""Parameter groups of a language model: what decays, what is a hidden matrix, and what is projected at which rank."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorank.fields import Rank, check_value
from lorank.layers import Gate
from lorank.method import Patterns, Site, check_table, rank_at, rank_within
from lorank.sites import choose_sites, expert_stacks, linear_layers, other_matrices, shares

Decay = Literal["matrices", "all"]


def plain_groups(model: nn.Module, weight_decay: float, decay: Decay = "matrices") -> list[dict[str, Any]]:
    """The trained parameters of a model as ``{"params", "weight_decay"}``, matrices of the blocks first.

    With decay="matrices" hidden matrices and the head decay, while norms, biases and embeddings do not; with "all"
    everything does.
    """
    outside = _outside(model)
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            decays = decay == "all" or not (p.ndim < 2 or p in embeddings)
            found.setdefault((p.ndim != 2 or p in outside, weight_decay if decays else 0.0), []).append(p)
    order = sorted(found, key=lambda key: key[0])  # else as the model has them; saved states count on this order
    return [{"params": found[key], "weight_decay": key[1]} for key in order]


def hidden_matrices(model: nn.Module, *, experts: bool = True) -> set[nn.Parameter]:
    """The weights [m, n] that are neither embedding nor head, and with `experts` the weights [E, m, n] of a mixture's experts.
    Biases of experts, which are [E, m], and gates inside layers are not among them."""
    outside, biases = _outside(model), {p for name, p in model.named_parameters() if name.endswith("bias")}
    gates = {p for module in model.modules() if isinstance(module, Gate) for p in module.parameters()}
    matrices = {p for p in model.parameters() if p.ndim == 2} - outside - biases - gates
    return matrices | (expert_stacks(model).keys() if experts else set())


def transposed(model: nn.Module) -> set[nn.Parameter]:
    """Weights that are kept as [d_in, d_out]: GPT-2's, and experts' of some architectures."""
    layers = {module.weight for module in model.modules() if isinstance(module, Conv1D)}
    kinds = [
        m for m in model.modules() if getattr(m, "is_transposed", False) or type(m).__name__ == "Llama4TextExperts"
    ]
    return layers | {p for module in kinds for p in module.parameters(recurse=False) if p.ndim == 3}


def with_lengths(
    model: nn.Module, groups: Sequence[dict[str, Any]], length: Callable[[int, int], float]
) -> list[dict[str, Any]]:
    """The groups, those of matrices split so that an update has the length of d_out and d_in where a weight is kept transposed.

    That group has an ``lr_multiplier``, by which its weight decay is divided: a step takes as much of all weights.
    """
    turned, found = transposed(model), []
    for group in groups:
        by_times: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            m, n = p.shape[-2:] if p in turned else (1, 1)
            by_times.setdefault(length(n, m) / length(m, n), []).append(p)
        for times, some in by_times.items():
            scaled = {} if times == 1 else {"lr_multiplier": times, "weight_decay": group["weight_decay"] / times}
            found.append({**group, "params": some, **scaled})
    return found


def _outside(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of embeddings and head."""
    outside = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for module in (input_embeddings(model), getattr(model, "get_output_embeddings", lambda: None)()):
        if module is not None:
            outside |= set(module.parameters())  # may be one tensor
    return outside


def input_embeddings(model: nn.Module) -> Any:
    """The model's, as transformers names them; None if it names none, as for CLIP, which has two towers."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def ranks(
    model: nn.Module, rank: Rank, *, targets: Patterns = None, exclude: Patterns = None, experts: bool = True
) -> dict[nn.Parameter, int]:
    """The rank of each weight that is projected, at most its narrower side: the linear layers of the repeated blocks and the
    stacks of its experts, which in a converted model are their factors; never embeddings or the head.

    Raises:
        ValueError: the rank is not valid, there is no linear layer, or a pattern matches nothing.
    """
    check_value("rank", rank, Rank)
    if not (layers := linear_layers(model)):
        raise ValueError("the model's blocks have no linear layer whose gradient could be projected; use adamw or muon")
    stacks = expert_stacks(model) if experts else {}
    if experts and targets is None and exclude is None:
        _warn_of_others(model, stacks)
    by_name = {site.name: p for p, site in stacks.items()}
    chosen = choose_sites([*layers, *stacks.values()], targets, exclude)
    check_table(rank, chosen)
    found = {}
    for site in chosen:
        parameter = by_name[site.name] if site.name in by_name else model.get_submodule(site.name).weight
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
            found[parameter] = min(rank_at(rank, site), site.d_in, site.d_out)
    return found


def _warn_of_others(model: nn.Module, stacks: Mapping[nn.Parameter, Site]) -> None:
    """A UserWarning if matrices of the blocks that no linear layer applies, and are no known experts, are left to AdamW."""
    others = {role: each for role, each in other_matrices(model).items() if not role.endswith("bias")}
    found = shares(model, {role: [p for p in each.values() if p not in stacks] for role, each in others.items()})
    if (share := sum(found.values())) > 0.02:
        warnings.warn(
            f"AdamW moves {share:.1%} of the blocks' parameters, in matrices that no linear layer applies: {', '.join(found)}",
            stacklevel=4,
        )


def split(groups: Iterable[dict[str, Any]], ranks: dict[nn.Parameter, int]) -> list[dict[str, Any]]:
    """The groups, each split by rank; those with a rank come first, the others have rank None."""
    taken: dict[tuple[int, int | None], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            key = (index, ranks.get(p))
            taken.setdefault(key, {**group, "params": [], "rank": key[1]})["params"].append(p)
    return sorted(taken.values(), key=lambda group: group["rank"] is None)


def rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a group, whose lr may be a tensor, times its multiplier."""
    return float(group["lr"]) * group.get("lr_multiplier", 1.0)


def listed(params: Iterable[Any]) -> list[Any]:
    """Parameters or groups as a list; TypeError for a single tensor, which torch refuses too."""
    if isinstance(params, Tensor):
        raise TypeError("params must be a list of parameters or groups, got one tensor; give [tensor]")
    return list(params)


def says_rank(group: Any) -> bool:
    """Whether one of an optimizer's groups, or a bare parameter, says a rank or that it has none."""
    return isinstance(group, Mapping) and "rank" in group


def by_rank(group: dict[str, Any], rank: Rank | None) -> list[dict[str, Any]]:
    """A group that says no rank, as groups of its matrices by their rank and one of the rest; any other as it is.

    Raises:
        ValueError: the rank is not valid, or a table, which needs the names that a group does not have.

    Warns:
        UserWarning: a parameter has three dimensions. It could be the experts of a mixture, and only a model says so.
    """
    if rank is None or says_rank(group) or not _of_group(group):
        return [group]
    check_value("rank", rank, Rank)
    if isinstance(rank, Mapping | str):
        raise ValueError("rank must be a number here, because a table needs names; use lorank.optim.low_rank_groups")
    found: dict[int | None, list[Any]] = {}
    stacks = []
    for given in _of_group(group):
        p = given[1] if isinstance(given, tuple) else given  # torch takes (name, parameter) too
        shape = [*p.shape] if isinstance(p, Tensor) else []
        found.setdefault(rank_within(rank, min(shape)) if len(shape) == 2 else None, []).append(given)
        if len(shape) == 3 and 1 not in shape:
            stacks.append(shape)
    if stacks:
        more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
        warnings.warn(
            f"AdamW moves a parameter of shape {stacks[0]}{more}; if it holds a mixture's experts, let "
            "lorank.optim.low_rank_groups make the groups",
            stacklevel=2,
        )
    made = [{**group, "params": some, "rank": r} for r, some in found.items()]
    return sorted(made, key=lambda one: one["rank"] is None)


def _of_group(group: dict[str, Any]) -> list[Any]:
    given = group["params"]
    return [given] if isinstance(given, Tensor) else given if isinstance(given, list) else list(given)


def low_rank_groups(
    model: nn.Module, rank: Rank, *, targets: Patterns = None, exclude: Patterns = None
) -> list[dict[str, Any]]:
    """Parameter groups of a model for any projecting optimizer: ``{"params", "rank"}``, rank None for the rest.

    `rank`, `targets` and `exclude` mean what they do in `lorank.convert`: an integer, a fraction of the narrower side or
    a table; regular expressions on names of linear layers.

    Raises:
        ValueError: the rank is not valid, or a pattern matches nothing.
    """
    trained: Sequence[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    return split([{"params": trained}], ranks(model, rank, targets=targets, exclude=exclude))
