"""Adapters of convolutions, against dense kernels."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorank
from lorank.adapters.cp_conv import AdaptedConv2d, adapt_convolutions, channel_norms, merge_convolutions


def adapted(structure: Any, magnitude: bool = False, **conv: Any) -> AdaptedConv2d:
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 8, (3, 5), **conv).double()
    return AdaptedConv2d(dense, 3, structure=structure, scale=0.5, magnitude=magnitude)


@pytest.mark.parametrize("conv", [{}, {"stride": (2, 1), "padding": (1, 2)}, {"padding": 2, "dilation": (1, 2)}])
def test_a_cp_update_is_a_chain_of_four_convolutions(conv: dict[str, Any]) -> None:
    layer, x = adapted("cp", **conv), torch.randn(2, 6, 12, 14, dtype=torch.float64)
    nn.init.normal_(layer.a)
    dense = torch.zeros_like(layer.W.weight)
    for q in range(3):  # one outer product of four vectors at a time
        a, b, c, d = (factor[:, q] for factor in (layer.a, layer.b, layer.c, layer.d))
        dense = dense + a[:, None, None, None] * b[:, None, None] * c[:, None] * d
    expected = F.conv2d(x, layer.W.weight + 0.5 * dense, layer.W.bias, **conv)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_other_structures_are_products_of_two_factors() -> None:
    x = torch.randn(2, 6, 12, 14, dtype=torch.float64)
    layer = adapted("conv")
    nn.init.normal_(layer.B)
    expected = layer.W(x) + 0.5 * F.conv2d(F.conv2d(x, layer.A), layer.B[:, :, None, None])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    unfolded = adapted("matrix")
    nn.init.normal_(unfolded.B)
    assert torch.linalg.matrix_rank(unfolded.update().reshape(8 * 3, 6 * 5)) == 3


@pytest.mark.parametrize(("structure", "count"), [("cp", 134), ("conv", 640), ("matrix", 384)])
def test_parameters_of_a_rank(structure: Any, count: int) -> None:
    layer = AdaptedConv2d(nn.Conv2d(64, 64, 3), 1, structure=structure, scale=1.0, magnitude=False)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("structure", ["cp", "conv", "matrix"])
def test_magnitudes_begin_as_the_identity_and_set_lengths(structure: Any) -> None:
    layer, x = adapted(structure, magnitude=True), torch.randn(2, 6, 12, 14, dtype=torch.float64)
    assert torch.equal(layer(x), layer.W(x))
    nn.init.normal_(layer.a if structure == "cp" else layer.B)
    assert layer.mu is not None
    layer.mu.data.mul_(2)
    torch.testing.assert_close(channel_norms(layer.kernel()), layer.mu)


def test_a_u_net_learns_and_merges() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip
    frozen, x = copy.deepcopy(model.state_dict()), torch.randn(4, 1, 8, 8)
    adapt_convolutions(model, rank=4, targets="[36]")
    assert type(model[0]) is nn.Conv2d and isinstance(model[3], AdaptedConv2d)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.roll(1, 3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model[3].W.weight, frozen["3.weight"]) and model[1].weight.grad is None
    expected = model.eval()(x)
    merge_convolutions(model)
    assert type(model[3]) is nn.Conv2d and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, (3, 1), stride=2, bias=False)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, run: Any = None) -> None:
    """One step on two micro-batches."""
    for half in torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed)).chunk(2):
        (run or model)(half.to(next(model.parameters()).dtype)).square().mean().div(2).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("structure", "magnitude"), [("cp", True), ("conv", False), ("matrix", False)])
def test_it_is_saved_alone_and_goes_on_bit_for_bit(structure: Any, magnitude: bool, tmp_path: Path) -> None:
    """With the statistics of BatchNorm, which training has moved; on other weights it is refused."""
    base = small_net()
    model = adapt_convolutions(copy.deepcopy(base), rank=3, structure=structure, scale=0.5, magnitude=magnitude)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        step(model, optimizer, seed)
    lorank.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert not any(".W." in key or key in ("1.weight", "1.bias") for key in stored) and "1.running_mean" in stored
    loaded = lorank.load_adapter(tmp_path, copy.deepcopy(base)).train()
    again = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 2)
    step(loaded, again, 2, run=lambda x: checkpoint(loaded[2:], loaded[:2](x), use_reentrant=False))  # type: ignore[index]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    base[0].weight.data[0] += 1
    with pytest.raises(ValueError, match="base must have the weights that"):
        lorank.load_adapter(tmp_path, base)
    assert type(base[3]) is nn.Conv2d and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("structure", ["cp", "conv"])
def test_peft_has_a_place_for_it(structure: Any, magnitude: bool, tmp_path: Path) -> None:
    """Its two convolutions, one after the other, and with magnitudes its DoRA; with peft installed, against its outputs too."""
    base, x = small_net().eval(), torch.randn(2, 2, 8, 8)
    model = adapt_convolutions(copy.deepcopy(base), rank=3, structure=structure, scale=0.5, magnitude=magnitude)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    lorank.export_peft(model, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["target_modules"] == ["0", "3"] and about["r"] == about["lora_alpha"] == 3
    assert about["use_dora"] is magnitude
    stored = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.0.lora_{side}.weight"] for side in "AB")
    layer: Any = model[0]  # type: ignore[index]
    expected = F.conv2d(x, layer.scale * layer.update(), padding=1)
    torch.testing.assert_close(F.conv2d(F.conv2d(x, A, padding=1), B), expected, rtol=1e-4, atol=1e-6)
    assert not magnitude or torch.equal(
        stored["base_model.model.0.lora_magnitude_vector"].flatten(), layer.mu.flatten()
    )
    model[1].requires_grad_()  # type: ignore[index, operator]
    with pytest.raises(ValueError, match=r"only the adapter may train for a LoRA of peft, but 1\.weight does too"):
        lorank.export_peft(model, tmp_path)
    peft = pytest.importorskip("peft")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("structure", ["cp", "conv", "matrix"])
def test_it_trains_in_sixteen_bits(structure: Any) -> None:
    model = adapt_convolutions(small_net().bfloat16(), structure=structure, magnitude=structure != "cp")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = [p.clone() for p in model.parameters()]
    step(model, optimizer, 0)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert any(moved) and not any(m and not p.requires_grad for m, p in zip(moved, model.parameters(), strict=True))
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in model.parameters())


def test_what_cannot_be_adapted_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"^0 must be a convolution without groups, .* leave it out with targets"):
        adapt_convolutions(model)
    with pytest.raises(ValueError, match="targets must match an nn.Conv2d of the model, got 'x', which matches none"):
        adapt_convolutions(model, targets="x")
    with pytest.raises(ValueError, match="structure must be 'cp', 'conv' or 'matrix', got 'tt'"):
        adapt_convolutions(model, structure="tt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        adapt_convolutions(model, rank=0)
    assert type(model[1]) is nn.Conv2d and all(p.requires_grad for p in model.parameters())
    adapt_convolutions(model, targets="1")
    with pytest.raises(ValueError, match="model must have no adapted convolutions yet; name all in one call"):
        adapt_convolutions(model, structure="matrix")
    model = adapt_convolutions(merge_convolutions(model), targets="1", structure="matrix")
    with pytest.raises(ValueError, match="structure must be 'cp' or 'conv' to give two convolutions, got 'matrix'"):
        lorank.export_peft(model, tmp_path)
