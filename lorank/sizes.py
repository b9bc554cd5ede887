"""Model shapes by name: the Llama family on which CoLA and its rivals publish their tables."""

import difflib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import LlamaConfig


class Size(NamedTuple):
    """Shape of a Llama and the rank that CoLA, or a plain factorisation, uses in it."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    rank: int


SIZES = {
    "tiny": Size(256, 688, 2, 4, 88),  # ours: the demo's, 1.6 M parameters in its dense blocks
    "20m": Size(256, 688, 4, 4, 64),  # ours: 19.5 M with a vocabulary of 32,000
    "60m": Size(512, 1376, 8, 8, 128),
    "130m": Size(768, 2048, 12, 12, 256),
    "350m": Size(1024, 2736, 24, 16, 256),
    "1b": Size(2048, 5461, 24, 32, 512),
    "7b": Size(4096, 11008, 32, 32, 1024),
}
"""60m to 7b: arXiv 2502.10940, with the shapes of the GaLore and SLTrain papers. The others are our choice."""


def find_size(name: str) -> Size:
    """The shape of that name; ValueError that lists the known ones if there is none."""
    if name in SIZES:
        return SIZES[name]
    near = difflib.get_close_matches(name.lower(), SIZES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown size {name!r}; {hint}the sizes are: {', '.join(SIZES)}")


def llama_config(size: str, *, vocab_size: int = 32_000, sequence_length: int = 256) -> "LlamaConfig":
    """The dense Llama of a size: RMSNorm eps 1e-6, RoPE theta 10,000, SiLU, untied embeddings, initial range 0.02, pad
    id 0."""
    from transformers import LlamaConfig

    shape = find_size(size)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=max(1024, sequence_length),
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        hidden_act="silu",
        initializer_range=0.02,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
