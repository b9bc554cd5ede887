"""How transformers' Auto classes come to know models saved by lorank, at no cost to those who never load one.

A saved model carries a `model_type` of its own, "lorank_" + the architecture's. transformers without lorank refuses
that type, which is right: a plain Llama would load none of the factors and answer noise. With lorank imported, the type
is a `PromisedConfig`: a name that turns into the real configuration class (and registers the model classes with it,
see `lorank.pretrained`) when a file first asks for it. So `import lorank` need not import four hundred architectures,
nor torch.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PREFIX = "lorank_"
EGG = "lorank_egg"
"""The one architecture that is not transformers' own."""
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class PromisedConfig:
    """Stands in transformers' table of configurations until the real class is asked for."""

    model_type: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real_class()(*args, **kwargs)

    @classmethod
    def real_class(cls) -> Any:
        if cls.model_type == EGG:
            from lorank.evolution.egg import EggConfig

            return EggConfig
        from lorank.pretrained import config_class

        return config_class(cls.model_type.removeprefix(PREFIX))

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


class _AfterAutoConfig(importlib.abc.MetaPathFinder):
    """Registers as soon as transformers' table of configurations is first imported, by whomever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)  # here, not above: somebody may look for the module and not import it
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def promise_auto_classes() -> None:
    """Let AutoConfig know every `lorank_*` model type: now if it is already imported, else at its import."""
    if _AUTO_CONFIG in sys.modules:
        _register(sys.modules[_AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _AfterAutoConfig())
