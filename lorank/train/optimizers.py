"""Optimizers over the parameters of a language model, with the groups that pre-training wants."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lorank.optim.galore import GaLoreAdamW
from lorank.optim.groups import split
from lorank.optim.matrices import adamw_bytes
from lorank.optim.muon_adamw import MuonAdamW, muon_flops
from lorank.optim.subspace import Subspace

Rule = Literal["adamw", "adamw-8bit", "adafactor", "muon"]


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: Literal["matrices", "all"]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(groups of hidden matrices, groups of the rest): lists of ``{"params", "weight_decay"}`` for torch.optim.

    Hidden matrices are the 2-D weights that are neither embedding nor head. With decay="matrices" they and the head
    decay, while norms, biases and embeddings do not; with "all" everything does.
    """
    outside = set()  # parameters of embeddings and head, which may be one tensor
    for lookup in (getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None)):
        if lookup is not None and (module := lookup()) is not None:
            outside |= set(module.parameters())
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}

    hidden: dict[float, list[nn.Parameter]] = {}
    others: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or parameter in embeddings
            decayed = weight_decay if decay == "all" or not plain else 0.0
            side = others if plain or parameter.ndim > 2 or parameter in outside else hidden
            side.setdefault(decayed, []).append(parameter)
    as_groups = lambda side: [{"params": params, "weight_decay": wd} for wd, params in side.items()]  # noqa: E731
    return as_groups(hidden), as_groups(others)


