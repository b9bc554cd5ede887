"""The estimate of EGGROLL against its equations: noise, shaped fitness, and the sum over members."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank.evolution.eggroll import Eggroll, above_baseline, operations_per_byte, shaped
from lorank.evolution.noise import BLOCK, pair_noise


@pytest.mark.parametrize(("m", "members", "r"), [(8192, 352, 1), (64, 7, 4)])
def test_operations_per_byte_are_the_papers(m: int, members: int, r: int) -> None:
    noisy = (m + 2 * r + 1 / 2) / (2 + r * (2 + 2 / m) + m / members)
    assert operations_per_byte(m, m, members, r) == pytest.approx(noisy)
    assert operations_per_byte(m, m, members) == pytest.approx(members * m / (2 * members + m))


def test_noise_does_not_depend_on_chunks() -> None:
    key = (0, 3, 1)
    whole = pair_noise(key, range(0, 3 * BLOCK), 7)
    assert torch.equal(pair_noise(key, range(5, 2 * BLOCK + 1), 7), whole[5 : 2 * BLOCK + 1])
    for other in ((1, 3, 1), (0, 4, 1), (0, 3, 2)):
        assert not torch.equal(pair_noise(other, range(3), 7), whole[:3])
    assert len(whole.unique(dim=0)) == 3 * BLOCK


@pytest.mark.parametrize(("reuse", "distinct"), [(1, 6), (2, 3), (3, 2), (0, 1)])
def test_noise_changes_every_so_many_epochs(reuse: int, distinct: int) -> None:
    layer = nn.Linear(3, 4)
    estimate = Eggroll(layer, population=4, sigma=0.1, noise_reuse=reuse)
    seen = []
    for _ in range(6):
        seen.append(estimate.factors(layer.weight, range(2))[0].flatten())  # type: ignore[arg-type]
        estimate(lambda members: torch.zeros(len(members)))
    assert len(torch.stack(seen).unique(dim=0)) == distinct


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_entries_of_the_noise_have_variance_one(rank: int) -> None:
    layer = nn.Linear(20, 30, bias=False)
    A, B = Eggroll(layer, population=4, sigma=1.0, rank=rank).factors(layer.weight, range(4000))  # type: ignore[arg-type]
    E = A @ B.mT
    assert E.var().item() == pytest.approx(1.0, rel=0.02)
    assert E.mean().item() == pytest.approx(0.0, abs=0.01)


def test_a_linear_fitness_gives_its_coefficients() -> None:
    layer = nn.Linear(6, 8, bias=False)
    C = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    estimate = Eggroll(layer, population=400_000, sigma=0.1, chunk=20_000)
    rows = torch.eye(6)
    estimate(lambda members: (layer(rows.repeat(len(members), 1)).view(-1, 6, 8) * C.T).sum((1, 2)))
    assert torch.cosine_similarity(-layer.weight.grad.flatten(), C.flatten(), dim=0) > 0.99  # type: ignore[union-attr]


def test_the_update_draws_the_noise_of_the_forward_pass(monkeypatch: Any) -> None:
    """Also where chunks cut the population elsewhere than blocks of pairs do."""
    layer = nn.Linear(5, 4)
    drawn: dict[Any, list[Tensor]] = {}
    estimate = Eggroll(layer, population=2 * BLOCK + 6, sigma=0.1, chunk=14)
    draw = estimate._noise

    def noted(p: nn.Parameter, pairs: range, size: int) -> Tensor:
        noise = draw(p, pairs, size)
        for k, row in zip(pairs, noise, strict=True):
            drawn.setdefault((p, k), []).append(row.clone())
        return noise

    monkeypatch.setattr(estimate, "_noise", noted)
    estimate(lambda members: layer(torch.ones(len(members), 5)).sum(1))
    assert len(drawn) == 2 * (BLOCK + 3)
    assert all(len(rows) == 2 and torch.equal(*rows) for rows in drawn.values()), "once forward, once for the update"


@pytest.mark.parametrize("rank", [1, 2])
def test_the_update_is_the_sum_over_members(rank: int, moves: Any) -> None:
    layer = nn.Linear(12, 10).double()
    estimate = Eggroll(layer, population=6, sigma=0.3, rank=rank, chunk=4)
    z = torch.randn(6, generator=torch.Generator().manual_seed(0))
    estimate.write_gradients(z)
    total: dict[nn.Parameter, Any] = dict.fromkeys(estimate.perturbed, 0.0)
    for member in range(6):
        for p, move in moves(estimate, member).items():
            total[p] = total[p] - math.sqrt(6) / 6 * z[member].item() * move
    for p, G in total.items():
        torch.testing.assert_close(p.grad, G, rtol=1e-5, atol=1e-6)
    assert torch.linalg.matrix_rank(layer.weight.grad, rtol=1e-5) == 3 * rank  # type: ignore[arg-type]
    many = Eggroll(layer, population=64, sigma=0.3)
    many.write_gradients(torch.randn(64))
    assert torch.linalg.matrix_rank(layer.weight.grad, rtol=1e-5) == 10  # type: ignore[arg-type]


@pytest.mark.parametrize("population", [256, 4096])
def test_where_fitness_is_noise_a_step_of_sgd_is_lr_sigma(population: int) -> None:
    layer = nn.Linear(40, 30)
    before = copy.deepcopy(layer.state_dict())
    generator = torch.Generator().manual_seed(0)
    Eggroll(layer, population=population, sigma=0.01)(lambda m: torch.randn(len(m), generator=generator))
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    rms = (layer.weight - before["weight"]).square().mean().sqrt().item()
    assert rms == pytest.approx(0.5 * 0.01, rel=0.2)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("group_size", [0, 4])
def test_constant_fitness_moves_nothing(group_size: int, baseline: bool) -> None:
    layer = nn.Linear(5, 4)
    estimate = Eggroll(layer, population=8, sigma=0.1, group_size=group_size, baseline=baseline)
    estimate(lambda members: torch.full((len(members),), 3.0))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())  # type: ignore[arg-type]


def by_hand(f: list[float], group_size: int) -> list[float]:
    """Without the group's mean, over the deviation of all, one number at a time."""
    mean = sum(f) / len(f)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in f) / len(f) + 1e-5)
    groups = [f[i : i + group_size] for i in range(0, len(f), group_size)]
    return [(x - sum(group) / group_size) / deviation for group in groups for x in group]


