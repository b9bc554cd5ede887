"""What the driver adds to the equations: staggered refreshes, gradients projected as they arrive, states of old versions."""

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import Adafactor, AdamW8bit, DCTAdamW, Fira, GaLore, Muon, Trion
from lorank.optim.driver import ByGroups, Projected
from tests.optim.conftest import gradients, groups, made, matrices, net, run, train


def test_projected_as_it_arrives_the_step_is_the_same_bit_by_bit() -> None:
    together, apart = net(), net()
    one = made(GaLore, groups(together), lr=0.05)
    other = made(GaLore, groups(apart), lr=0.05, in_backward=True)
    assert train(together, one, range(8)) == train(apart, other, range(8))
    assert all(map(torch.equal, together.parameters(), apart.parameters()))


def test_no_gradient_of_a_matrix_outlives_its_backward_pass() -> None:
    model = net()
    optimizer = made(GaLore, groups(model), lr=0.05, in_backward=True)
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

    one = made(GaLore, groups(together), lr=0.05, basis=noted)
    other = made(GaLore, groups(apart), lr=0.05, basis=noted, in_backward=True)
    assert train(together, one, range(6), parts=3) == pytest.approx(train(apart, other, range(6), parts=3), rel=1e-12)
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_what_is_clipped_is_what_the_optimizer_sees() -> None:
    free, clipped = net(), net()
    other = made(GaLore, groups(clipped), lr=0.05, in_backward=True)
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 2.5}, "rank must be .*, got 2.5"),
        ({"projection": "nope"}, "projection must be .*, got 'nope'"),
        ({"update_gap": 0}, "update_gap must be .*, got 0"),
    ],
)
def test_a_changed_group_is_checked_as_gradients_arrive(changes: dict[str, Any], words: str) -> None:
    model = net()
    optimizer = made(GaLore, groups(model), lr=0.01, in_backward=True)
    optimizer.param_groups[0].update(changes)
    with pytest.raises(ValueError, match=words):
        train(model, optimizer, range(1))


def test_a_gradient_that_is_no_number_stops_the_backward_pass() -> None:
    model = net()
    optimizer = made(GaLore, groups(model), lr=0.05, in_backward=True)
    train(model, optimizer, range(2))
    with pytest.raises(FloatingPointError, match=r"gradient of a parameter of shape \(8, 20\) is not finite"):
        (model(torch.ones(2, 12, dtype=torch.float64)) * float("nan")).sum().backward()


def test_staggered_refreshes_take_turns() -> None:
    parameters = matrices(*[(12, 20)] * 4)
    optimizer = made(GaLore, [{"params": parameters, "rank": 4, "update_gap": 4}], lr=0.1, stagger=True)
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
    run(made(GaLore, [{"params": together, "rank": 4, "update_gap": 4}], lr=0.1, stagger=True), together, range(9))
    run(made(GaLore, [{"params": alone, "rank": 4, "update_gap": 4}], lr=0.1), alone, range(9))
    torch.testing.assert_close(together[0], alone[0], rtol=1e-9, atol=1e-9)
    assert not torch.equal(together[1], alone[1])


def test_a_run_stopped_between_staggered_refreshes_goes_on() -> None:
    for stop in range(1, 6):
        whole, broken = matrices(*[(12, 20)] * 3), matrices(*[(12, 20)] * 3)
        make = lambda p: made(GaLore, [{"params": p, "rank": 4, "update_gap": 3}], lr=0.1, stagger=True)  # noqa: E731
        run(make(whole), whole, range(6))
        first, second = make(broken), make(broken)
        run(first, broken, range(stop))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        run(second, broken, range(stop, 6))
        assert all(map(torch.equal, whole, broken)), stop


def test_a_matrix_added_later_is_projected_on_arrival() -> None:
    whole, grown = net(), net()
    one = made(GaLore, groups(whole), lr=0.05, in_backward=True)
    first, *later = groups(grown)
    other = made(GaLore, [first], lr=0.05, in_backward=True)
    for group in later:
        other.add_param_group(group)
    assert train(whole, one, range(3)) == train(grown, other, range(3))
    assert all(map(torch.equal, whole.parameters(), grown.parameters()))


def test_gradients_that_no_backward_pass_brought_count_too() -> None:
    """Set by hand, as an estimator does, or of a matrix that was frozen when the optimizer was made."""
    one, other = net(), net()
    other[0].weight.requires_grad_(False)
    plain = made(GaLore, groups(one), lr=0.05)
    arriving = made(GaLore, groups(other), lr=0.05, in_backward=True)
    other[0].weight.requires_grad_(True)
    assert train(one, plain, range(3)) == train(other, arriving, range(3))
    for model, optimizer in ((one, plain), (other, arriving)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    "forget", [lambda o, start: o.state.clear(), lambda o, start: o.load_state_dict(start)], ids=["clear", "load"]
)
@pytest.mark.parametrize("when", ["after", "between"])
def test_gradients_on_a_basis_that_is_gone_are_dropped(forget: Any, when: str) -> None:
    model = net()
    optimizer = made(GaLore, groups(model), lr=0.05, in_backward=True)
    start = copy.deepcopy(optimizer.state_dict())
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    forget(optimizer, start)
    if when == "between":
        model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert all(loss < 100 for loss in train(model, optimizer, range(4)))
    shapes = {tuple(s["exp_avg"].shape) for p, s in optimizer.state.items() if p.ndim == 2}
    assert shapes == {(20, 3), (3, 20)}


