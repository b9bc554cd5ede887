"""`convert`: from a dense model to a low-rank one, on unmodified classes of transformers.

It has three steps: find the projections of the repeated blocks (`lorank.sites.find_sites`), replace them
(`lorank.rewriting.rewrite`), and record this in the model, so that saving and loading give the same model
(`lorank.pretrained.record`).
"""

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorank import renamed
from lorank.architectures import as_conv1d, copied, dense_layer, is_linear
from lorank.experts import ExpertsLinear, split
from lorank.experts import joined as join_experts
from lorank.fusion import FusedProjections, joined, unknown_fusion
from lorank.layers import loaded
from lorank.method import Method, Patterns, Site
from lorank.pretrained import config_class, forget, record
from lorank.rewriting import converted_with, put, rewrite
from lorank.sites import (
    base_prefix,
    check_callers,
    choose_sites,
    left_out,
    listed,
    module_name,
    other_matrices,
    owners_of,
    shares,
    sites_of,
    wanted_sites,
)
from lorank.table import find, from_record, register
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
        UserWarning: a rank at which the factors are no smaller than the dense layer; or more than a tenth of the blocks stays dense
            because no linear layer applies it, such as the experts of a mixture, though `targets` (if given) match it and `exclude`
            does not; or a matrix that seems to hold several projections, whose parts are not known; or trained weights, loaded by
            ``from_pretrained``, that the method's new factors replace.

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
    check_module(model)
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
        # also if patterns leave all of them out: on loading, the patterns must match what they match now
        **({"experts": True} if any(site.experts for site in sites_of(method, model)) else {}),
    }

    def apply(model: Any, sites: list[Site]) -> None:
        rewrite(model, method, sites)
        if isinstance(model, PreTrainedModel):
            record(model, {**recorded, "prefix": base_prefix(model)})
        else:
            model._lorank = recorded

    if isinstance(model, PreTrainedModel):
        try_on_shapes(model, method, sites, lambda twin: apply(twin, _chosen_sites(twin, method, targets, exclude)))
    _warn_of_other_matrices(model, method, targets, exclude)
    _warn_of_unknown_fusions(model, sites)
    _warn_of_dropped_weights(model, method, sites)
    apply(model, sites)
    return model


def check_module(model: Any) -> None:
    """Raises ValueError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")


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
    sites = _chosen_sites(model, method, targets, exclude)
    check_callers(model, sites)
    check_shared(model, sites)
    method.check(sites)
    return sites


def _chosen_sites(model: nn.Module, method: Method, targets: Patterns, exclude: Patterns) -> list[Site]:
    return choose_sites(wanted_sites(method, sites_of(method, model)), targets, exclude)


def _warn_of_unknown_fusions(model: nn.Module, sites: list[Site]) -> None:
    """Names the matrices that seem to hold several projections and are rewritten as one."""
    single = [site for site in sites if not site.experts and module_name(model, site) == site.name]
    if roles := dict.fromkeys(site.role for site in single if unknown_fusion(model, site.name)):
        warnings.warn(
            f"{', '.join(roles)}: each seems to hold several projections and becomes one layer, because lorank.fusion.FUSED does not "
            "have its parts; exclude it, or add it to the table",
            stacklevel=3,
        )


def _warn_of_dropped_weights(model: nn.Module, method: Method, sites: list[Site]) -> None:
    """If weights were loaded, from which the method does not begin. Only `from_pretrained` leaves a mark by which this is known."""
    if not method.keeps_outputs and any(map(loaded, model.parameters())):
        warnings.warn(
            f"{method.name} drops the trained weights of {len(sites)} projections: its new layers do not compute what the dense ones "
            "did, so the model must be trained anew",
            stacklevel=3,
        )


def _warn_of_other_matrices(model: nn.Module, method: Method, targets: Patterns, exclude: Patterns) -> None:
    """Names the matrices that the method cannot reach and the patterns do not leave out, if they are more than a tenth of the blocks."""
    reached = owners_of(wanted_sites(method, sites_of(method, model)))
    left = {
        role: [p for name, p in each.items() if not left_out(name, targets, exclude)]
        for role, each in other_matrices(model).items()
        if role.rpartition(".")[0] not in reached
    }
    parts = shares(model, left)
    if (share := sum(parts.values())) > 0.1:
        what = "experts" if any("expert" in role for role in parts) else "matrices"
        names = ", ".join(f"{role} ({part * 100:.3g} %)" for role, part in parts.items())
        warnings.warn(
            f"{method.name} leaves {share * 100:.3g} % of the blocks' parameters dense, {what} that no linear layer applies: {names}",
            stacklevel=3,
        )


def method_of(model: nn.Module) -> Method | None:
    """The method that a model was converted with, with its hyper-parameters; None for a dense one."""
    recorded = converted_with(model)
    return None if recorded is None else from_record(recorded)


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


renamed.hint(__name__)
