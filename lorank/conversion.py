"""`convert`: from a dense model to a low-rank one, on unmodified classes of transformers.

Three steps, one function each: find the projections of the repeated blocks (`find_sites`), replace them (`rewrite`),
and let the model remember what was done to it, so that saving and loading give the same model
(`lorank.pretrained.record`).
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from lorank.fusion import FusedProjections, as_linear, copied, dense_layer, fusion_of, joined, with_fused
from lorank.methods import find_method, register
from lorank.parametrization import Parametrization, Site, StepHook, compile_pattern, warmup_cosine

Model = TypeVar("Model", bound=nn.Module)
Patterns = str | Sequence[str] | None
ACTIVATIONS: tuple[Any, ...] = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())


def convert(
    model: Model,
    method: Parametrization | type[Parametrization] | str,
    *,
    targets: Patterns = None,
    exclude: Patterns = None,
) -> Model:
    """Rewrite the linear layers inside a model's repeated blocks; embeddings, head and norms stay as they are.

    The model is changed in place and returned. It may live on the meta device. The new layers take the device and dtype
    of those they replace. Whether they start as the dense ones is the method's business: CoLA draws its factors anew,
    ReLoRA, SwitchLoRA and SST compute what the dense model does.

    Args:
        model: any model with a ``nn.ModuleList`` of blocks that hold ``nn.Linear`` or transformers' ``Conv1D`` and call them
            as modules. Give the outermost model, the one that will be saved: it is its configuration that remembers the
            method.
        method: a method with its hyper-parameters, ``CoLA(rank=128)``; or, for its defaults, its class or its name.
        targets: regular expression(s) searched in module names; only matching projections are rewritten. Default: all.
        exclude: regular expression(s) of projections to leave dense; wins over `targets`.

    Raises:
        ValueError: the model is converted already or is a wrapper around one of transformers, its code reads the weight of
            a projection (T5, Mamba), nothing in it matches, a pattern is no regular expression, the method has the name of
            another, or it refuses (for CoLA: the rank). The model is then unchanged.

    Warns:
        UserWarning: a rank at which the factors are no smaller than the dense layer.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = LlamaConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    >>> convert(LlamaForCausalLM(shape), "cola").model.layers[1].mlp.down_proj
    CoLALinear(
      d_in=96, d_out=32, rank=8, activation=silu
      (A): Linear(in_features=96, out_features=8, bias=False)
      (B): Linear(in_features=8, out_features=32, bias=False)
    )
    """
    if isinstance(method, str):
        method = find_method(method)
    if isinstance(method, type):
        method = method()
    if not isinstance(method, Parametrization):
        raise ValueError(f"method={method!r} is no method: give one such as CoLA(rank=128), its class, or its name")
    sites = sites_to_convert(model, method, targets, exclude)
    rewrite(model, method, sites)
    recorded = {
        "method": method.name,
        "arguments": method.to_dict(),
        "targets": _listed(targets) or None,
        "exclude": _listed(exclude) or None,
    }
    if isinstance(model, PreTrainedModel):
        from lorank.pretrained import record

        record(model, {**recorded, "prefix": base_prefix(model)})
    else:
        model._lorank = recorded  # type: ignore[assignment]
    return model


def sites_to_convert(
    model: nn.Module, method: Parametrization, targets: Patterns = None, exclude: Patterns = None
) -> list[Site]:
    """The projections that `convert` would rewrite; it raises and warns as that does, and changes nothing."""
    register(type(method))
    if earlier := next(filter(None, map(converted_with, model.modules())), None):
        raise ValueError(
            f"this model is already converted (method {earlier['method']!r}); convert a dense model instead"
        )
    if isinstance(model, PreTrainedModel):
        from lorank.pretrained import config_class

        config_class(model.config.model_type)  # refuses an unknown architecture before anything is changed
    elif inner := next((type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel)), None):
        raise ValueError(
            f"{type(model).__name__} is a wrapper around {inner}, which could not be saved; convert that one, before it is "
            "compiled or wrapped"
        )
    sites = choose_sites(wanted_sites(method, find_sites(model)), targets, exclude)
    _check_callers(model, sites)
    method.check(sites)
    return sites


def converted_with(model: nn.Module) -> dict[str, Any] | None:
    """What `convert` recorded on a model (method, arguments, targets, exclude), or None for a dense one."""
    recorded = getattr(getattr(model, "config", None), "lorank", None)
    return recorded if recorded is not None else getattr(model, "_lorank", None)


def base_prefix(model: nn.Module) -> str:
    """What names of modules begin with because the model is a body under a head: "model." of a LlamaForCausalLM, else
    nothing."""
    has_head = isinstance(model, PreTrainedModel) and model.base_model is not model
    return f"{model.base_model_prefix}." if has_head else ""


def method_of(model: nn.Module) -> Parametrization | None:
    """The method that a model was converted with, with its hyper-parameters; None for a dense one."""
    recorded = converted_with(model)
    return None if recorded is None else find_method(recorded["method"]).from_dict(recorded["arguments"])


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model of transformers with the same outputs: every converted layer is one dense layer again.

    The model itself stays as it is. What comes back is saved, loaded and used without lorank; its new layers can be
    trained.

    Raises:
        ValueError: the model is not a converted one of transformers, or its method has no dense equivalent (CoLA).
    """
    method = method_of(model)
    if method is None or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"this {type(model).__name__} is no converted model of transformers; there is nothing to merge"
        )
    with torch.inference_mode(False), torch.no_grad():  # whatever the caller is in: the new layers can be trained
        return _merged(copy.deepcopy(model), method)