def test_scaled_gradients_are_not_projected_as_they_arrive() -> None:
    model = net().float()
    scaler = torch.amp.GradScaler("cpu")
    for in_backward in (False, True):
        optimizer = made(GaLore, groups(model), lr=0.05, in_backward=in_backward)
        scaler.scale(model(torch.ones(2, 12)).sum()).backward()
        if in_backward:
            with pytest.raises(ValueError, match="train in bfloat16, which needs no scaler"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_eps_knows_how_many_steps_each_parameter_has_taken() -> None:
    late, alone = matrices((12, 20), dtype=torch.float64), matrices((12, 20), dtype=torch.float64)
    early = matrices((12, 20), dtype=torch.float64)
    both = made(GaLore, [{"params": early + late, "rank": 4}], lr=0.1, eps=1e-2)
    single = made(GaLore, [{"params": alone, "rank": 4}], lr=0.1, eps=1e-2)
    for step in range(20):
        early[0].grad = gradients(step, early)[0]
        if step >= 15:
            late[0].grad, alone[0].grad = gradients(step, late)[0], gradients(step, alone)[0]
            single.step()
        both.step()
    torch.testing.assert_close(late[0], alone[0], rtol=1e-12, atol=1e-12)


class OwnBasis(Trion):
    """A basis that `move` finds by itself in each step, and keeps."""

    def state_shapes(self, shape: Any, group: Any) -> Any:
        return {"left": (shape[0], group["rank"])}


def test_a_basis_without_a_gap_is_gathered_as_it_is_kept() -> None:
    p = nn.Parameter(torch.zeros(20, 10))
    assert OwnBasis().gathered_bytes(p, {"params": [p], "rank": 3}) == 4 * (20 * 10 + 20 * 3)


def test_an_optimizer_that_is_gone_projects_nothing_any_more() -> None:
    model = net()
    optimizer = made(GaLore, groups(model), lr=0.05, in_backward=True)
    train(model, optimizer, range(1))
    del optimizer
    gc.collect()
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_processes_that_come_together_later_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = made(GaLore, groups(model), lr=0.05, in_backward=True)
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    monkeypatch.setattr("lorank.optim.arriving.processes", lambda: 2)
    with pytest.raises(ValueError, match="in_backward must be False in distributed runs"):
        optimizer.step()


# ---- states of the optimizers before LowRankOptimizer


def as_before(method: ByGroups, saved: dict[str, Any]) -> dict[str, Any]:
    """In the layout of `Subspace`, `MuonAdamW` or `MatrixOptimizer`: an optimizer's state inside another's, no rule."""
    before = copy.deepcopy(saved)
    for group in before["param_groups"]:
        rule = group.pop("rule")
        if not isinstance(method, Projected):
            del group["rank"]
        if rule == "muon":
            group |= {"nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}
    for index, state in before["state"].items():
        if isinstance(method, GaLore):
            own = {name: state.pop(name) for name in ("steps", "left", "right", "norm") if name in state}
            before["state"][index] = {**own, "inner": state}
        elif method.name == "adamw-8bit":
            hidden = {name: state.pop(name) for name in [*state] if name != "step"}
            state["__bnb_optimizer_quant_state__"] = hidden
    return before


@pytest.mark.parametrize(
    "method",
    [GaLore(update_gap=3), GaLore(rule="muon"), GaLore(rule="adafactor"), Fira(), DCTAdamW(), Trion(), Muon(), Adafactor()],
    ids=lambda method: f"{method.name}-{getattr(method, 'rule', '')}",
)  # fmt: skip
def test_a_state_in_the_old_layout_is_loaded(method: Any) -> None:
    one, other = net().float(), net().float()

    def make(model: nn.Module) -> Any:
        mine = groups(model)
        rule = mine[0].pop("rank") if not isinstance(method, Projected) else None
        mine[0] |= {"rule": "muon"} if method.name == "muon" and rule else {}
        return method.optimizer(mine, lr=0.01, betas=(0.9, 0.99), eps=1e-8)

    first, second = make(one), make(other)
    train(one, first, range(4))
    other.load_state_dict(one.state_dict())
    second.load_state_dict(as_before(method, first.state_dict()))
    assert train(one, first, range(4, 8)) == train(other, second, range(4, 8))


def test_a_state_of_bitsandbytes_itself_is_loaded() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = (matrices((70, 80), (20, 12), dtype=torch.float32) for _ in range(2))
    first, second = bitsandbytes.optim.AdamW8bit(theirs, lr=0.01), made(AdamW8bit, ours, lr=0.01)
    run(first, theirs, range(3))
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(first.state_dict())
    run(first, theirs, range(3, 6))
    run(second, ours, range(3, 6))
    assert all(map(torch.equal, ours, theirs))
