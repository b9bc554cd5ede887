"""What `Subspace` adds to GaLore's equations: staggered refreshes, gradients projected as they arrive, rules of 8 bits."""

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorank.optim import DCTAdamW, FiraAdamW, GaLoreAdamW, MuonAdamW, Subspace, Trion, low_rank_groups
from tests.optim.test_galore import gradients, matrices, run


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).double()


def groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    projected = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [{"params": projected, "rank": 3, "update_gap": 3, **settings}, {"params": rest}]


def train(model: nn.Module, optimizer: Any, steps: range, parts: int = 1, clip: float | None = None) -> list[float]:
    """Losses of steps on batches of 12 rows, in so many micro-batches."""
    losses = []
    for step in steps:
        x = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        total = 0.0
        for part in x.chunk(parts):
            loss = (model(part) - part[:, :8].sin()).square().mean() / parts
            loss.backward()
            total += loss.item()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(optimizer.seen_parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def test_projected_as_it_arrives_the_step_is_the_same_bit_by_bit() -> None:
    together, apart = net(), net()
    one = GaLoreAdamW(groups(together), lr=0.05)
    other = GaLoreAdamW(groups(apart), lr=0.05, in_backward=True)
    assert train(together, one, range(8)) == train(apart, other, range(8))
    assert all(map(torch.equal, together.parameters(), apart.parameters()))


def test_no_gradient_of_a_matrix_outlives_its_backward_pass() -> None:
    model = net()
    optimizer = GaLoreAdamW(groups(model), lr=0.05, in_backward=True)
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True, False, True, False]
    seen = {tuple(p.shape): p.grad.shape for p in optimizer.seen_parameters()}  # type: ignore[union-attr]
    assert seen == {(20, 3): (20, 3), (3, 20): (3, 20), (20,): (20,), (8,): (8,)}
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.seen_parameters())


def test_micro_batches_add_up_inside_the_subspace() -> None:
    """Between refreshes, projecting is linear; a basis itself is that of the first micro-batch."""
    together, apart = net(), net()
    bases: dict[torch.Size, Tensor] = {}

    def noted(G: Tensor, rank: int) -> Tensor:  # the same for both: of the first basis of each shape
        return bases.setdefault(G.shape[1:], torch.linalg.svd(G).U[..., :rank])

    one = GaLoreAdamW(groups(together), lr=0.05, basis=noted)
    other = GaLoreAdamW(groups(apart), lr=0.05, basis=noted, in_backward=True)
    assert train(together, one, range(6), parts=3) == pytest.approx(train(apart, other, range(6), parts=3), rel=1e-12)
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_norm_that_is_clipped_is_that_of_what_the_optimizer_sees() -> None:
    free, clipped = net(), net()
    other = GaLoreAdamW(groups(clipped), lr=0.05, in_backward=True)
    x = torch.ones(2, 12, dtype=torch.float64)
    for model in (free, clipped):
        model(x).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(other.seen_parameters(), 0.01)
    full = [
        torch.linalg.svdvals(m)[:3]
        for m in torch.autograd.grad(free(x).square().sum(), [free[0].weight, free[2].weight])
    ]
    rest = [p.grad for p in (free[0].bias, free[2].bias)]
    assert norm == pytest.approx(torch.cat([*full, *rest]).norm().item(), rel=1e-9)
    scaled = torch.cat([p.grad.flatten() for p in other.seen_parameters()])  # type: ignore[union-attr]
    assert scaled.norm() == pytest.approx(0.01, rel=1e-4)


def test_a_gradient_that_is_no_number_stops_the_backward_pass() -> None:
    model = net()
    optimizer = GaLoreAdamW(groups(model), lr=0.05, in_backward=True)
    train(model, optimizer, range(2))
    with pytest.raises(FloatingPointError, match=r"gradient of a parameter of shape \(8, 20\) is not finite"):
        (model(torch.ones(2, 12, dtype=torch.float64)) * float("nan")).sum().backward()


def test_fira_needs_the_whole_gradient() -> None:
    with pytest.raises(ValueError, match="in_backward=True frees the gradient whose residual Fira needs"):
        FiraAdamW(groups(net()), lr=0.1, in_backward=True)


