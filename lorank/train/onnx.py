"""A causal language model as one ONNX graph with a key-value cache, by the exporter of transformers.

The graph reads n new tokens after the t in the cache, so an empty cache [b, heads, 0, d] begins a text. Its attention mask
[b, t + n] is 0 for padding on the left. Weights are float32, which ONNX Runtime computes with on any
machine. The exporter takes as long as one generation of three tokens, and some 20 s for its own work.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.utils import decompose_for_generation

from lorank.pretrained import dense_config
from lorank.train.entries import last_line


def as_onnx(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Write ``model.onnx`` with its weights in ``model.onnx.data``, a configuration, and what the exporter notes for itself.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model is no causal language model, or it cannot be exported.
    """
    if type(model.config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"--format onnx is for causal language models, got a {type(model).__name__}")
    exporter = OnnxExporter()
    tokens = torch.arange(1, 8)[None].expand(2, -1)  # of two rows and several columns, so that neither size is fixed
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0  # without padding there would be no mask in the graph
    with _quiet():
        try:
            stages = decompose_for_generation(
                model.float(), {"input_ids": tokens, "attention_mask": mask}, multi_token_decode=True
            )
            _, inputs = stages["decode"]
            exported = exporter.export(model, inputs, OnnxConfig(dynamic=True))
        except Exception as error:  # of tracing, of which each model has its own
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise ValueError(f"the model cannot be exported to ONNX: {last_line(cause)}") from error
    exported.config = dense_config(copy.deepcopy(model.config))  # the layers are in the graph
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch prints on the way and warns of."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
