"""What every optimizer must satisfy: it trains, and is copied, scheduled, saved and resumed as torch's are.

Each check is a function of a `Mover`. Its name is the claim, and AssertionError says where the claim does not hold.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorank.conversion import convert
from lorank.loop import optimizer as optimizer_of
from lorank.method import Method
from lorank.optim.driver import ByGroups, Projected
from lorank.testing.saying import equal_models
from lorank.testing.structure import SMALL, loss_of


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two matrices that are a pair of factors, wide enough that some moments of 8-bit AdamW have a byte each, also inside a
    subspace; an embedding and biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 80), nn.Tanh(), nn.Linear(80, 70)).to(dtype)


class Mover(NamedTuple):
    """A method that decides how weights move, and the learning rate with which it trains `net`."""

    method: Method
    lr: float = 0.01

    @property
    def projects(self) -> bool:
        return isinstance(self.method, Projected)

    def chosen(self, rank: int) -> dict[str, Any]:
        """What a group of matrices says: its rank, or the method's own rule."""
        if self.projects:
            return {"rank": rank}
        ruled = isinstance(self.method, ByGroups) and self.method.name in self.method.rules
        return {"rule": self.method.name} if ruled else {}

    def groups(self, model: nn.Module, rank: int = 8) -> list[dict[str, Any]]:
        """The matrices of `net`, and the rest."""
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("0.")]
        rest = [p for name, p in model.named_parameters() if p.ndim != 2 or name.startswith("0.")]
        return [
            {"params": matrices, "weight_decay": 0.1, **self.chosen(rank)},
            {"params": rest, "weight_decay": 0.0},
        ]

    def over(self, groups: Any) -> Any:
        return self.method.optimizer(groups, lr=self.lr, betas=(0.9, 0.99), eps=1e-8)

    def make(self, model: nn.Module) -> Any:
        return self.over(self.groups(model))


def train(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    """The losses of some steps; step k sees the same data whenever it is taken."""
    losses = []
    for step in steps:
        x = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(step))
        target = torch.sin(torch.arange(70.0) * (x[:, None] + 1))
        loss = (model(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- training


def training_lowers_the_loss(mover: Mover) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = net(dtype)
        start = weights(model)
        losses = train(model, mover.make(model), range(40))
        first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
        assert last < 0.95 * first, (
            f"40 steps with lr={mover.lr} must lower the loss by 5 %, got {first:.4f}, {last:.4f}"
        )
        for before, (name, p) in zip(start, model.named_parameters(), strict=True):
            assert p.dtype == dtype, f"{name} is {p.dtype} after training in {dtype}"
            assert p.isfinite().all(), f"{name} is not finite"
            assert not torch.equal(before, p), f"{name} has not moved"


def the_whole_model_moves(mover: Mover) -> None:
    model = SMALL[0].dense()
    structure = getattr(mover.method, "structure", None)
    model = convert(model, structure) if structure else model
    made = optimizer_of(model, mover.method, lr=0.01, weight_decay=0.1)
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
    before = weights(model)
    loss_of(model.train()).backward()
    made.step()
    still = [
        name for (name, p), old in zip(model.named_parameters(), before, strict=True) if torch.equal(p.detach(), old)
    ]
    assert not still, f"these have not moved: {still}"


def a_copy_goes_on_as_the_original_does(mover: Mover) -> None:
    model = net()
    made = mover.make(model)
    train(model, made, range(1))
    for twin, other in (copy.deepcopy((model, made)), pickle.loads(pickle.dumps((model, made)))):
        original, its = copy.deepcopy((model, made))
        assert train(original, its, range(1, 3)) == train(twin, other, range(1, 3))
        equal_models(original, twin)


def a_copy_does_not_share_the_schedule(mover: Mover) -> None:
    """A scheduler sets a `step` on the optimizer, which must not travel with a copy."""
    model = net()
    made = mover.make(model)
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)
    pickle.dumps(made)
    twin, its = copy.deepcopy((model, made))
    before = weights(model)
    train(twin, its, range(1))
    assert all(map(torch.equal, before, model.parameters())), "a step of the copy moved the original"
    assert not any(map(torch.equal, before, twin.parameters())), "a step of the copy did not move the copy"


def a_schedule_reaches_every_group(mover: Mover) -> None:
    model = net()
    made = mover.make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: float(step > 0))
    before = weights(model)
    train(model, made, range(1))
    assert all(map(torch.equal, before, model.parameters())), "a learning rate of zero moves weights"
    schedule.step()
    train(model, made, range(1, 2))
    assert not any(map(torch.equal, before, model.parameters())), "a scheduled learning rate does not reach all"
    cycle = torch.optim.lr_scheduler.OneCycleLR(mover.make(net()), max_lr=0.1, total_steps=10)  # moves betas as well
    assert cycle.optimizer.param_groups[0]["betas"][0] == 0.95


# ---- groups


def groups_may_be_added_later(mover: Mover) -> None:
    one, other = net(), net()
    whole = mover.make(one)
    first, later = mover.groups(other)
    given = dict(later)
    grown = mover.over([first])
    grown.add_param_group(later)
    assert {name: later[name] for name in given} == given and later.keys() == given.keys(), "a user's group has changed"
    train(one, whole, range(3))
    train(other, grown, range(3))
    equal_models(one, other)


