"""Names of special tokens in a text are text, whatever the tokenizer's model."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorank.train.data import byte_tokenizer, load_tokenizer, padding_id, rows_of
from lorank.train.data.specials import encode

LETTERS = "<>/|abcdefghijklmnopqrstuvwxyz"


def unigram():
    """Like T5's: the best of its pieces are the names of special tokens, and it ends texts itself."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((letter, -4.0) for letter in LETTERS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def merging():
    """Byte pairs whose merges make up the name of a special token."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS + " ")}
    for piece in ("</", "s>", "</s>", "<pad>"):
        vocabulary[piece] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("<", "/"), ("s", ">"), ("</", "s>")]))
    backend.decoder = decoders.Fuse()
    return backend, {"eos_token": "</s>", "pad_token": "<pad>"}


def whole_words():
    """Byte-level, but what is in the vocabulary is not taken apart (Llama 3's way), and not split before."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "</s>": 256, "<pad>": 257}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend, {"eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("kind", [unigram, merging, whole_words])
def test_a_name_of_a_special_token_is_text(kind, tmp_path):
    backend, special = kind()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["</s>", "the </s> ends and <pad> fills", "a</s>b <pad><pad>"]
    for text, ids in zip(texts, encode(tokenizer, texts, add_special_tokens=False), strict=True):
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    ended = encode(tokenizer, texts, truncation=True, max_length=6)
    assert all(ids.count(tokenizer.eos_token_id) == (kind is unigram) for ids in ended), "a template's own end stays"


def test_trained_tokenizers_and_bytes_read_text_themselves(tmp_path):
    text = "GPT-2 ends a text with <|endoftext|>, others fill rows with <|pad|>. "
    for tokenizer in (byte_tokenizer(), load_tokenizer(None, [text * 50], vocab_size=300)):
        tokenizer.save_pretrained(tmp_path)
        for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            ids = one(text)["input_ids"]
            assert not set(ids) & set(one.all_special_ids)
            assert one.decode(ids, skip_special_tokens=True) == text


def test_a_row_has_special_tokens_only_where_we_put_them(write_jsonl, tmp_path, load, tokens):
    texts = [f"page {i} names <|endoftext|> and <|pad|> and goes on. " * 3 for i in range(60)]
    corpus = load(write_jsonl(tmp_path / "a.jsonl", texts))
    ids, end = tokens(corpus.train), corpus.tokenizer.eos_token_id
    assert ids.count(corpus.tokenizer.pad_token_id) == 0
    assert 50 < ids.count(end) <= 57
    assert "<|endoftext|> and <|pad|>" in corpus.tokenizer.decode([i for i in ids if i != end])


def test_a_special_token_of_one_character_is_text():
    """Some take "!" for padding. Where it is written it is read, so it cannot be padding."""
    backend, special = whole_words()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, "pad_token": "!"})
    [ids] = encode(tokenizer, ["ah! oh!"])
    assert ids.count(tokenizer.pad_token_id) == 2
    assert padding_id(tokenizer) is None


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"eos_token": "</s>", "pad_token": "<pad>"}, 257),
        ({"eos_token": "</s>"}, None),
        ({"eos_token": "</s>", "pad_token": "</s>"}, None),
        ({"eos_token": "</s>", "unk_token": "<pad>", "pad_token": "<pad>"}, None),
    ],
)
def test_padding_is_an_id_that_nothing_else_uses(special, expected):
    assert padding_id(PreTrainedTokenizerFast(tokenizer_object=whole_words()[0], **special)) == expected


def test_a_tokenizer_with_holes_needs_a_row_for_its_largest_id():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 90}, unk_token="<unk>"))
    assert rows_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b")) == 91
