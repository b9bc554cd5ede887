"""Text from a model: greedy, sampled, repeatable, within the model's positions."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lorank import convert
from lorank.train.data import byte_tokenizer
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


def test_a_prompt_that_names_a_special_token_is_text(small: Any) -> None:
    """As in training; a byte tokenizer whose end of text has a name made of letters."""
    model = small("llama", vocab_size=258).eval()
    tokenizer = byte_tokenizer()
    prompt = f"a {tokenizer.eos_token} b"
    assert generate_text(model, tokenizer, prompt, max_new_tokens=1, temperature=0).startswith(prompt)


def test_greedy_text_is_the_trained_models_own() -> None:
    """RoBERTa counts positions from its padding id; what a configuration says about beams and lengths has no say."""
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    shape |= {"vocab_size": 258, "pad_token_id": 1, "bos_token_id": 256, "eos_token_id": 256, "is_decoder": True}
    for kind in ("llama", "roberta"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **shape, max_position_embeddings=64)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.update(num_beams=3, min_length=40, repetition_penalty=3.0)
        kept = model.generation_config
        x = torch.tensor([list(b"the cat")])
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4)  # far from ties
            for _ in range(6):
                x = torch.cat([x, model(input_ids=x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        expected = byte_tokenizer().decode(x[0], skip_special_tokens=True)
        assert generate_text(model, byte_tokenizer(), "the cat", temperature=0, max_new_tokens=6) == expected
        assert model.generation_config is kept and "prepare_inputs_for_generation" not in vars(model)
