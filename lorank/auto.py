"""How transformers' Auto classes come to know models saved by lorank, at no cost to those who never load one.

A saved model has a new `model_type`, "lorank_" + the architecture's. transformers without lorank refuses
that type, which is right: a plain Llama would load none of the factors and answer noise. With lorank imported, the type
is a `PromisedConfig`: a name that turns into the real configuration class (and registers the model classes with it,
see `lorank.pretrained`) when a file first asks for it. So `import lorank` need not import four hundred architectures,
nor torch.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PREFIX = "lorank_"
EGG = "lorank_egg"
"""The one architecture that is not transformers' own."""
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.modeling_utils"
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Options that say where files are."""


def type_of(config: Any) -> str:
    """The model type of a configuration, converted or not, as a message names it: "llama"."""
    kind: str = config.model_type
    return kind if kind == EGG else kind.removeprefix(PREFIX)


def real_config(model_type: str) -> Any:
    """The configuration class of saved models of a type, "lorank_llama"."""
    if model_type == EGG:
        from lorank.evolution.egg_model import EggConfig

        return EggConfig
    from lorank.pretrained import config_class

    return config_class(model_type.removeprefix(PREFIX))


class PromisedConfig:
    """Stands in transformers' table of configurations until the real class is asked for."""

    model_type: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real_class()(*args, **kwargs)

    @classmethod
    def real_class(cls) -> Any:
        return real_config(cls.model_type)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return cls.real_class().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real_class().from_pretrained(*args, **kwargs)


def _refuse_dense_configurations(base: Any) -> None:
    """Let no dense configuration read a converted model's: ``LlamaForCausalLM.from_pretrained`` would only warn, and answer noise."""
    read = base.__dict__["from_dict"].__func__
    if hasattr(read, "refuses_converted"):
        return

    @functools.wraps(read)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        saved = config_dict.get("model_type") or ""
        if saved.startswith(PREFIX) and cls.model_type not in ("", saved):
            raise ValueError(
                f"{cls.__name__} must not read a model of type {saved!r}: it was converted by lorank, and a dense one would have random "
                "weights; load it with AutoModelForCausalLM or another Auto class"
            )
        return read(cls, config_dict, **kwargs)

    from_dict.refuses_converted = True  # type: ignore[attr-defined]
    base.from_dict = classmethod(from_dict)


def _register(auto: ModuleType) -> None:
    _refuse_dense_configurations(auto.PreTrainedConfig)
    for model_type in [*(PREFIX + base_type for base_type in auto.CONFIG_MAPPING_NAMES), EGG]:
        auto.AutoConfig.register(model_type, type("PromisedConfig", (PromisedConfig,), {"model_type": model_type}))


def _refuse_other_configurations(models: ModuleType) -> None:
    """Let no model get the weights of a converted one under the configuration of another, which transformers would only warn of."""
    base = models.PreTrainedModel
    load = base.__dict__["from_pretrained"].__func__
    if hasattr(load, "refuses_converted"):
        return

    @functools.wraps(load)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        place = pretrained_model_name_or_path
        if config is not None and place is not None and getattr(config, "_name_or_path", None) != str(place):
            given = config if isinstance(config, models.PreTrainedConfig) else cls.config_class
            options = {name: kwargs[name] for name in _HUB if name in kwargs}
            _check_same_model(cls.__name__, given, place, models.PreTrainedConfig, options)
        return load(cls, place, *args, config=config, **kwargs)

    from_pretrained.refuses_converted = True  # type: ignore[attr-defined]
    base.from_pretrained = classmethod(from_pretrained)


def _check_same_model(name: str, given: Any, place: Any, base: Any, options: dict[str, Any]) -> None:
    """Raises ValueError if the weights at a place and a given configuration are not both of dense models, or of one method."""
    try:
        saved, _ = base.get_config_dict(place, **options)
    except (OSError, ValueError):  # weights without a configuration
        return
    kinds = [
        (config.get("model_type") or "", (config.get("lorank") or {}).get("method"))
        for config in (saved, {"model_type": given.model_type, "lorank": getattr(given, "lorank", None)})
    ]
    if kinds[0] != kinds[1] and any(kind.startswith(PREFIX) for kind, _ in kinds):
        said = [f"{kind!r}" + (f" (method {method!r})" if method else "") for kind, method in kinds]
        raise ValueError(
            f"{name} must get the configuration of the weights in {place}, which is of type {said[0]}, got one of type {said[1]}, which "
            "would give layers random weights; leave out config and use an Auto class such as AutoModelForCausalLM"
        )


class _After(importlib.abc.MetaPathFinder):
    """Does something with a module as soon as it is first imported, by whomever."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]):
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)  # here, not above: somebody may look for the module and not import it
            self.act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def promise_auto_classes() -> None:
    """Let AutoConfig know every `lorank_*` model type, and dense models refuse converted weights: now if transformers' modules are
    already imported, else at their import."""
    for name, act in ((_AUTO_CONFIG, _register), (_MODELS, _refuse_other_configurations)):
        if name in sys.modules:
            act(sys.modules[name])
        else:
            sys.meta_path.insert(0, _After(name, act))
