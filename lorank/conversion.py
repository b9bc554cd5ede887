"""`convert`: from a dense model to a low-rank one, on unmodified classes of transformers.

It has three steps: find the projections of the repeated blocks (`lorank.sites.find_sites`), replace them
(`lorank.rewriting.rewrite`), and record this in the model, so that saving and loading give the same model
(`lorank.pretrained.record`).
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank.architectures import as_conv1d, copied, dense_layer, is_linear
from lorank.experts import ExpertsLinear, split
from lorank.experts import joined as join_experts
from lorank.fields import Beta, check_value
from lorank.fusion import FusedProjections, joined, unknown_fusion
from lorank.method import AdamW, Dense, Method, Patterns, Site, StepHook, check_combination, warmup_cosine
from lorank.optim.groups import Decay, plain_groups
from lorank.pretrained import config_class, forget, record
from lorank.rewriting import converted_with, put, rewrite
from lorank.sites import (
    base_prefix,
    blocks,
    check_callers,
    choose_sites,
    listed,
    module_name,
    other_matrices,
    owners_of,
    sites_of,
    wanted_sites,
)
from lorank.table import find, register
from lorank.trial import check_quantization, check_shared, try_on_shapes

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    method: Method | type[Method] | str,
    *,
    targets: Patterns = None,
    exclude: Patterns = None,
) -> Model:
    """Rewrite the linear layers inside a model's repeated blocks; embeddings, head and norms stay as they are.

    The model is changed in place and returned. It may be on the meta device. The new layers have the device and dtype of
    those they replace. The method decides whether they start as the dense ones: CoLA draws new factors, while ReLoRA,
    SwitchLoRA and SST compute what the dense model does.

    Args:
        model: any model with a ``nn.ModuleList`` of blocks that contain ``nn.Linear`` or transformers' ``Conv1D`` and call
            them as modules. Give the outermost model, the one that will be saved, because its configuration records the
            method.
        method: a method with its hyper-parameters, ``CoLA(rank=128)``; or, for its defaults, its class or its name.
        targets: regular expression(s) searched in module names; only matching projections are rewritten. Default: all
            but the routers of a mixture of experts, which need a pattern that names them ("router", not ".*").
        exclude: regular expression(s) of projections that stay dense, even if `targets` match.

    Raises:
        ValueError: the model is already converted, quantised or wraps a model of transformers; its code reads the weight of a
            projection (T5, Mamba), or layers share one; nothing matches, a pattern is not a regular expression, the method
            has the name of another, or the method does not accept the model (for CoLA: the rank); a trial on shapes
            (`lorank.trial`) shows that the converted model would fail, or not be loaded as it was saved. The model is then
            unchanged.

    Warns:
        UserWarning: a rank at which the factors are no smaller than the dense layer; or most of the blocks stays dense because no
            linear layer applies it, such as the experts of a mixture; or a matrix that seems to hold several projections, whose
            parts are not known.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = LlamaConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    >>> convert(LlamaForCausalLM(shape), "cola").model.layers[1].mlp.down_proj
    CoLALinear(
      d_in=96, d_out=32, rank=8, activation=silu
      (A): Linear(in_features=96, out_features=8, bias=False)
      (B): Linear(in_features=8, out_features=32, bias=False)
    )
    """
    method = as_method(method)
    if "method" not in method.answers():
        raise ValueError(
            f"{method.name} does not decide what the weights are, so there is nothing to convert; use cola or sltrain, for "
            "example, and lorank.optimizer for methods that decide how weights move"
        )
    sites = sites_to_convert(model, method, targets, exclude)
    recorded = {
        "method": method.name,
        "arguments": method.to_dict(),
        "targets": listed(targets) or None,
        "exclude": listed(exclude) or None,
        **({"experts": True} if any(site.experts for site in sites) else {}),
    }

    def apply(model: Any) -> None:
        rewrite(model, method, choose_sites(wanted_sites(method, sites_of(method, model)), targets, exclude))
        if isinstance(model, PreTrainedModel):
            record(model, {**recorded, "prefix": base_prefix(model)})
        else:
            model._lorank = recorded

    if isinstance(model, PreTrainedModel):
        try_on_shapes(model, method, apply)
    if targets is None:
        _warn_of_other_matrices(model, method, sites)
    _warn_of_unknown_fusions(model, sites)
    apply(model)
    return model


def as_method(method: Method | type[Method] | str) -> Method:
    """A method from itself, its class or its name; ValueError for anything else."""
    if isinstance(method, str) and "+" in method:
        raise ValueError(
            f"method must be one method here, got {method!r}; convert the model with the one that decides what the weights are, and "
            "give the other to lorank.optimizer"
        )
    kind = find(method) if isinstance(method, str) else method
    made = kind() if isinstance(kind, type) and issubclass(kind, Method) else kind
    if not isinstance(made, Method):
        raise ValueError(f"method must be a method such as CoLA(rank=128), its class or its name, got {method!r}")
    return made


def sites_to_convert(
    model: nn.Module, method: Method, targets: Patterns = None, exclude: Patterns = None
) -> list[Site]:
    """The projections that `convert` would rewrite. It raises and warns as `convert` does, and changes nothing."""
    register(type(method))
    if earlier := next(filter(None, map(converted_with, model.modules())), None):
        raise ValueError(f"model must be dense, got one that is already converted (method {earlier['method']!r})")
    if isinstance(model, PreTrainedModel):
        config_class(model.config.model_type)  # refuses an unknown architecture before anything is changed
        check_quantization(model.config)
    elif inner := next((type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel)), None):
        raise ValueError(
            f"model must be the {inner} inside this {type(model).__name__}, which could not be saved; convert it before it is "
            "compiled or wrapped"
        )
    sites = choose_sites(wanted_sites(method, sites_of(method, model)), targets, exclude)
    check_callers(model, sites)
    check_shared(model, sites)
    method.check(sites)
    return sites


def _warn_of_unknown_fusions(model: nn.Module, sites: list[Site]) -> None:
    """Names the matrices that seem to hold several projections and are rewritten as one."""
    single = [site for site in sites if not site.experts and module_name(model, site) == site.name]
    if roles := dict.fromkeys(site.role for site in single if unknown_fusion(site.name, site.linear)):
        warnings.warn(
            f"{', '.join(roles)}: each seems to hold several projections and becomes one layer, because lorank.fusion.FUSED does not "
            "have its parts; exclude it, or add it to the table",
            stacklevel=3,
        )


def _warn_of_other_matrices(model: nn.Module, method: Method, sites: Sequence[Site]) -> None:
    """Names the matrices that no method reaches, if they are more than a tenth of the blocks."""
    total = sum(p.numel() for p in {p for _, _, block in blocks(model) for p in block.parameters()})
    reached = owners_of(sites)
    parts = {
        role: sum(p.numel() for p in each) / total
        for role, each in other_matrices(model).items()
        if role.rpartition(".")[0] not in reached
    }
    if (left := sum(parts.values())) > 0.1:
        what = "experts" if any("expert" in role for role in parts) else "matrices"
        listed = ", ".join(f"{role} ({part * 100:.3g} %)" for role, part in parts.items())
        warnings.warn(
            f"{method.name} leaves {left * 100:.3g} % of the blocks' parameters dense, {what} that no linear layer applies: {listed}",
            stacklevel=3,
        )


def method_of(model: nn.Module) -> Method | None:
    """The method that a model was converted with, with its hyper-parameters; None for a dense one."""
    recorded = converted_with(model)
    return None if recorded is None else find(recorded["method"]).from_dict(recorded["arguments"])


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model of transformers with the same outputs, in which every converted layer is one dense layer again.

    The given model does not change. The result is saved, loaded and used without lorank, and its new layers can be
    trained.

    Raises:
        ValueError: the model is not a converted one of transformers, or its method has no dense equivalent (CoLA).
    """
    method = method_of(model)
    if method is None or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a converted model of transformers, got {type(model).__name__}; there is nothing to merge"
        )
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # the new layers can be trained even if the caller is in one of these modes
        return _merged(copy.deepcopy(model), method)