def test_staggered_refreshes_take_turns() -> None:
    parameters = matrices(*[(12, 20)] * 4)
    optimizer = GaLoreAdamW([{"params": parameters, "rank": 4, "update_gap": 4}], lr=0.1, stagger=True)
    changed = []
    before: dict[nn.Parameter, Tensor] = {}
    for step in range(9):
        run(optimizer, parameters, range(step, step + 1))
        now = {p: optimizer.state[p]["left"].clone() for p in parameters}
        changed.append([i for i, p in enumerate(parameters) if p not in before or not torch.equal(before[p], now[p])])
        before = now
    assert changed == [[0, 1, 2, 3], [3], [2], [1], [0], [3], [2], [1], [0]]


def test_a_staggered_matrix_is_one_alone_with_its_own_steps() -> None:
    together, alone = matrices(*[(12, 20)] * 2), matrices(*[(12, 20)] * 2)
    run(GaLoreAdamW([{"params": together, "rank": 4, "update_gap": 4}], lr=0.1, stagger=True), together, range(9))
    run(GaLoreAdamW([{"params": alone, "rank": 4, "update_gap": 4}], lr=0.1), alone, range(9))
    torch.testing.assert_close(together[0], alone[0], rtol=1e-9, atol=1e-9)
    assert not torch.equal(together[1], alone[1])


def test_it_goes_on_bit_by_bit_when_stopped_between_two_staggered_refreshes() -> None:
    for stop in range(1, 6):
        whole, broken = matrices(*[(12, 20)] * 3), matrices(*[(12, 20)] * 3)
        make = lambda p: GaLoreAdamW([{"params": p, "rank": 4, "update_gap": 3}], lr=0.1, stagger=True)  # noqa: E731
        run(make(whole), whole, range(6))
        first, second = make(broken), make(broken)
        run(first, broken, range(stop))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        run(second, broken, range(stop, 6))
        assert all(map(torch.equal, whole, broken)), stop


# ---- a plain optimizer of torch

EVERY: list[Any] = [
    lambda g: GaLoreAdamW(g, lr=0.05),
    lambda g: FiraAdamW(g, lr=0.05),
    lambda g: DCTAdamW(g, lr=0.05),
    lambda g: Trion(g, lr=0.05),
    lambda g: Subspace(g, MuonAdamW, lr=0.05),
]
"""With groups of `net`: matrices at rank 3, and biases."""


def a_step(model: nn.Module, optimizer: Any, step: int) -> None:
    x = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    (model(x) - x[:, :8].sin()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def plain_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "update_gap"} for group in groups(model)]