def each_group_may_have_its_own_settings(mover: Mover) -> None:
    moved = []
    for changes in ({}, {"lr": 20 * 0.01}):
        model = net()
        mine = mover.groups(model)
        mine[1] |= changes
        before = weights(model)
        train(model, mover._replace(lr=0.01).over(mine), range(1))
        moved.append([(p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved[1][1] == moved[0][1], "the matrices have moved otherwise, though their group is the same"
    assert moved[1][0] > 4 * moved[0][0], "a learning rate 20 times as large must move the embedding further"


def a_learning_rate_may_be_a_tensor(mover: Mover) -> None:
    one, other = net(), net()
    plain, tensors = mover.make(one), mover.make(other)
    for group in tensors.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    assert train(one, plain, range(3)) == train(other, tensors, range(3))


def weight_decay_shrinks_and_nothing_else(mover: Mover) -> None:
    p = nn.Parameter(torch.ones(6, 4))
    chosen: dict[str, Any] = {"rank": 2} if mover.projects else {}
    made = mover._replace(lr=0.1).over([{"params": [p], "lr": 0.1, "weight_decay": 0.5, **chosen}])
    p.grad = torch.zeros(6, 4)
    made.step()
    torch.testing.assert_close(p.detach(), torch.full((6, 4), 1 - 0.1 * 0.5))


def to_maximise_is_to_minimise_the_negative(mover: Mover) -> None:
    up, down = net(), net()
    one = mover._replace(lr=0.01).over([{**group, "maximize": True} for group in mover.groups(up)])
    other = mover._replace(lr=0.01).make(down)
    for step in range(3):
        for i, (p, q) in enumerate(zip(up.parameters(), down.parameters(), strict=True)):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad = -q.grad
        one.step()
        other.step()
    torch.testing.assert_close(weights(up), weights(down))


def a_parameter_removed_from_its_group_moves_no_more(mover: Mover) -> None:
    model = net()
    made = mover.make(model)
    train(model, made, range(1))
    removed = made.param_groups[1]["params"].copy()
    made.param_groups[1]["params"].clear()
    before, first = [p.detach().clone() for p in removed], weights(model[1])[0]
    train(model, made, range(1, 2))
    assert all(map(torch.equal, removed, before)), "a parameter that is in no group has moved"
    assert not torch.equal(first, weights(model[1])[0]), "the other group has not moved"
    made.param_groups.pop()
    train(model, made, range(2, 3))


def a_matrix_without_numbers_is_left_alone(mover: Mover) -> None:
    p = nn.Parameter(torch.zeros(0, 4))
    p.grad = torch.zeros(0, 4)
    mover.over([{"params": [p], **({"rank": 2} if mover.projects else {})}]).step()


def a_closure_makes_the_gradients_of_its_step(mover: Mover) -> None:
    """As in Lightning; its value is returned."""
    one, other = net(), net()
    plain, closed = mover.make(one), mover.make(other)
    for step in range(3):
        [expected] = train(one, plain, range(step, step + 1))

        def closure(step: int = step) -> Tensor:
            closed.zero_grad()
            x = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(step))
            loss = (other(x) - torch.sin(torch.arange(70.0) * (x[:, None] + 1))).square().mean()
            loss.backward()
            return loss

        assert closed.step(closure=closure).item() == expected, "step(closure) must return the closure's loss"
    equal_models(one, other)


def parameters_may_be_swapped_before_the_first_step(mover: Mover) -> None:
    """As accelerate does when it shards a model: nothing but the place in the groups stays."""
    one, other = net(), net()
    plain, swapped = mover.make(one), mover.make(other)
    new = {p: nn.Parameter(p.detach().clone()) for p in other.parameters()}
    for module in other:
        for name, p in list(module.named_parameters()):
            setattr(module, name, new[p])
    for group in swapped.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    assert train(one, plain, range(3)) == train(other, swapped, range(3))
    equal_models(one, other)


# ---- what is saved


def resumed_at_any_step_it_goes_on_bit_by_bit(mover: Mover) -> None:
    for stop in range(5):
        whole, broken = net(), net()
        train(whole, mover.make(whole), range(5))
        first, second = mover.make(broken), mover.make(broken)
        train(broken, first, range(stop))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        train(broken, second, range(stop, 5))
        equal_models(whole, broken)


def loading_an_earlier_state_forgets_the_later(mover: Mover) -> None:
    model = net()
    made = mover.make(model)
    start, ends = copy.deepcopy((model.state_dict(), made.state_dict())), []
    for _ in range(2):
        model.load_state_dict(start[0])
        made.load_state_dict(copy.deepcopy(start[1]))
        train(model, made, range(3))
        ends.append(weights(model))
    assert all(map(torch.equal, *ends)), "a loaded state keeps something of the later one"


ANY: tuple[Callable[[Mover], None], ...] = (
    training_lowers_the_loss,
    the_whole_model_moves,
    a_copy_goes_on_as_the_original_does,
    a_copy_does_not_share_the_schedule,
    a_schedule_reaches_every_group,
    groups_may_be_added_later,
    each_group_may_have_its_own_settings,
    a_learning_rate_may_be_a_tensor,
    weight_decay_shrinks_and_nothing_else,
    to_maximise_is_to_minimise_the_negative,
    a_parameter_removed_from_its_group_moves_no_more,
    a_matrix_without_numbers_is_left_alone,
    a_closure_makes_the_gradients_of_its_step,
    parameters_may_be_swapped_before_the_first_step,
    resumed_at_any_step_it_goes_on_bit_by_bit,
    loading_an_earlier_state_forgets_the_later,
)
"""For any optimizer."""
