"""How documents become sequences."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, TypeAlias

from transformers import PreTrainedTokenizerBase

from lorank.train.data.specials import encode, rows_of, rules_of
from lorank.train.tokens import Encode, encoder

Documents: TypeAlias = Literal["packed", "separate", "padded"]
"""How documents share rows. Packed and separate rows are the same; they become different batches."""


def end_of(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The `end` of `collate` for such batches."""
    return tokenizer.eos_token_id if documents == "separate" else None


class Form(NamedTuple):
    """A tokenizer, and how many tokens of which documents a row has."""

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    documents: Literal["packed", "padded"]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, sequence_length: int, documents: Documents) -> Self:
        """The rows of which batches of `documents` are made."""
        return cls(tokenizer, sequence_length, "padded" if documents == "padded" else "packed")

    @property
    def columns(self) -> list[str]:
        return ["input_ids"] if self.documents == "packed" else ["input_ids", "attention_mask", "labels"]

    @property
    def cut(self) -> int | None:
        """Tokens of a document that are used; None: all."""
        return None if self.documents == "packed" else self.sequence_length

    @property
    def padding(self) -> int:
        """The id that fills a row."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def dtype(self) -> str:
        """The smallest type that holds all ids: "uint16" or "int32"."""
        return "uint16" if rows_of(self.tokenizer) <= 1 << 16 else "int32"

    @property
    def rules(self) -> str | None:
        """What `lorank.train.tokens.encoder` needs for the same ids as `encode`; None if it cannot give them."""
        return rules_of(self.tokenizer, self.cut)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; of padded rows with special tokens, and cut."""
        options: dict[str, Any] = {"add_special_tokens": False}
        if self.cut is not None:
            options = {"truncation": True, "max_length": self.cut}
        return encode(self.tokenizer, texts, **options)

    @property
    def quick(self) -> Encode:
        """`encode`, in the fastest way there is."""
        rules = self.rules if self.cut is None else None
        return self.encode if rules is None else encoder(rules, cut=False)
