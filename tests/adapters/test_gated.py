"""The one product of all adapters, and what freezing a trained model means."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lorank
from lorank.accounting import count_parameters
from lorank.adapters.codyra import CoDyRALinear
from lorank.adapters.gated import Adapter, GatedAdapter, blockwise, gated, gathered, kept, spread
from lorank.adapters.moram import MoRAMLinear
from lorank.adapters.row_adaptive import RowAdaptiveLinear
from lorank.adapters.smora import SMoRALinear
from lorank.table import find, method_names
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe
from tests.conftest import LLAMA_BLOCK

ADAPTERS = [name for name in method_names("method") if find(name).adapts]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_mixture_of_adapters_is_one_with_a_gate() -> None:
    """y = Σ_i g_i B_i A_i x for experts of ranks 2, 3 and 4, each as a matrix of its own."""
    ranks, x, g = (2, 3, 4), drawn(5, 7, 12), drawn(5, 7, 3, seed=1)
    As, Bs = ([drawn(r, 12, seed=r) for r in ranks], [drawn(10, r, seed=10 + r) for r in ranks])
    expected = sum(g[..., i, None] * (x @ (B @ A).T) for i, (A, B) in enumerate(zip(As, Bs, strict=True)))
    found = gated(x @ torch.cat(As).T, blockwise(g, ranks)) @ torch.cat(Bs, 1).T
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_what_is_gathered_is_what_a_gate_of_zeros_leaves() -> None:
    x, A, B, p = drawn(2, 5, 12), drawn(8, 12, seed=1), drawn(10, 8, seed=2), drawn(2, 5, 8, seed=3)
    values, chosen = kept(p, 3)
    gate = spread(values, chosen, 8)
    assert torch.equal(gate.count_nonzero(dim=-1), torch.full((2, 5), 3))
    torch.testing.assert_close(gathered(x, A, B, chosen, values), gated(x @ A.T, gate) @ B.T, rtol=1e-13, atol=1e-13)
    assert kept(p, 20)[0].shape[-1] == 8 and kept(p, 1, least=2)[0].shape[-1] == 2


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_what_is_added_trains(name: str, small: Any) -> None:
    """Embeddings, norms, biases and head stay too, under weight decay."""
    for model in (small("llama", num_hidden_layers=1), small("gpt2", n_layer=1)):
        lorank.convert(model, name)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        method: Any = lorank.conversion.method_of(model)  # type: ignore[attr-defined]
        assert isinstance(method, Adapter)
        added = {id(p) for layer in method.layers(model).values() for p in layer.trained()}
        added |= {id(p) for key, p in model.named_parameters() if "lorank_" in key}  # shared by all layers
        assert added == {id(p) for p in model.parameters() if p.requires_grad}
        assert len(method.layers(model)) in (6, 7), "all projections"
        optimizer = lorank.optimizer(model, lr=1e-2, weight_decay=0.1)
        lorank.step_hook(model, optimizer, steps=2)
        tokens = torch.arange(8)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(p.grad is None for p in model.parameters() if id(p) not in added)
        optimizer.step()
        assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if id(p) not in added)


COUNTS: dict[str, Callable[[int, int], int]] = {
    "lora": lambda d_in, d_out: 4 * (d_in + d_out),
    "smora": lambda d_in, d_out: 4 * (d_in + d_out) + 4 * d_in,  # and a router
    "moram": lambda d_in, d_out: 4 * (d_in + d_out),
    "codyra": lambda d_in, d_out: 4 * (d_in + d_out + 1),
    "row-adaptive": lambda d_in, d_out: 4 * (d_in + d_out),
    "petalface": lambda d_in, d_out: 2 * 4 * (d_in + d_out),
    "splitflux": lambda d_in, d_out: (4 + 16) * (d_in + d_out),
    "block-lora": lambda d_in, d_out: 4 * d_out + d_in,
    "break-for-make": lambda d_in, d_out: 4 * (d_in + d_out) // 2,
    "osft": lambda d_in, d_out: (d_in + d_out + 1) * (min(d_in, d_out) - 4),
    "comp-lora": lambda d_in, d_out: 4 * (d_in + d_out),
    "mtlora": lambda d_in, d_out: 4 * (d_in + d_out),
    "reclora": lambda d_in, d_out: 4 * 4 * (d_in + d_out),
}
"""Trained parameters of a layer at rank 4."""
MORE = {
    "mtlora": sum(4 * 4 * sum(sizes) for name, sizes in LLAMA_BLOCK.items() if name.split(".")[1][0] not in "qkv"),
    "reclora": 4 * (64 + 1) + 64,
}
"""Of a whole model: four tasks' parts in its last block; a gate over four adapters, whatever the number of users."""


@pytest.mark.parametrize("name", ADAPTERS)
def test_counts_are_the_closed_forms(name: str) -> None:
    """`lorank plan` counts them so."""
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe = Recipe(method=name, model="llama", rank=4, shape={**shape, "num_key_value_heads": 2, "head_dim": 8})
    expected = sum(COUNTS[name](*sizes) for sizes in LLAMA_BLOCK.values())
    assert count_parameters(empty_model(recipe)).trainable == 2 * expected + MORE.get(name, 0)


def test_a_rank_beyond_all_projections_is_refused(small: Any) -> None:
    """And directions that leave nothing to train."""
    for method, words in (
        (
            lorank.LoRA(rank=1_000_000),
            "rank must be at most 80, the longest side of a projection that would have it, got",
        ),
        (lorank.SMoRA(rank={"mlp": 80, ".*": 33}), "rank must be at most 32, the longest side of"),
        (lorank.SplitFlux(residual_rank=81), "residual_rank must be at most 80, the longest side of"),
        (
            lorank.CompLoRA(keep=1.0),
            r"keep must leave directions to train, so be below 32 at model\.layers\.0\..*q_proj, got 32",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            lorank.convert(small("llama"), method)
    lorank.convert(small("llama"), lorank.CompLoRA(keep=16, sides="input"))


def test_the_compiler_gets_one_graph_of_all_gates() -> None:
    torch.manual_seed(0)
    dense = [nn.Linear(12, 12) for _ in range(4)]
    layers: list[GatedAdapter] = [
        SMoRALinear(dense[0], 8, scale=2.0, top_k=2, expert_rank=2, speed=1e-5),
        MoRAMLinear(dense[1], 4, tasks=2, top_k=None, temperature=0.03, threshold=0.2),
        CoDyRALinear(dense[2], 4),
        RowAdaptiveLinear(dense[3], 4, eta=2.0),
    ]
    for layer in layers:
        nn.init.normal_(layer.B.weight)
    model = nn.Sequential(*layers)
    compiled, x = copy.deepcopy(model), torch.randn(3, 5, 12)
    counter = CompileCounterWithBackend("aot_eager")
    expected, found = model(x), torch.compile(compiled, fullgraph=True, backend=counter)(x)
    for y in (expected, found):
        y.square().sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([p.grad for p in compiled.parameters()], [p.grad for p in model.parameters()])
    assert torch.equal(compiled[0].router.counts, model[0].router.counts) and model[0].router.counts.sum() == 30


def test_a_task_ends_without_a_method_too(small: Any) -> None:
    model = small("llama")
    optimizer = lorank.optimizer(model, lr=1e-3)
    lorank.next_task(model, optimizer)  # full tuning: nothing changes
    with pytest.raises(ValueError, match="model must be the whole converted model"):
        lorank.next_task(lorank.convert(small("llama"), "moram").model.layers[0])
