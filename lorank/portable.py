"""A modelling file next to saved weights, with which a model of lorank is loaded where lorank is not installed.

`lorank.standalone` is copied, and the model's own classes are written at its end. config.json names them under `auto_map`,
so ``from_pretrained(folder, trust_remote_code=True)`` finds them. A layer can be written there if its class says how, with
a method ``standalone()`` that gives the name of a class of `lorank.standalone` and its arguments. If a model has other layers,
the file asks for lorank instead (`lorank.needed`). Where lorank is imported its own classes are used, and no file is run.
"""

import pprint
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from lorank import standalone
from lorank.needed import write_needs
from lorank.whole import made_whole

FILE = "modeling_lorank.py"


def write_modelling_file(model: PreTrainedModel, folder: str | Path, autos: list[str]) -> None:
    """Write the file into `folder`, and `auto_map` into the model's configuration; if a layer cannot be written, `lorank.needed`'s.

    Args:
        autos: names of transformers' Auto classes that load the model.
    """
    config: Any = model.config
    layers = _layers(model)
    base, base_config = type(model).__bases__[0], type(config).__bases__[0]
    if (
        layers is None
        or not autos
        or any(
            kind.__name__.startswith("Generic") for kind in base.__mro__
        )  # whose body is AutoModel's, of lorank's type
        or not all(one.__module__.startswith("transformers.") for one in (base, base_config))
    ):
        write_needs(config, folder)
        return
    classes = {"AutoConfig": type(config).__name__, **dict.fromkeys(autos, type(model).__name__)}
    if body := _body(model, layers):
        classes["AutoModel"] = f"Lorank{type(body).__name__}"
    config.auto_map = {auto: f"{Path(FILE).stem}.{name}" for auto, name in classes.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    kinds = {type(model).__name__: (base, "")}
    if body:
        kinds[classes["AutoModel"]] = (type(body), f"{model.base_model_prefix}.")
    with made_whole(Path(folder) / FILE) as half:
        half.write_text(_text(kinds, base_config, type(config), layers), encoding="utf-8")


def _text(
    kinds: dict[str, tuple[type, str]], base_config: type, config: type[PretrainedConfig], layers: dict[str, Any]
) -> str:
    """Of the file: `kinds` are its classes by name, each with its base and what the names of its layers leave out."""
    imports = "\n".join(dict.fromkeys(_import(kind) for kind in (*(base for base, _ in kinds.values()), base_config)))
    models = "\n\n\n".join(_class(name, base, prefix, config) for name, (base, prefix) in kinds.items())
    return (
        Path(standalone.__file__).read_text(encoding="utf-8")
        + f"""

# The classes of this model.

{imports}

LAYERS = {pprint.pformat(layers, width=110, compact=True, sort_dicts=False)}


class {config.__name__}({base_config.__name__}):
    model_type = {config.model_type!r}


{models}
"""
    )


def _class(name: str, base: type, prefix: str, config: type[PretrainedConfig]) -> str:
    layers = f"{{name.removeprefix({prefix!r}): layers for name, layers in LAYERS.items()}}" if prefix else "LAYERS"
    return f"""class {name}(Chained, {base.__name__}):
    config_class = {config.__name__}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        put_layers(self, {layers})"""


def _body(model: PreTrainedModel, layers: dict[str, Any]) -> PreTrainedModel | None:
    """The body of a model with a head, which AutoModel loads by the same file; None if there is none, or not all layers are in it."""
    body = getattr(model, model.base_model_prefix, None)
    inside = all(name.startswith(f"{model.base_model_prefix}.") for name in layers)
    public = isinstance(body, PreTrainedModel) and type(body).__module__.startswith("transformers.")
    bodies: Any = AutoModel._model_mapping.get(type(model.config).__bases__[0], ())
    return body if public and inside and isinstance(body, bodies) else None


def _import(kind: type) -> str:
    public = getattr(transformers, kind.__name__, None) is kind
    return f"from {'transformers' if public else kind.__module__} import {kind.__name__}"


def _layers(model: nn.Module) -> dict[str, Any] | None:
    """{name with * for the depth: [[depths, [class, arguments]], ...]}; None if a layer cannot be written, as experts cannot."""
    if any(hasattr(module, "stands_for_experts") for module in model.modules()):
        return None
    found: dict[str, list[Any]] = {}
    for name, module in _replaced(model):
        said = _said(module)
        if said is None:
            return None
        depth = re.search(r"\.(\d+)\.", name)
        pattern = name if depth is None else f"{name[: depth.start(1)]}*{name[depth.end(1) :]}"
        groups = found.setdefault(pattern, [])
        if not groups or groups[-1][1] != said:
            groups.append([[], said])
        groups[-1][0].append(0 if depth is None else int(depth[1]))
    return found or None


def _replaced(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are not the architecture's own, outermost ones only."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{one}.") for one in outer):
            continue
        if hasattr(module, "stands_for_linear") or hasattr(module, "standalone") or isinstance(module, nn.Identity):
            outer.append(name)
            yield name, module


def _said(module: nn.Module) -> list[Any] | None:
    """How a layer describes itself. Not by a base class whose forward pass it replaces."""
    if isinstance(module, nn.Identity):
        return ["Nothing", {}]
    if isinstance(module, nn.Linear):
        sizes = {"d_in": module.in_features, "d_out": module.out_features, "bias": module.bias is not None}
        return ["Dense", sizes]
    lines = type(module).__mro__
    says = [place for place, kind in enumerate(lines) if "standalone" in vars(kind)]
    runs = [place for place, kind in enumerate(lines) if "forward" in vars(kind)]
    if not says or says[0] > runs[0]:
        return None
    said = module.standalone()  # type: ignore[operator]
    if said is None:
        return None
    kind, arguments = said
    if "parts" in arguments:
        arguments = {**arguments, "parts": {name: _said(part) for name, part in arguments["parts"].items()}}
        if None in arguments["parts"].values():
            return None
    return [kind, arguments]