@pytest.mark.parametrize("make", EVERY)
def test_a_vector_that_is_no_number_changes_nothing_either(make: Any) -> None:
    model = net()
    optimizer = make(plain_groups(model))
    a_step(model, optimizer, 0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    model[2].bias.grad[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"gradient of a parameter of shape \(8,\) is not finite"):
        optimizer.step()
    now = model.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(now, (before[0], before[1]["state"]), rtol=0, atol=0)


@pytest.mark.parametrize("make", EVERY)
def test_loading_an_earlier_state_forgets_the_later_one(make: Any) -> None:
    model = net()
    optimizer = make(plain_groups(model))
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for _ in range(2):
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        for step in range(3):
            a_step(model, optimizer, step)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("make", EVERY)
def test_a_copy_goes_on_as_the_original_does(make: Any) -> None:
    model = net()
    optimizer = make(plain_groups(model))
    a_step(model, optimizer, 0)
    for twin, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        original, its = copy.deepcopy((model, optimizer))
        for step in (1, 2):
            a_step(original, its, step)
            a_step(twin, other, step)
        assert all(map(torch.equal, original.parameters(), twin.parameters()))


@pytest.mark.parametrize("make", EVERY)
def test_groups_may_be_added_later(make: Any) -> None:
    one, other = net(), net()
    whole, grown = make(plain_groups(one)), make(plain_groups(other)[:1])
    grown.add_param_group(plain_groups(other)[1])
    for step in range(3):
        a_step(one, whole, step)
        a_step(other, grown, step)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("make", EVERY)
def test_a_group_that_is_refused_leaves_the_others_alone(make: Any) -> None:
    model = net()
    optimizer = make(plain_groups(model)[:1])
    with pytest.raises(ValueError, match="rank=0 is no positive integer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 4))], "rank": 0})
    assert len(optimizer.param_groups) == 1
    a_step(model, optimizer, 0)


def test_a_matrix_added_later_is_projected_as_its_gradient_arrives() -> None:
    whole, grown = net(), net()
    one = GaLoreAdamW(groups(whole), lr=0.05, in_backward=True)
    first, *later = groups(grown)
    other = GaLoreAdamW([first], lr=0.05, in_backward=True)
    for group in later:
        other.add_param_group(group)
    assert train(whole, one, range(3)) == train(grown, other, range(3))
    assert all(map(torch.equal, whole.parameters(), grown.parameters()))


def test_gradients_that_no_backward_pass_brought_count_too() -> None:
    """Set by hand, as an estimator does, or of a matrix that was frozen when the optimizer was made."""
    one, other = net(), net()
    other[0].weight.requires_grad_(False)
    plain = GaLoreAdamW(groups(one), lr=0.05)
    arriving = GaLoreAdamW(groups(other), lr=0.05, in_backward=True)
    other[0].weight.requires_grad_(True)
    assert train(one, plain, range(3)) == train(other, arriving, range(3))
    for model, optimizer in ((one, plain), (other, arriving)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("make", EVERY)
def test_an_optimizer_whose_state_is_cleared_begins_anew(make: Any) -> None:
    model, fresh = net(), net()
    optimizer = make(plain_groups(model))
    for step in range(3):
        a_step(model, optimizer, step)
    optimizer.state.clear()
    fresh.load_state_dict(model.state_dict())
    other = make(plain_groups(fresh))
    for step in range(2):
        a_step(model, optimizer, step)
        a_step(fresh, other, step)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


@pytest.mark.parametrize("make", EVERY)
def test_a_matrix_without_numbers_is_left_alone(make: Any) -> None:
    p = nn.Parameter(torch.zeros(0, 4))
    p.grad = torch.zeros(0, 4)
    make([{"params": [p], "rank": 2}]).step()


@pytest.mark.parametrize("make", EVERY[:4])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 2.5}, "rank=2.5 is no positive integer"),
        ({"rank": True}, "rank=True is no positive integer"),
        ({"lr": float("inf")}, "lr=inf is negative or no finite number"),
        ({"betas": (1.0, 0.9)}, r"(?i)betas=\(1.0, 0.9\) are not|Invalid beta parameter at index 0: 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make([{"params": [nn.Parameter(torch.ones(6, 4))], "rank": 2, **settings}]).step()


@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW])
def test_to_maximise_is_to_minimise_the_negative(kind: Any) -> None:
    up, down = net(), net()
    one, other = kind(groups(up), lr=0.05, maximize=True), kind(groups(down), lr=0.05)
    for step in range(4):
        x = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        (-up(x)).square().sum().neg().backward()
        down(x).square().sum().backward()
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(up.parameters(), down.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_what_a_hook_makes_of_a_saved_state_is_loaded() -> None:
    """torch's way to load what was saved in another order of parameters."""
    for make in EVERY:
        shapes, steps = [(6, 4)] * 3, 3
        whole = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
        one = make([{"params": whole, "rank": 2}])

        def go(optimizer: Any, parameters: list[nn.Parameter], first: int, steps: int = steps) -> None:
            for step in range(first, first + steps):
                for k, p in enumerate(parameters):
                    p.grad = torch.randn(
                        6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + k)
                    )
                optimizer.step()

        go(one, whole, 0)
        saved = copy.deepcopy(one.state_dict())
        turned = [nn.Parameter(p.detach().clone()) for p in reversed(whole)]
        other = make([{"params": turned, "rank": 2}])
        other.register_load_state_dict_pre_hook(
            lambda _, given: {**given, "state": {2 - k: state for k, state in given["state"].items()}}
        )
        other.load_state_dict(saved)
        go(one, whole, steps)
        go(other, turned[::-1], steps)
        for p, q in zip(whole, reversed(turned), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", EVERY)
def test_a_state_of_another_optimizer_is_refused_and_the_old_one_stays(make: Any) -> None:
    model = net()
    optimizer = make(plain_groups(model))
    a_step(model, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(before)
    other["param_groups"][0]["rank"] = 2
    for state, words in (
        (torch.optim.AdamW(plain_groups(net()), lr=0.1).state_dict(), "has no|has rank"),
        (other, "group 0 of the saved state has rank 2 where this one has 3"),
    ):
        for group in state["param_groups"] if state is not other else ():
            group.pop("rank", None)
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    a_step(model, optimizer, 1)


@pytest.mark.parametrize("make", EVERY)
def test_a_parameter_taken_out_of_its_group_moves_no_more(make: Any) -> None:
    model = net()
    optimizer = make(plain_groups(model))
    a_step(model, optimizer, 0)
    optimizer.param_groups[1]["params"].clear()
    before = [p.detach().clone() for p in model.parameters()]
    a_step(model, optimizer, 1)
    assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == [False, True, False, True]


def test_adafactor_takes_the_eps_of_each_group_and_another_adafactor_is_refused() -> None:
    moved = []
    for rank, kind in ((12, Subspace), (None, None)):
        model = net()
        mine: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.ndim == 2], "eps": (None, 10.0)}]
        optimizer = (
            torch.optim.Adafactor(mine, lr=0.1)
            if kind is None
            else Subspace([{**mine[0], "rank": rank}], torch.optim.Adafactor, lr=0.1, scale=1.0)
        )
        before = model[0].weight.detach().clone()
        model(torch.ones(3, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        moved.append((model[0].weight - before).norm().item())
    assert 0.3 < moved[0] / moved[1] < 3, (
        "a rotated gradient has other factors; by the default eps it would be 10,000 times as much"
    )

    class Other(torch.optim.SGD):
        def __init__(self, params: Any, lr: float):
            super().__init__(params, lr=lr)
            self.defaults["scale_parameter"] = True

    with pytest.raises(ValueError, match=r"take torch.optim.Adafactor, which is given it, or scale_parameter=False"):
        Subspace(groups(net()), Other, lr=0.1)


def test_what_torch_knows_of_adamw_and_we_do_not_is_refused() -> None:
    for kind in (DCTAdamW, Trion):
        for name in ("maximize", "amsgrad"):
            with pytest.raises(ValueError, match=f"{kind.__name__} has no {name}"):
                kind([{"params": [nn.Parameter(torch.ones(6, 4))], name: True}], lr=0.1)
    for kind in (GaLoreAdamW, FiraAdamW):
        for options in ({"fused": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}):
            model = net()
            a_step(model, kind(groups(model), lr=0.1, **options), 0)


@pytest.mark.parametrize(
    "forget", [lambda o, start: o.state.clear(), lambda o, start: o.load_state_dict(start)], ids=["clear", "load"]
)
@pytest.mark.parametrize("when", ["after", "between"])
def test_gradients_on_a_basis_that_is_gone_are_dropped(forget: Any, when: str) -> None:
    model = net()
    optimizer = GaLoreAdamW(groups(model), lr=0.05, in_backward=True)
    start = copy.deepcopy(optimizer.state_dict())
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    forget(optimizer, start)
    if when == "between":
        model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert all(loss < 100 for loss in train(model, optimizer, range(4)))
    shapes = {tuple(s["inner"]["exp_avg"].shape) for p, s in optimizer.state.items() if p.ndim == 2}
    assert shapes == {(20, 3), (3, 20)}


def test_groups_that_are_taken_out_whole_are_refused_before_anything_moves() -> None:
    for make in EVERY:
        model = net()
        optimizer = make(plain_groups(model))
        a_step(model, optimizer, 0)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.param_groups.pop()
        with pytest.raises(ValueError, match="groups have been taken out of param_groups; empty their params instead"):
            a_step(model, optimizer, 1)
        assert all(map(torch.equal, model.parameters(), before))


def test_muon_s_groups_are_muon_s_whatever_else_they_have() -> None:
    p, q = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3))
    optimizer = MuonAdamW([{"params": [p], "momentum": 0.9, "betas": (0.9, 0.9)}, {"params": [q]}], lr=0.1)
    p.grad, q.grad = torch.eye(3), torch.ones(3)
    optimizer.step()
    assert [sorted(optimizer.state[one]) for one in (p, q)] == [["momentum_buffer"], ["exp_avg", "exp_avg_sq", "step"]]
    with pytest.raises(ValueError, match="the saved state has other groups under Muon"):
        optimizer.load_state_dict(torch.optim.AdamW([{"params": [p]}, {"params": [q]}]).state_dict())
    inside = Subspace([{"params": [nn.Parameter(torch.eye(4))], "rank": 2}], MuonAdamW, lr=0.1)
    with pytest.raises(ValueError, match="is no matrix"):
        inside.add_param_group({"params": [nn.Parameter(torch.ones(4))], "momentum": 0.9})
    assert len(inside.param_groups) == len(inside.inner.param_groups) == 1