def _merged(dense: PreTrainedModel, method: Parametrization) -> PreTrainedModel:
    from lorank.pretrained import forget

    forget(dense)
    with torch.device("meta"):
        shapes = type(dense)(dense.config)  # where the architecture has linear layers, and of which kind
    for name, was in shapes.named_modules():
        if _is_linear(was) and type(now := dense.get_submodule(name)) is not type(was):
            weight, bias = joined(method, now) if isinstance(now, FusedProjections) else method.merged(now)
            linear = copied(dense_layer(weight, bias, now.training)).requires_grad_()
            _put(dense, name, _as_conv1d(linear) if isinstance(was, Conv1D) else linear)
    method.undo(dense)
    dense.activation_checkpointing_disable()
    return dense


def step_hook(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, seed: int = 0) -> StepHook | None:
    """Let a converted model's method act between the steps of `optimizer`, in a training loop of any kind.

    Args:
        steps: optimizer steps of the whole run.
        seed: of whatever the method draws on its way.

    Returns:
        The hook, which is already at work, for its `state_dict`; None if the method needs none, or the model is dense.

    Raises:
        ValueError: the method cannot live with this optimizer or with so few steps.
    """
    _check_steps(steps)
    method = method_of(model)
    return None if method is None else method.hook(model, optimizer, steps=steps, seed=seed)


def lr_schedule(
    model: nn.Module, *, steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.1
) -> Callable[[int], float]:
    """Multiplier of the learning rate by steps done, for ``torch.optim.lr_scheduler.LambdaLR``: the one that a model's
    method needs (ReLoRA and SST climb again after each restart), or else a linear warm-up and a cosine.

    Raises:
        ValueError: there are no steps, or the method's cycles do not fit into them.
    """
    _check_steps(steps)
    method = method_of(model)
    own = None if method is None else method.schedule(steps, warmup_steps, min_lr_ratio)
    return own or (lambda step: warmup_cosine(step, steps, warmup_steps, min_lr_ratio))


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(
            f"steps={steps} is not positive; give the optimizer steps of the whole run (Trainer hands them to create_scheduler; "
            "its max_steps is -1 where it counts epochs)"
        )


def rewrite(
    model: nn.Module, method: Parametrization, sites: Sequence[Site], names: Mapping[str, str] | None = None
) -> None:
    """Replace projections of `model` by what `method` builds; all of them or, if it raises, none.

    `names` tells where in this model a site is that goes by the name it has in another.
    """
    names = names or {}
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(site.role, []).append(site)
    replacements: dict[str, nn.Module] = {}
    for stack in stacks.values():
        for site, module in zip(stack, method.build_stack(stack), strict=True):
            replacements[names.get(site.name, site.name)] = module.train(site.linear.training)
            module.stands_for_linear = True  # type: ignore[assignment]

    before = {module: dict(module._modules) for module in model.modules()}
    try:
        for name, module in with_fused(model, replacements):
            _put(model, name, module)
        method.finish(model)
    except BaseException:
        for module, children in before.items():
            module._modules = children
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Where the projections are
# ---------------------------------------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """The repeated blocks of a model as (name of their list, depth, block), in the model's order.

    Blocks are the members of an outermost ``nn.ModuleList`` each of which has a linear map, or what `rewrite` put in
    place of one, somewhere below it and is not one itself; a list of heads or of embeddings is none.
    """
    seen: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in seen)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and all(map(_holds_linear, module)):
            seen.append(name)
            for depth, block in enumerate(module):
                yield name, depth, block


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear map inside the repeated blocks, in the model's order, but for those from or to a single number.

    A matrix in which an architecture has fused several projections (GPT-2's query, key and value) gives one site for
    each of them, named below it: ``transformer.h.0.attn.c_attn.query``. One bottleneck for all three would be another
    method.
    """
    sites = []
    for site in linear_layers(model):
        fused = fusion_of(model, site.name)
        if fused is None:
            sites.append(site)
        else:
            name, role, depth, linear = site
            sites += [Site(f"{name}.{part}", f"{role}.{part}", depth, lin) for part, lin in fused.split(linear).items()]
    return sites


def linear_layers(model: nn.Module) -> list[Site]:
    """The same with fused projections as the one matrix they are."""
    return [
        Site(f"{stack}.{depth}.{inner}", f"{stack}.*.{inner}", depth, as_linear(module))
        for stack, depth, block in blocks(model)
        for inner, module in block.named_modules()
        if _is_linear(module) and 1 not in module.weight.shape
    ]


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
        _put(model, name, nn.Identity())