def _merged(dense: PreTrainedModel, method: Method) -> PreTrainedModel:
    forget(dense)
    with torch.device("meta"):
        # where the architecture has linear layers and experts, and of which kind
        shapes = type(dense)._from_config(copy.deepcopy(dense.config))
    for name, was in list(shapes.named_modules()):
        if (parts := split(was, name)) and type(now := dense.get_submodule(name)) is not type(was):
            weights = {part: _dense_weight(method, now.get_submodule(part or "all")) for part in parts}
            put(dense, name, join_experts(was, name, weights).train(now.training).requires_grad_())
        if is_linear(was) and type(now := dense.get_submodule(name)) is not type(was):
            weight, bias = joined(method, now) if isinstance(now, FusedProjections) else method.merged(now)
            linear = copied(dense_layer(weight, bias, now.training)).requires_grad_()
            put(dense, name, as_conv1d(linear) if isinstance(was, Conv1D) else linear)
    method.undo(dense)
    dense.activation_checkpointing_disable()
    return dense


def _dense_weight(method: Method, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    return (layer.weight, layer.bias) if isinstance(layer, ExpertsLinear) else method.merged(layer)


def optimizer(
    model: nn.Module,
    method: Method | type[Method] | str | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay: Decay = "matrices",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    targets: Patterns = None,
    exclude: Patterns = None,
) -> Optimizer:
    """The optimizer of a method over the trained parameters of a model, dense or converted.

    Args:
        method: a method that decides how weights move, ``GaLore(rank=128)``, its class or its name. Default: the optimizer that the
            model's own method needs (SwitchLoRA), or AdamW.
        decay: "matrices" exempts norms, biases and embeddings from weight decay; "all" exempts nothing.
        targets, exclude: regular expressions that choose which linear layers are projected. Default: all.

    Raises:
        ValueError: the method does not decide how weights move, it cannot be combined with the model's own, or a pattern
            matches nothing.
    """
    check_value("decay", decay, Decay)
    check_value("betas", betas, tuple[Beta, Beta])
    own = method_of(model) or Dense()
    chosen = AdamW() if method is None else as_method(method)
    if "method" in chosen.answers() and "optimizer" in chosen.answers():  # SwitchLoRA brings its own
        if chosen.name != own.name:
            raise ValueError(
                f"{chosen.name} also changes the weights; convert the model with it, and leave method out here"
            )
        chosen = AdamW()
    if chosen.key != "optimizer" and "optimizer" not in chosen.answers():
        hint = (
            "; lorank.evolution.eggroll.Eggroll estimates gradients in your own loop"
            if chosen.key == "gradient"
            else ""
        )
        raise ValueError(
            f"{chosen.name} does not decide how weights move; use adamw, muon or galore, for example{hint}"
        )
    check_combination([own, chosen])
    mover = own if "optimizer" in own.answers() else chosen
    if (targets or exclude) and (mover is own or not hasattr(mover, "rank")):
        raise ValueError(f"{mover.name} projects nothing; leave out targets and exclude")
    groups = mover.parameter_groups(model, plain_groups(model, weight_decay, decay), targets, exclude)
    made: Any = mover.optimizer(groups, lr=lr, betas=betas, eps=eps)
    made.lorank_method = chosen  # it may also need a hook or a schedule
    return made


def step_hook(model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int = 0) -> StepHook | None:
    """Let the methods of a model and its optimizer act between the steps, in any training loop.

    Args:
        model: the converted model, also inside DDP, ``torch.compile`` or another module.
        optimizer: what moves its parameters, also inside accelerate's wrapper.
        steps: optimizer steps of the whole run.
        seed: seed of the method's random draws during the run.

    Returns:
        The hook, which is already active, for its `state_dict`; None if no method needs one.

    Raises:
        ValueError: the method cannot work with this optimizer or with so few steps, the optimizer has a hook already, `model` is only a
            part of a converted model, or it is dense and the optimizer moves none of its parameters.
    """
    _check_steps(steps)
    inner, moving = converted_inside(model), _unwrapped(optimizer)
    if inner is None:
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in moving.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer must move parameters of the model, but it moves none of this {type(model).__name__}; give the model that was "
                "converted, and make its optimizer after wrapping it"
            )
    for method in _methods(inner, moving):
        if "hook" not in method.answers():
            continue
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                f"{method.name} cannot act on parameters that FullyShardedDataParallel has flattened; use DDP or train on one device"
            )
        if (hook := method.hook(model if inner is None else inner, moving, steps=steps, seed=seed)) is not None:
            return hook
    return None


