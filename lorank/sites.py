"""Where the projections of a model are: its repeated blocks, the linear maps in them, and the choice among these."""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorank.architectures import EXPERTS_CLASS, as_linear, dense_layer, is_linear, routers
from lorank.experts import split
from lorank.fields import compile_pattern
from lorank.fusion import fusion_of
from lorank.layers import Factor
from lorank.method import Method, Patterns, Site


def blocks(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """The repeated blocks of a model as (name of their list, depth, block), in the model's order.

    Blocks are the members of an outermost ``nn.ModuleList`` in which each member contains a linear map, or the layer that
    `rewrite` put there instead, and is not one itself. A list of heads or of embeddings does not count.
    """
    seen: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in seen)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and all(map(holds_linear, module)):
            seen.append(name)
            for depth, block in enumerate(module):
                yield name, depth, block


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear map inside the repeated blocks, in the model's order, except those from or to a single number.

    A matrix in which an architecture fuses several projections (GPT-2's query, key and value) gives one site for each of
    them, with its name appended: ``transformer.h.0.attn.c_attn.query``. One bottleneck for all three would be another
    method.
    """
    sites = []
    for site in linear_layers(model):
        fused = fusion_of(model, site.name)
        if fused is None:
            sites.append(site)
        else:
            name, role, depth, linear = site[:4]
            sites += [Site(f"{name}.{part}", f"{role}.{part}", depth, lin) for part, lin in fused.split(linear).items()]
    return sites


def linear_layers(model: nn.Module) -> list[Site]:
    """The same, but fused projections are one site. In a converted model its factors count."""
    return [
        Site(f"{stack}.{depth}.{inner}", f"{stack}.*.{inner}", depth, as_linear(module), routing.get(inner))
        for stack, depth, block in blocks(model)
        for routing in [routers(block)]
        for inner, module in block.named_modules()
        if (is_linear(module) or isinstance(module, Factor)) and 1 not in module.weight.shape
    ]


def expert_sites(model: nn.Module) -> list[Site]:
    """Every linear map of a mixture's experts, one site for all experts of a block: ``model.layers.3.mlp.experts.gate_proj``."""
    return [
        Site(
            f"{stack}.{depth}.{inner}.{part}".removesuffix("."),
            f"{stack}.*.{inner}.{part}".removesuffix("."),
            depth,
            dense_layer(layer.weight[0], None if layer.bias is None else layer.bias[0], module.training),
            experts=len(layer.weight),
        )
        for stack, depth, block in blocks(model)
        for inner, module in block.named_modules()
        for part, layer in split(module, inner).items()
    ]


def sites_of(method: Method, model: nn.Module, *, experts: bool = True) -> list[Site]:
    """The sites that a method can rewrite: linear layers and, for some methods, experts."""
    return [*find_sites(model), *(expert_sites(model) if experts and method.experts else [])]


def owners_of(sites: Sequence[Site]) -> set[str]:
    """Roles of the modules that hold these experts, with other matrices than the sites."""
    return {role for site in sites if site.experts for role in (site.role, site.role.rpartition(".")[0])}


def expert_stacks(model: nn.Module) -> dict[nn.Parameter, Site]:
    """The weights [E, m, n] of a mixture's experts as they are kept, each with a site: gate_up_proj and down_proj, or in a converted
    model the factors of each projection. Parameters of other modules with three dimensions, such as kernels of convolutions,
    are not among them."""
    found = {}
    for stack, depth, block in blocks(model):
        for inner, module in block.named_modules():
            if EXPERTS_CLASS.search(type(module).__name__):
                for name, p in module.named_parameters(recurse=False):
                    if p.ndim == 3 and 1 not in p.shape[1:]:
                        at, linear = f"{inner}.{name}", nn.Linear(p.shape[2], p.shape[1], bias=False, device="meta")
                        found[p] = Site(f"{stack}.{depth}.{at}", f"{stack}.*.{at}", depth, linear, experts=len(p))
    return found


def other_matrices(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Matrices of the blocks that no linear layer applies, such as Mixtral's experts: {role: {name: one for each depth}}. Routers are
    not among them."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for stack, depth, block in blocks(model):
        known = set(routers(block))
        stands = ("stands_for_linear", "stands_for_experts")
        known |= {n for n, m in block.named_modules() if is_linear(m) or any(hasattr(m, name) for name in stands)}
        for name, parameter in block.named_parameters():
            inside = any(name.startswith(f"{module}.") for module in known)
            if not inside and sum(size > 1 for size in parameter.shape) > 1:
                found.setdefault(f"{stack}.*.{name}", {})[f"{stack}.{depth}.{name}"] = parameter
    return found


def shares(model: nn.Module, parameters: Mapping[str, Collection[nn.Parameter]]) -> dict[str, float]:
    """What part of all parameters of the blocks each entry is; entries without parameters are left out."""
    total = sum(p.numel() for p in {p for _, _, block in blocks(model) for p in block.parameters()})
    return {role: sum(p.numel() for p in some) / total for role, some in parameters.items() if some}


def derived_layers(model: nn.Module) -> list[str]:
    """Names of the classes derived from ``nn.Linear`` whose layers do not count as linear maps."""
    return sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and not is_linear(m)})


