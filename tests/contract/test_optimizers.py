"""What every method that decides how weights move must satisfy, run over the table.

A method earns its place by passing this file unchanged; its equations are tested in ``tests/optim``.
"""

import copy
import io
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lorank import GaLore, Method, optimizer
from lorank.optim.driver import ByGroups, Projected
from lorank.table import find, method_names
from tests.conftest import ARCHITECTURES

NAMES = [name for name in method_names("optimizer") if issubclass(find(name), ByGroups)]
"""All but AdamW, which is torch's."""
LR = {"trion": 0.02, "adafactor": 0.02}
RULES = [GaLore(rule=rule, update_gap=2) for rule in ("adamw-8bit", "adafactor", "muon")]
"""GaLore with another rule inside is examined with the methods."""
OPTIONS: list[Method] = [
    GaLore(update_gap=2, in_backward=True, projection="reverse_std"),
    GaLore(update_gap=2, projection="full", basis="svd"),
    GaLore(update_gap=2, projection="left", basis="randomised"),
    find("dct-adamw")(error_feedback="full", transform="fft"),
    find("dct-adamw")(error_feedback="8bit"),
    find("trion")(transform="fft"),
]
"""Settings under which state and work differ."""


def named(method: Method) -> str:
    changed = {k: v for k, v in method.to_dict().items() if v != type(method)().to_dict()[k] and k != "update_gap"}
    return "-".join([method.name, *map(str, changed.values())])


METHODS: list[Any] = [find(name)(**find(name).soon) for name in NAMES] + RULES
methods = pytest.mark.parametrize("method", METHODS, ids=named)
projecting = pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Projected)], ids=named)
needs_bitsandbytes = {"adamw-8bit", "galore-adamw-8bit"}


@pytest.fixture(autouse=True)
def _bitsandbytes(request: pytest.FixtureRequest) -> None:
    method = request.node.callspec.params.get("method") if hasattr(request.node, "callspec") else None
    if method is not None and named(method) in needs_bitsandbytes:
        pytest.importorskip("bitsandbytes")


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Wide enough that some moments of 8-bit AdamW have a byte each, also inside a subspace."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 80), nn.Tanh(), nn.Linear(80, 70)).to(dtype)


def groups(model: nn.Module, method: Method, rank: int = 8) -> list[dict[str, Any]]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("0.")]
    rest = [p for p in model.parameters() if p not in set(matrices)]
    chosen: dict[str, Any] = {"rank": rank} if isinstance(method, Projected) else {}
    chosen |= {"rule": "muon"} if method.name == "muon" else {}
    return [{"params": matrices, "weight_decay": 0.1, **chosen}, {"params": rest, "weight_decay": 0.0}]


def make(method: Method, model: nn.Module) -> Any:
    return method.optimizer(groups(model, method), lr=LR.get(method.name, 0.01), betas=(0.9, 0.99), eps=1e-8)


def train(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
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


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


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
    made = optimizer(model, method, lr=0.01, weight_decay=0.1)
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
    before = weights(model)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    made.step()
    assert not any(map(torch.equal, before, model.parameters()))


@methods
def test_resumed_at_any_step_it_goes_on_bit_by_bit(method: Method) -> None:
    for stop in range(5):
        whole, broken = net(), net()
        train(whole, make(method, whole), range(5))
        first, second = make(method, broken), make(method, broken)
        train(broken, first, range(stop))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        train(broken, second, range(stop, 5))
        assert equal(whole, broken), stop


@methods
def test_a_loaded_state_has_the_types_it_was_saved_with(method: Method) -> None:
    """bf16 has no 257, and torch's own loading would cast counters and indices."""
    model = net(torch.bfloat16)
    first, second = make(method, model), make(method, model)
    train(model, first, range(2))
    for state in first.state.values():
        for name in ("step", "steps"):
            if isinstance(state.get(name), Tensor):
                state[name].fill_(257)
    second.load_state_dict(first.state_dict())
    for p, state in first.state.items():
        assert state.keys() == second.state[p].keys()
        for name, value in state.items():
            loaded = second.state[p][name]
            same = torch.equal(loaded, value) if isinstance(value, Tensor) else loaded == value
            assert same and getattr(loaded, "dtype", None) == getattr(value, "dtype", None), name


@methods
def test_loading_an_earlier_state_forgets_the_later(method: Method) -> None:
    model = net()
    made = make(method, model)
    start, ends = copy.deepcopy((model.state_dict(), made.state_dict())), []
    for _ in range(2):
        model.load_state_dict(start[0])
        made.load_state_dict(copy.deepcopy(start[1]))
        train(model, made, range(3))
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))


