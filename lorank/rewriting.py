"""Putting other modules in the place of a model's projections, and what was recorded about it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lorank.architectures import ACTIVATIONS
from lorank.fusion import with_fused
from lorank.method import Method, Site, by_role
from lorank.sites import blocks


def rewrite(model: nn.Module, method: Method, sites: Sequence[Site], names: Mapping[str, str] | None = None) -> None:
    """Replace projections of `model` by what `method` builds; all of them or, if it raises, none.

    `names` tells where in this model a site is that goes by the name it has in another.
    """
    names = names or {}
    replacements: dict[str, nn.Module] = {}
    for stack in by_role(sites).values():
        for site, module in zip(stack, method.build_stack(stack), strict=True):
            replacements[names.get(site.name, site.name)] = module.train(site.linear.training)
            module.stands_for_linear = True  # type: ignore[assignment]

    before = {module: dict(module._modules) for module in model.modules()}
    try:
        for name, module in with_fused(model, replacements):
            put(model, name, module)
        method.finish(model)
    except BaseException:
        for module, children in before.items():
            module._modules = children
        raise


def drop_activations(model: nn.Module, fed_by: Callable[[str, nn.Module], bool]) -> None:
    """Replace the non-linearity that a block has of its own (its SiLU, GELU, ...) by the identity.

    Only in blocks with a projection of which `fed_by(name, module)` holds; a block left dense needs its activation.

    Raises:
        ValueError: such a block has none that is a module of transformers or torch, so it cannot be found; nothing is
        changed.
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
                f"found no activation module in {stack}.{depth}; use nonlinearity='both' with this architecture"
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