def holds_linear(block: nn.Module) -> bool:
    return not is_linear(block) and any(
        is_linear(module) or hasattr(module, "stands_for_linear") for module in block.modules()
    )


def base_prefix(model: nn.Module) -> str:
    """The beginning of module names in a model with a head, "model." for a LlamaForCausalLM; empty for a body alone."""
    has_head = isinstance(model, PreTrainedModel) and model.base_model is not model
    return f"{model.base_model_prefix}." if has_head else ""


def body_of(model: nn.Module) -> Any:
    """The model without its head, if it has one."""
    return getattr(model, "base_model", model)


def wanted_sites(method: Method, sites: list[Site]) -> list[Site]:
    """The sites that the method rewrites; ValueError if it rewrites none of them."""
    wanted = [site for site in sites if method.wants(site)]
    if sites and not wanted:
        roles = dict.fromkeys(site.role for site in sites)
        raise ValueError(f"{method.name} does not recognise any of this model's projections: {', '.join(roles)}")
    return wanted


def choose_sites(sites: list[Site], targets: Patterns = None, exclude: Patterns = None) -> list[Site]:
    """The sites that match a pattern of `targets` (None: all) and none of `exclude`; ValueError for a pattern that matches
    nothing.

    What chooses experts is left alone unless a pattern of `targets` names it: "router" does, ".*" and "mlp" do not.
    """
    if not sites:
        raise ValueError(
            "the model must have linear layers (nn.Linear or transformers' Conv1D, not a derived class that computes something "
            "else) inside repeated blocks (a ModuleList), got none"
        )
    wanted = [compile_pattern(p, "targets") for p in listed(targets)]
    unwanted = [compile_pattern(p, "exclude") for p in listed(exclude)]
    roles = list(dict.fromkeys(site.role for site in sites))
    for option, patterns in (("targets", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(pattern.search(site.name) for site in sites):
                raise ValueError(
                    f"{option} must match linear layers of the blocks, got {pattern.pattern!r}; they are: {', '.join(roles)}"
                )

    def is_wanted(site: Site) -> bool:
        if site.router is not None:
            return any(_names_router(pattern, site) for pattern in wanted)
        return not wanted or any(pattern.search(site.name) for pattern in wanted)

    chosen = [site for site in sites if is_wanted(site) and not any(p.search(site.name) for p in unwanted)]
    if wanted and not any(map(is_wanted, sites)):
        names = ", ".join(dict.fromkeys(site.role for site in sites if any(p.search(site.name) for p in wanted)))
        raise ValueError(f"targets must name a router to reach it, got {targets!r}, which matches only {names}")
    if not chosen:
        raise ValueError(
            f"exclude must leave a linear layer to convert, got {exclude!r}; the blocks have: {', '.join(roles)}"
        )
    return chosen


def left_out(name: str, targets: Patterns, exclude: Patterns) -> bool:
    """Whether these patterns leave a matrix alone: one of `exclude` matches its name, or none of `targets` does."""
    matched = [any(re.search(pattern, name) for pattern in listed(patterns)) for patterns in (targets, exclude)]
    return matched[1] or (bool(listed(targets)) and not matched[0])


def _names_router(pattern: re.Pattern[str], site: Site) -> bool:
    """Whether a pattern matches because of the part of the name that says router."""
    without = ".".join("" if part == site.router else part for part in site.name.split("."))
    return pattern.search(site.name) is not None and pattern.search(without) is None


def listed(patterns: Patterns) -> list[str]:
    if not isinstance(patterns, str | re.Pattern | Iterable | None):
        raise ValueError(f"patterns must be a string or several strings, got {patterns!r}")
    listed = [patterns] if isinstance(patterns, str | re.Pattern) else list(patterns or [])
    if odd := next((pattern for pattern in listed if not isinstance(pattern, str)), None):
        raise ValueError(f"patterns must be strings, because they are saved with the model, got {odd!r}")
    return listed


# ---- the same in a model that may be converted


class Place(NamedTuple):
    """A projection of a dense or converted model: a module, or some of its outputs if an architecture fuses several."""

    name: str
    role: str
    depth: int
    module: nn.Module
    rows: Callable[[Tensor], Tensor]
    """Selects this projection's rows of a tensor with one row for each of the module's outputs."""


def places(model: nn.Module) -> Iterator[Place]:
    """Every projection of the repeated blocks, with the names of `find_sites`."""
    linear = {site.name for site in linear_layers(model)}
    for stack, depth, block in blocks(model):
        taken: list[str] = []
        for inner, module in block.named_modules():
            name, role = f"{stack}.{depth}.{inner}", f"{stack}.*.{inner}"
            inside = any(inner.startswith(f"{outer}.") for outer in taken)
            if inside or not (name in linear or hasattr(module, "stands_for_linear")):
                continue
            taken.append(inner)
            fusion = fusion_of(model, name)
            if fusion is None:
                yield Place(name, role, depth, module, lambda rows: rows)
            else:
                for part in fusion.sizes:
                    take = partial(lambda fusion, part, rows: fusion.rows(rows)[part], fusion, part)
                    yield Place(f"{name}.{part}", f"{role}.{part}", depth, module, take)


# ---- projections whose weight is read by other code


def check_callers(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises ValueError for a projection whose weight is read by the code around it, because its replacement has none."""
    for site in sites:
        if (caller := weight_reader(model, site)) is not None:
            attribute = module_name(model, site).rpartition(".")[2]
            raise ValueError(
                f"{site.role} cannot be replaced, because the code of {caller} reads its weight; exclude it "
                f"(exclude={attribute!r}) or use another architecture"
            )


def weight_reader(model: nn.Module, site: Site) -> str | None:
    """The class around a projection whose code reads its weight; None if it does not."""
    parent, _, attribute = module_name(model, site).rpartition(".")
    caller = type(model.get_submodule(parent))
    code = _code(caller)  # type: ignore[arg-type]
    reads = (
        re.search(rf"self\.{attribute}\.weight\b", code) and "pretraining_tp" not in code
    )  # Bloom: a branch for tests
    return caller.__name__ if reads else None


def module_name(model: nn.Module, site: Site) -> str:
    """Name of the module that a site is, or of the fused matrix that it is a part of."""
    return site.name if fusion_of(model, site.name.rpartition(".")[0]) is None else site.name.rpartition(".")[0]


@functools.cache
def _code(module: type[nn.Module]) -> str:
    """Source of the methods of a class of modules that run after it is built."""
    functions = [
        f for name, f in vars(module).items() if inspect.isfunction(f) and name not in ("__init__", "_init_weights")
    ]
    try:
        return "\n".join(map(inspect.getsource, functions))
    except OSError:  # created at run time, without a file
        return ""
