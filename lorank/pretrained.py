"""Saving and loading converted models with transformers' own methods.

For every architecture a pair of classes is generated, such as LorankLlamaConfig and LorankLlamaForCausalLM. They are
subclasses of transformers' classes with another `model_type`, and the model's `__init__` applies the method that the
configuration records. Weights keep their names in the file: what transformers renames or takes apart for its own
architectures, such as a mixture's experts, would not fit those of a converted one. So ``save_pretrained`` writes plain safetensors and JSON, ``from_pretrained`` builds the right modules
before it fills them, and a transformers without lorank reports an unknown type instead of loading noise.
"""

import contextvars
import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.utils import output_capturing

from lorank.auto import PREFIX
from lorank.checkpointing import POLICIES, checkpoint, has_tapes, policy_is_on
from lorank.kernels import check_kernels, without_missing
from lorank.method import Method, Site
from lorank.needed import not_copied
from lorank.portable import write_modelling_file
from lorank.rewriting import rewrite
from lorank.sites import base_prefix, choose_sites, sites_of, wanted_sites
from lorank.table import find, from_record
from lorank.whole import open_to_others

OWN_NAMES = "own"
"""What `record` notes of the names of weights in files. Files without it (lorank 0.2 and before) have transformers' older names."""
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "inside the __init__ of a generated class", default=False
)


