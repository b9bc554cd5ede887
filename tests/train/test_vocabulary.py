"""The rows and special tokens that a model's configuration takes from the tokenizer."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase

from lorank.train.data import byte_tokenizer, load_tokenizer
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe
from lorank.train.vocabulary import keep_vocabulary, set_vocabulary


@pytest.fixture
def padded() -> PreTrainedTokenizerBase:
    """300 entries at most, with padding as id 1."""
    return load_tokenizer(None, ["some text"], vocab_size=300)


def test_every_id_is_learnt_without_a_padding_token(padded: PreTrainedTokenizerBase) -> None:
    """A row of zeros with a gradient of zeros would stay: that is what padding is."""
    recipe = Recipe(size="tiny", sequence_length=8)
    for tokenizer, still in ((byte_tokenizer(), []), (padded, [1])):
        model = build_model(recipe, build_config(recipe, tokenizer))
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        rows: Any = model.get_input_embeddings().weight
        assert [i for i in range(7) if not rows.grad[i].any()] == still == [i for i in range(7) if not rows[i].any()]


@pytest.mark.parametrize("kind", ["opt", "gemma", "olmo", "phi3", "bert", "llama"])
def test_an_architectures_own_padding_id_is_not_the_tokenizers(kind: str, padded: PreTrainedTokenizerBase) -> None:
    for tokenizer, expected in ((byte_tokenizer(), None), (padded, 1)):
        config = AutoConfig.for_model(kind)
        set_vocabulary(config, tokenizer)
        assert config.pad_token_id == expected and config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("kind", ["gemma3", "llama4", "qwen3_5", "marian"])
def test_a_nested_vocabulary_follows(kind: str) -> None:
    """The rows of a text model's embedding are those asked for, wherever its configuration keeps their number."""
    for rows in (300, 400):
        config: PretrainedConfig = AutoConfig.for_model(kind)
        text = config if kind == "marian" else config.get_text_config(decoder=True)
        set_vocabulary(config, byte_tokenizer(), rows)
        assert text.vocab_size == rows and getattr(text, "decoder_vocab_size", rows) == rows
        assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (0, 0, None)


def test_a_type_that_needs_padding_gets_an_id_without_text() -> None:
    """RoBERTa counts positions from its padding id; Emu3's configuration insists on a number."""
    for kind in ("roberta", "emu3"):
        config: PretrainedConfig = AutoConfig.for_model(kind).get_text_config(decoder=True)
        set_vocabulary(config, byte_tokenizer())
        assert (config.vocab_size, config.pad_token_id) == (257, 256)
        set_vocabulary(config, byte_tokenizer(), 300)
        assert (config.vocab_size, config.pad_token_id) == (300, 256)
        with pytest.raises(ValueError, match="vocab_size must be above 256 for model type .* needs a padding token"):
            set_vocabulary(config, byte_tokenizer(), 256)


@pytest.mark.parametrize("kind", ["mllama", "emu3", "gpt2"])
def test_ids_beyond_the_vocabulary_are_removed(kind: str) -> None:
    """Or lie in it, where a configuration insists on a number."""
    config: PretrainedConfig = AutoConfig.for_model(kind)
    set_vocabulary(config, None, 300)
    text = config.get_text_config(decoder=True)
    assert all((getattr(text, name, None) or 0) < 300 for name in ("bos_token_id", "eos_token_id", "pad_token_id"))


def test_a_run_goes_on_with_the_rows_and_tokens_it_began_with() -> None:
    config = build_config(Recipe(size="tiny"), byte_tokenizer())
    keep_vocabulary(config, LlamaConfig(vocab_size=128, pad_token_id=0, eos_token_id=5))
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (128, 0, 5)
