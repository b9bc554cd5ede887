"""What every optimizer that `lorank.optim.driver` makes must satisfy besides: it refuses bad input before anything moves, begins anew with
another rank, and costs what it says."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lorank.optim.driver import Projected
from lorank.testing.movement import Mover, net, train
from lorank.testing.saying import equal_models, refused


def a_refused_group_leaves_the_others_alone(mover: Mover) -> None:
    model = net()
    made = mover.make(model)
    number = "must be a number of at least 0, got"
    for settings, words in (
        ({"rank": 0}, "rank must be a positive integer or None, got 0"),
        ({"rank": 2.5}, "rank must be a positive integer or None, got 2.5"),
        ({"rank": True}, "rank must be a positive integer or None, got True"),
        ({"rule": "sgd"}, "rule must be 'adamw', 'adamw-8bit', 'adafactor'.* or .*, got 'sgd'"),
        ({"rule": "adafactor", "eps": 1e-8}, "eps must be 2 values, .*, got 1e-08"),
        ({"rule": "muon", "momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"lr": float("inf")}, f"lr {number} inf"),
        ({"lr": -1.0}, f"lr {number} -1.0"),
        ({"weight_decay": "a"}, f"weight_decay {number} 'a'"),
        ({"rule": "adamw", "eps": -1.0}, f"eps {number} -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
        ({"betas": 0.9}, "betas must be 2 values, each a finite number, got 0.9"),
        ({"betas": (0.9,)}, r"betas must be 2 values, each a finite number, got \(0.9,\)"),
        ({"maximize": "no"}, "maximize must be true or false, got 'no'"),
        ({"amsgrad": True}, "has no amsgrad"),
    ):
        refused(words, partial(made.add_param_group, {"params": [nn.Parameter(torch.ones(3, 4))], **settings}))
    for settings, words in (
        ({"rank": 2}, "group without rank|leave rank out"),
        ({"rule": "muon"}, "another rule than 'muon'"),
    ):
        refused(words, partial(made.add_param_group, {"params": [nn.Parameter(torch.ones(3))], **settings}))
    assert len(made.param_groups) == 2, "a refused group has been added"
    train(model, made, range(1))


def a_group_that_is_changed_later_is_checked(mover: Mover) -> None:
    """Another rule brings its own settings."""
    model = net()
    made = mover.make(model)
    train(model, made, range(1))
    group = made.param_groups[-1]
    for changes, words in (
        ({"rule": "sgd"}, "rule must be .*, got 'sgd'"),
        ({"betas": (0.9,)}, "betas must be 2 values"),
    ):
        before = {name: group[name] for name in changes}
        group.update(changes)
        refused(words, partial(train, model, made, range(1)))
        group.update(before)
    if made.param_groups[0]["rule"] != "adafactor":  # which has another kind of eps
        made.param_groups[0]["rule"] = "muon"
    train(model, made, range(1))


def a_sparse_gradient_is_refused(mover: Mover) -> None:
    model = nn.Embedding(10, 4, sparse=True)
    made = mover.over(model.parameters())
    model(torch.tensor([1])).sum().backward()
    refused(r"gradients must be dense .*use nn.Embedding\(sparse=False\)", made.step)


def a_gradient_that_is_not_finite_changes_nothing(mover: Mover) -> None:
    """Or one whose norm is not, though its entries are."""
    for name, value in (("1.weight", "nan"), ("1.bias", "inf"), ("1.weight", "3e38")):
        model = net()
        made = mover.make(model)
        train(model, made, range(1))
        before = copy.deepcopy((model.state_dict(), made.state_dict()["state"]))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient.view(-1)[:2] = float(value)
        refused(
            rf"gradient of a parameter of shape \({len(gradient)}, .*is not finite|80,", made.step, FloatingPointError
        )
        torch.testing.assert_close((model.state_dict(), made.state_dict()["state"]), before, rtol=0, atol=0)


def a_large_gradient_moves_weights_by_something_finite(mover: Mover) -> None:
    """Its squares are finite, though not their sum."""
    model = net()
    made = mover.make(model)
    for _ in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = 1e18 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        made.step()
    assert all(p.isfinite().all() for p in model.parameters()), "weights are not finite"


def weights_in_float16_are_refused(mover: Mover) -> None:
    refused(
        "weights must not be float16, in which moments overflow; use bfloat16", lambda: mover.make(net(torch.float16))
    )
    model = net()
    made = mover.make(model)
    train(model, made, range(1))
    model.half()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    refused("weights must not be float16", made.step)


def a_changed_rank_begins_anew(mover: Mover) -> None:
    """With the basis and moments of a fresh optimizer; but a state whose shapes have no rank, as Trion's momentum, stays."""
    if not mover.projects:
        return
    for rank in (3, 12):
        model, fresh = net(), net()
        made, again = mover.make(model), mover.make(fresh)
        train(model, made, range(3))
        fresh.load_state_dict(model.state_dict())
        (group, _), method = made.param_groups, cast(Projected, mover.method)
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            has_rank = any(p is one for one in group["params"])
            if not has_rank or method.state_shapes(p.shape, group) == method.state_shapes(
                p.shape, {**group, "rank": rank}
            ):
                again.state[q] = copy.deepcopy(made.state[p])
        for one in (made, again):
            one.param_groups[0]["rank"] = rank
        train(model, made, range(3, 6))
        train(fresh, again, range(3, 6))
        equal_models(model, fresh)


