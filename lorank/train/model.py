"""From a recipe to a model: the shape, then the method, then what is kept for backward."""

import copy
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorank.architectures import llama_config
from lorank.auto import type_of
from lorank.checkpointing import POLICIES, checkpoint
from lorank.conversion import convert
from lorank.evolution.egg_model import EggConfig
from lorank.kernels import check_kernels, implementations
from lorank.pretrained import positions_of
from lorank.speed.bottleneck import fuse_bottlenecks
from lorank.speed.linear_cross_entropy import loss_without_logits
from lorank.starts import zero_outputs
from lorank.table import from_record
from lorank.train.data import load_tokenizer
from lorank.train.hub import ForeignCode, read_config
from lorank.train.methods import KEYS, Methods, methods_of
from lorank.train.recipe import Recipe
from lorank.train.shape import described, reason_of, repeat_lists, reset_leftovers, set_shape
from lorank.train.start import Start, start_config
from lorank.train.vocabulary import set_vocabulary
from lorank.trial import check_quantization

logger = logging.getLogger(__name__)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
"""Files that have trained weights."""

INTEGERS = {
    "weight_decay": 0.0,
    "clip": 0.0,
    "warmup_steps": 0,
    "precision": "fp32",
    "checkpoint": None,
    "documents": "packed",
    "zero_outputs": False,
}
"""The only values that mean something to a model of integers."""


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    """The dense model's configuration: of a size, a model type, or a folder, config.json or hub name.

    Vocabulary and special tokens follow the tokenizer, also in the nested configuration of a text model. The recipe's
    `vocab_size` overrides the tokenizer's count (the papers use 32,000 rows with T5's 32,100 entries, of which the last
    hundred never occur in text). There is no padding id if the tokenizer has no padding token or uses it for text,
    because a model never trains the embedding of its padding id. The entries of `shape` come last.

    Raises:
        ValueError: unknown size or entry, no such configuration, one that is already converted, or code that would be downloaded.
    """
    if recipe.attention not in (known := implementations("attn_implementation")):
        raise ValueError(f"attention must be one of {', '.join(known)}, which are installed, got {recipe.attention!r}")
    check_kernels(recipe.shape, "shape")
    config: PretrainedConfig
    if recipe.start_from is not None:  # which has its vocabulary
        config = start_config(recipe.start_from)
        check_quantization(config)
        vars(config).pop("auto_map", None)
        return config
    if recipe.model is None:
        config = llama_config(recipe.size, sequence_length=recipe.sequence_length)
    elif recipe.model in CONFIG_MAPPING and not os.path.exists(recipe.model):
        config = AutoConfig.for_model(recipe.model)
    else:
        config = _read_config(recipe.model)
    if getattr(config, "lorank", None) is not None:
        raise ValueError(
            f"model={recipe.model!r} is already converted ({config.lorank['method']}); give the dense model it was made from"
        )
    check_quantization(config)
    vars(config).pop("auto_map", None)  # code in the folder, which is not run
    reset_leftovers(config)
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # BERT and its kin attend to later tokens unless told not to
    set_vocabulary(config, tokenizer, recipe.vocab_size)
    set_shape(config, recipe.shape)
    return config


def empty_model(recipe: Recipe, *, layers: int | None = None) -> PreTrainedModel:
    """The recipe's model on the meta device: shapes without data; if given, with another number of `layers`."""
    config = _counted_config(recipe)
    with torch.device("meta"):
        return build_model(recipe, config if layers is None else with_layers(config, layers))


def empty_dense(recipe: Recipe) -> PreTrainedModel:
    """The dense model of the recipe's shape on the meta device, whatever its methods are."""
    with torch.device("meta"):
        return loss_without_logits(_dense_model(recipe, _counted_config(recipe)))


