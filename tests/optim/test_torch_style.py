"""The classes that are called as torch's: the same steps as the methods', ranks by default, arguments as users expect them."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

import lorank
from lorank import Muon
from lorank.optim import DCTAdamW, FiraAdamW, GaLoreAdamW, MuonAdamW, Trion, VectorAdamW, low_rank_groups
from tests.conftest import ARCHITECTURES
from tests.optim.conftest import groups, matrices, net, run, train

CLASSES = [GaLoreAdamW, FiraAdamW, DCTAdamW, Trion]


@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_its_method(kind: Any) -> None:
    one, other = net(), net()
    mine = kind(groups(one, weight_decay=0.1), 0.02, rank=7)
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    common = {"betas": defaults["betas"], "eps": defaults["eps"]}
    theirs = kind.kind().optimizer(groups(other, weight_decay=0.1), lr=0.02, **common)
    assert train(one, mine, range(4)) == train(other, theirs, range(4))
    assert [group["rank"] for group in mine.param_groups] == [3, None]
    assert mine.state_dict()["state"].keys() == {0, 1, 2, 3}
    copy.deepcopy(mine).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("kind", CLASSES)
def test_matrices_have_a_rank_unless_a_group_says_one(kind: Any) -> None:
    model = net()
    of = lambda optimizer: [(group["rank"], len(group["params"])) for group in optimizer.param_groups]  # noqa: E731
    assert of(kind(model.parameters(), 0.1)) == [(3, 1), (2, 1), (None, 2)], "a quarter of the narrower side"
    assert of(kind(model.named_parameters(), 0.1, rank=4)) == [(4, 2), (None, 2)]
    some = [{"params": [model[0].weight], "rank": 5}, {"params": [model[2].weight, model[2].bias]}]
    assert of(kind(some, 0.1)) == [(5, 1), (None, 2)], "as in torch, what a group does not say is the default"
    assert of(kind(some, 0.1, rank=4)) == [(5, 1), (4, 1), (None, 1)]
    grown = kind(some[:1], 0.1, rank=0.5)
    grown.add_param_group({"params": [model[2].weight]})
    assert of(grown) == [(5, 1), (4, 1)]
    assert all(group["lr"] == 0.1 for group in grown.param_groups)


@pytest.mark.parametrize("kind", CLASSES)
def test_without_a_matrix_nothing_is_projected_silently(kind: Any) -> None:
    vectors = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="must have a matrix to project, got none; give it groups with a rank"):
        kind(vectors, 0.1)
    with pytest.raises(ValueError, match="must have a matrix to project, got none"):
        kind.kind().optimizer(vectors, lr=0.1)
    with pytest.raises(ValueError, match="rank must be a number here, because a table needs names"):
        kind(matrices((12, 20)), 0.1, rank={"mlp": 2})
    with pytest.raises(ValueError, match="rank must be .*, got 0"):
        kind(matrices((12, 20)), 0.1, rank=0)
    assert kind([{"params": vectors, "rank": None}], 0.1).param_groups[0]["rank"] is None, "which says so"


def test_arguments_of_torch_are_accepted_or_refused() -> None:
    ours, theirs = matrices((12, 20)), matrices((12, 20))
    options = {"lr": 0.1, "weight_decay": 0.1, "maximize": True}
    run(GaLoreAdamW([{"params": ours, "rank": 4}], fused=False, foreach=True, amsgrad=False, **options), ours, range(3))
    run(GaLoreAdamW([{"params": theirs, "rank": 4}], 0.1, weight_decay=0.1), theirs, range(3), sign=-1.0)
    assert torch.equal(ours[0], theirs[0])
    for name in ("amsgrad", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{name} must be False with GaLoreAdamW, got True; leave it out"):
            GaLoreAdamW(ours, **{name: True})
    with pytest.raises(TypeError, match="unknown argument of GaLoreAdamW 'update_gaps'; did you mean 'update_gap'"):
        GaLoreAdamW(ours, 0.1, update_gaps=3)
    with pytest.raises(ValueError, match="update_gap must be a positive integer, got 0"):
        GaLoreAdamW(ours, 0.1, update_gap=0)
    for kind in (GaLoreAdamW, MuonAdamW):
        with pytest.raises(
            TypeError, match=r"params must be a list of parameters or groups, got one tensor; give \[tensor\]"
        ):
            kind(ours[0])
        with pytest.raises(ValueError, match="empty parameter list"):
            kind([])


def test_muon_takes_the_groups_that_name_it_or_all_matrices() -> None:
    model = net()
    rules = lambda optimizer: [(g["rule"], len(g["params"])) for g in optimizer.param_groups]  # noqa: E731
    assert rules(MuonAdamW(model.parameters(), 0.1)) == [("muon", 2), ("adamw", 2)]
    assert rules(MuonAdamW(groups(model), 0.1)) == [("muon", 2), ("adamw", 2)]
    mine = [{"params": [model[0].weight], "momentum": 0.9}, {"params": [model[2].weight]}]
    optimizer = MuonAdamW(mine, lr=0.1)
    assert rules(optimizer) == [("muon", 1), ("adamw", 1)] and optimizer.param_groups[0]["momentum"] == 0.9
    assert all(loss < 10 for loss in train(model, optimizer, range(2)))


@pytest.mark.parametrize("rank", ["x", 1.5, True, [4], 0])
def test_what_is_no_rank_does_not_choose_muon(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank must be a positive integer or None"):
        MuonAdamW([{"params": matrices((12, 20)), "rank": rank}])


def test_what_projects_nothing_has_no_rank() -> None:
    for make in (lambda groups: VectorAdamW(groups), lambda groups: Muon().optimizer(groups, lr=0.1)):
        with pytest.raises(ValueError, match="projects nothing; leave rank out of its groups, got 4"):
            make([{"params": matrices((12, 20)), "rank": 4}])


def test_transformers_makes_it_from_class_and_arguments(tmp_path: Any) -> None:
    model = ARCHITECTURES["llama"].dense()
    given = (GaLoreAdamW, {"lr": 0.01, "rank": 2, "params": low_rank_groups(model, 2)})
    trainer = Trainer(model, optimizer_cls_and_kwargs=given)
    made = trainer.create_optimizer()
    assert isinstance(made, GaLoreAdamW) and made.param_groups[0]["rank"] == 2
    assert lorank.optim.GaLoreAdamW is GaLoreAdamW