def over_first(f: list[float], group_size: int) -> list[float]:
    z = []
    for start in range(0, len(f), group_size):
        group = f[start : start + group_size]
        mean = sum(group) / group_size
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / group_size)
        z += [0.0, 0.0] + [(x - group[0]) / (deviation + 1e-8) for x in group[2:]]
    return z


@pytest.mark.parametrize("group_size", [0, 4, 6])
@pytest.mark.parametrize(("shape", "formula"), [(shaped, by_hand), (above_baseline, over_first)])
def test_shaping(shape: Any, formula: Any, group_size: int) -> None:
    f = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    expected = torch.tensor(formula(f.tolist(), group_size or 12), dtype=torch.float64)
    torch.testing.assert_close(shape(f, group_size), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shape(f + 7.0, group_size), expected, rtol=1e-9, atol=1e-9)


def test_shaping_of_several_questions() -> None:
    """z is the mean over the questions, each with its own mean; of z-scores the deviation is that of all answers."""
    f = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5.0, 9.0]
    )
    answers = f.flatten().tolist()
    mean = sum(answers) / 24
    deviation = math.sqrt(sum((x - mean) ** 2 for x in answers) / 24 + 1e-5)
    expected = [sum(f[i, q].item() - sum(f[:, q].tolist()) / 8 for q in range(3)) / 3 / deviation for i in range(8)]
    torch.testing.assert_close(shaped(f), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    each = [over_first(f[:, q].tolist(), 4) for q in range(3)]
    expected = [sum(z) / 3 for z in zip(*each, strict=True)]
    torch.testing.assert_close(
        above_baseline(f, 4), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("chunk", [2, 6, 12])
def test_a_baseline_has_no_noise_and_the_update_norm_one(chunk: int, moves: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 8).double()
    estimate = Eggroll(layer, population=12, sigma=0.5, group_size=6, baseline=True, chunk=chunk)
    x, seen = torch.randn(1, 6, dtype=torch.float64), []

    def fitness(members: range) -> Tensor:
        y = layer(x.expand(len(members), 6))
        seen.append(y)
        return y.square().sum(1)

    moved = {i: moves(estimate, i) for i in range(12)}
    f = estimate(fitness)
    outputs, plain = torch.cat(seen), layer(x)[0].detach()
    same = [torch.allclose(y, plain, rtol=1e-12, atol=1e-12) for y in outputs]
    assert same == [i % 6 < 2 for i in range(12)]
    z = over_first(f.tolist(), 6)
    G = {p: -math.sqrt(12) / 12 * sum(z[i] * moved[i][p] for i in range(12)) for p in layer.parameters()}
    norm = math.sqrt(sum(g.square().sum().item() for g in G.values()))
    assert norm > 1.0
    for p, g in G.items():
        torch.testing.assert_close(p.grad, g / norm, rtol=1e-4, atol=1e-5)
    small = Eggroll(layer, population=12, sigma=1e-3, group_size=6, baseline=True)
    small(fitness)
    squares = [p.grad.square().sum().item() for p in layer.parameters() if p.grad is not None]
    assert 0 < sum(squares) < 0.99, "what is shorter stays as it is"


def test_it_learns_with_any_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 1))
    x = torch.randn(32, 4)
    y = x[:, :1] * x[:, 1:2]
    loss = lambda out: (out - y).square().mean((-2, -1))  # noqa: E731
    start = loss(model(x)).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    estimate = Eggroll(model, population=64, sigma=0.05)
    for _ in range(60):
        estimate(lambda members: -loss(model(x.repeat(len(members), 1)).view(len(members), 32, 1)))
        optimizer.step()
    assert loss(model(x)).item() < 0.5 * start


