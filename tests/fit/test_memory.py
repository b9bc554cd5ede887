"""A fit of a 7B model, planned on the meta device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.fit import MatrixPCA
from lorank.fit.memory import needed


def test_a_7b_model_is_planned_within_the_stated_bytes() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(dtype=torch.bfloat16)).bfloat16()
    found = needed(model, "svd", budget=0.5)
    d, f = 4096, 11008
    ranks = (int(0.5 * d * d / (d + d)), int(0.5 * d * f / (d + f)))
    assert found.model == 2 * 6_738_415_616
    assert found.factors == 2 * 32 * (4 * ranks[0] * 2 * d + 3 * ranks[1] * (d + f))
    assert found.sums == 16 * (6 * d * d + f * f)
    assert found.total < 22 * 2**30
    grouped = needed(model, MatrixPCA(groups=8), budget=0.5)  # four blocks at once, attention alone
    assert grouped.sums == 16 * 4 * 4 * d * d
    with pytest.raises(ValueError, match="policy must be 'uniform' or 'break-even' here"):
        needed(model, "svd", policy="energy")