def wanted_sites(method: Parametrization, sites: list[Site]) -> list[Site]:
    """Those that the method rewrites; ValueError if there are sites, but none for it."""
    wanted = [site for site in sites if method.wants(site)]
    if sites and not wanted:
        roles = dict.fromkeys(site.role for site in sites)
        raise ValueError(f"{method.name} recognises none of this model's projections: {', '.join(roles)}")
    return wanted


def choose_sites(sites: list[Site], targets: Patterns = None, exclude: Patterns = None) -> list[Site]:
    """Those that match a pattern of `targets` (None: all) and none of `exclude`; ValueError for a pattern without use."""
    if not sites:
        raise ValueError(
            "found no linear layer (nn.Linear or transformers' Conv1D, not a class derived from them that does anything else) inside "
            "a repeated block (a ModuleList of blocks); nothing to convert"
        )
    wanted = [compile_pattern(p, "targets") for p in _listed(targets)]
    unwanted = [compile_pattern(p, "exclude") for p in _listed(exclude)]
    roles = list(dict.fromkeys(site.role for site in sites))
    for option, patterns in (("targets", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(pattern.search(site.name) for site in sites):
                raise ValueError(
                    f"{option}={pattern.pattern!r} matches no linear layer of the blocks; they are: {', '.join(roles)}"
                )
    chosen = [
        site
        for site in sites
        if (not wanted or any(p.search(site.name) for p in wanted)) and not any(p.search(site.name) for p in unwanted)
    ]
    if not chosen:
        raise ValueError(f"exclude={exclude!r} leaves no linear layer to convert; the blocks hold: {', '.join(roles)}")
    return chosen


def _listed(patterns: Patterns) -> list[str]:
    listed = [patterns] if isinstance(patterns, str | re.Pattern) else list(patterns or [])
    if odd := next((pattern for pattern in listed if not isinstance(pattern, str)), None):
        raise ValueError(f"{odd!r} is not a string; give regular expressions as strings, they are saved with the model")
    return listed


def _check_callers(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a projection whose weight is read by the code around it, which would not find it in what takes its place."""
    for site in sites:
        if (caller := weight_reader(model, site)) is not None:
            attribute = _module_name(model, site).rpartition(".")[2]
            raise ValueError(
                f"the code of {caller} reads the weight of {site.role} itself, so it cannot be replaced; exclude it "
                f"(exclude={attribute!r}) or take another architecture"
            )


def weight_reader(model: nn.Module, site: Site) -> str | None:
    """The class around a projection whose code reads its weight, so that nothing else can take its place; None: it does not."""
    parent, _, attribute = _module_name(model, site).rpartition(".")
    caller = type(model.get_submodule(parent))
    code = _code(caller)  # type: ignore[arg-type]
    reads = (
        re.search(rf"self\.{attribute}\.weight\b", code) and "pretraining_tp" not in code
    )  # Bloom: a branch for tests
    return caller.__name__ if reads else None


def _module_name(model: nn.Module, site: Site) -> str:
    """Of the module that a site is, or of the fused matrix that it is a part of."""
    return site.name if fusion_of(model, site.name.rpartition(".")[0]) is None else site.name.rpartition(".")[0]


@functools.cache
def _code(module: type[nn.Module]) -> str:
    """Source of what a class of modules does once it is built."""
    functions = [
        f for name, f in vars(module).items() if inspect.isfunction(f) and name not in ("__init__", "_init_weights")
    ]
    try:
        return "\n".join(map(inspect.getsource, functions))
    except OSError:  # made at run time, without a file
        return ""


def derived_layers(model: nn.Module) -> list[str]:
    """Names of the classes derived from ``nn.Linear`` whose layers are not taken for linear maps."""
    return sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and not _is_linear(m)})


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) or _computes_linear_map(type(module))  # type: ignore[arg-type]


@functools.cache
def _computes_linear_map(kind: Any) -> bool:
    """Whether a class changes nothing of nn.Linear but how `forward` computes the same x Wᵀ + b (Falcon's). Others (quantised,
    tensor-parallel, routers) have meanings of their own."""
    own = {name for name in vars(kind) if not (name.startswith("__") and name != "__init__")}
    if kind.__mro__[1:] != nn.Linear.__mro__ or own != {"forward"}:
        return False
    layer: Any = kind(3, 2, device="meta", dtype=torch.float64).to_empty(device="cpu")  # draws no random numbers
    with torch.inference_mode(), torch.device("cpu"):
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(-1, 2 + number, parameter.numel()).view_as(parameter))
        x = torch.linspace(-3, 1, 12, dtype=torch.float64).view(2, 2, 3)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        try:
            found = layer(x)
        except Exception:  # it wants more than an input
            return False
        return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def _holds_linear(block: nn.Module) -> bool:
    return not _is_linear(block) and any(
        _is_linear(module) or hasattr(module, "stands_for_linear") for module in block.modules()
    )


def _as_conv1d(linear: nn.Linear) -> Conv1D:
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    conv.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.detach())
    return conv.train(linear.training)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its full name."""
    parent_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent_name), attribute, module)
