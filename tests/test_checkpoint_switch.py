"""transformers' own switch for checkpointing, which Trainer turns, keeps the policy of a method."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Trainer,
    TrainingArguments,
)

from lorank import (
    CoLA,
    CoLAM,
    CRNet,
    checkpoint,
    convert,
    keep_bottlenecks,
    merge,
)

D, D_FF, HEADS, N, R = 48, 112, 4, 20, 9
"""Chosen so that nd, nr, n d_ff, n h and n² h are all different."""


# ---- transformers' own switch, which Trainer's `activation_checkpointing=True` turns


def function_of(model: Any) -> Any:
    """What checkpoints the last block."""
    return model.model.layers[-1]._gradient_checkpointing_func.keywords.get("context_fn")


def test_trainers_switch_keeps_the_policy_of_the_method(small: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = convert(small("llama"), CoLAM(rank=4))
    policy = function_of(model)
    assert policy.args == (keep_bottlenecks,)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to="none",
        use_cpu=True,
        activation_checkpointing=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    assert function_of(model) is policy
    model.activation_checkpointing_disable()
    model.activation_checkpointing_enable()
    assert function_of(model).args == (keep_bottlenecks,)
    with pytest.raises(ValueError, match="^activation checkpointing of a cola-m model must follow a policy"):
        model.activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("door", ["model", "body", "in a wrapper", "decoder of a pair"])
def test_every_door_to_the_switch_keeps_the_policy(door: str, small: Any, tmp_path: Path) -> None:
    model = convert(small("llama"), CoLAM(rank=4))
    model.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    both = BertConfig(**shape), BertConfig(**shape, is_decoder=True, add_cross_attention=True)
    pair = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*both))
    inner: dict[str, Callable[[Any], Any]] = {
        "model": lambda model: model,
        "body": lambda model: model.model,
        "in a wrapper": lambda model: nn.ModuleDict({"base_model": model}).base_model.base_model,
        "decoder of a pair": lambda model: model.decoder,
    }
    converted = (
        [convert(pair, CoLAM(rank=4))] if "pair" in door else [model, AutoModelForCausalLM.from_pretrained(tmp_path)]
    )
    for whole in [*converted, copy.deepcopy(converted[0])]:
        for off in (False, True):
            part = inner[door](whole)
            if off:
                part.activation_checkpointing_disable()
            with pytest.warns(FutureWarning):  # the older name of the switch
                part.gradient_checkpointing_enable()
            functions = {
                m._gradient_checkpointing_func for m in part.modules() if getattr(m, "gradient_checkpointing", False)
            }
            assert [function.keywords["context_fn"].args for function in functions] == [(keep_bottlenecks,)]
            with pytest.raises(ValueError, match="^activation checkpointing of a cola-m model must follow a policy"):
                part.activation_checkpointing_enable({"use_reentrant": True})


def test_the_body_of_a_merged_model_is_checkpointed_as_any(small: Any) -> None:
    merged = merge(convert(small("llama"), "relora"))
    merged.model.activation_checkpointing_enable({"use_reentrant": True})
    assert function_of(merged) is None and merged.model.layers[-1].gradient_checkpointing


def test_the_switch_respects_what_was_chosen_and_what_is_needed(small: Any, tokens: Tensor) -> None:
    chosen = convert(small("llama"), CoLA(rank=4))
    chosen.activation_checkpointing_enable()
    assert function_of(chosen) is None
    checkpoint(chosen, keep_bottlenecks)
    chosen.activation_checkpointing_enable()
    assert function_of(chosen).args == (keep_bottlenecks,)
    chained = convert(small("llama"), CRNet(rank=4)).train()
    chained.activation_checkpointing_enable({"use_reentrant": False})
    chained(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in chained.parameters())
