"""What every method that decides how weights move must satisfy, run over the table.

A method earns its place by passing this file and test_optimizer_states.py unchanged; its equations are tested in
``tests/optim``.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import Method, convert, optimizer
from lorank.optim.driver import Projected
from tests.conftest import ARCHITECTURES
from tests.contract.conftest import LR, METHODS, equal, groups, make, named, net, train, weights

methods = pytest.mark.parametrize("method", METHODS, ids=named)
projecting = pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Projected)], ids=named)


# ---- training


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss(method: Method, dtype: torch.dtype) -> None:
    model = net(dtype)
    start = weights(model)
    losses = train(model, make(method, model), range(40))
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
    assert not any(map(torch.equal, start, model.parameters())), "every parameter has moved"


@methods
def test_the_whole_model_by_its_name(method: Method, tokens: Tensor) -> None:
    model = ARCHITECTURES["llama"].dense()
    structure = getattr(method, "structure", None)
    model = convert(model, structure) if structure else model
    made = optimizer(model, method, lr=0.01, weight_decay=0.1)
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
    before = weights(model)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    made.step()
    assert not any(map(torch.equal, before, model.parameters()))


@methods
def test_a_copy_goes_on_as_the_original_does(method: Method) -> None:
    model = net()
    made = make(method, model)
    train(model, made, range(1))
    for twin, other in (copy.deepcopy((model, made)), pickle.loads(pickle.dumps((model, made)))):
        original, its = copy.deepcopy((model, made))
        assert train(original, its, range(1, 3)) == train(twin, other, range(1, 3))
        assert equal(original, twin)


@methods
def test_a_copy_does_not_share_the_schedule(method: Method) -> None:
    """A scheduler sets a `step` on the optimizer, which must not travel with a copy."""
    model = net()
    made = make(method, model)
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)
    pickle.dumps(made)
    twin, its = copy.deepcopy((model, made))
    before = weights(model)
    train(twin, its, range(1))
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(map(torch.equal, before, twin.parameters()))


@methods
def test_a_schedule_reaches_every_group(method: Method) -> None:
    model = net()
    made = make(method, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: float(step > 0))
    before = weights(model)
    train(model, made, range(1))
    assert all(map(torch.equal, before, model.parameters()))
    schedule.step()
    train(model, made, range(1, 2))
    assert not any(map(torch.equal, before, model.parameters()))
    cycle = torch.optim.lr_scheduler.OneCycleLR(make(method, net()), max_lr=0.1, total_steps=10)  # moves betas as well
    assert cycle.optimizer.param_groups[0]["betas"][0] == 0.95


# ---- groups


@methods
def test_groups_may_be_added_later(method: Method) -> None:
    one, other = net(), net()
    whole = make(method, one)
    first, later = groups(other, method)
    grown = method.optimizer([first], lr=LR.get(method.name, 0.01), betas=(0.9, 0.99), eps=1e-8)
    grown.add_param_group(later)
    assert "rule" not in later, "the user's group stays as it is"
    train(one, whole, range(3))
    train(other, grown, range(3))
    assert equal(one, other)


@methods
def test_a_refused_group_leaves_the_others_alone(method: Method) -> None:
    model = net()
    made = make(method, model)
    matrix = lambda: nn.Parameter(torch.ones(3, 4))  # noqa: E731
    for settings, words in (
        ({"rank": 0}, "rank must be a positive integer or None, got 0"),
        ({"rank": 2.5}, "rank must be a positive integer or None, got 2.5"),
        ({"rank": True}, "rank must be a positive integer or None, got True"),
        ({"rule": "sgd"}, "rule must be 'adamw', 'adamw-8bit', 'adafactor'.* or .*, got 'sgd'"),
        ({"rule": "adafactor", "eps": 1e-8}, "eps must be 2 values, .*, got 1e-08"),
        ({"rule": "muon", "momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"lr": float("inf")}, "lr must be a number of at least 0, got inf"),
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"weight_decay": "a"}, "weight_decay must be a number of at least 0, got 'a'"),
        ({"rule": "adamw", "eps": -1.0}, "eps must be a number of at least 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
        ({"betas": 0.9}, "betas must be 2 values, each a finite number, got 0.9"),
        ({"betas": (0.9,)}, r"betas must be 2 values, each a finite number, got \(0.9,\)"),
        ({"maximize": "no"}, "maximize must be true or false, got 'no'"),
        ({"amsgrad": True}, "has no amsgrad"),
    ):
        with pytest.raises(ValueError, match=words):
            made.add_param_group({"params": [matrix()], **settings})
    vector = nn.Parameter(torch.ones(3))
    for settings, words in (
        ({"rank": 2}, "group without rank|leave rank out"),
        ({"rule": "muon"}, "another rule than 'muon'"),
    ):
        with pytest.raises(ValueError, match=words):
            made.add_param_group({"params": [vector], **settings})
    assert len(made.param_groups) == 2
    train(model, made, range(1))


@methods
def test_a_group_that_is_changed_later_is_checked(method: Method) -> None:
    """Another rule brings its own settings."""
    model = net()
    made = make(method, model)
    train(model, made, range(1))
    group = made.param_groups[-1]
    for changes, words in (
        ({"rule": "sgd"}, "rule must be .*, got 'sgd'"),
        ({"betas": (0.9,)}, "betas must be 2 values"),
    ):
        before = {name: group[name] for name in changes}
        group.update(changes)
        with pytest.raises(ValueError, match=words):
            train(model, made, range(1))
        group.update(before)
    if made.param_groups[0]["rule"] != "adafactor":  # which has another kind of eps
        made.param_groups[0]["rule"] = "muon"
    train(model, made, range(1))


@methods
def test_each_group_may_have_its_own_settings(method: Method) -> None:
    moved = []
    for changes in ({}, {"lr": 0.2}):
        model = net()
        mine = groups(model, method)
        mine[1] |= changes
        before = weights(model)
        train(model, method.optimizer(mine, lr=0.01, betas=(0.9, 0.99), eps=1e-8), range(1))
        moved.append([(p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved[1][1] == moved[0][1], "matrices of the first group"
    assert moved[1][0] > 4 * moved[0][0], "the embedding"


@methods
def test_a_learning_rate_may_be_a_tensor(method: Method) -> None:
    one, other = net(), net()
    plain, tensors = make(method, one), make(method, other)
    for group in tensors.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    assert train(one, plain, range(3)) == train(other, tensors, range(3))


@methods
def test_weight_decay_shrinks_and_nothing_else(method: Method) -> None:
    p = nn.Parameter(torch.ones(6, 4))
    chosen: dict[str, Any] = {"rank": 2} if isinstance(method, Projected) else {}
    made = method.optimizer(
        [{"params": [p], "lr": 0.1, "weight_decay": 0.5, **chosen}], lr=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    p.grad = torch.zeros(6, 4)
    made.step()
    torch.testing.assert_close(p.detach(), torch.full((6, 4), 1 - 0.1 * 0.5))


@methods
def test_to_maximise_is_to_minimise_the_negative(method: Method) -> None:
    up, down = net(), net()
    mine = [{**group, "maximize": True} for group in groups(up, method)]
    one, other = method.optimizer(mine, lr=0.01, betas=(0.9, 0.99), eps=1e-8), make(method, down)
    one.param_groups[0]["lr"] = other.param_groups[0]["lr"]
    one.param_groups[1]["lr"] = other.param_groups[1]["lr"]
    for step in range(3):
        for i, (p, q) in enumerate(zip(up.parameters(), down.parameters(), strict=True)):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad = -q.grad
        one.step()
        other.step()
    for p, q in zip(up.parameters(), down.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@methods
def test_a_parameter_removed_from_its_group_moves_no_more(method: Method) -> None:
    model = net()
    made = make(method, model)
    train(model, made, range(1))
    removed = made.param_groups[1]["params"].copy()
    made.param_groups[1]["params"].clear()
    before = [p.detach().clone() for p in removed]
    others = weights(model[1])  # type: ignore[index]
    train(model, made, range(1, 2))
    assert all(map(torch.equal, removed, before))
    assert not torch.equal(others[0], model[1].weight)  # type: ignore[index]
    made.param_groups.pop()
    train(model, made, range(2, 3))


@methods
def test_a_matrix_without_numbers_is_left_alone(method: Method) -> None:
    p = nn.Parameter(torch.zeros(0, 4))
    p.grad = torch.zeros(0, 4)
    chosen: dict[str, Any] = {"rank": 2} if isinstance(method, Projected) else {}
    method.optimizer([{"params": [p], **chosen}], lr=0.1, betas=(0.9, 0.99), eps=1e-8).step()


# ---- what is refused before anything moves


@methods
@pytest.mark.parametrize(("name", "value"), [("1.weight", "nan"), ("1.bias", "inf"), ("1.weight", "3e38")])
def test_a_gradient_that_is_not_finite_changes_nothing(method: Method, name: str, value: str) -> None:
    """Or one whose norm is not, though its entries are."""
    model = net()
    made = make(method, model)
    train(model, made, range(1))
    before = copy.deepcopy((model.state_dict(), made.state_dict()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    shape = model.get_parameter(name).shape
    model.get_parameter(name).grad.view(-1)[:2] = float(value)  # type: ignore[union-attr]
    with pytest.raises(
        FloatingPointError, match=rf"gradient of a parameter of shape \({shape[0]}, .*is not finite|80,"
    ):
        made.step()
    now = model.state_dict(), made.state_dict()["state"]
    torch.testing.assert_close(now, (before[0], before[1]["state"]), rtol=0, atol=0)


@methods
def test_a_large_gradient_moves_weights_by_something_finite(method: Method) -> None:
    """Its squares are finite, though not their sum."""
    model = net()
    made = make(method, model)
    for _ in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = 1e18 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        made.step()
    assert all(p.isfinite().all() for p in model.parameters())


@methods
def test_weights_in_float16_are_refused(method: Method) -> None:
    with pytest.raises(ValueError, match="weights must not be float16, in which moments overflow; use bfloat16"):
        make(method, net(torch.float16))
    model = net()
    made = make(method, model)
    train(model, made, range(1))
    model.half()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="weights must not be float16"):
        made.step()


@methods
def test_a_sparse_gradient_is_refused(method: Method) -> None:
    model = nn.Embedding(10, 4, sparse=True)
    made = method.optimizer(model.parameters(), lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradients must be dense .*use nn.Embedding\(sparse=False\)"):
        made.step()


# ---- other people's loops


@methods
def test_a_closure_makes_the_gradients_of_its_step(method: Method) -> None:
    """As in Lightning; its value is returned."""
    one, other = net(), net()
    plain, closed = make(method, one), make(method, other)
    for step in range(3):
        [expected] = train(one, plain, range(step, step + 1))

        def closure(step: int = step) -> Tensor:
            closed.zero_grad()
            x = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(step))
            loss = (other(x) - torch.sin(torch.arange(70.0) * (x[:, None] + 1))).square().mean()
            loss.backward()
            return loss

        assert closed.step(closure=closure).item() == expected
    assert equal(one, other)


@methods
def test_parameters_may_be_swapped_before_the_first_step(method: Method) -> None:
    """As accelerate does when it shards a model: nothing but the place in the groups stays."""
    one, other = net(), net()
    plain, swapped = make(method, one), make(method, other)
    new = {p: nn.Parameter(p.detach().clone()) for p in other.parameters()}
    for module in other:  # type: ignore[union-attr]
        for name, p in list(module.named_parameters()):
            setattr(module, name, new[p])
    for group in swapped.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    assert train(one, plain, range(3)) == train(other, swapped, range(3))
    assert equal(one, other)


@projecting
@pytest.mark.parametrize("rank", [3, 12])
def test_a_changed_rank_begins_anew(method: Any, rank: int) -> None:
    """With the basis and moments of a fresh optimizer; but Trion's momentum has no rank and stays."""
    model, fresh = net(), net()
    made, again = make(method, model), make(method, fresh)
    train(model, made, range(3))
    fresh.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        if method.name == "trion" or all(p is not q for q in made.param_groups[0]["params"]):
            again.state[q] = copy.deepcopy(made.state[p])
    for one in (made, again):
        one.param_groups[0]["rank"] = rank
    train(model, made, range(3, 6))
    train(fresh, again, range(3, 6))
    assert equal(model, fresh)
