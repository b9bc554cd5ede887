"""What optimizers keep: saved and loaded, in bytes, and in several processes; and the operations of a step."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorank import LORO, DCTAdamW, Method, Spectron
from lorank.optim.driver import Projected
from lorank.testing import driven
from lorank.testing.movement import net, train
from lorank.testing.saying import equal_models
from tests.contract.conftest import METHODS, NEED_BITSANDBYTES, OPTIONS, groups, make, mover, named

methods = pytest.mark.parametrize("method", METHODS, ids=named)
projecting = pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Projected)], ids=named)


# ---- states


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
        with pytest.raises(ValueError, match="not saved by an optimizer like this"):
            made.load_state_dict(saved.state_dict())
        train(model, made, range(2))
        with pytest.raises(ValueError, match="not saved by an optimizer like this"):
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
        with pytest.raises(ValueError, match=r"^group \d of the saved state has .*not saved by an optimizer like this"):
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
    equal_models(model, fresh)


# ---- what it costs


@pytest.mark.parametrize("method", OPTIONS, ids=named)
@pytest.mark.parametrize(
    "claim",
    [
        driven.bytes_are_those_that_are_kept,
        driven.operations_of_a_step_are_those_of_the_counter,
        driven.the_kept_gradient_has_the_shape_it_waits_in,
    ],
)
def test_costs_follow_the_settings(method: Method, claim: Callable[[Any], None]) -> None:
    claim(mover(method))


@methods
def test_only_elementwise_rules_have_no_products(method: Method) -> None:
    """So that the counter of operations has something to count."""
    model = net()
    made = make(method, model)
    flops = [method.step_flops(p, group) for group in made.param_groups for p in group["params"]]
    assert (sum(flops) > 0) == (method.name not in ("adamw", "adamw-8bit", "factor-lr"))