def test_muon_takes_matrices_only() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) is no matrix; put it in a group without momentum"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(3))], "momentum": 0.9}], lr=0.1)


def test_scaled_gradients_are_not_projected_as_they_arrive() -> None:
    model = net().float()
    scaler = torch.amp.GradScaler("cpu")
    for in_backward in (False, True):
        optimizer = GaLoreAdamW(groups(model), lr=0.05, in_backward=in_backward)
        scaler.scale(model(torch.ones(2, 12)).sum()).backward()
        if in_backward:
            with pytest.raises(ValueError, match="train in bfloat16, which needs no scaler"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", EVERY)
def test_each_group_may_have_settings_of_its_own(make: Any) -> None:
    found = []
    for betas in ((0.9, 0.95), (0.0, 0.5)):
        model = net()
        mine = plain_groups(model)
        mine[1]["betas"], mine[1]["lr"] = betas, 0.5
        optimizer = make(mine)
        start = model[0].bias.detach().clone()
        for step in range(2):
            a_step(model, optimizer, step)
        found.append(model[0].bias.detach().clone() - start)
    assert not torch.equal(*found)
    assert found[0].abs().max() > 0.3, "a group's own learning rate is taken as it is"


def test_a_rule_s_own_settings_reach_it_and_schedules_find_them() -> None:
    model = net()
    mine = groups(model)
    mine[0]["momentum"] = 0.5
    optimizer = Subspace(mine, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert [group["momentum"] for group in optimizer.inner.param_groups] == [0.5, 0.9]
    adam = GaLoreAdamW(groups(net()), lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.1, total_steps=10)  # moves betas as well
    assert adam.param_groups[0]["betas"][0] == 0.95


def test_eps_knows_how_many_steps_each_parameter_has_taken() -> None:
    late, alone = matrices((12, 20), dtype=torch.float64), matrices((12, 20), dtype=torch.float64)
    early = matrices((12, 20), dtype=torch.float64)
    both = GaLoreAdamW([{"params": early + late, "rank": 4}], lr=0.1, eps=1e-2)
    single = GaLoreAdamW([{"params": alone, "rank": 4}], lr=0.1, eps=1e-2)
    for step in range(20):
        early[0].grad = gradients(step, early)[0]
        if step >= 15:
            late[0].grad, alone[0].grad = gradients(step, late)[0], gradients(step, alone)[0]
            single.step()
        both.step()
    torch.testing.assert_close(late[0], alone[0], rtol=1e-12, atol=1e-12)


def test_adafactor_takes_the_size_of_the_weights_into_account() -> None:
    ours, theirs = matrices((12, 20)), matrices((12, 20))
    group = {"params": ours, "rank": 12, "scale": 1.0}
    eye = lambda G, rank: torch.eye(G.shape[1], dtype=G.dtype).expand(len(G), -1, -1)  # noqa: E731
    run(Subspace([group], torch.optim.Adafactor, lr=0.01, basis=eye), ours, range(4))
    run(torch.optim.Adafactor(theirs, lr=0.01, weight_decay=0.0), theirs, range(4))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)


def test_muon_works_inside_with_adamw_beside_it() -> None:
    model = net()
    optimizer = Subspace(groups(model), MuonAdamW, lr=0.05, betas=(0.9, 0.99))
    before = train(model, optimizer, range(1))[0]
    assert train(model, optimizer, range(1, 30))[-1] < before


def test_rules_that_cannot_work_inside_are_told_apart() -> None:
    with pytest.raises(ValueError, match="Adagrad makes its state before it has seen a gradient"):
        Subspace(groups(net()), torch.optim.Adagrad, lr=0.1)
    Subspace(groups(net()), torch.optim.Rprop, lr=0.1)  # which knows no weight decay
    for settings, words in (
        ({"lr": -1.0}, "lr=-1.0 is negative"),
        ({"lr": 0.1, "scale": "abc"}, "scale='abc' is negative or no finite number"),
        ({"lr": 0.1, "update_gap": 0.5}, "update_gap=0.5 is no positive integer"),
        ({"lr": 0.1, "basis": "dct"}, "basis='dct' is none of singular, svd, randomised"),
    ):
        with pytest.raises(ValueError, match=words):
            GaLoreAdamW([{"params": [net()[0].weight], "rank": 3}], **settings)  # type: ignore[arg-type]


def test_an_optimizer_that_is_gone_projects_nothing_any_more() -> None:
    model = net()
    optimizer = GaLoreAdamW(groups(model), lr=0.05, in_backward=True)
    train(model, optimizer, range(1))
    del optimizer
    gc.collect()
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- 8 bits


def eight_bit(parameters: list[nn.Parameter], **settings: Any) -> Subspace:
    from lorank.train.optimizers import adamw_8bit

    return Subspace([{"params": parameters, "rank": 64}], adamw_8bit, lr=0.01, **settings)


def test_small_moments_of_8_bit_adamw_stay_in_32_and_the_step_is_that_of_adamw() -> None:
    ours, theirs = (matrices((60, 90), dtype=torch.float32) for _ in range(2))  # R [60, 64]: 3,840 numbers
    run(Subspace([{"params": ours, "rank": 40}], adamw8(), lr=0.01), ours, range(5))
    run(Subspace([{"params": theirs, "rank": 40}], torch.optim.AdamW, lr=0.01), theirs, range(5))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def adamw8() -> Any:
    from lorank.train.optimizers import adamw_8bit

    return adamw_8bit


def test_large_moments_take_a_byte_and_stay_near() -> None:
    ours, theirs = (matrices((128, 160), dtype=torch.float32) for _ in range(2))
    optimizer = eight_bit(ours)
    run(optimizer, ours, range(5))
    run(Subspace([{"params": theirs, "rank": 64}], torch.optim.AdamW, lr=0.01), theirs, range(5))
    inner = optimizer.state[ours[0]]["inner"]
    assert inner["state1"].dtype == inner["state2"].dtype == torch.uint8
    moved = (theirs[0] - matrices((128, 160), dtype=torch.float32)[0]).norm()
    assert ((ours[0] - theirs[0]).norm() / moved).item() < 0.1


def test_8_bit_state_survives_a_safe_file_bit_by_bit() -> None:
    for stop in (1, 3):
        whole, broken = (matrices((128, 160), (20, 12), dtype=torch.float32) for _ in range(2))
        run(eight_bit(whole, update_gap=2), whole, range(5))
        first, second = eight_bit(broken, update_gap=2), eight_bit(broken, update_gap=2)
        run(first, broken, range(stop))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        run(second, broken, range(stop, 5))
        assert all(map(torch.equal, whole, broken))


# ---- groups of a model


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[int | None, set[str]]:
    named = {id(p): name for name, p in model.named_parameters()}
    found: dict[int | None, set[str]] = {}
    for group in groups:
        found.setdefault(group["rank"], set()).update(named[id(p)] for p in group["params"])
    return found


def test_block_matrices_are_projected_embeddings_head_and_norms_are_not() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    found = names_of(model, low_rank_groups(model, 4))
    projected = {n for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n}
    assert len(projected) == 14
    assert found == {4: projected, None: {n for n, _ in model.named_parameters()} - projected}
    some = names_of(model, low_rank_groups(model, {"mlp": 0.5, ".*": 100}, exclude="o_proj"))
    assert some[8] == {n for n in projected if "mlp" in n}, "a fraction is of the narrower side"
    assert some[16] == {n for n in projected if "self_attn" in n and "o_proj" not in n}, "a rank is at most that side"
    with pytest.raises(ValueError, match="targets='conv' matches no linear layer"):
        low_rank_groups(model, 4, targets="conv")


def test_a_fused_matrix_is_projected_as_the_one_it_is() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    found = names_of(model, low_rank_groups(model, 4))
    inside = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found[4] == {f"transformer.h.0.{name}.weight" for name in inside}
    assert "transformer.wte.weight" in found[None]


def test_at_full_rank_plain_gradient_descent_moves_by_the_gradient_itself() -> None:
    [p] = matrices((12, 20))
    optimizer = Subspace([{"params": [p], "rank": 12, "scale": 1.0}], torch.optim.SGD, lr=1.0)
    before = p.detach().clone()
    run(optimizer, [p], range(1))
    torch.testing.assert_close(before - p, gradients(0, [p])[0])


class CountsCalls(torch.optim.SGD):
    """As optimizers outside of torch may."""

    calls = 0

    def step(self, *closure: Any) -> Any:
        self.calls += 1
        self.at_once = sum(p.numel() for group in self.param_groups for p in group["params"] if p.grad is not None)
        return super().step(*closure)


def test_a_rule_that_may_count_calls_is_called_once_per_step_and_torch_s_stack_by_stack() -> None:
    """With the same result; the latter has no more than one stack's R at a time."""
    here, there = net(), net()
    theirs: Any = type("OfTorch", (CountsCalls,), {"__module__": "torch.optim.sgd"})
    counting = Subspace(groups(here), CountsCalls, lr=0.1, momentum=0.9)
    by_stack = Subspace(groups(there), theirs, lr=0.1, momentum=0.9)
    assert train(here, counting, range(7)) == train(there, by_stack, range(7))
    assert all(map(torch.equal, here.parameters(), there.parameters()))
    sizes = [20 + 8, 3 * 20, 20 * 3]  # what has no rank, then two matrices' R
    assert (counting.inner.calls, counting.inner.at_once) == (7, sum(sizes))
    assert (by_stack.inner.calls, by_stack.inner.at_once) == (7 * len(sizes), sizes[-1])


@pytest.mark.parametrize("make", EVERY)
def test_half_precision_takes_gradients_whose_projection_it_can_hold(make: Any) -> None:
    """Here the norm of the whole is beyond it."""
    model = nn.Sequential(nn.Linear(256, 256)).half()
    optimizer = make([{"params": [model[0].weight], "rank": 8}, {"params": [model[0].bias]}])
    for p in model.parameters():
        p.grad = (400 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))).half()
    assert model[0].weight.grad.float().norm() > 65504  # type: ignore[union-attr]
    optimizer.step()


