"""INT2.1: its start, its two losses by hand, what is trained, and that training never ends further from the parent."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorank.adapters.lora import LoRALinear
from lorank.fit import INT2, EoRA, fit
from lorank.fit.int2 import bits_per_weight
from lorank.sites import find_sites


@pytest.fixture
def data() -> list[Tensor]:
    return [torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(5 + i)) for i in range(2)]


def test_factors_alone_are_trained_and_come_nearer(small: Callable[..., Any], data: list[Tensor]) -> None:
    dense = small("llama")
    start = fit(copy.deepcopy(dense), EoRA(base="int2", group=16), data, budget=0.2)
    base = INT2(group=16, steps=12)
    model = fit(copy.deepcopy(dense), base, data, budget=0.2)
    batches = [{"input_ids": ids} for ids in data]
    closed, trained = base._mean(start, dense, batches), base._mean(model, dense, batches)
    assert trained < 0.9 * closed
    zero = copy.deepcopy(start)  # the quantised model itself
    layers = [layer for layer in zero.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        torch.nn.init.zeros_(layer.B.weight)
        x = torch.randn(3, layer.W.in_features)
        assert torch.equal(layer(x), F.linear(x, layer.W.weight, layer.W.bias))
    assert closed < base._mean(zero, dense, batches)

    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if n.endswith(("A.weight", "B.weight"))}
    rank = {name: model.get_submodule(name).A.out_features for name in (s.name for s in find_sites(dense))}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(rank[s.name] * (s.d_in + s.d_out) for s in find_sites(dense))
    before = dict(start.named_parameters())
    assert all(torch.equal(p, before[n]) == (n not in names) and p.grad is None for n, p in model.named_parameters())


def test_training_that_does_harm_is_dropped(small: Callable[..., Any], data: list[Tensor]) -> None:
    dense = small("gpt2")
    start = fit(copy.deepcopy(dense), INT2(group=16, steps=0), data, budget=0.2)
    model = fit(dense, INT2(group=16, steps=2, rate=50.0), data, budget=0.2)
    assert all(map(torch.equal, model.state_dict().values(), start.state_dict().values()))


@pytest.mark.parametrize("loss", ["parent", "model"])
def test_losses_by_hand(small: Callable[..., Any], data: list[Tensor], loss: Any) -> None:
    """With padding, which no term counts."""
    parent, model = small("llama").double(), small("llama").double()
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, std=0.3)
    ids, mask = data[0], torch.ones_like(data[0])
    mask[1, 8:] = 0
    found = INT2(loss=loss, hidden=0.5).distance(model, parent, {"input_ids": ids, "attention_mask": mask})
    a, b = (m(ids, attention_mask=mask, output_hidden_states=True) for m in (model, parent))
    here = mask.bool()
    if loss == "model":
        text = F.cross_entropy(a.logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(~here[:, 1:], -100).flatten())
        wanted = ((a.hidden_states[-1] - b.hidden_states[-1])[here] ** 2).mean() / 2 + text / 2
    else:
        p, q = b.logits[here].softmax(-1), a.logits[here].softmax(-1)
        states = zip(a.hidden_states[1:], b.hidden_states[1:], strict=True)
        parts = [torch.linalg.norm((y - x)[here]) ** 2 / torch.linalg.norm(y[here]) ** 2 for x, y in states]
        wanted = (p * (p / q).log()).sum(-1).mean() + 0.5 * sum(parts) / len(parts)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_bits_are_those_that_the_paper_claims() -> None:
    """A model 1.05 times as large, 2.1 bits instead of two: ranks of about 13 in matrices of 4096."""
    assert bits_per_weight(2, 0, 4096, 4096) == 2
    assert bits_per_weight(2, 12, 4096, 4096) < 2.1 < bits_per_weight(2, 13, 4096, 4096)


def test_it_needs_text_and_reads_encoders(small: Callable[..., Any], data: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="data must be given with int2"):
        fit(small("llama"), "int2")
    dense = small("bert").base_model
    model = fit(copy.deepcopy(dense), INT2(group=16, steps=3), data, budget=0.2)
    batches = [{"input_ids": ids} for ids in data]
    start = fit(copy.deepcopy(dense), INT2(group=16, steps=0), data, budget=0.2)
    assert INT2()._mean(model, dense, batches) <= INT2()._mean(start, dense, batches)
