"""Block-LoRA is a LoRA of less rank whose B learns faster."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorank
from lorank.adapters.block_lora import BlockLoRALinear
from lorank.adapters.lora import LoRALinear

N, RANK = 4, 12


def pair() -> tuple[BlockLoRALinear, LoRALinear]:
    """It and a LoRA of rank r/N with the same A."""
    torch.manual_seed(0)
    dense = nn.Linear(40, 24).double()
    block, plain = (
        BlockLoRALinear(copy.deepcopy(dense), RANK, blocks=N, scale=0.5),
        LoRALinear(copy.deepcopy(dense), RANK // N, scale=0.5),
    )
    plain.A.load_state_dict(block.A.state_dict())
    return block, plain


def test_parameters_are_those_of_one_block_down_and_all_up() -> None:
    block, plain = pair()
    assert sum(p.numel() for p in block.trained()) == 408 == RANK * 24 + 40 * RANK // N
    assert sum(p.numel() for p in plain.trained()) == 192
    assert sum(p.numel() for p in LoRALinear(nn.Linear(40, 24), RANK, scale=0.5).trained()) == 768


def test_it_is_the_lora_whose_up_projection_is_the_sum() -> None:
    block, plain = pair()
    nn.init.normal_(block.B.weight)
    with torch.no_grad():
        plain.B.weight.copy_(sum(block.B.weight[:, 3 * i : 3 * i + 3] for i in range(N)))
    x = torch.randn(5, 40, dtype=torch.float64)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-12, atol=1e-12)
    repeated = 0.5 * (x @ block.A.weight.repeat(N, 1).T) @ block.B.weight.T  # a LoRA of rank r with A's rows N times
    torch.testing.assert_close(block(x), block.W(x) + repeated, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(block.product()) == RANK // N
    B, A = lorank.BlockLoRA().pair(block)
    torch.testing.assert_close(B @ A, block.product(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_it_trains_as_a_lora_with_n_times_the_rate_for_b(kind: type[torch.optim.Optimizer]) -> None:
    block, plain = pair()
    options = {"eps": 1e-30} if kind is torch.optim.Adam else {}
    ours = kind([*block.trained()], lr=1e-2, **options)  # type: ignore[call-arg]
    groups = [{"params": [plain.A.weight]}, {"params": [plain.B.weight], "lr": N * 1e-2}]
    theirs = kind(groups, lr=1e-2, **options)  # type: ignore[call-arg]
    x, y = torch.randn(9, 40, dtype=torch.float64), torch.randn(9, 24, dtype=torch.float64)
    for _ in range(5):
        for layer, optimizer in ((block, ours), (plain, theirs)):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(block.product(), plain.product(), rtol=1e-9, atol=1e-12)
    first, *others = block.B.weight.split(RANK // N, dim=1)
    assert all(torch.equal(first, other) for other in others) and first.any()


def test_blocks_must_divide_the_rank(small: Any) -> None:
    with pytest.raises(
        ValueError, match=r"blocks must divide the rank 6 of model\.layers\.0\.self_attn\.q_proj, got 4"
    ):
        lorank.convert(small("llama"), lorank.BlockLoRA(rank=6))
