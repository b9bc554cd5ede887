"""Text from a language model."""

import functools
import inspect
import re
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorank.pretrained import positions_of
from lorank.train.data.specials import encode
from lorank.train.tokens import tokenizing


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
) -> str:
    """The prompt and its continuation. Temperature 0 always chooses the most likely token.

    The prompt is text as in training: the name of a special token in it is read as letters.

    A seed makes sampling repeatable and leaves torch's global generator unchanged.

    Raises:
        ValueError: a temperature or top_p out of range, no token to start from, a token outside the model's vocabulary, or a
            prompt as long as the model's positions.
    """
    if not (temperature == 0 or 1e-3 <= temperature <= 1e3):
        raise ValueError(f"temperature must be 0 (greedy) or from 0.001 to 1000, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not prompt.isprintable() and (broken := re.search("[\ud800-\udfff]", prompt)):
        raise ValueError(f"the prompt must be UTF-8 text, and character {broken.start()} is not")
    ids = encode(tokenizer, [prompt], add_special_tokens=False)[0] if prompt else []
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and start is None:
        raise ValueError("the tokenizer has no start token; give a prompt")
    inputs = torch.tensor([ids or [start]], device=model.device)
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore
    if (largest := int(inputs.max())) >= rows:
        raise ValueError(f"token ids of the prompt must be below the model's {rows} vocabulary entries, got {largest}")
    positions = positions_of(model)
    if positions is not None:
        if inputs.shape[1] >= positions:
            raise ValueError(
                f"the prompt must be shorter than the model's {positions} positions, got {inputs.shape[1]} tokens"
            )
        max_new_tokens = min(max_new_tokens, positions - inputs.shape[1])
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    training, settings = model.training, model.generation_config
    model.eval()
    ends = (
        settings.eos_token_id if settings is not None and settings.eos_token_id is not None else tokenizer.eos_token_id
    )
    model.generation_config = GenerationConfig(eos_token_id=ends)  # nothing else that a configuration says
    try:
        own_positions = _counts_positions_itself(model, inputs)
        if own_positions:
            prepare: Any = model.prepare_inputs_for_generation

            @functools.wraps(prepare)  # generate reads its signature
            def without_positions(*given: Any, **more: Any) -> dict[str, Any]:
                return {name: value for name, value in prepare(*given, **more).items() if name != "position_ids"}

            vars(model)["prepare_inputs_for_generation"] = without_positions
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            output = model.generate(  # type: ignore[operator]
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                use_cache=not own_positions,
                **sampling,
            )
    finally:
        vars(model).pop("prepare_inputs_for_generation", None)
        model.generation_config = settings
        model.train(training)
    with tokenizing(tokenizer.name_or_path):
        return str(tokenizer.decode(output[0], skip_special_tokens=True))


@torch.no_grad()
def _counts_positions_itself(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether a model, when it gets ids alone as in training, uses other positions than 0, 1, 2, ... (RoBERTa begins after its
    padding id). transformers' `generate` would give it these."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    alone = model(input_ids=ids, use_cache=False).logits
    given = model(
        input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device)[None], use_cache=False
    ).logits
    return not torch.allclose(alone, given, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
