"""Text from a model: greedy, sampled, repeatable, within the model's positions."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorank import convert
from lorank.train.generation import generate_text


@pytest.fixture
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", pad_token="w0")


@pytest.fixture
def model(small: Any) -> Any:
    model = convert(small("llama"), "cola").eval()
    model.generation_config.eos_token_id = None  # an untrained model may say its end at once
    return model


def test_greedy_text_is_the_argmax_step_by_step(model: Any, tokenizer: Any) -> None:
    ids = [5, 6, 7]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = generate_text(model, tokenizer, "w5 w6 w7", max_new_tokens=6, temperature=0)
    assert text.split() == [f"w{i}" for i in ids if i]


def test_a_seed_repeats_a_sample(model: Any, tokenizer: Any) -> None:
    state = torch.get_rng_state()
    first, again, other = (generate_text(model, tokenizer, "w5", max_new_tokens=20, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_prompt_starts_from_the_start_token(model: Any, tokenizer: Any) -> None:
    assert generate_text(model, tokenizer, max_new_tokens=3, seed=0)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no start token; give a prompt"):
        generate_text(model, tokenizer)


def test_generation_ends_where_the_positions_do(small: Any, tokenizer: Any) -> None:
    model = small("gpt2").eval()  # 64 learned positions
    model.generation_config.eos_token_id = None
    calls: list[int] = []
    original = model.generate
    model.generate = lambda *a, **k: calls.append(k["max_new_tokens"]) or original(*a, **k)
    generate_text(model, tokenizer, "w5 w6", max_new_tokens=1000, seed=0)
    assert calls == [62]
    with pytest.raises(ValueError, match="the prompt must be shorter than the model's 64 positions, got 64"):
        generate_text(model, tokenizer, "w5 " * 64)


def test_the_training_mode_comes_back(model: Any, tokenizer: Any) -> None:
    generate_text(model.train(), tokenizer, "w5", max_new_tokens=2, seed=0)
    assert model.training
    with pytest.raises(ValueError, match="temperature must be 0 .greedy. or from 0.001 to 1000, got -1"):
        generate_text(model, tokenizer, "w5", temperature=-1)


def test_a_token_beyond_the_vocabulary_is_refused(model: Any, tokenizer: Any) -> None:
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="must be below the model's 96 vocabulary entries, got 96"):
        generate_text(model, tokenizer, "w5 zebra")
