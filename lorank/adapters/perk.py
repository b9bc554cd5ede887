"""PERK: a long text is written into an adapter by a few gradient steps, from a start that has learned to be written to.

    φ_0 = θ      φ_{n+1} = φ_n - α_n ∇ L(K; φ_n),   n = 0 … N-1          L the loss on segments of the text K, as one batch    (1)
    outer loss:  that of the answers at φ_N, without the text;  its gradient for θ and α goes through the last T steps only     (2)

Saves: activations of reading long texts.

θ and φ are {name: tensor}, such as `parameters_of` an adapter; a model computes with them by `called`. In (2) the gradient for θ is
(I - α_{N-T} H_{N-T}) … (I - α_{N-1} H_{N-1}) times that of the answers for φ_N, where H_n is the Hessian of L at φ_n: what is kept for it
grows with T and not with N. T = 0 is the first-order rule.

A step costs a forward and a backward pass over K, and each of the last T another two for its Hessian. Backward through them needs
attention that can be differentiated twice: load the model with ``attn_implementation="eager"``.

Source: Chen et al., "PERK: Long-Context Reasoning as Parameter-Efficient Test-Time Learning", arXiv 2507.06415, and the authors' code.

Confirmed in the authors' code: (1) and (2), N = 4 and T = 2, a LoRA of rank 256 with α = 16 and rank-stabilised scaling, learned α for each
parameter and step that begin at 5e-5, an outer rate of 1e-5. Departures. Their inner steps are AdamW's and weigh tokens by a small
network; here L is any function and steps are (1). They use the library `higher`, which is not maintained.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Parameters = Mapping[str, Tensor]
"""Some of a model's parameters, by name."""
Rate = float | Tensor | Mapping[str, Tensor]
"""α_n: one number, or one for each parameter, which may have that parameter's shape."""


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """θ: a model's parameters that train, as they are."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def called(model: nn.Module, phi: Parameters, *inputs: Any, **named: Any) -> Any:
    """What a model gives with `phi` in place of its parameters of these names."""
    return functional_call(model, dict(phi), inputs, named)


def written(
    loss: Callable[[dict[str, Tensor]], Tensor], theta: Parameters, rates: Sequence[Rate], *, kept: int | None = None
) -> dict[str, Tensor]:
    """φ_N of (1), differentiable in `theta` and `rates` through the last `kept` steps.

    Args:
        loss: L(K; φ), called once for each step.
        theta: where φ begins; it is not changed.
        rates: α_n for each of the N steps.
        kept: T; None: all steps.

    Raises:
        ValueError: `kept` is not from 0 to N.
    """
    steps = len(rates)
    kept = steps if kept is None else kept
    if not 0 <= kept <= steps:
        raise ValueError(f"kept must be from 0 to the {steps} steps, got {kept}")
    phi = dict(theta)
    for n, rate in enumerate(rates):
        if n < steps - kept:
            phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
            with torch.enable_grad():
                value = loss(phi)
            phi = _moved(phi, torch.autograd.grad(value, [*phi.values()]), rate, detached=True)
        else:
            if n == steps - kept:
                phi = _from(theta, phi)
            value = loss(phi)
            phi = _moved(phi, torch.autograd.grad(value, [*phi.values()], create_graph=True), rate)
    return phi if kept else _from(theta, phi)


def _moved(phi: Parameters, gradients: Sequence[Tensor], rate: Rate, *, detached: bool = False) -> dict[str, Tensor]:
    steps = {name: rate[name] if isinstance(rate, Mapping) else rate for name in phi}
    if detached:
        steps = {name: step.detach() if isinstance(step, Tensor) else step for name, step in steps.items()}
    return {name: p - steps[name] * g for (name, p), g in zip(phi.items(), gradients, strict=True)}


def _from(theta: Parameters, phi: Parameters) -> dict[str, Tensor]:
    """The values of `phi`, with the gradient that `theta` would have: the steps so far count as the identity."""
    return {name: phi[name].detach() + (p - p.detach()) for name, p in theta.items()}