def _counted_config(recipe: Recipe) -> PretrainedConfig:
    """`build_config`, where only the number of the tokenizer's entries matters."""
    counted = recipe.tokenizer is not None and recipe.vocab_size is None
    tokenizer = load_tokenizer(recipe.tokenizer) if counted else None
    if tokenizer is None and recipe.vocab_size is None:
        recipe = dataclasses.replace(recipe, vocab_size=4096)  # as a tokenizer trained on the data would have
    return build_config(recipe, tokenizer)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy with that many blocks; what a configuration lists block by block is repeated from its beginning.

    Raises:
        ValueError: its number of blocks is not one that can be set.
    """
    now = getattr(config, "num_hidden_layers", None)
    if not isinstance(now, int):
        raise ValueError(
            f"the number of layers of a {config.model_type!r} model cannot be changed: it has no num_hidden_layers"
        )
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    repeat_lists(config, now)
    return config


def warn_of_weights(name: str | None) -> None:
    """Log that training starts from new weights, if `model` names something that has trained ones."""
    folder = Path(name or "").expanduser()
    known = name is None or folder.is_file() or (name in CONFIG_MAPPING and not folder.exists())
    if not known and (not folder.exists() or any(any(folder.glob(pattern)) for pattern in WEIGHTS)):
        logger.warning(
            "only the configuration of model=%s is used: training starts from new weights, not from its own", name
        )


def _read_config(name: str) -> PretrainedConfig:
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".json")
    if looks_local and not os.path.exists(os.path.expanduser(name)):
        raise ValueError(
            f"model={name!r} does not exist; give a folder with a config.json, or a model type such as gpt2"
        )
    try:
        return read_config(os.path.expanduser(name))
    except ForeignCode:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model={name!r} could not be read as a configuration of transformers: {reason}") from None


def build_model(
    recipe: Recipe, config: PretrainedConfig, saved: PretrainedConfig | None = None, start: Start | None = None
) -> PreTrainedModel:
    """A model with fresh weights, or with those of `start`, converted and checkpointed as the recipe says; seed torch before. It may be built on
    the meta device. A run that goes on gives the configuration that it `saved`, whose method has all settings: those that
    the recipe leaves out may have other defaults by now.

    Raises:
        ValueError: a shape that cannot be built, sequences longer than its positions, or a method that does not suit it.
    """
    found = methods_of(recipe)
    if isinstance(config, EggConfig):
        _check_integers(recipe, found)
    model = _dense_model(recipe, config)
    check_positions(model, recipe.sequence_length)
    if start is not None and not start.converted:
        start.fill(model)
    if found.method.name != "dense":
        recorded = getattr(saved, "lorank", None)
        method = found.method if recorded is None else from_record(recorded)
        method = dataclasses.replace(method, **{name: getattr(found.method, name) for name in method.progress})
        (convert if start is None else start.convert)(model, method, targets=recipe.targets, exclude=recipe.exclude)
        if start is not None and start.converted:
            start.fill(model)
        if recipe.fused:
            fuse_bottlenecks(model)
    elif (recipe.targets or recipe.exclude) and not hasattr(found.mover, "rank"):
        raise ValueError(f"{found.title} converts no layer and projects no gradient; leave out targets and exclude")
    if recipe.zero_outputs:
        zero_outputs(model)
    policy = recipe.checkpoint or found.method.policy
    if recipe.checkpoint_every != 1 and policy in (None, "none"):
        raise ValueError(
            f"checkpoint_every={recipe.checkpoint_every} needs a checkpoint policy; add checkpoint=bottlenecks"
        )
    if policy is not None:
        checkpoint(model, POLICIES[policy], every=recipe.checkpoint_every)
    model.config.use_cache = False  # not before: settings of generation are made from the configuration
    return model if found.gradient.answers() else loss_without_logits(model)


def _check_integers(recipe: Recipe, found: Methods) -> None:
    """Raises ValueError for settings that mean nothing to EGG, whose weights are integers without a gradient."""
    egg = "a model of type lorank_egg, whose weights are integers"
    for key, name, method in zip(KEYS, ("dense", "votes", "eggroll"), found, strict=True):
        if method.name != name:
            raise ValueError(f"{key} must be {name} with {egg}, got {method.name}; start from the recipe egg")
    for name, wanted in INTEGERS.items():
        if (value := getattr(recipe, name)) != wanted:
            raise ValueError(f"{name} must be {wanted} with {egg}, got {value}; start from the recipe egg")


def _dense_model(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"transformers has no causal language model of type {config.model_type!r}; choose another model"
        )
    dtype = torch.bfloat16 if recipe.precision == "bf16-pure" else torch.float32
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # refused below
            make = partial(AutoModelForCausalLM.from_config, config, dtype=dtype)
            model: PreTrainedModel = _with_attention(make, recipe.attention)
        _check_not_empty(model)
        return model
    except Exception as error:  # whatever the modelling code raises for a shape that makes no sense
        reason, given = reason_of(error, config), f" with {described(recipe.shape)}" if recipe.shape else ""
        if recipe.attention != "eager" and "does not support" in reason and "ttention" in reason:
            reason, given = f"transformers has no attention={recipe.attention} for it; use attention=eager", ""
        elif "adding_idx" in reason:  # positions whose table is shorter than the vocabulary
            padding, rows = (getattr(config, name, None) for name in ("pad_token_id", "max_position_embeddings"))
            reason = f"max_position_embeddings must be above the padding id {padding}, after which its positions begin, got {rows}"
        raise ValueError(
            f"no causal language model of type {config.model_type!r} can be built{given}: {reason}"
        ) from None


def _with_attention(make: Callable[..., PreTrainedModel], attention: str) -> PreTrainedModel:
    """The model; where transformers has no "sdpa" for its type, which is the default, with "eager"."""
    try:
        return make(attn_implementation=attention)
    except ValueError as error:
        if attention != "sdpa" or "does not support" not in str(error) or "scaled_dot_product" not in str(error):
            raise
        logger.info("transformers has no sdpa attention for this type of model; it gets its own, eager")
        return make(attn_implementation="eager")


def _check_not_empty(model: PreTrainedModel) -> None:
    """Raises ValueError for a model without blocks, or with a weight that has no entries."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ValueError(f"the number of layers must be at least 1, got {layers}")
    if (empty := next((name for name, p in model.named_parameters() if not p.numel()), None)) is not None:
        raise ValueError(f"its weight {empty} would have no entries")


