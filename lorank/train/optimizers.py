"""PyTorch's own optimizers over the parameters of a language model, with the groups that pre-training wants."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn


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


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on the hidden matrices and torch.optim.AdamW on everything else, as one optimizer.

    Muon's updates are scaled to AdamW's root mean square (``adjust_lr_fn="match_rms_adamw"``, arXiv 2502.16982), so
    that one learning rate, weight decay and schedule serve both. Both halves work on this object's `param_groups` and
    `state`: schedulers, ``state_dict`` and hooks see one optimizer.
    """

    def __init__(
        self,
        hidden: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        self._halves = (
            [torch.optim.Muon(hidden, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")] if hidden else []
        ) + ([torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps)] if others else [])
        self._sizes = [len(half.param_groups) for half in self._halves]
        super().__init__([group for half in self._halves for group in half.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for half, size in zip(self._halves, self._sizes, strict=True):
            half.param_groups = self.param_groups[start : start + size]
            half.state = self.state
            start += size

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("MuonAdamW evaluates no closure; call backward() before step()")
        for half in self._halves:
            half.step()
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()  # loading made new groups and a new state


def build_optimizer(
    model: nn.Module,
    name: Literal["adamw", "muon"],
    *,
    lr: float,
    weight_decay: float,
    decay: Literal["matrices", "all"] = "matrices",
    betas: Iterable[float] = (0.9, 0.999),
    eps: float = 1e-8,
    adamw: type[torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """AdamW in PyTorch's fused form, or `MuonAdamW`, over `parameter_groups`; `adamw` is a method's own AdamW."""
    hidden, others = parameter_groups(model, weight_decay, decay)
    beta1, beta2 = betas
    if adamw is not None:
        if name != "adamw":
            raise ValueError(f"optimizer={name!r}: the method needs {adamw.__name__}; take optimizer=adamw")
        return adamw(hidden + others, lr=lr, betas=(beta1, beta2), eps=eps)  # type: ignore[call-arg]
    if name == "muon":
        return MuonAdamW(hidden, others, lr=lr, betas=(beta1, beta2), eps=eps)
    return torch.optim.AdamW(hidden + others, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
