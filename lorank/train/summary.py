"""What is written about a run in figures: its summary, and its environment."""

import contextlib
import dataclasses
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lorank
from lorank.train.data import Corpus


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a finished run, as in summary.json."""

    method: str
    parameters: int
    block_parameters: int
    flops_per_token: float | None
    """None: the model cannot be counted."""
    steps: int
    tokens: int
    tokens_per_second: float | None
    """By the median step; None if no step was timed. The first step never is."""
    mfu: float | None
    peak_flops_source: str
    peak_memory_gib: float
    validation_loss_nats_per_token: float
    validation_perplexity: float
    validation_bits_per_byte: float | None
    published_compatible_perplexity: float
    evaluated_tokens: int
    """Predicted tokens of the validation text on which the loss and perplexities are."""
    sample: str


def environment(corpus: Corpus) -> dict[str, Any]:
    """What a repetition needs besides the recipe: data, versions, device and commit."""
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return {
        "corpus": corpus.description,
        "data_hash": corpus.hash,
        "held_out_hash": corpus.held_out_hash,
        "files": corpus.files,
        "python": platform.python_version(),
        "packages": {"lorank": lorank.__version__, **{name: version(name) for name in packages}},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }
