"""From a recipe to a model: the shape, then the method, then what is kept for backward."""

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lorank.checkpointing import POLICIES, checkpoint
from lorank.conversion import convert
from lorank.evolution.egg import EggConfig
from lorank.optim import ESTIMATORS, find_optimizer, optimizer_names, options_of
from lorank.optim.groups import ranks
from lorank.pretrained import positions_of
from lorank.sizes import llama_config
from lorank.table import find, method_names, unknown
from lorank.train.estimators import build_egg, egg_config
from lorank.train.hub import asked_if_reachable
from lorank.train.recipe import Recipe


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    """The dense model's configuration: of a size, a model type, or a folder, config.json or hub name.

    Vocabulary and special tokens follow the tokenizer; a `vocab_size` of the recipe wins over the tokenizer's count
    (the papers use 32,000 rows with T5's 32,100 entries, of which the last hundred never occur in text).

    Raises:
        ValueError: unknown size, no such configuration, or one that is converted already.
    """
    if recipe.model == "egg":
        return egg_config(recipe)
    vocab_size = recipe.vocab_size
    if vocab_size is None:
        vocab_size = len(tokenizer) if tokenizer is not None else 32_000
    config: PretrainedConfig
    if recipe.model is None:
        config = llama_config(recipe.size, vocab_size=vocab_size, sequence_length=recipe.sequence_length)
    elif recipe.model in CONFIG_MAPPING_NAMES and not os.path.exists(recipe.model):
        config = AutoConfig.for_model(recipe.model)
    else:
        config = _read_config(recipe.model)
    if getattr(config, "lorank", None) is not None:
        raise ValueError(
            f"model={recipe.model!r} is converted already ({config.lorank['method']}); give its dense shape"
        )
    config.vocab_size = vocab_size
    config.use_cache = False
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # BERT and its kin look at what comes next unless told not to
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if tokenizer is not None and (token != "pad_token_id" or tokenizer.pad_token_id is not None):
            setattr(config, token, getattr(tokenizer, token))
        elif isinstance(index := getattr(config, token, None), int) and index >= vocab_size:
            setattr(config, token, None)  # the architecture's own, of a larger vocabulary
    return config


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy with that many blocks; what a configuration lists block by block is repeated from its beginning.

    Raises:
        ValueError: its number of blocks is not one that can be set.
    """
    now = getattr(config, "num_hidden_layers", None)
    if not isinstance(now, int):
        raise ValueError(f"a configuration of type {config.model_type!r} has no number of layers that can be set")
    config = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == now:
            setattr(config, name, (value * layers)[:layers])
    config.num_hidden_layers = layers
    return config


def _read_config(name: str) -> PretrainedConfig:
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".json")
    if looks_local and not os.path.exists(os.path.expanduser(name)):
        raise ValueError(
            f"model={name!r} does not exist; give a folder with a config.json, or a model type such as gpt2"
        )
    try:
        with asked_if_reachable():
            return AutoConfig.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        # a field that a configuration class refuses is told of in the last line, all else in the first
        reason = str(error).strip().splitlines()[-1 if isinstance(error, StrictDataclassError) else 0]
        raise ValueError(f"model={name!r} gives no configuration of transformers: {reason.strip()}") from None


def build_model(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """A model with fresh weights, converted and checkpointed as the recipe says; seed torch before. Fits the meta
    device.

    Raises:
        ValueError: a shape that cannot be built, sequences longer than its positions, or a method it cannot take.
    """
    if isinstance(config, EggConfig):
        return build_egg(recipe, config)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"no causal language model of {config.model_type!r} can be built: transformers has none of this type"
        )
    try:
        dtype = torch.bfloat16 if recipe.precision == "bf16-pure" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=recipe.attention)
    except Exception as error:  # whatever the modelling code makes of a shape that makes no sense
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if recipe.attention != "eager" and "does not support" in reason and "ttention" in reason:
            reason = f"transformers has no attention={recipe.attention} for it; give --attention eager"
        raise ValueError(f"no causal language model of {config.model_type!r} can be built: {reason}") from None
    check_positions(model, recipe.sequence_length)
    optimizer = find_optimizer(recipe.method)
    structure = recipe.method not in ("dense", "eggroll") and optimizer is None
    if recipe.method == "eggroll" and (recipe.targets or recipe.exclude):
        raise ValueError("method=eggroll moves every matrix; drop targets and exclude")
    if structure:
        convert(model, build_method(recipe), targets=recipe.targets, exclude=recipe.exclude)
    elif recipe.method == "dense" and (recipe.rank is not None or recipe.options or recipe.targets or recipe.exclude):
        raise ValueError("method=dense takes no rank, options, targets or exclude; drop them or choose another method")
    policy: str | None = recipe.checkpoint
    if policy is None and structure:
        policy = find(recipe.method).policy
    if recipe.checkpoint_every != 1 and policy in (None, "none"):
        raise ValueError(
            f"checkpoint_every={recipe.checkpoint_every} needs a checkpoint policy; give checkpoint=bottlenecks"
        )
    if policy is not None:
        checkpoint(model, POLICIES[policy], every=recipe.checkpoint_every)
    return model


def check_positions(model: nn.Module, sequence_length: int) -> None:
    """Raises ValueError if sequences are longer than the model's positions."""
    positions = positions_of(model)
    if positions is not None and sequence_length > positions:
        raise ValueError(f"sequence_length={sequence_length} exceeds the model's {positions} positions")