def a_stack_of_experts_moves_and_costs_what_it_should(mover: Mover) -> None:
    """A weight [3, 8, 6], as mixtures of experts have, next to one [8, 6]. What projects has at most a few numbers for all experts."""
    if not mover.projects:
        return
    draw = torch.Generator().manual_seed(0)
    stack, one = (nn.Parameter(torch.randn(*shape, generator=draw)) for shape in ((3, 8, 6), (8, 6)))
    before = stack.detach().clone()
    made = mover.over([{"params": [stack, one], **mover.chosen(2)}])
    for _ in range(3):
        for p in (stack, one):
            p.grad = torch.randn(p.shape, generator=draw)
        made.step()
    [group] = made.param_groups
    assert all(not torch.equal(*each) for each in zip(stack, before, strict=True)), "an expert has not moved"
    said, found = mover.method.state_bytes(stack, group), bytes_kept(made.state[stack])
    assert said == found, f"state_bytes says {said} for (3, 8, 6), but {found} are kept"
    for cost in (mover.method.step_flops, mover.method.gathered_bytes):
        three, single = cost(stack, group), cost(one, group)
        assert 3 * single - 24 <= three <= 3.1 * single, f"{cost.__name__}: {three} of (3, 8, 6), {single} of (8, 6)"


# ---- what it costs


def bytes_kept(state: Any) -> int:
    """Bytes of a parameter's tensors, counters left out."""
    return sum(
        v.numel() * v.element_size() for k, v in state.items() if isinstance(v, Tensor) and k not in ("step", "steps")
    )


def bytes_are_those_that_are_kept(mover: Mover) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = net(dtype)
        made = mover.make(model)
        train(model, made, range(2))
        for group in made.param_groups:
            for p in group["params"]:
                given = {name: group[name] for name in ("rank", "rule", "weight_decay")}
                said, found = mover.method.state_bytes(p, given), bytes_kept(made.state[p])
                assert said == found, f"state_bytes says {said} for {tuple(p.shape)} in {given}, but {found} are kept"


def _in_place(out: Any, *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """FLOPs of W.addmm_(a, b), which PyTorch's counter does not know."""
    (m, r), (_, n) = shapes
    return 2 * m * r * n


def operations_of_a_step_are_those_of_the_counter(mover: Mover) -> None:
    """To the number, over the steps from one refresh to the next, with two micro-batches each."""
    model, gap = net(), getattr(mover.method, "update_gap", 1)
    made = mover.make(model)
    drawn = [(p, torch.randn_like(p)) for p in model.parameters()]

    def steps() -> None:
        for _ in range(gap):
            for _ in range(2):
                torch.stack([(p * gradient).sum() for p, gradient in drawn]).sum().backward()
            made.step()
            made.zero_grad()

    steps()  # the first ones may find a basis more
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        steps()
    said = sum(
        mover.method.step_flops(p, group, micro_batches=2) for group in made.param_groups for p in group["params"]
    )
    found = counter.get_total_flops() / gap
    assert abs(found - said) <= 1e-12 * found, f"step_flops says {said:,.0f} of a step, but {found:,.0f} are counted"


def the_kept_gradient_has_the_shape_it_waits_in(mover: Mover) -> None:
    model = net()
    made = mover.make(model)
    for p in model.parameters():
        (p * torch.ones_like(p)).sum().backward()
    pairs = [(p, group) for group in made.param_groups for p in group["params"]]
    for (p, group), one in zip(pairs, made.seen_parameters(), strict=True):
        said, found = mover.method.kept_gradient(p, group), tuple(one.grad.shape)
        assert said == found, f"kept_gradient says {said} for {tuple(p.shape)}, but {found} is kept"


DRIVEN: tuple[Callable[[Mover], None], ...] = (
    a_refused_group_leaves_the_others_alone,
    a_group_that_is_changed_later_is_checked,
    a_sparse_gradient_is_refused,
    a_gradient_that_is_not_finite_changes_nothing,
    a_large_gradient_moves_weights_by_something_finite,
    weights_in_float16_are_refused,
    a_changed_rank_begins_anew,
    a_stack_of_experts_moves_and_costs_what_it_should,
    bytes_are_those_that_are_kept,
    operations_of_a_step_are_those_of_the_counter,
    the_kept_gradient_has_the_shape_it_waits_in,
)
"""For those that lorank.optim.driver makes."""