@functools.cache
def config_class(base_type: str) -> type[PretrainedConfig]:
    """The configuration class of converted models of an architecture ("llama"), registered with the Auto classes."""
    if base_type not in configuration_auto.CONFIG_MAPPING:
        raise ValueError(
            f"the model type must be known to transformers, so that the converted model can be loaded again, got {base_type!r}; "
            "register it with AutoConfig.register"
        )
    base = configuration_auto.CONFIG_MAPPING[base_type]

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but a file that names code to download is refused."""
        check_kernels(config_dict := without_missing(config_dict), "this config.json")
        return base.from_dict.__func__(cls, config_dict, **kwargs)  # type: ignore[attr-defined]

    own = {"from_dict": classmethod(from_dict), "register_for_auto_class": classmethod(not_copied)}
    derived = _derive(base, {"model_type": PREFIX + base_type, **own})
    configuration_auto.AutoConfig.register(derived.model_type, derived, exist_ok=True)
    for auto in _auto_classes():
        for model in _classes_of(auto, base):
            auto.register(derived, model_class(model, derived), exist_ok=True)  # type: ignore[arg-type]
    return derived


@functools.cache
def model_class(base: type[PreTrainedModel], config: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The model class that applies, when it is built, the method recorded in its configuration."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        outermost = not _inside.get()
        token = _inside.set(True)
        try:
            base.__init__(self, config, *args, **kwargs)
        finally:
            _inside.reset(token)
        if not outermost:  # the body of a model with a head: the head's class rewrites it
            return
        recorded = getattr(config, "lorank", None)
        if recorded is None:
            raise ValueError(
                f"a {type(config).__name__} must have the entry 'lorank', which records how to build its model"
            )
        method = from_record(recorded)
        # patterns are for names in the converted model, which may have had a head where this one has none, or the reverse
        here, there = base_prefix(self), recorded["prefix"]
        then = lambda name: name if here == there else there + name.removeprefix(here)  # noqa: E731
        if recorded.get("names") == OWN_NAMES:
            _keep_names(self)
        else:
            self.early_fusions = True
        own = sites_of(method, self, experts=recorded.get("experts", False))
        sites = [site._replace(name=then(site.name), role=then(site.role)) for site in own]
        names = {then(site.name): site.name for site in own}
        chosen = choose_sites(wanted_sites(method, sites), recorded["targets"], recorded["exclude"])
        rewrite(self, method, [site for site in chosen if _in_tables(method, site)], names)
        _mark_method(self, method.name)
        _mark_drawn(self)
        self._frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    @guard_torch_init_functions()  # parameters from a file keep their values
    def initialize_weights(self: Any) -> None:
        undrawn = [module for module in _own_layers(self) if not getattr(module, "_is_hf_initialized", False)]
        base.initialize_weights(self)
        if all(getattr(parameter, "_is_hf_initialized", False) for parameter in self.parameters()):  # from a file
            for body in _bodies(self):
                body._init_weights(body)  # left out above; some compute buffers of their layers, which no file has
        for module in undrawn:
            module.reset_parameters()  # replaces transformers' own draw of the nested layers
        for name in getattr(self, "_frozen", ()):
            self.get_parameter(name).requires_grad_(False)  # transformers makes all that it loads trainable

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_main_process", True):
            autos = [
                auto.__name__ for auto in _auto_classes() if base in _classes_of(auto, type(self.config).__bases__[0])
            ]
            write_modelling_file(self, save_directory, autos)
        result: Any = base.save_pretrained(self, save_directory, *args, **kwargs)  # type: ignore[arg-type]
        open_to_others(Path(save_directory).glob("*.safetensors"))
        return result

    own = (__init__, initialize_weights, save_pretrained)
    return _derive(base, {"config_class": config, **{function.__name__: function for function in own}})


def record(model: PreTrainedModel, recorded: dict[str, Any]) -> None:
    """Turn a converted model, in place, into an instance of its generated class, with `recorded` in its configuration.

    The configuration is a copy: the caller's own object still describes the dense model.
    """
    dense = model.config
    derived = config_class(dense.model_type)
    config = copy.deepcopy(dense)
    config.__class__ = derived
    config.__dict__.pop("model_type", None)  # from a file; the class has its own
    config.lorank = {**recorded, "names": OWN_NAMES}
    model.__dict__.pop("_weight_conversions", None)  # of the file that the dense model came from
    _keep_names(model)
    _mark_method(model, recorded["method"])
    model.__class__ = model_class(type(model), derived)  # type: ignore[arg-type]
    _keep_recording(model)
    _mark_drawn(model)
    for module in model.modules():
        if getattr(module, "config", None) is dense:
            module.config = config  # type: ignore[assignment]


def _in_tables(method: Method, site: Site) -> bool:
    """Whether all tables of ranks of a method have a pattern for a site. Parts that a saved model did not have may be without one."""
    tables = [getattr(method, field.name) for field in dataclasses.fields(method)]
    return all(any(re.search(p, site.name) for p in table) for table in tables if isinstance(table, Mapping))


def _keep_recording(model: PreTrainedModel) -> None:
    """Let transformers record hidden states and attentions of the new class; otherwise it does so when a model of it is built."""
    if registry := getattr(output_capturing, "_CAN_RECORD_REGISTRY", None):
        registry[model] = model._can_record_outputs


def _refuse_dense_classes() -> None:
    """Let no dense model be built from the configuration of a converted one; its weights would not fit."""
    build = PreTrainedModel.__init__

    @functools.wraps(build)
    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(getattr(config, "lorank", None), dict) and not _inside.get():
            raise ValueError(
                f"{type(self).__name__} must have a dense configuration, got a {type(config).__name__}; use an Auto class such as "
                "AutoModelForCausalLM"
            )
        build(self, config, *args, **kwargs)

    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]


_refuse_dense_classes()


def _mark_method(model: PreTrainedModel, name: str) -> None:
    """Let every pretrained model in a converted one, such as its body, know the method."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._lorank_method = name  # type: ignore[assignment]


