"""Text stays text: what a document says of `<|endoftext|>` or `<|pad|>` never becomes that special token.

A special token has a role instead of a meaning: it ends a document, begins one, or fills a row. Only this package puts it
into a row. So its name, written in a document, is tokenised as the letters it consists of. A special token of one character,
or of white space, is text itself and stays readable; that token cannot also be padding.
"""

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorank.train.tokens import tokenizing

ROLES = ("bos", "eos", "unk", "sep", "cls")


def rows_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for all ids of a tokenizer, which may leave some unused."""
    return max(len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values()))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the padding token, None if there is none or if the token is also used for something that is learnt.

    A model never trains the embedding of its `pad_token_id`.
    """
    pad = tokenizer.pad_token_id
    roles = [getattr(tokenizer, f"{role}_token_id", None) for role in ROLES]
    return None if pad is None or pad in roles or _is_text(str(tokenizer.pad_token)) else pad


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Token ids of each text. Names of special tokens in them are text; `options` are those of calling a tokenizer.

    Raises:
        ValueError: a text has the name of a special token, and this tokenizer can read it in no other way; or it fails.
    """
    reader, unreadable = _reader(tokenizer)
    for name in unreadable:
        if any(name in text for text in texts):
            raise ValueError(
                f"the text must not contain {name!r}, which the tokenizer {tokenizer.name_or_path!r} can only read as a special "
                "token; remove it from the text or use another tokenizer"
            )
    if hasattr(reader, "split_special_tokens"):
        options["split_special_tokens"] = True
    with tokenizing(tokenizer.name_or_path):
        found: list[list[int]] = reader(list(texts), verbose=False, **options)["input_ids"]
    return found


def rules_of(tokenizer: PreTrainedTokenizerBase, cut: int | None) -> str | None:
    """The JSON of a `tokenizers.Tokenizer` with which `encode` works, cutting texts to `cut` tokens; None if it does other things too."""
    reader, unreadable = _reader(tokenizer)
    kind, plain = type(reader), PreTrainedTokenizerFast
    calls = ("__call__", "_encode_plus", "set_truncation_and_padding")
    if (
        unreadable
        or not isinstance(reader, plain)
        or any(getattr(kind, name) is not getattr(plain, name) for name in calls)
    ):
        return None
    found = Tokenizer.from_str(reader.backend_tokenizer.to_str())
    found.no_padding()
    found.no_truncation()
    if cut is not None:
        found.enable_truncation(cut, direction=reader.truncation_side)
    return found.to_str()


def _is_text(token: str) -> bool:
    return len(token) == 1 or not token.strip()


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens that stand for no text. An unknown token does: for text that the vocabulary lacks."""
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    tokens |= {str(token): index for index, token in _added(tokenizer).items() if token.special}
    return {name: index for name, index in tokens.items() if index != tokenizer.unk_token_id and not _is_text(name)}


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    return getattr(tokenizer, "added_tokens_decoder", {})


@functools.lru_cache(maxsize=4)
def _reader(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """A tokenizer with the same ids that reads names of special tokens as text, and the names with which it fails.

    Without its special tokens a tokenizer may still find their names in its vocabulary: a unigram model has them among
    its pieces, and a list of words among its words.
    """
    names = _control_tokens(tokenizer)
    found = _read_as_special(tokenizer, names)
    text = [str(token) for token in _added(tokenizer).values() if token.special and _is_text(str(token))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not (found or text):
        return tokenizer, found
    reader = copy.deepcopy(tokenizer)
    reader._tokenizer = Tokenizer.from_str(json.dumps(_without(json.loads(backend.to_str()), found, text)))  # type: ignore[attr-defined]
    return reader, _read_as_special(reader, names)


def _read_as_special(tokenizer: PreTrainedTokenizerBase, names: dict[str, int]) -> list[str]:
    options = {"split_special_tokens": True} if hasattr(tokenizer, "split_special_tokens") else {}
    around = ("{}", " {}", "a{}a", "a {} a")
    wrong = []
    for name, index in names.items():
        with tokenizing(tokenizer.name_or_path):
            rows = tokenizer([a.format(name) for a in around], add_special_tokens=False, verbose=False, **options)
        if any(index in ids for ids in rows["input_ids"]):
            wrong.append(name)
    return wrong


def _without(rules: dict[str, Any], names: Sequence[str], text: Sequence[str]) -> dict[str, Any]:
    """The rules of a tokenizer whose model cannot reach `names`, and for which the special tokens `text` are words."""
    model, hidden = rules["model"], {name: f"\0{name}\0" for name in names}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & hidden.keys()]
    rules["added_tokens"] = [
        {**token, "special": token["special"] and token["content"] not in text}
        for token in rules["added_tokens"]
        if token["content"] not in hidden
    ]
    return rules