@methods
def test_what_a_hook_makes_of_a_saved_state_is_loaded(method: Method) -> None:
    """torch's way to load what was saved in another order of parameters."""
    model, other = net(), net()
    one = make(method, model)
    train(model, one, range(2))
    saved = copy.deepcopy(one.state_dict())
    saved["state"] = {100 + index: state for index, state in saved["state"].items()}
    two = make(method, other)
    two.register_load_state_dict_pre_hook(
        lambda _, given: {**given, "state": {index - 100: state for index, state in given["state"].items()}}
    )
    two.load_state_dict(saved)
    other.load_state_dict(model.state_dict())
    assert train(model, one, range(2, 4)) == train(other, two, range(2, 4))


@methods
def test_another_optimizers_state_is_refused(method: Method) -> None:
    model = net()
    made = make(method, model)
    train(model, made, range(1))
    before = copy.deepcopy(made.state_dict())
    theirs_groups = [{"params": list(group["params"])} for group in made.param_groups]
    theirs = torch.optim.SGD(theirs_groups, lr=0.1, momentum=0.9)
    train(model, theirs, range(1))
    with pytest.raises(ValueError, match=r"of the saved state .*make the optimizer as it was made for the state"):
        made.load_state_dict(theirs.state_dict())
    now = made.state_dict()
    torch.testing.assert_close(now["state"], before["state"], rtol=0, atol=0)
    assert now["param_groups"] == before["param_groups"]
    train(model, made, range(1, 2))