def _keep_policies() -> None:
    """Let converted models and their bodies keep the policy of their method under ``activation_checkpointing_enable``, which Trainer's
    ``gradient_checkpointing=True`` calls: one that is on stays, and the method's own comes before that of transformers, which keeps
    a block's input alone.

    The function raises ValueError for ``use_reentrant=True`` and `offload`, which know no policies.
    """
    enable = PreTrainedModel.activation_checkpointing_enable

    @functools.wraps(enable)
    def activation_checkpointing_enable(
        self: Any, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        given = dict(activation_checkpointing_kwargs or {})
        name = getattr(self, "_lorank_method", None)
        policy = POLICIES[(name and find(name).policy) or ("blocks" if has_tapes(self) else "none")]
        is_on = name is not None and policy_is_on(self)
        if "context_fn" in given or (policy is None and not is_on):
            enable(self, activation_checkpointing_kwargs, every_n_layers, offload)
            return
        if given.get("use_reentrant") or offload:
            raise ValueError(
                f"activation checkpointing of a {name} model must follow a policy of lorank.checkpoint, got "
                f"{'offload' if offload else 'use_reentrant'}=True, which would replace it; leave it out"
            )
        if not is_on:
            checkpoint(self, policy, every=every_n_layers)

    PreTrainedModel.activation_checkpointing_enable = activation_checkpointing_enable  # type: ignore[method-assign]


_keep_policies()


def forget(model: PreTrainedModel) -> None:
    """The opposite of `record`: the classes of transformers again, and a configuration without lorank."""
    configs = {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None and hasattr(c, "lorank")
    }
    for config in configs.values():
        dense_config(config)
    for module in model.modules():
        module.__dict__.pop("is_custom_code", None)
        module.__dict__.pop("_lorank_method", None)
        if type(module).__module__ == __name__:
            module.__class__ = type(module).__bases__[0]


def dense_config(config: Any) -> Any:
    """Turn a converted model's configuration, in place, into that of the architecture. A dense one stays as it is."""
    if hasattr(config, "lorank"):
        config.__class__ = type(config).__bases__[0]
        config.__dict__.pop("model_type", None)  # from a file; the class has its own
        del config.lorank
        config.__dict__.pop("auto_map", None)
        config.architectures = [one.removeprefix("Lorank") for one in config.architectures or []] or None
    return config


def _keep_names(model: PreTrainedModel) -> None:
    """Let transformers neither rename nor take apart weights when it saves or loads them: it leaves alone models that are not its own."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.is_custom_code = _not_of_transformers  # type: ignore[method-assign, assignment]


def _not_of_transformers() -> bool:
    return True


def _bodies(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The pretrained models in a model, itself included, that have no parameters themselves."""
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module for module in found if next(module.parameters(recurse=False), None) is None]


def _own_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "reset_parameters") and not _is_native(m)]


def _mark_drawn(model: nn.Module) -> None:
    """Mark layers built with memory, which have their initial values, so that `init_weights` skips them as it skips transformers' own."""
    for layer in _own_layers(model):
        if not any(parameter.is_meta for parameter in layer.parameters()):
            for module in layer.modules():
                module._is_hf_initialized = True


def _is_native(module: nn.Module) -> bool:
    """Not ours, or a factor, which is drawn by the layer it belongs to."""
    return isinstance(module, nn.Linear) or type(module).__module__.partition(".")[0] in ("torch", "transformers")


def _derive(base: type, body: dict[str, Any]) -> Any:
    name = f"Lorank{base.__name__}"
    derived = type(
        name, (base,), {**body, "__module__": __name__, "__doc__": f"{base.__name__} with a method of lorank."}
    )
    globals()[name] = derived  # pickle looks for it here
    return derived


def __getattr__(name: str) -> Any:
    """A generated class by its name, LorankLlamaForCausalLM, created when a pickle of another process needs it."""
    base: Any = getattr(transformers, name.removeprefix("Lorank"), None) if name.startswith("Lorank") else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = base if issubclass(base, PretrainedConfig) else base.config_class
    derived = config_class(config.model_type)
    return derived if base is config else model_class(base, derived)  # type: ignore[arg-type]


@functools.cache
def _auto_classes() -> list[Any]:
    """AutoModel, AutoModelForCausalLM, ... : every Auto class that maps configurations to models."""
    candidates = vars(modeling_auto).values()
    return [auto for auto in candidates if inspect.isclass(auto) and getattr(auto, "_model_mapping", None) is not None]


def _classes_of(auto: Any, config: type) -> tuple[type[PreTrainedModel], ...]:
    """The models that an Auto class makes of a configuration class."""
    models = auto._model_mapping.get(config, ())
    return models if isinstance(models, tuple) else (models,)


def positions_of(model: nn.Module) -> int | None:
    """The longest sequence that a model accepts; None: any."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    learned = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name]
    return positions - max([m.padding_idx + 1 for m in learned if m.padding_idx is not None], default=0)  # RoBERTa's
