"""Replacing the projections of a model by other modules, and what was recorded about it."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorank.architectures import ACTIVATIONS, copied
from lorank.experts import with_parts
from lorank.fusion import with_fused
from lorank.hooks import expect_hook
from lorank.method import Method, Site
from lorank.rounding import is_narrow
from lorank.sites import blocks

REWRITTEN: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models that live and were rewritten, of which others may hold the parameters without the modules (an exported graph)."""


def rewrite(model: nn.Module, method: Method, sites: Sequence[Site], names: Mapping[str, str] | None = None) -> None:
    """Replace projections of `model` by what `method` builds: all of them or, if it raises, none.

    `names` gives the place in this model of sites that are named as in another model.

    Layers draw their initial values when they are built. They could not do so here, after a whole stack is built, because
    the order of random draws, and with it every recorded curve, would change.
    """
    names = names or {}
    replacements: dict[str, nn.Module] = {}
    of_experts: dict[str, nn.Module] = {}
    for stack in method.stacks(sites):
        probe = None if not method.keeps_outputs or stack[0].linear.weight.is_meta else _probe(stack[0].linear)
        built = method.build_stack(stack)
        if probe is not None:
            _check_outputs(method, stack[0], built[0], *probe)
        for site, module in zip(stack, built, strict=True):
            found = of_experts if site.experts else replacements
            found[names.get(site.name, site.name)] = module
            setattr(module, "stands_for_experts" if site.experts else "stands_for_linear", True)

    before = {module: dict(module._modules) for module in model.modules()}
    REWRITTEN.add(model)
    try:
        for name, module in [*with_fused(model, replacements), *_with_experts(model, of_experts)]:
            put(model, name, module.train(model.get_submodule(name).training))
        method.finish(model)
    except BaseException:
        for module, children in before.items():
            module._modules = children
        raise
    if method.has_hook:
        expect_hook(model, method.name)


@torch.no_grad()
def _probe(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Two inputs [2, d_in] and their outputs, taken before a method may change the dense layer in place (SwitchLoRA)."""
    weight = linear.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
    return x, linear(x).float()


@torch.no_grad()
def _check_outputs(method: Method, site: Site, module: nn.Module, x: Tensor, expected: Tensor) -> None:
    """Raises ValueError if a layer of a method that keeps outputs computes something else than the dense layer."""
    error = _error(module, x, expected)
    if error <= _allowed(x.dtype):
        return
    advice = "exclude it, or use another architecture or other settings"
    if is_narrow(x.dtype) and _holds_in_float32(method, site):  # W - s B A + s B A, where s B A is much larger than W
        advice = (
            "16 bits round away weights that are much smaller than the terms which the method adds; convert the model in float32"
            + (" or lower alpha" if hasattr(method, "alpha") else "")
        )
    raise ValueError(
        f"{method.name} must start as the dense model, but its layer for {site.name} differs by {error:.1%} in {x.dtype}; {advice}"
    )


def _allowed(dtype: torch.dtype) -> float:
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def _error(module: nn.Module, x: Tensor, expected: Tensor) -> float:
    training = module.training
    found = module.eval()(x).float()
    module.train(training)
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).nan_to_num(math.inf).item()


def _holds_in_float32(method: Method, site: Site) -> bool:
    """Whether the method starts as a dense layer of this shape and size in float32. Draws none of the caller's random numbers."""
    devices = [site.linear.weight.device] if site.linear.weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        precise = site._replace(linear=copied(site.linear).float())
        probe = _probe(precise.linear)
        return _error(method.build_stack([precise])[0], *probe) <= _allowed(torch.float32)


def _with_experts(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of experts with these layers in them."""
    modules = dict(model.named_modules())
    gathered: dict[str, dict[str, nn.Module]] = {}
    for name, layer in replacements.items():
        owner, part = (name, "") if name in modules else (name.rpartition(".")[0], name.rpartition(".")[2])
        gathered.setdefault(owner, {})[part] = layer
    for owner, parts in gathered.items():
        yield owner, with_parts(modules[owner], owner, parts)


def drop_activations(model: nn.Module, fed_by: Callable[[str, nn.Module], bool]) -> None:
    """Replace a block's own non-linearity (its SiLU, GELU, ...) by the identity.

    This is done only in blocks with a projection for which `fed_by(name, module)` holds; a dense block needs its activation.

    Raises:
        ValueError: no activation module of transformers or torch is found in one of these blocks. The model is then unchanged.
    """
    found = []
    for stack, depth, block in blocks(model):
        if not any(fed_by(name, module) for name, module in block.named_modules()):
            continue
        gates = [name for name, module in block.named_modules() if fed_by(name, module)]
        own = [
            f"{stack}.{depth}.{name}"
            for name, module in block.named_modules()
            if isinstance(module, ACTIVATIONS) and any(gate.startswith(name.rpartition(".")[0]) for gate in gates)
        ]
        if not own:
            raise ValueError(
                f"{stack}.{depth} must have an activation module to remove, got none; use nonlinearity='both' with this architecture"
            )
        found += own
    for name in found:
        put(model, name, nn.Identity())


def converted_with(model: nn.Module) -> dict[str, Any] | None:
    """What `convert` recorded on a model (method, arguments, targets, exclude), or None for a dense one."""
    recorded = getattr(getattr(model, "config", None), "lorank", None)
    return recorded if recorded is not None else getattr(model, "_lorank", None)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its full name."""
    parent_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent_name), attribute, module)