@projecting
def test_a_state_of_another_rank_is_refused(method: Method) -> None:
    model = net()
    made = make(method, model)
    saved = method.optimizer(groups(model, method, rank=2), lr=0.1).state_dict()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="group 0 of the saved state has rank 2 where this one has 8"):
        made.load_state_dict(saved)


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
        ({"rule": "sgd"}, "rule must be 'adamw', 'adamw-8bit', 'adafactor' or 'muon', got 'sgd'"),
        ({"rule": "adafactor", "eps": 1e-8}, "eps must be 2 values, .*, got 1e-08"),
        ({"rule": "muon", "momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"lr": float("inf")}, "lr must be a number of at least 0, got inf"),
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"weight_decay": "a"}, "weight_decay must be a number of at least 0, got 'a'"),
        ({"rule": "adamw", "eps": -1.0}, "eps must be a number of at least 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
        ({"amsgrad": True}, "has no amsgrad"),
    ):
        with pytest.raises(ValueError, match=words):
            made.add_param_group({"params": [matrix()], **settings})
    vector = nn.Parameter(torch.ones(3))
    for settings, words in (({"rank": 2}, "group without rank"), ({"rule": "muon"}, "another rule than 'muon'")):
        with pytest.raises(ValueError, match=rf"shape \(3,\) is not a matrix; put it in a .*{words}"):
            made.add_param_group({"params": [vector], **settings})
    assert len(made.param_groups) == 2
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
def test_weight_decay_shrinks_and_nothing_else(method: Method) -> None:
    p = nn.Parameter(torch.ones(6, 4))
    chosen: dict[str, Any] = {"rank": 2} if isinstance(method, Projected) else {}
    made = method.optimizer([{"params": [p], "weight_decay": 0.5, **chosen}], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
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
def test_a_cleared_state_begins_anew(method: Method) -> None:
    model, fresh = net(), net()
    made = make(method, model)
    train(model, made, range(3))
    made.state.clear()
    fresh.load_state_dict(model.state_dict())
    assert train(model, made, range(2)) == train(fresh, make(method, fresh), range(2))
    assert equal(model, fresh)


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
    with pytest.raises(FloatingPointError, match=rf"gradient of a parameter of shape \({shape[0]}, .*is not finite|80,"):
        made.step()
    now = model.state_dict(), made.state_dict()["state"]
    torch.testing.assert_close(now, (before[0], before[1]["state"]), rtol=0, atol=0)


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
def test_a_sparse_gradient_and_a_closure_are_refused(method: Method) -> None:
    model = nn.Embedding(10, 4, sparse=True)
    made = method.optimizer(model.parameters(), lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"a gradient is sparse, .*use nn.Embedding\(sparse=False\)"):
        made.step()
    with pytest.raises(ValueError, match="evaluates no closure"):
        made.step(lambda: 0.0)


# ---- what it costs


def kept(state: Any) -> int:
    """Bytes of tensors, counters left out."""
    return sum(v.numel() * v.element_size() for k, v in state.items() if isinstance(v, Tensor) and k not in ("step", "steps"))


@pytest.mark.parametrize("method", METHODS + OPTIONS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_are_kept(method: Method, dtype: torch.dtype) -> None:
    model = net(dtype)
    made = make(method, model)
    train(model, made, range(2))
    for group in made.param_groups:
        for p in group["params"]:
            given = {name: group[name] for name in ("rank", "rule", "weight_decay")}
            assert method.state_bytes(p, given) == kept(made.state[p]), (p.shape, given)


def in_place(out: Any, *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """FLOPs of W.addmm_(a, b), which PyTorch's counter does not know."""
    (m, r), (_, n) = shapes
    return 2 * m * r * n


@pytest.mark.parametrize("method", METHODS + OPTIONS, ids=named)
def test_operations_of_a_step_are_those_of_the_counter(method: Any) -> None:
    """To the number, over the steps from one refresh to the next, with two micro-batches each."""
    model, gap = net(), getattr(method, "update_gap", 1)
    made = make(method, model)
    drawn = [(p, torch.randn_like(p)) for p in model.parameters()]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        for _ in range(gap):
            for _ in range(2):
                torch.stack([(p * gradient).sum() for p, gradient in drawn]).sum().backward()
            made.step()
            made.zero_grad()
    found = sum(method.step_flops(p, group, micro_batches=2) for group in made.param_groups for p in group["params"])
    assert counter.get_total_flops() == pytest.approx(gap * found, rel=1e-12)
    assert (found > 0) == (method.name != "adamw-8bit")


@pytest.mark.parametrize("method", METHODS + OPTIONS, ids=named)
def test_the_kept_gradient_has_the_shape_it_waits_in(method: Any) -> None:
    model = net()
    made = make(method, model)
    for p in model.parameters():
        (p * torch.ones_like(p)).sum().backward()
    seen = made.seen_parameters()
    for p, one in zip((p for group in made.param_groups for p in group["params"]), seen, strict=True):
        group = next(group for group in made.param_groups if any(q is p for q in group["params"]))
        assert method.kept_gradient(p, group) == tuple(one.grad.shape)


# ---- several processes

PROGRAM = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `two_processes.py` says in each of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(__file__).parents[2])
    both = [
        subprocess.Popen([sys.executable, PROGRAM], env={**shared, "RANK": r}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in "01"
    ]  # fmt: skip
    (said, error), (other, _) = (process.communicate(timeout=240) for process in both)
    assert both[0].returncode == 0, error
    return {**json.loads(said), "other": other.strip()}


@methods
def test_two_processes_do_what_one_does(found: dict[str, Any], method: Method) -> None:
    """Replicated (DDP), and sharded (FSDP2), where state as large as the weights is sharded too."""
    result = found[named(method)]
    tolerance = 1e-3 if named(method) in needs_bitsandbytes else 1e-12  # a code may be rounded the other way
    assert result["ddp"] < tolerance and result["fsdp"] < tolerance
    assert result["same"], "both processes have the same weights"
    assert result["resumed"], "a sharded run goes on from its saved state bit by bit"


def test_gradients_of_one_process_only_are_refused(found: dict[str, Any]) -> None:
    assert "in_backward=True sees the gradient of one process only" in found["refusal"]


def test_one_part_that_is_not_finite_stops_all_processes(found: dict[str, Any]) -> None:
    said = "the gradient of a parameter of shape (20, 12) is not finite; lower lr or clip gradients"
    assert found["nan"] == found["other"] == said