def check_positions(model: nn.Module, sequence_length: int) -> None:
    """Raises ValueError if sequences are longer than the model's positions."""
    positions = positions_of(model)
    if positions is not None and sequence_length > positions:
        raise ValueError(f"sequence_length={sequence_length} exceeds the model's {positions} positions")


def check_causal(model: PreTrainedModel, shape: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError if a model cannot be run, or if what it says of a position depends on later ones: its perplexity would
    mean nothing. A model that will be trained is run in training mode too; it gets the recipe's `shape`, to name it.

    Where a mask hides the last token, the gradient of earlier outputs with respect to it is zero, and exactly so in any
    precision. What no gradient shows (a choice that depends on all tokens, a second table that reads their ids) shows when the
    last token is exchanged for another. The ids are from the middle of the vocabulary, because special ones are at its ends,
    and XLM hides those of padding.
    """
    if not next(model.parameters()).is_floating_point():
        return  # EGG, a recurrence of integers
    kind, training = type_of(model.config), model.training
    try:
        ids = _some_ids(model)
        logits, influence = _influence(model, ids, slice(None, -1))
        with torch.no_grad():
            other = model(input_ids=ids[:, [0, 1, 2, 3, 4, 5, 6, 3]], use_cache=False).logits
            if shape is not None:
                with torch.random.fork_rng(devices=[]):
                    model.train()(input_ids=ids, use_cache=False)  # dropout
    except Exception as error:  # whatever the modelling code makes of a shape that makes no sense
        given = described(shape or {}) or "this configuration"
        raise ValueError(
            f"a model of type {kind!r} with {given} cannot be run: {reason_of(error, model.config)}"
        ) from error
    finally:
        model.train(training)
    if not all(one.isfinite().all() for one in influence):
        raise ValueError(f"a model of type {kind!r} gives numbers that are not finite on any text; it has diverged")
    moved = (other - logits)[:, :-1].detach().abs().max() / logits.detach().abs().max()
    if any(one[:, -1].any() for one in influence) or moved > torch.finfo(logits.dtype).eps ** 0.5:
        raise ValueError(
            f"model type {kind!r} sees the tokens it should predict, so its perplexity would mean nothing; use a decoder"
        )


def check_separate(model: PreTrainedModel) -> None:
    """Raises ValueError if a model does not keep documents apart whose positions begin anew (`documents=separate`): if what it
    says of the second document of a row depends on the first, or is not what it says of the second alone."""
    kind, training = type_of(model.config), model.training
    ids = _some_ids(model)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=ids.device)
    try:
        together, influence = _influence(model, ids, slice(3, None), position_ids=positions)
        with torch.no_grad():
            alone = model(input_ids=ids[:, 3:], use_cache=False).logits
    except Exception as error:  # it takes no positions, or whatever the modelling code makes of them
        raise _not_separate(kind, reason_of(error, model.config)) from error
    finally:
        model.train(training)
    if any(one[:, :3].any() for one in influence):
        raise _not_separate(kind, "a token would still see the documents before its own")
    if (together[:, 3:] - alone).abs().max() > torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max():
        raise _not_separate(kind, "its positions would not begin anew with each document")


def _not_separate(kind: str, reason: str) -> ValueError:
    return ValueError(f"documents must be packed or padded with a model of type {kind!r}, got separate: {reason}")


def _some_ids(model: PreTrainedModel) -> torch.Tensor:
    """A row of eight tokens from the middle of the vocabulary [1, 8]."""
    entries = model.get_input_embeddings().weight.shape[0]  # type: ignore
    return (torch.arange(8, device=model.device)[None] + entries // 2) % entries


def _influence(
    model: PreTrainedModel, ids: torch.Tensor, wanted: slice, **given: torch.Tensor
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Logits in evaluation mode, and gradients of those that are `wanted` with respect to all outputs of the embedding [1, n, d]."""
    found: list[torch.Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # which CTRL changes in place

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model.eval()(input_ids=ids, use_cache=False, **given).logits
            sum_of_squares = logits[:, wanted].float().square().sum()
            return logits, torch.autograd.grad(sum_of_squares, found, materialize_grads=True)
    finally:
        hook.remove()