class Failing(torch.optim.SGD):
    def step(self, *closure: Any) -> Any:
        raise RuntimeError("no step")


def test_a_rule_that_fails_at_once_has_moved_and_counted_nothing() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = Subspace(groups(model), Failing, lr=0.1)
    with pytest.raises(RuntimeError, match="no step"):
        train(model, optimizer, range(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [int(optimizer.state[p]["steps"]) for p in model.parameters() if p.ndim == 2] == [0, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_a_compiled_step_of_the_rule_is_compiled_once() -> None:
    """However many stacks there are."""
    torch._dynamo.reset()
    counter = CompileCounter()
    parameters = matrices(*((12, 20 + i) for i in range(12)))
    optimizer = Subspace([{"params": parameters, "rank": 3}], torch.optim.AdamW, lr=0.1, foreach=True)
    optimizer.inner.step = torch.compile(optimizer.inner.step, backend=counter)  # type: ignore[method-assign]
    run(optimizer, parameters, range(4))
    assert counter.frame_count <= 2, "once for the first step, once for those that find a state"


def test_bitsandbytes_overrides_are_found() -> None:
    """It looks for them when it is first called, in the groups of then."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64, bias=False))
    bitsandbytes.optim.GlobalOptimManager.get_instance().register_module_override(
        model[0], "weight", {"optim_bits": 32}
    )
    mine = [{"params": [model[1].weight], "rank": 32}, {"params": [model[0].weight]}]
    optimizer = Subspace(mine, bitsandbytes.optim.AdamW8bit, lr=0.1, min_8bit_size=1)
    model(torch.arange(64)).square().sum().backward()
    optimizer.step()
    types = [optimizer.state[p]["inner"]["state1"].dtype for p in (model[0].weight, model[1].weight)]
    assert types == [torch.float32, torch.uint8]


@pytest.mark.parametrize("make", EVERY)
def test_a_copy_of_an_optimizer_with_a_schedule_is_one_of_its_own(make: Any) -> None:
    """A scheduler puts a `step` on the optimizer, which is not to travel along."""
    model = net()
    optimizer = make(plain_groups(model))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    pickle.dumps(optimizer)
    twin, its = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    a_step(twin, its, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 1.9e4)])
@pytest.mark.parametrize("make", EVERY)
def test_a_gradient_whose_norm_is_infinite_spoils_nothing(make: Any, dtype: torch.dtype, large: float) -> None:
    """A finite one, but its projection would not be."""
    model = net().to(dtype)
    optimizer = make(plain_groups(model))
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, large)
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_processes_that_come_together_later_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = GaLoreAdamW(groups(model), lr=0.05, in_backward=True)
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    monkeypatch.setattr("lorank.optim.subspace.processes", lambda: 2)
    with pytest.raises(ValueError, match="in_backward=True sees the gradient of one process only"):
        optimizer.step()


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_muon_alone_refuses_gradients_that_are_not_finite(name: str) -> None:
    model = net()
    optimizer = MuonAdamW(plain_groups(model), lr=0.05)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    model.get_parameter(name).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match="is not finite"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
