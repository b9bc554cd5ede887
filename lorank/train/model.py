"""From a recipe to a model: the shape, then the method, then what is kept for backward."""

import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lorank.checkpointing import POLICIES, checkpoint
from lorank.conversion import convert
from lorank.egg import EggConfig
from lorank.methods import find_method
from lorank.sizes import find_size, llama_config
from lorank.train.estimators import build_egg, egg_config
from lorank.train.recipe import Recipe


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    """The dense model's configuration: of a size, a model type, or a folder, config.json or hub name.

    Vocabulary and special tokens follow the tokenizer; a `vocab_size` of the recipe wins over the tokenizer's count
    (the papers use 32,000 rows with T5's 32,100 entries, of which the last hundred never occur in text).

    Raises:
        ValueError: unknown size, no such configuration, one that is converted already, or sequences longer than its
        positions.
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
        if tokenizer is not None:
            setattr(config, token, getattr(tokenizer, token))
        elif isinstance(index := getattr(config, token, None), int) and index >= vocab_size:
            setattr(config, token, None)  # the architecture's own, of a larger vocabulary
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < recipe.sequence_length:
        raise ValueError(f"sequence_length={recipe.sequence_length} exceeds the model's {positions} positions")
    return config


def _read_config(name: str) -> PretrainedConfig:
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".json")
    if looks_local and not os.path.exists(os.path.expanduser(name)):
        raise ValueError(
            f"model={name!r} does not exist; give a folder with a config.json, or a model type such as gpt2"
        )
    try:
        return AutoConfig.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        # a field that a configuration class refuses is told of in the last line, all else in the first
        reason = str(error).strip().splitlines()[-1 if isinstance(error, StrictDataclassError) else 0]
        raise ValueError(f"model={name!r} gives no configuration of transformers: {reason.strip()}") from None


def build_model(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """A model with fresh weights, converted and checkpointed as the recipe says; seed torch before. Fits the meta
    device."""
    if isinstance(config, EggConfig):
        return build_egg(recipe, config)
    try:
        dtype = torch.bfloat16 if recipe.precision == "bf16-pure" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=recipe.attention)
    except Exception as error:  # whatever the modelling code makes of a shape that makes no sense
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no causal language model of {config.model_type!r} can be built: {reason}") from None
    if recipe.method == "eggroll":
        if recipe.targets or recipe.exclude:
            raise ValueError("method=eggroll moves every matrix; drop targets and exclude")
    elif recipe.method != "dense":
        convert(model, build_method(recipe), targets=recipe.targets, exclude=recipe.exclude)
    elif recipe.rank is not None or recipe.options or recipe.targets or recipe.exclude:
        raise ValueError("method=dense takes no rank, options, targets or exclude; drop them or choose another method")
    policy: str | None = recipe.checkpoint
    if policy is None and recipe.method not in ("dense", "eggroll"):
        policy = find_method(recipe.method).checkpoint_policy
    if recipe.checkpoint_every != 1 and policy in (None, "none"):
        raise ValueError(
            f"checkpoint_every={recipe.checkpoint_every} needs a checkpoint policy; give checkpoint=bottlenecks"
        )
    if policy is not None:
        checkpoint(model, POLICIES[policy], every=recipe.checkpoint_every)
    return model


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raises ValueError if what a model says of a position depends on later ones: its perplexity would mean nothing."""
    training = model.training
    ids = torch.zeros(2, 8, dtype=torch.int64, device=model.device)
    ids[1, -1] = 1
    one, other = model.eval()(input_ids=ids, use_cache=False).logits[:, :-1]
    model.train(training)
    if (one - other).abs().max() > 64 * torch.finfo(one.dtype).eps * one.abs().max():  # more than rounding
        raise ValueError(
            f"model type {model.config.model_type!r} sees tokens that are still to come, so it cannot be pre-trained to "
            "predict them; take a decoder"
        )


def build_method(recipe: Recipe) -> Any:
    """The recipe's method with its hyper-parameters; the rank is the recipe's, else the size's, else the method's
    default."""
    try:
        method = find_method(recipe.method)
    except ValueError as error:
        raise ValueError(f"{error}, dense, eggroll") from None
    fields = dict(recipe.options)
    known = list(method.__dataclass_fields__)
    for name in fields:
        if name not in known:
            raise ValueError(f"options: {recipe.method} has no field {name!r}; it has {', '.join(known)}")
    if recipe.rank is not None:
        if "rank" not in known:
            raise ValueError(f"rank={recipe.rank}: method {recipe.method} has no rank")
        fields["rank"] = recipe.rank
    elif recipe.model is None and "rank" in known and "rank" not in fields:
        fields["rank"] = find_size(recipe.size).rank
    return method(**fields)