def check_causal(model: PreTrainedModel) -> None:
    """Raises ValueError if a model cannot be run, or if what it says of a position depends on later ones: its perplexity
    would mean nothing.

    Where a mask hides the last token, the gradient of earlier outputs with respect to it is zero, and exactly so in any
    precision.
    """
    if not next(model.parameters()).is_floating_point():
        return  # EGG, a recurrence of integers
    found: list[torch.Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output.detach().requires_grad_())
        return found[0]

    kind, training = model.config.model_type, model.training
    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model.eval()(input_ids=torch.arange(8, device=model.device)[None], use_cache=False).logits
            [influence] = torch.autograd.grad(logits[:, :-1].float().square().sum(), found[:1])
    except Exception as error:  # whatever the modelling code makes of a shape that makes no sense
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"a model of type {kind!r} with this configuration cannot be run: {reason}") from error
    finally:
        hook.remove()
        model.train(training)
    if not influence.isfinite().all():
        raise ValueError(f"a model of type {kind!r} gives numbers that are not finite on any text; it has diverged")
    if influence[:, -1].any():
        raise ValueError(
            f"model type {kind!r} sees tokens that are still to come, so its perplexity would mean nothing; take a decoder"
        )


def check_name(method: str) -> None:
    """Raises ValueError for a method that neither lorank nor an installed package has."""
    known = [*method_names(), *optimizer_names(), *ESTIMATORS, "dense"]
    if method not in known:
        raise ValueError(unknown("method", method, known))


def build_method(recipe: Recipe) -> Any:
    """The recipe's method with its hyper-parameters: the recipe's, else those published for the size, else the method's
    defaults."""
    check_name(recipe.method)
    method = find(recipe.method)
    known = list(method.__dataclass_fields__)
    check_options(recipe, known)
    if recipe.rank is not None and "rank" not in known:
        raise ValueError(f"rank={recipe.rank}: method {recipe.method} has no rank")
    try:
        return method(**_settings(recipe, method))
    except TypeError as error:  # a list where a name is meant, and the like
        raise ValueError(f"options: {recipe.method} cannot take {recipe.options}: {error}") from None


def schedule_of(recipe: Recipe) -> Callable[[int], float] | None:
    """Multiplier of the learning rate by steps done, of a method that has one of its own; ValueError if the steps are too few
    for it."""
    if recipe.method in ("dense", "eggroll") or find_optimizer(recipe.method) is not None:
        return None
    return build_method(recipe).schedule(recipe.steps, recipe.warmup_steps, recipe.min_lr_ratio)


def _settings(recipe: Recipe, kind: type) -> dict[str, Any]:
    """Rank and options: the recipe's, and beneath them what the paper of a method or optimizer takes at its size."""
    published = {} if recipe.model else getattr(kind, "published", {}).get(recipe.size, {})
    return {**published, **recipe.options, **({} if recipe.rank is None else {"rank": recipe.rank})}


def rank_of(recipe: Recipe) -> Any:
    """The rank that the recipe's method takes: the recipe's, else the published one of the size, else a default of the
    method, of an optimizer a quarter of the width. None: it has no rank, or an optimizer is not told one for a `model`."""
    if recipe.method in ("dense", "eggroll"):
        return recipe.rank
    kind = find_optimizer(recipe.method)
    if kind is None:
        return getattr(build_method(recipe), "rank", None)
    return _settings(recipe, kind).get("rank", None if recipe.model else 0.25)


def written_out(recipe: Recipe) -> Recipe:
    """The recipe with the rank and options that it leaves to the size, so that its model may become another one."""
    if recipe.method in ("dense", "eggroll"):
        return recipe
    options = _settings(recipe, find_optimizer(recipe.method) or find(recipe.method))
    return dataclasses.replace(
        recipe, rank=rank_of(recipe), options={name: value for name, value in options.items() if name != "rank"}
    )


def check_options(recipe: Recipe, known: Sequence[str]) -> None:
    """Raises ValueError for an option that the method does not have."""
    for name in recipe.options:
        if name not in known:
            raise ValueError(f"options: {recipe.method} has no field {name!r}; it has {', '.join(known)}")


def check_types(recipe: Recipe, kind: type) -> None:
    """Raises ValueError for an option of another type than its default."""
    defaults = options_of(kind)
    for name, value in recipe.options.items():
        default = defaults.get(name)
        for type_, asked in ((bool, "true or false"), (int, "a whole number"), (float, "a number"), (str, "a name")):
            if isinstance(default, type_):
                fits = isinstance(value, int | float if type_ is float else type_)
                if not fits or isinstance(value, bool) != (type_ is bool):
                    raise ValueError(
                        f"options: {name}={value!r} of {recipe.method} is not {asked}; its default is {default!r}"
                    )
                break


class Projection(NamedTuple):
    """A low-rank optimizer, the matrices of a model that it projects, and its options."""

    kind: type[Optimizer]
    ranks: dict[nn.Parameter, int]
    options: dict[str, Any]


def find_projection(recipe: Recipe, model: nn.Module) -> Projection | None:
    """What the recipe's method projects, if it is a low-rank optimizer; rank and options as `rank_of` and `build_method`
    have them.

    Raises:
        ValueError: an unknown option, a pattern that matches nothing, or no rank.
    """
    kind = find_optimizer(recipe.method)
    if kind is None:
        return None
    check_options(recipe, list(options_of(kind)))
    check_types(recipe, kind)
    try:
        make: Any = kind
        make([{"params": [nn.Parameter(torch.zeros(2, 2))], "rank": 1}], lr=1.0, **recipe.options)
    except TypeError as error:
        raise ValueError(f"options: {recipe.method} cannot take {recipe.options}: {error}") from None
    recipe = written_out(recipe)
    if recipe.rank is None:
        raise ValueError(f"method={recipe.method} needs a rank for model={recipe.model!r}; give rank=0.25, for example")
    return Projection(kind, ranks(model, recipe.rank, targets=recipe.targets, exclude=recipe.exclude), recipe.options)
