"""Consoles for results and for progress. Only commands import this: rich and transformers take time to load."""

import os
import warnings

from rich.console import Console
from transformers.utils import logging


def results_console() -> Console:
    """A console for results, with the libraries' own output turned down."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = lambda message, *args, **kwargs: f"lorank: {message}\n"  # without the line of the code
    logging.disable_progress_bar()
    return Console(quiet=os.environ.get("RANK", "0") != "0")  # under torchrun the first process prints


def errors_console() -> Console:
    """A console for progress that leaves no trace in what is piped on."""
    return Console(stderr=True)
