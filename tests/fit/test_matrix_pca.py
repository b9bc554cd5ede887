"""Matrix PCA as a structure of `lorank.fit`: the model of `lorank.fit_masa`, its budget, and its groups."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lorank
from lorank.fit import MatrixPCA, fit
from lorank.fit.calibration import Block, joined
from lorank.fit.door import apart, together
from lorank.sites import Place


@pytest.fixture
def data() -> list[Tensor]:
    return [torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(5)) for _ in range(2)]


def test_one_group_is_the_model_of_fit_masa(small: Callable[..., Any], data: list[Tensor], tmp_path: Path) -> None:
    dense, seen = small("llama", num_hidden_layers=4).double(), []
    model = fit(copy.deepcopy(dense), "masa", data, budget=0.75, see=seen.append)
    ranks = {rf"{name.split('.')[-1]}$": one.rank for one in seen for name in [one.name]}
    wanted = lorank.fit_masa(dense, data=data, atoms=1 / 3, residual_rank=ranks)
    assert torch.equal(model(data[0]).logits, wanted(data[0]).logits)
    attention = [p for name, p in model.named_parameters() if "self_attn" in name or "lorank_atoms" in name]
    kept = sum(p.numel() for p in attention)
    assert sum(one.parameters for one in seen) == kept <= 0.75 * sum(one.d_in * one.d_out for one in seen)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(data[0]).logits, model(data[0]).logits)


def test_groups_are_fitted_behind_those_before(small: Callable[..., Any], data: list[Tensor]) -> None:
    """The second group has its own atoms, inputs that come through the first, and goes on where a fit was stopped."""
    dense = small("llama", num_hidden_layers=4).double()
    structure, kept, seen = MatrixPCA(atoms=1, groups=(0, 2)), {}, []
    model = fit(copy.deepcopy(dense), structure, data, budget=0.8, finished=kept, see=seen.append)
    assert len(kept) == 8 and len(seen) == 16
    kept = {name: found for name, found in kept.items() if ".layers.0." in name}
    again = fit(copy.deepcopy(dense), structure, data, budget=0.8, finished=kept)
    assert torch.equal(again(data[0]).logits, model(data[0]).logits)

    mixed, rows = copy.deepcopy(dense), []
    for depth in (0, 1):
        mixed.model.layers[depth] = model.model.layers[depth]
    name = "model.layers.3.self_attn.v_proj"
    layer, W = model.get_submodule(name), dense.get_submodule(name).weight
    hook = mixed.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    for batch in data:
        mixed(batch)
    hook.remove()
    X, told = torch.cat(rows), next(one for one in seen if one.name == name)
    error = torch.linalg.norm(X @ (W - layer.weight()).T) / torch.linalg.norm(X @ W.T)
    assert told.output_error == pytest.approx(error.item(), rel=1e-5)
    lack = W - layer.dictionary(layer.depth)
    tail = torch.linalg.svdvals(X @ lack.T)[told.rank :].norm()
    torch.testing.assert_close(torch.linalg.norm(X @ (W - layer.weight()).T), tail, rtol=1e-6, atol=0)


def test_a_number_of_groups_is_cut_by_drift() -> None:
    """Where drift is largest, but no group has as many atoms as blocks."""
    assert MatrixPCA(groups=3, atoms=1)._cuts([9, 1, 8, 2, 7, 1, 9]) == (0, 3, 5)
    assert MatrixPCA(groups=4, atoms=2)._cuts([5, 4, 3]) == (0,)


def test_energy_and_what_no_budget_holds(small: Callable[..., Any], data: list[Tensor]) -> None:
    dense, seen = small("llama", num_hidden_layers=4), []
    fit(copy.deepcopy(dense), "masa", data, budget=0.6, policy="energy", see=seen.append)
    assert sum(one.parameters for one in seen) <= 0.6 * sum(one.d_in * one.d_out for one in seen)
    assert len({one.rank for one in seen}) > 1
    with pytest.raises(ValueError, match=r"budget must be at least .* parameters with these settings of masa"):
        fit(copy.deepcopy(dense), "masa", data, budget=0.3)
    with pytest.raises(ValueError, match="atoms must be fewer than the 1 matrices that share them, got 1"):
        fit(dense, MatrixPCA(groups=(0, 1)), data)


def test_blocks_of_a_group_are_one_visit() -> None:
    module = torch.nn.Identity()
    chain = [
        Block(f"h.{i}", module, [Place(f"h.{i}.{p}", f"h.*.{p}", i, module, lambda rows: rows) for p in "ab"])
        for i in range(5)
    ]
    whole = joined(chain, [["h.0.a", "h.1.a"], ["h.1.b", "h.2.b"], ["h.3.a"], ["h.4.a"]])
    assert [block.name for block in whole] == ["h.0 to h.2", "h.3", "h.4"]
    assert [place.name for place in whole[0].places] == [f"h.{i}.{p}" for i in range(3) for p in "ab"]


def test_tensors_of_a_group_are_kept_once() -> None:
    shared = torch.ones(2)
    found = [{"A": shared, "x": torch.tensor([i])} for i in range(11)]
    whole = together(found)
    assert len(whole) == 12
    assert [each["x"].item() for each in apart(whole, 11)] == [*range(11)]
    assert together(found[:1]) == found[0]