def adamw_8bit(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose moments of tensors from 4,096 numbers on take a byte each, with a scale per 256."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ImportError("optimizer=adamw-8bit needs bitsandbytes; pip install 'lorank[8bit]'") from None
    return AdamW8bit(groups, **settings)


def adafactor(groups: Any, *, betas: tuple[float, float], eps: float, **settings: Any) -> torch.optim.Optimizer:
    """torch's Adafactor, which has neither betas nor Adam's epsilon."""
    return torch.optim.Adafactor(groups, **settings)


def build_optimizer(
    model: nn.Module,
    name: Rule,
    *,
    lr: float,
    weight_decay: float,
    decay: Literal["matrices", "all"] = "matrices",
    betas: Iterable[float] = (0.9, 0.999),
    eps: float = 1e-8,
    adamw: type[torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of that name over `parameter_groups`; `adamw` is a method's own AdamW."""
    hidden, others = parameter_groups(model, weight_decay, decay)
    beta1, beta2 = betas
    check_rule(name, adamw=adamw)
    if adamw is not None:
        return adamw(hidden + others, lr=lr, betas=(beta1, beta2), eps=eps)  # type: ignore[call-arg]
    if name == "muon":
        hidden = [{**group, "momentum": 0.95} for group in hidden]
    return _RULES[name](hidden + others, lr=lr, betas=(beta1, beta2), eps=eps)


def check_rule(
    name: Rule, *, kind: type[torch.optim.Optimizer] | None = None, adamw: type[torch.optim.Optimizer] | None = None
) -> None:
    """Raises ValueError if it is another rule than AdamW, where a low-rank optimizer, or a method's AdamW, is one of its own."""
    if name == "adamw":
        return
    if adamw is not None:
        raise ValueError(f"optimizer={name!r}: the method needs {adamw.__name__}; take optimizer=adamw")
    if kind not in (None, GaLoreAdamW):
        raise ValueError(f"optimizer={name!r}: {kind.__name__} is an optimizer of its own; leave optimizer out")


def build_low_rank_optimizer(
    model: nn.Module,
    kind: type[torch.optim.Optimizer],
    ranks: dict[nn.Parameter, int],
    name: Rule = "adamw",
    *,
    lr: float,
    weight_decay: float,
    decay: Literal["matrices", "all"] = "matrices",
    betas: Iterable[float] = (0.9, 0.999),
    eps: float = 1e-8,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of `lorank.optim` over the same groups, of which `ranks` are projected.

    GaLore's basis goes with any rule; then `name` is the optimizer that works inside.

    Raises:
        ValueError: another optimizer than AdamW is asked for, and `kind` is one of its own.
    """
    hidden, others = parameter_groups(model, weight_decay, decay)
    settings = {"lr": lr, "betas": tuple(betas), "eps": eps, **(options or {})}
    groups = split(hidden + others, ranks)
    if name == "adamw":
        return kind(groups, **settings)
    check_rule(name, kind=kind)
    return Subspace(groups, _RULES[name], **settings)


_RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw-8bit": adamw_8bit,
    "adafactor": adafactor,
    "muon": MuonAdamW,
}


# ---- bytes of state


def _adamw_8bit_bytes(shape: Sequence[int], itemsize: int) -> int:
    numel = math.prod(shape)
    return 2 * numel * 4 if numel < 4096 else 2 * (numel + 4 * math.ceil(numel / 256)) + 2 * 256 * 4


def _adafactor_bytes(shape: Sequence[int], itemsize: int) -> int:
    factored = len(shape) > 1
    return itemsize * (math.prod(shape[:-1]) + math.prod([*shape[:-2], shape[-1]]) if factored else math.prod(shape))


def state_bytes(
    model: nn.Module,
    name: Rule = "adamw",
    kind: type[torch.optim.Optimizer] | None = None,
    ranks: Mapping[nn.Parameter, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Bytes that `build_optimizer`, or with a `kind` `build_low_rank_optimizer`, keeps between steps; counters left out."""
    rest = {"adamw-8bit": _adamw_8bit_bytes, "adafactor": _adafactor_bytes}.get(name, adamw_bytes)
    moment = lambda shape, itemsize: math.prod(shape) * itemsize  # noqa: E731 (Muon's)
    hidden, others = parameter_groups(model, 0.0, "all")
    total = 0
    for group, inside in ((hidden, moment if name == "muon" and kind is None else rest), (others, rest)):
        for p in (p for part in group for p in part["params"]):
            if kind is not None and ranks and p in ranks:
                chosen: Any = {**(options or {}), "moments": moment if name == "muon" else rest}
                total += _said_by(kind, "state_bytes")(*p.shape, ranks[p], p.element_size(), **chosen)
            else:
                total += inside(p.shape, p.element_size())
    return total


# ---- operations of a step


def _adafactor_flops(shape: Sequence[int]) -> int:
    return 2 * math.prod(shape) if len(shape) > 1 else 0  # the second moment, a column by a row


def step_flops(
    model: nn.Module,
    name: Rule = "adamw",
    kind: type[torch.optim.Optimizer] | None = None,
    ranks: Mapping[nn.Parameter, int] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    micro_batches: int = 1,
) -> float:
    """FLOPs of the matrix products in a step of what `build_optimizer`, or with a `kind` `build_low_rank_optimizer`, makes; those
    of some steps only are spread over all. AdamW has none. Decompositions (eigenvectors, QR) and transforms by FFT are left out.

    Raises:
        ValueError: a `kind` that does not say what it costs.
    """
    rest: Callable[[Sequence[int]], int] = _adafactor_flops if name == "adafactor" else lambda shape: 0
    matrices = muon_flops if name == "muon" else rest
    hidden, others = parameter_groups(model, 0.0, "all")
    total = 0.0
    for group, plain in ((hidden, rest if kind is not None else matrices), (others, rest)):
        for p in (p for part in group for p in part["params"]):
            if kind is not None and ranks and p in ranks:
                chosen: Any = {**(options or {}), "inside": matrices, "micro_batches": micro_batches}
                total += _said_by(kind, "step_flops")(*p.shape, ranks[p], **chosen)
            else:
                total += plain(p.shape)
    return total


def _said_by(kind: type[torch.optim.Optimizer], what: str) -> Callable[..., Any]:
    if (found := getattr(kind, what, None)) is None:
        raise ValueError(f"{kind.__name__} does not say what it costs; give it {what} as lorank/optim/galore.py has it")
    return found


def kept_gradients(
    kind: type[torch.optim.Optimizer] | None,
    ranks: Mapping[nn.Parameter, int] | None,
    options: Mapping[str, Any] | None,
) -> dict[nn.Parameter, tuple[int, int]]:
    """Shape of what waits for the step of each projected gradient, where an optimizer projects as gradients arrive."""
    shape: Any = getattr(kind, "kept_gradient", None)
    return {} if shape is None else {p: shape(*p.shape, rank, **(options or {})) for p, rank in (ranks or {}).items()}
