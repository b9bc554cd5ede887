"""A conversion tried on shapes alone, before a model is changed.

The model is built a second time from its configuration, on the meta device, where tensors have shapes and no memory. This
twin is converted and called once in evaluation and once in training. What fails only after the conversion is refused: code
that reads a weight from somewhere else (RWKV), blocks that hand different numbers of tokens to each other (Funnel), names
that transformers would change when it loads them. A type whose dense twin cannot be called this way, because it needs other
inputs, is not tried.
"""

import collections
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from lorank.checkpointing import has_tapes
from lorank.method import Method, Site
from lorank.sites import module_name

TOKENS = 8
Shapes = list[torch.Size]


def check_quantization(config: PretrainedConfig) -> None:
    """Raises ValueError for the configuration of quantised weights, as which trained ones could not be loaded."""
    if quantization := getattr(config, "quantization_config", None):
        given: Any = quantization if isinstance(quantization, dict) else vars(quantization)
        raise ValueError(
            f"the configuration must not be that of quantised weights, got quantization_config ({given.get('quant_method', 'unknown')}); "
            "remove this entry to train a model of this shape"
        )


def check_shared(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises ValueError for a projection whose weight also serves elsewhere, because its replacement would serve here alone."""
    homes: dict[int, list[str]] = {}
    twice = isinstance(model, PreTrainedModel)  # which cannot be saved with a block in two places
    for name, module in model.named_modules(remove_duplicate=not twice):
        for parameter in module._parameters.values():
            homes.setdefault(id(parameter), []).append(name)
    for site in (site for site in sites if not site.experts):
        layer: Any = model.get_submodule(module_name(model, site))
        if len(homes[id(layer.weight)]) > 1:
            raise ValueError(
                f"{site.role} cannot be replaced, because it shares its weight with another layer; exclude it, or use another "
                "architecture"
            )


_passed: collections.deque[tuple[Any, ...]] = collections.deque(maxlen=100)
"""The trials that raised nothing, latest first: a plan, a comparison or a test converts one shape again and again."""

_known: collections.deque[tuple[Any, ...]] = collections.deque(maxlen=20)
"""Types and configurations, and with which inputs their dense twins work: methods are tried on one after another."""


def try_on_shapes(
    model: PreTrainedModel, method: Method, sites: Sequence[Site], apply: Callable[[PreTrainedModel], Any]
) -> None:
    """Raises ValueError if the model would not work, or not be loaded as it was saved, once `apply` has converted its `sites`.

    Neither the model nor the global random generator changes. What has passed once in this process is not tried again.
    """
    asked = type(model), method, [site.name for site in sites], _shapes(model), model.config
    if asked not in _passed:
        asked = *asked[:-1], copy.deepcopy(model.config)
        _try(model, method, apply)
        _passed.appendleft(asked)


def _try(model: PreTrainedModel, method: Method, apply: Callable[[PreTrainedModel], Any]) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), no_init_weights():
        warnings.simplefilter("ignore")
        twin = _twin(model)
        if twin is None:
            return
        inputs = _inputs_of_both_modes(twin)
        try:
            apply(twin)
        except ValueError:
            raise
        except Exception:  # the method needs values; the conversion itself tells what is wrong with them
            return
        _check_layerdrop(twin, method)
        _check_names(twin, method)
        for training, given in zip((False, True), inputs, strict=True):
            if given is None:
                continue
            before, arguments = given
            mode = "training" if training else "evaluation"
            try:
                after = _outputs(twin, arguments, training)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
                raise ValueError(
                    f"{method.name} does not suit {model.config.model_type!r}: the converted model fails in {mode} ({reason}); use "
                    "another method, exclude the projections concerned, or use another architecture"
                ) from error
            if after != before:
                raise ValueError(
                    f"{method.name} does not suit {model.config.model_type!r}: in {mode}, outputs have other shapes than before; use "
                    "another method or architecture"
                )


def _twin(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same model on the meta device, built from its configuration; None if that gives another one."""
    try:
        with torch.device("meta"):
            twin = type(model)._from_config(copy.deepcopy(model.config))
    except Exception:  # then `from_pretrained` cannot build it either, converted or not
        return None
    return twin if _shapes(twin) == _shapes(model) else None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _inputs_of_both_modes(twin: PreTrainedModel) -> list[tuple[Shapes, dict[str, Any]] | None]:
    """What `_working_inputs` finds in evaluation and in training, looked for once."""
    for kind, config, found in _known:
        if (kind, config) == (type(twin), twin.config):
            return found
    _known.appendleft((type(twin), copy.deepcopy(twin.config), [_working_inputs(twin, mode) for mode in (False, True)]))
    return _known[0][-1]


def _working_inputs(twin: PreTrainedModel, training: bool) -> tuple[Shapes, dict[str, Any]] | None:
    """Inputs with which the dense twin can be called, and the shapes of its outputs; None if none were found."""
    for arguments in _possible_inputs(twin):
        try:
            return _outputs(twin, arguments, training), arguments
        except Exception:
            continue
    return None


class _Zeros(TorchDispatchMode):
    """Lets code that looks at a value of the meta device find 0 or False, as if nothing were padded or packed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def _outputs(twin: PreTrainedModel, arguments: dict[str, Any], training: bool) -> Shapes:
    twin.train(training)
    with torch.no_grad(), _Zeros():
        return [leaf.shape for leaf in tree_leaves(dict(twin(**arguments))) if isinstance(leaf, Tensor)]


def _possible_inputs(twin: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Text, and pictures or sounds if these are the model's main input, of the least size."""
    accepted, side = inspect.signature(twin.forward).parameters, _number(twin.config, "image_size", 32)
    ids = torch.ones(1, TOKENS, dtype=torch.int64, device="meta")
    channels = _number(twin.config, "num_channels", 3)
    frames = 2 * _number(twin.config, "max_source_positions", 50)
    known: dict[str, Any] = {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "pixel_values": torch.zeros(1, channels, side, side, device="meta"),
        "input_values": torch.zeros(1, 8000, device="meta"),
        "input_features": torch.zeros(1, _number(twin.config, "num_mel_bins", 80), frames, device="meta"),
    }
    quiet = {"use_cache": False} if "use_cache" in accepted else {}
    for chosen in (("input_ids", "decoder_input_ids"), (twin.main_input_name, "decoder_input_ids"), tuple(known)):
        if made := {name: known[name] for name in chosen if name in accepted and name in known}:
            yield {**made, **quiet}


def _number(config: PretrainedConfig, name: str, default: int) -> int:
    """An entry of a configuration or of one inside it; the first of several numbers."""
    for one in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        value = getattr(one, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return default


def _check_layerdrop(twin: PreTrainedModel, method: Method) -> None:
    """Raises ValueError if a block may be skipped whose output the next one needs."""
    if not has_tapes(twin):
        return
    rates = {name: rate for m in twin.modules() for name, rate in vars(m).items() if "layerdrop" in name.lower()}
    rates |= {name: rate for name, rate in vars(twin.config).items() if "layerdrop" in name.lower()}
    if dropped := next((name for name, rate in rates.items() if isinstance(rate, float) and rate > 0), None):
        raise ValueError(
            f"{method.name} needs every block of every forward pass, but {dropped} is {rates[dropped]}, so that training skips some; "
            f"set it to 0 in the configuration"
        )


def _check_names(twin: PreTrainedModel, method: Method) -> None:
    """Raises ValueError if transformers would give a weight another name when it loads the model."""
    rules: Any = get_model_conversion_mapping(twin)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    for name in twin.state_dict():
        if (other := rename_source_key(name, renamings, converters)[0]) != name:
            raise ValueError(
                f"{method.name} does not suit {twin.config.model_type!r}: transformers would load the weight {name} as {other}; use another "
                "method or architecture"
            )
