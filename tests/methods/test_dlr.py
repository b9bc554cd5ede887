"""DLR: what is added to B, that it is the authors' layer with a second branch, and where weight decay leads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorank
from lorank import CoLA, convert
from lorank.layers import LowRankLinear, entry_std
from lorank.methods.cola import ReusingLinear
from lorank.methods.dlr import DecayToReuse, Reusing, reuse, reused
from tests.conftest import ARCHITECTURES

NEVER = {
    (512, 128): 0, (1376, 128): 2, (768, 256): 0, (2048, 256): 0, (2736, 256): 7, (5461, 512): 15, (11008, 1024): 23, (96, 128): 32,
}  # fmt: skip
"""Numbers of the bottleneck that no output of a paper's shape reuses."""


class Branch(nn.Module):
    """The authors' layer: y = B z + (α/√K) E z, with E a fixed branch."""

    def __init__(self, layer: Any):
        super().__init__()
        d_out, r = layer.B.weight.shape
        K = -(-d_out // r)
        self.columns = torch.tensor([min(o // K, r - 1) for o in range(d_out)])
        self.weight = K**-0.5
        self.A = nn.Parameter(layer.A.weight.detach().clone())
        own = torch.zeros(d_out, r, dtype=torch.float64)
        own[torch.arange(d_out), self.columns] = self.weight
        self.E = own
        self.B = nn.Parameter(layer.B.weight.detach() - own)

    def forward(self, x: Tensor) -> Tensor:
        z = F.silu(x @ self.A.T)
        return z @ self.B.T + self.weight * z[..., self.columns]


def layer_of(d_in: int = 12, d_out: int = 22, r: int = 5) -> Any:
    torch.manual_seed(0)
    return ReusingLinear(d_in, d_out, r, dtype=torch.float64).start(1.0, None)


@pytest.mark.parametrize(("shape", "never"), list(NEVER.items()), ids=str)
def test_which_numbers_are_reused(shape: tuple[int, int], never: int) -> None:
    """The counts of the paper's shapes; the spectral norm is α."""
    d_out, r = shape
    columns = reused(d_out, r)
    K = -(-d_out // r)
    assert columns.tolist() == [min(o // K, r - 1) for o in range(d_out)]
    assert r - len(columns.unique()) == never
    E = reuse(d_out, r, alpha=0.7).double()
    assert (E != 0).sum(1).tolist() == [1] * d_out
    assert (E.T @ E).diag().max().sqrt().item() == pytest.approx(0.7, rel=1e-6)  # columns are disjoint


@pytest.mark.parametrize("d_out", [512, 1376])
def test_shares_of_the_output_at_the_start(d_out: int) -> None:
    """Of E[z²]: r s² by what is drawn, 1/K by what is reused; 60M's attention and MLP."""
    r, d_in = 128, 512
    s, K = entry_std(d_in, d_out, r), -(-d_out // r)
    assert (round(r * s * s, 3), round(1 / K, 3)) == {512: (0.354, 0.25), 1376: (0.26, 0.091)}[d_out]
    torch.manual_seed(0)
    layer = ReusingLinear(d_in, d_out, r, dtype=torch.float64).start(1.0, None)
    z = torch.randn(4000, r, dtype=torch.float64)
    E = reuse(d_out, r).double()
    learnt = (z @ (layer.B.weight.detach() - E).T).square().mean().item()
    assert learnt == pytest.approx(r * s * s, rel=0.03)
    assert (z @ E.T).square().mean().item() == pytest.approx(1 / K, rel=0.03)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_moves_as_the_layer_with_a_branch(optimizer: str) -> None:
    """Without weight decay exactly; with decay if that leads to the reuse, and not if it leads to 0."""

    def trained(model: nn.Module, decay: float, centre: bool = False) -> Tensor:
        group = {"params": list(model.parameters()), "weight_decay": decay}
        if optimizer == "adamw":
            moving: Any = torch.optim.AdamW([group], lr=0.01)
        else:
            moving = lorank.Muon().optimizer([{**group, "rule": "muon"}], lr=0.01)
        if centre:
            DecayToReuse(moving, [model])  # type: ignore[list-item]
        for step in range(50):
            x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            (model(x) - x.repeat(1, 2)[:, :22].sin()).square().mean().backward()
            moving.step()
            moving.zero_grad()
        if isinstance(model, Branch):
            return (model.B + model.E).detach()
        return model.B.weight.detach()  # type: ignore[union-attr, return-value]

    tolerance = 1e-12 if optimizer == "adamw" else 1e-3  # Newton-Schulz is in bfloat16
    for decay in (0.0, 0.1):
        theirs = trained(Branch(layer_of()), decay)
        ours = trained(layer_of(), decay, centre=decay > 0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert (trained(layer_of(), 0.1) - theirs).abs().max() > 1e-3


def test_a_converted_model_starts_and_is_loaded_so(tmp_path: Any) -> None:
    make = lambda **settings: convert(ARCHITECTURES["llama"].dense(), CoLA(rank=8, **settings))  # noqa: E731
    plain, dlr, nothing, random = (
        make(**settings)
        for settings in ({}, {"init": "dlr"}, {"init": "dlr", "reuse_scale": 0.0}, {"init": "dlr-random"})
    )
    for name, module in dlr.named_modules():
        if isinstance(module, Reusing):
            was: Any = plain.get_submodule(name)
            d_out, r = was.B.weight.shape
            torch.testing.assert_close(module.B_star(), was.B.weight + reuse(d_out, r).float(), rtol=0, atol=0)
            assert torch.equal(nothing.get_submodule(name).B.weight, was.B.weight), "α = 0 is CoLA"
    one, other = (random.model.layers[i].mlp.up_proj for i in (0, 1))
    assert not torch.equal(one.reuse(), other.reuse()), "drawn for each layer"
    random.save_pretrained(tmp_path / "model")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(map(torch.equal, again.parameters(), random.parameters()))
    assert torch.equal(again.model.layers[0].mlp.up_proj.reuse(), one.reuse())


def test_weight_decay_leads_a_model_to_the_reuse() -> None:
    model = convert(ARCHITECTURES["llama"].dense(), CoLA(rank=8, init="dlr", decay_to="reuse"))
    optimizer = lorank.optimizer(model, lr=0.0, weight_decay=1.0)
    assert lorank.step_hook(model, optimizer, steps=10) is not None
    layer: Any = next(module for module in model.modules() if isinstance(module, Reusing))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(40):
        optimizer.step()
    torch.testing.assert_close(layer.B.weight, layer.reuse(), rtol=0, atol=1e-6)
    assert isinstance(layer, LowRankLinear)


def test_decay_to_a_reuse_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="init must be 'dlr' or 'dlr-random' with decay_to='reuse', got 'cola'"):
        CoLA(decay_to="reuse")
