"""Tokenizers: loaded by name, trained on the text (byte-level BPE), or plain bytes. Long texts are tokenised in pieces."""

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorank.panics import no_panic
from lorank.train.bpe import END, PAD, at_spaces, learnt, learnt_apart
from lorank.train.data.cache import use
from lorank.train.data.sources import amount, cache_folder, first_line
from lorank.train.hub import asked_if_reachable
from lorank.train.tokens import pieces_of
from lorank.train.watching import tell, told

logger = logging.getLogger(__name__)
VERSION = 2  # part of every cache key; raise it when the same text must give other tokens or sequences
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")
"""What ends a text, by names in use."""
PADS = ("<|pad|>", "<pad>", "[PAD]")
TOKENIZER_CHARACTERS = 50_000_000  # of training text that a tokenizer learns from
LONG_CHARACTERS = 4_000_000  # from which it learns for seconds


def load_tokenizer(
    name_or_path: str | None,
    texts: Iterable[str] | Callable[[], Iterable[str]] = (),
    *,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
    texts_name: str | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer by name, folder or tokenizer.json, "bytes" (each byte a token), or for None byte-level BPE trained on `texts` (or cached).

    The last two read the names of their special tokens in a text as text.

    Args:
        texts: or a function that returns them. At most 50 million characters are read.
        vocab_size: most entries, including 256 bytes, <|endoftext|> (eos and bos) and <|pad|>.
        texts_name: their name in the cache. By default their hash, for which they are read.

    Raises:
        OSError: no tokenizer could be loaded.
        ValueError: the vocabulary is smaller than the set of bytes.
    """
    if name_or_path == "bytes":
        return byte_tokenizer()
    if name_or_path is not None:
        try:
            with asked_if_reachable(), no_panic("reading it failed", "use another one"):
                found = _loaded(os.path.expanduser(name_or_path))
        except Exception as error:  # the hub, a file or its parser
            reason = (
                "it needs code from its folder, which lorank never runs"
                if "trust_remote_code" in str(error)
                else "it has no tokenizer.json that transformers can read"
                if "instantiate the backend tokenizer" in str(error)
                else first_line(error)
            )
            if name_or_path.startswith((".", "/", "~")) or name_or_path.endswith(".json"):
                reason = (
                    reason if os.path.exists(os.path.expanduser(name_or_path)) else "there is no such file or folder"
                )
            raise OSError(f"{name_or_path}: no tokenizer could be loaded ({reason})") from error
        if found.get_vocab().keys() <= found.get_added_vocab().keys():  # some types load without files
            raise OSError(f"{name_or_path}: no tokenizer could be loaded (its vocabulary is empty)")
        return found
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes and 2 special tokens), got {vocab_size}")
    texts, size = first_pieces(texts() if callable(texts) else texts, TOKENIZER_CHARACTERS), None
    if texts_name is None:
        texts = list(texts)
        size = sum(map(len, texts))
        texts_name = "".join(hashlib.blake2b(text.encode()).hexdigest() for text in texts)
    folder = cache_folder(cache_dir) / "tokenizers" / Hasher.hash((VERSION, texts_name, vocab_size))
    use(folder)
    if not folder.exists():
        tokenizer = _train_tokenizer(texts, vocab_size, size)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as part:
                tokenizer.save_pretrained(f"{part}/whole")
                os.rename(f"{part}/whole", folder)
        except OSError as error:
            if not folder.exists():  # if it does, another process was faster
                logger.warning("the tokenizer could not be cached for the next run: %s", error)
                return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _loaded(place: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name, folder or file. The file alone does not say which token ends a text: the first of `ENDS` that it has."""
    if not os.path.isfile(place):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    folder, name = os.path.split(os.path.abspath(place))
    if name == "tokenizer.json" and os.path.isfile(f"{folder}/tokenizer_config.json"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rules = Tokenizer.from_file(place)
    vocabulary = rules.get_vocab()
    roles = {"eos_token": ENDS, "pad_token": PADS}
    special = {role: next((one for one in ones if one in vocabulary), None) for role, ones in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=rules, **special)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the 256 bytes. Byte 0 ends and begins documents; a byte 0 inside a text is left out.

    The text `<|endoftext|>` is read as its 13 letters.
    """
    named = sorted(pre_tokenizers.ByteLevel.alphabet())  # with stand-ins for bytes that cannot be printed
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert sorted(vocabulary) == named
    del vocabulary[chr(256)]
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, **vocabulary}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, split_special_tokens=True)


def _train_tokenizer(texts: Iterable[str], vocab_size: int, size: int | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer learnt from texts of that many characters, if it is known how many; from long ones in a process that can be ended."""
    remaining, first, seen = iter(texts), list[str](), 0
    while seen < LONG_CHARACTERS and (text := next(remaining, None)) is not None:
        first.append(text)
        seen += len(text)
    if seen < LONG_CHARACTERS:
        rules = learnt(first, vocab_size)
    else:
        said = f"up to {amount(TOKENIZER_CHARACTERS, 'characters')}" if size is None else amount(size, "characters")
        tell(f"learning a vocabulary of {vocab_size:,} tokens from {said}", 0, None, "")
        parts = (part for text in itertools.chain(first, remaining) for part in at_spaces(text))
        rules = learnt_apart(_told(parts, size), vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token=END, eos_token=END, pad_token=PAD, split_special_tokens=True
    )


def _told(parts: Iterable[str], size: int | None) -> Iterator[str]:
    yield from told("learning a vocabulary", parts, len, size, "characters")
    tell("merging tokens to a vocabulary", 0, None, "")


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides a tokenizer's output, without the truncation that its last call set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    rules = json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None})
    return Hasher.hash((rules, tokenizer.eos_token_id, tokenizer.pad_token_id))


def first_pieces(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts piece by piece, until that many characters are reached."""
    for piece in itertools.chain.from_iterable(map(pieces_of, texts)):
        if characters <= 0:
            return
        yield piece.text
        characters -= len(piece.text)
