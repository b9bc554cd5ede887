"""VectorAdamW is torch's AdamW while all counters agree, and one AdamW per vector when they do not."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank.optim.adamw import VectorAdamW, reset_vectors


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (drawn * 10.0 ** (step % 5 - 3)).to(parameter.dtype)


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


SETTINGS: dict[str, Any] = {
    "defaults": {},
    "pretraining": {"lr": 2e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    "no decay": {"lr": 1e-2, "weight_decay": 0.0},
    "no memory": {"lr": 1e-3, "betas": (0.0, 0.0)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_with_equal_counters_it_is_torchs_adamw(settings: dict[str, Any]) -> None:
    ours, theirs = (parameters((5, 7), (7,), (), (3, 2, 4)) for _ in range(2))
    mine, reference = VectorAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    reset_vectors(mine, ours[0], 0, torch.tensor([1]))  # [5, 1] counters, all zero
    for step in range(40):
        for params, optimizer in ((ours, mine), (theirs, reference)):
            gradients(params, step)
            optimizer.param_groups[0]["lr"] *= 0.97
            optimizer.step()
    assert mine.state[ours[0]]["step"].shape == (5, 1)
    assert mine.state[ours[1]]["step"].shape == ()
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
        close(mine.state[a]["exp_avg"], reference.state[b]["exp_avg"])
        close(mine.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])
        assert (mine.state[a]["step"] == 40).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_each_vector_is_moved_by_an_adamw_of_its_own(dim: int) -> None:
    """Vectors reset at different steps against torch's optimizer on each vector alone, begun anew at that step."""
    (matrix,) = parameters((4, 6))
    resets = {3: [1], 5: [0, 2], 11: [1]}
    optimizer = VectorAdamW([matrix], lr=1e-2, weight_decay=0.1)
    vectors = [nn.Parameter(vector.clone()) for vector in matrix.detach().unbind(dim)]
    fresh = lambda vector: torch.optim.AdamW([vector], lr=1e-2, weight_decay=0.1)  # noqa: E731
    each = [fresh(vector) for vector in vectors]
    for step in range(20):
        gradients([matrix], step)
        assert matrix.grad is not None
        for row in resets.get(step, []):
            each[row] = fresh(vectors[row])
        if step in resets:
            reset_vectors(optimizer, matrix, dim, torch.tensor(resets[step]))
        for vector, gradient, alone in zip(vectors, matrix.grad.unbind(dim), each, strict=True):
            vector.grad = gradient.clone()
            alone.step()
        optimizer.step()
        close(matrix.detach(), torch.stack([vector.detach() for vector in vectors], dim))
    assert optimizer.state[matrix]["step"].shape == ((4, 1) if dim == 0 else (1, 6))
    assert optimizer.state[matrix]["step"].flatten()[:3].tolist() == [15, 9, 15]


def test_a_reset_empties_the_state_of_these_vectors_only() -> None:
    (matrix,) = parameters((4, 6))
    optimizer = VectorAdamW([matrix])
    gradients([matrix], 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[matrix])
    reset_vectors(optimizer, matrix, 1, torch.tensor([5, 2]))
    for name, value in optimizer.state[matrix].items():
        kept = before[name].expand(value.shape)
        assert (value[..., [5, 2]] == 0).all()
        assert torch.equal(value[..., [0, 1, 3, 4]], kept[..., [0, 1, 3, 4]])
        assert (kept != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_agree_with_torchs_too(dtype: torch.dtype) -> None:
    ours, theirs = (parameters((5, 7), (7,), dtype=dtype) for _ in range(2))
    mine, reference = VectorAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    reset_vectors(mine, ours[0], 1, torch.tensor([0]))
    for step in range(10):
        for params, optimizer in ((ours, mine), (theirs, reference)):
            gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == mine.state[a]["exp_avg"].dtype == dtype
        assert mine.state[a]["step"].dtype == torch.float32
        close(a, b, 2e-6 if dtype == torch.float32 else 2e-2)


def test_saved_and_loaded_it_goes_on_bit_by_bit() -> None:
    def fresh() -> tuple[list[nn.Parameter], VectorAdamW]:
        params = parameters((5, 7), (7,), dtype=torch.float32)
        return params, VectorAdamW(params, lr=1e-2)

    def run(params: list[nn.Parameter], optimizer: VectorAdamW, steps: range) -> None:
        for step in steps:
            gradients(params, step)
            if step == 2:
                reset_vectors(optimizer, params[0], 0, torch.tensor([1, 3]))
            optimizer.step()

    whole, optimizer = fresh()
    run(whole, optimizer, range(8))
    first, saved = fresh()
    run(first, saved, range(4))
    file = io.BytesIO()
    torch.save([saved.state_dict(), first], file)
    file.seek(0)
    state, values = torch.load(file)
    assert all(isinstance(value, Tensor) for entry in state["state"].values() for value in entry.values())
    second, loaded = fresh()
    with torch.no_grad():
        for parameter, value in zip(second, values, strict=True):
            parameter.copy_(value)
    loaded.load_state_dict(state)
    assert loaded.state[second[0]]["step"].shape == (5, 1)
    run(second, loaded, range(4, 8))
    assert all(map(torch.equal, second, whole))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters((3,), (4,))
    optimizer = VectorAdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    params[1].grad = torch.ones_like(params[1])
    before = [p.detach().clone() for p in params]
    assert optimizer.step(lambda: 3.5) == 3.5
    assert torch.equal(params[0], before[0])
    assert params[0] not in optimizer.state
    close(params[1].detach(), before[1] * (1 - 0.5 * 1e-2) - 0.5, 1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-3}, r"lr must be a number of at least 0"),
        ({"eps": float("nan")}, "eps must be a number of at least 0, got nan"),
        ({"weight_decay": -1}, "weight_decay must be a number of at least 0, got -1"),
        ({"lr": "0.1"}, "lr must be a number of at least 0, got '0.1'"),
        ({"lr": torch.tensor([1.0, 2.0])}, "lr must be a number of at least 0, got tensor"),
        ({"weight_decay": 10**400}, "weight_decay must be a number of at least 0, got 1000"),
        ({"lr": True}, "lr must be a number of at least 0, got True"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a number in \[0, 1\), got 1.0"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorAdamW(parameters((2,)), **settings)


def test_what_it_would_ruin_is_refused() -> None:
    with pytest.raises(ValueError, match="weights must not be float16"):
        VectorAdamW(parameters((2, 3), dtype=torch.float16))
    matrix = parameters((5, 3))
    gradients(matrix, 0)
    theirs, ours = torch.optim.SGD(matrix, lr=0.1, momentum=0.9), VectorAdamW(matrix)
    for optimizer in (theirs, ours):
        optimizer.step()
    with pytest.raises(ValueError, match="so it was not saved by an optimizer like this vector-adamw"):
        ours.load_state_dict(theirs.state_dict())