def lr_schedule(
    model: nn.Module,
    *,
    steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
    optimizer: Optimizer | None = None,
) -> Callable[[int], float]:
    """Multiplier of the learning rate by steps done, for ``torch.optim.lr_scheduler.LambdaLR``: the one that a model's
    method needs (ReLoRA and SST climb again after each restart), or else a linear warm-up and a cosine.

    Args:
        model: the converted model, also inside DDP, ``torch.compile`` or another module.
        optimizer: one of `lorank.optimizer`, whose method may need a schedule too.

    Raises:
        ValueError: there are no steps, the method's cycles do not fit into them, or `model` is only a part of a converted model.
    """
    _check_steps(steps)
    for method in _methods(converted_inside(model), optimizer and _unwrapped(optimizer)):
        if (own := method.schedule(steps, warmup_steps, min_lr_ratio)) is not None:
            return own
    return lambda step: warmup_cosine(step, steps, warmup_steps, min_lr_ratio)


def converted_inside(model: nn.Module) -> nn.Module | None:
    """The converted model that a module is or wraps; None for a dense one.

    Raises:
        ValueError: it is no module, it has no parameters, it contains several converted models, or parts of one without what
            `convert` recorded.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    found = [
        m for m in model.modules() if "_lorank" in vars(m) or (isinstance(m, PreTrainedModel) and converted_with(m))
    ]
    outermost = found[:1]
    inside = {part for whole in outermost for part in whole.modules()}
    if apart := [m for m in found if m not in inside]:
        names = f"{type(outermost[0]).__name__} and {type(apart[0]).__name__}"
        raise ValueError(f"model must contain one converted model, got {names}; give each of them by itself")
    if outermost:
        return outermost[0]
    if any(
        "stands_for_linear" in vars(module) for module in model.modules()
    ):  # set by `rewrite`; EGG's class has it too
        raise ValueError(f"model must be the whole converted model, got only a {type(model).__name__} from it")
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"model must have parameters, got a {type(model).__name__} without any; give the model that was converted"
        )
    return None


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside those of accelerate and Lightning, whose steps alone call its hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    return optimizer


def _methods(inner: nn.Module | None, optimizer: Optimizer | None) -> list[Method]:
    """The methods of a converted model and of an optimizer that `optimizer` made."""
    found = [None if inner is None else method_of(inner), getattr(optimizer, "lorank_method", None)]
    return [method for method in found if method is not None]


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(
            f"steps must be the optimizer steps of the whole run, a positive integer, got {steps} (Trainer passes them to "
            "create_scheduler; its max_steps is -1 if it counts epochs)"
        )
