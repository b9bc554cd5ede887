"""What optimizers keep: saved and loaded, in bytes, and in several processes; and the operations of a step."""

import copy
import importlib.util
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorank import LORO, DCTAdamW, Method, Spectron
from lorank.optim.driver import Projected
from tests.contract.conftest import METHODS, NEED_BITSANDBYTES, OPTIONS, equal, groups, make, named, net, train, weights

methods = pytest.mark.parametrize("method", METHODS, ids=named)
projecting = pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Projected)], ids=named)


# ---- states


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
    with pytest.raises(
        ValueError, match=r"of the saved state .*make the optimizer with the settings of the one that was saved"
    ):
        made.load_state_dict(theirs.state_dict())
    now = made.state_dict()
    torch.testing.assert_close(now["state"], before["state"], rtol=0, atol=0)
    assert now["param_groups"] == before["param_groups"]
    train(model, made, range(1, 2))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LORO(), LORO(direction="gradient")),
        (LORO(), Spectron()),
        (DCTAdamW(error_feedback="full"), DCTAdamW(error_feedback="8bit")),
        (DCTAdamW(error_feedback="full"), DCTAdamW()),
    ],
    ids=named,
)
def test_a_state_of_other_settings_is_refused(one: Method, other: Method) -> None:
    for method, giver in ((one, other), (other, one)):
        model, theirs = net(), net()
        made, saved = make(method, model), make(giver, theirs)
        train(theirs, saved, range(2))
        with pytest.raises(ValueError, match="another optimizer than this"):
            made.load_state_dict(saved.state_dict())
        train(model, made, range(2))
        with pytest.raises(ValueError, match="another optimizer than this"):
            made.load_state_dict(saved.state_dict())


@projecting
def test_a_state_of_another_rank_is_refused(method: Method) -> None:
    model = net()
    made = make(method, model)
    saved = method.optimizer(groups(model, method, rank=2), lr=0.1).state_dict()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="group 0 of the saved state has rank 2 where this one has 8"):
        made.load_state_dict(saved)


@projecting
def test_a_state_of_another_method_is_refused(method: Method) -> None:
    """Of every other in the table, by what it keeps; a GaLore with the same rule keeps the same."""
    model = net()
    made = make(method, model)
    train(model, made, range(2))
    for other in (m for m in METHODS if isinstance(m, Projected) and named(m) != named(method)):
        if {method.name, other.name} == {"apollo", "apollo-mini"}:
            continue  # one is the other with other settings
        if NEED_BITSANDBYTES & {named(other)} and not importlib.util.find_spec("bitsandbytes"):
            continue
        theirs = make(other, model)
        train(model, theirs, range(1))
        with pytest.raises(ValueError, match=r"^group \d of the saved state has .*another optimizer than this"):
            made.load_state_dict(theirs.state_dict())
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


# ---- what it costs


def kept(state: Any) -> int:
    """Bytes of tensors, counters left out."""
    return sum(
        v.numel() * v.element_size() for k, v in state.items() if isinstance(v, Tensor) and k not in ("step", "steps")
    )


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
    if method.name == "loro":
        pytest.skip(
            "this pair has no smaller rank than its map, so it takes no exact step; counted in tests/optim/test_loro.py"
        )
    model, gap = net(), getattr(method, "update_gap", 1)
    made = make(method, model)
    drawn = [(p, torch.randn_like(p)) for p in model.parameters()]

    def steps() -> None:
        for _ in range(gap):
            for _ in range(2):
                torch.stack([(p * gradient).sum() for p, gradient in drawn]).sum().backward()
            made.step()
            made.zero_grad()

    steps()  # DCT-AdamW has one choice of columns more in these
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        steps()
    found = sum(method.step_flops(p, group, micro_batches=2) for group in made.param_groups for p in group["params"])
    assert counter.get_total_flops() == pytest.approx(gap * found, rel=1e-12)
    assert (found > 0) == (method.name not in ("adamw-8bit", "factor-lr")), "elementwise rules have no products"


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