def test_fitness_that_is_no_number_changes_nothing() -> None:
    layer = nn.Linear(3, 4)
    estimate = Eggroll(layer, population=4, sigma=0.1)
    with pytest.raises(FloatingPointError, match="fitness of a member is not finite"):
        estimate(lambda members: torch.tensor([0.0, 1.0, float("nan"), 0.0]))
    assert layer.weight.grad is None and estimate.epoch == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"population": 5}, "population must be even, because members come in pairs, got 5"),
        ({"population": 2.0}, "population must be an integer of at least 2, got 2.0"),
        ({"population": 8, "group_size": 6}, "group_size must be 0 or an even divisor of population=8, got 6"),
        ({"population": 8, "chunk": 3}, "chunk must be even"),
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 1.5}, "rank must be a positive integer, got 1.5"),
        ({"noise_reuse": 0.5}, "noise_reuse must be an integer of at least 0, got 0.5"),
        ({"sigma": 0.0}, "sigma must be a positive finite number such as 0.01, got 0.0"),
        ({"sigma": math.nan}, "sigma must be a positive finite number such as 0.01, got nan"),
        ({"sigma": "x"}, "sigma must be"),
        ({"sigma": None}, "sigma must be"),
        ({"sigma": 10**400}, "sigma must be"),
        ({"sigma": torch.ones(2)}, "sigma must be"),
        ({"baseline": "maybe"}, "baseline must be true or false, got 'maybe'"),
        ({"group_size": 2, "baseline": True}, "baseline needs groups of at least 4 members.*, got 2"),
    ],
)
def test_settings_that_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eggroll(nn.Linear(3, 4), **{"population": 4, "sigma": 0.1, **wrong})


def test_sigma_may_be_any_number() -> None:
    assert Eggroll(nn.Linear(3, 4), population=4, sigma=torch.tensor(0.5)).sigma == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8,), (4, 2, 2), ()])
def test_fitness_is_one_for_each_member(shape: tuple[int, ...]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="one number or one row for each of 4 members"):
        Eggroll(model, population=4, sigma=0.1)(lambda members: torch.zeros(shape))
    assert model.weight.grad is None
