"""Where the projections of a model are, dense or converted, and which linear map each amounts to."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorank.conversion import blocks, linear_layers
from lorank.fusion import fusion_of
from lorank.parametrization import Parametrization

ATTENTION = re.compile(
    r"(?:^|\.)(?:self_)?(?:attn|attention)\.(?:\w+\.)*"
    r"(?:(?P<query>q_proj|q_lin|query)|(?P<key>k_proj|k_lin|key)|(?P<value>v_proj|v_lin|value)"
    r"|(?P<output>o_proj|out_proj|out_lin|c_proj|dense))$"
)
"""Names that architectures give to the four projections of self-attention; cross-attention is not among them."""


class Place(NamedTuple):
    """A projection of a dense or converted model: a module, or some of its outputs where an architecture fuses several."""

    name: str
    role: str
    depth: int
    module: nn.Module
    rows: Callable[[Tensor], Tensor]
    """From a tensor with a row for each of the module's outputs to those of this projection."""


def places(model: nn.Module) -> Iterator[Place]:
    """Every projection of the repeated blocks, under the names that `lorank.conversion.find_sites` gives it."""
    linear = {site.name for site in linear_layers(model)}
    for stack, depth, block in blocks(model):
        taken: list[str] = []
        for inner, module in block.named_modules():
            name, role = f"{stack}.{depth}.{inner}", f"{stack}.*.{inner}"
            inside = any(inner.startswith(f"{outer}.") for outer in taken)
            if inside or not (name in linear or hasattr(module, "stands_for_linear")):
                continue
            taken.append(inner)
            fusion = fusion_of(model, name)
            if fusion is None:
                yield Place(name, role, depth, module, lambda rows: rows)
            else:
                for part in fusion.sizes:
                    take = partial(lambda fusion, part, rows: fusion.rows(rows)[part], fusion, part)
                    yield Place(f"{name}.{part}", f"{role}.{part}", depth, module, take)


def linear_part(module: nn.Module, method: Parametrization | None) -> tuple[Tensor | None, str]:
    """A projection's own weight, what its method merges it to, or the product of its factors, and which of these it is."""
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.T if isinstance(module, Conv1D) else module.weight, "weight"
    try:
        return (None, "none") if method is None else (method.merged(module)[0], "merged")
    except (ValueError, AssertionError, AttributeError, TypeError):  # not linear, or no projection at all
        A, B, W = (getattr(module, name, None) for name in "ABW")
        if isinstance(A, nn.Linear) and isinstance(B, nn.Linear):
            return B.weight @ A.weight, "product"
        return (W.weight, "weight") if isinstance(W, nn.Linear) else (None, "none")


def projection_type(name: str) -> str | None:
    """ "query", "key", "value" or "output" by a module's full name; None for what is not self-attention.

    >>> projection_type("transformer.h.0.attn.c_attn.query"), projection_type("transformer.h.0.mlp.c_proj")
    ('query', None)
    """
    found = ATTENTION.search(name)
    return found and found.lastgroup
