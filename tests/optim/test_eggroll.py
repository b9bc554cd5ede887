"""EGGROLL against its specification: each member on its own, with its weights written out."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lorank.evolution.egg import EggConfig, EggForCausalLM
from lorank.evolution.eggroll import BLOCK, above_baseline, operations_per_byte, pair_noise, shaped
from lorank.optim import Eggroll, IntegerEggroll


def moves(estimate: Eggroll, member: int) -> dict[nn.Parameter, Tensor]:
    """s σ E of a member for each parameter, by the equation."""
    pairs, sign = range(member // 2, member // 2 + 1), 1 - 2 * (member % 2)
    found = {}
    for p in estimate.perturbed:
        if p.ndim == 2:
            A, B = estimate.factors(p, pairs)
            found[p] = sign * (A[0] @ B[0].T)
        else:
            found[p] = sign * estimate.dense(p, pairs)[0]
    return found


def members_one_by_one(model: nn.Module, estimate: Eggroll, call: Callable[[int], Tensor]) -> Iterator[Tensor]:
    for member in range(estimate.population):
        moved = moves(estimate, member)
        with torch.no_grad():
            for p, move in moved.items():
                p += move
            yield call(member)
            for p, move in moved.items():
                p -= move


@pytest.mark.parametrize(("m", "members", "r"), [(8192, 352, 1), (64, 7, 4)])
def test_operations_per_byte_are_the_papers_for_a_square_matrix(m: int, members: int, r: int) -> None:
    noisy = (m + 2 * r + 1 / 2) / (2 + r * (2 + 2 / m) + m / members)
    assert operations_per_byte(m, m, members, r) == pytest.approx(noisy)
    assert operations_per_byte(m, m, members) == pytest.approx(members * m / (2 * members + m))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_members_output_is_that_of_its_weights_and_a_pairs_mean_that_of_none(kind: Any, rank: int) -> None:
    torch.manual_seed(0)
    layer = (nn.Linear(6, 8) if kind is nn.Linear else Conv1D(8, 6)).double()
    estimate = Eggroll(layer, population=6, sigma=0.5, rank=rank)
    x = torch.randn(6, 3, 5, 6, dtype=torch.float64)  # a member has 3 x 5 rows
    with estimate.perturb(range(6)), torch.no_grad():
        found = layer(x.flatten(0, 1)).view(6, 3, 5, 8)
    for y, expected in zip(found, members_one_by_one(layer, estimate, lambda i: layer(x[i])), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    with estimate.perturb(range(6)), torch.no_grad():
        same = layer(x[:1].expand(6, 3, 5, 6).reshape(18, 5, 6)).view(3, 2, 3, 5, 8)
    torch.testing.assert_close(same.mean(1), layer(x[0]).detach().expand(3, 3, 5, 8))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "qwen3"])
def test_a_language_model_of_transformers(name: str, freeze: bool, small: Any, tokens: Tensor) -> None:
    """Norms, biases, a tied head, positions looked up once for all rows, and members in chunks."""
    model = small("llama", tie_word_embeddings=True) if name == "llama tied" else small(name)
    model = model.double()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in ("llama tied", "gpt2"))
    before = copy.deepcopy(model.state_dict())
    estimate = Eggroll(model, population=4, sigma=0.1, freeze_others=freeze)
    assert any(p.ndim == 1 for p in estimate.perturbed) != freeze
    expected = list(members_one_by_one(model, estimate, lambda i: model(tokens).logits))
    for members in (range(0, 4), range(2, 4)):
        with estimate.perturb(members), torch.no_grad():
            found = model(tokens.repeat(len(members), 1)).logits.view(len(members), *tokens.shape, -1)
        torch.testing.assert_close(found, torch.stack(expected)[members.start :], rtol=1e-6, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 0.01
    model.load_state_dict(before)
    assert not any("forward" in module.__dict__ for module in model.modules())


class Functional(nn.Module):
    """A head that is the embedding with no module of its own, and a matrix and a vector that nobody's forward announces."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.router, self.shift = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        h = nn.functional.linear(self.norm(self.embedding(ids)), self.router, bias=self.shift)
        return nn.functional.linear(h.tanh(), weight=self.embedding.weight)


def test_a_matrix_is_perturbed_wherever_it_is_used() -> None:
    torch.manual_seed(0)
    model, ids = Functional().double(), torch.randint(0, 11, (2, 5))
    estimate = Eggroll(model, population=6, sigma=0.3, rank=2)
    expected = torch.stack(list(members_one_by_one(model, estimate, lambda i: model(ids))))
    with estimate.perturb(range(6)), torch.no_grad():
        found = model(ids.repeat(6, 1)).view(6, 2, 5, 11)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all((found[i] - found[j]).abs().max() > 0.01 for i in range(6) for j in range(i))


class Product(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.wte, self.use = nn.Embedding(8, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, x: x @ m.wte.weight.T, r"the model uses wte.weight in torch.Tensor.T.__get__, where"),
        (lambda m, x: x @ m.wte.weight.t(), "the model uses wte.weight in torch.Tensor.t, where EGGROLL does not know"),
        (lambda m, x: torch.matmul(x, m.wte.weight.mT), "wte.weight"),
        (lambda m, x: nn.functional.linear(m.wte.weight, x), "the model uses wte.weight in torch.nn.functional.linear"),
        (lambda m, x: nn.functional.linear(x, m.wte.weight.float()), "wte.weight in torch.Tensor.float"),
        (lambda m, x: torch.cat([m.wte.weight, x]), "wte.weight in torch.cat"),
        (
            lambda m, x: m.wte(torch.zeros(4, 2).long()) + m.wte(torch.zeros(8, 2).long())[:4],
            "looks up 8 rows for a batch of 4",
        ),
    ],
)
def test_a_use_that_cannot_be_perturbed_is_refused_by_name(use: Any, message: str) -> None:
    model = Product(use)
    estimate = Eggroll(model, population=4, sigma=0.1)
    with estimate.perturb(range(4)), torch.no_grad(), pytest.raises(ValueError, match=message):
        model(torch.zeros(4, 4))
    model.wte.weight.requires_grad_(False)  # what has no noise may be used in any way
    with Eggroll(model, population=4, sigma=0.1).perturb(range(4)), torch.no_grad():
        model(torch.zeros(4, 4))


def test_noise_is_the_same_whenever_asked_for_and_does_not_depend_on_chunks() -> None:
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
        seen.append(estimate.factors(layer.weight, range(2))[0].flatten())
        estimate(lambda members: torch.zeros(len(members)))
    assert len(torch.stack(seen).unique(dim=0)) == distinct


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_entries_of_the_noise_have_variance_one(rank: int) -> None:
    layer = nn.Linear(20, 30, bias=False)
    A, B = Eggroll(layer, population=4, sigma=1.0, rank=rank).factors(layer.weight, range(4000))
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


def test_the_update_draws_the_noise_of_the_forward_pass_to_the_bit(monkeypatch: Any) -> None:
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
def test_the_update_is_the_sum_over_members_and_its_rank_what_they_span(rank: int) -> None:
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
def test_with_a_baseline_the_first_pair_of_each_group_has_no_noise_and_the_update_a_norm_of_one(chunk: int) -> None:
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
    assert sum(p.grad.square().sum() for p in layer.parameters()) < 0.99, "what is shorter stays as it is"  # type: ignore[union-attr]


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has which torch makes inside."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_no_tensor_is_a_matrix_per_member() -> None:
    """The largest tensor of an estimate is an activation or a factor, far below [pairs, a, b]."""

    a, b, N, r = 96, 80, 64, 2
    layer = nn.Linear(b, a)
    x = torch.randn(1, b)
    estimate = Eggroll(layer, population=N, sigma=0.1, rank=r)
    with Largest() as largest:
        estimate(lambda members: layer(x.expand(len(members), b)).sum(1))
    assert largest.numbers <= N * r * (a + b)
    assert N * r * (a + b) < N // 2 * a * b / 5


def test_no_tensor_is_a_matrix_per_member_in_integers() -> None:
    """The largest is the logits of all rows; M1 alone would be 16 times as many numbers per pair, the embedding 32 times."""
    D, pairs = 64, 128
    model = EggForCausalLM(EggConfig(hidden_size=D, num_hidden_layers=1))
    estimate = IntegerEggroll(model, population=2 * pairs, chunk=2 * pairs)
    with Largest() as largest:
        estimate(torch.randint(0, 256, (pairs, 3)))
    assert largest.numbers == pairs * 2 * 256 < pairs * 4 * D * D / 16


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


def test_refusals() -> None:
    layer = nn.Linear(3, 4)
    assert Eggroll(layer, population=4, sigma=torch.tensor(0.5)).sigma == 0.5  # type: ignore[arg-type]
    for wrong, message in [
        ({"population": 5}, "population=5 is not an even number"),
        ({"population": 8, "group_size": 6}, "group_size=6 is neither 0 nor an even divisor of population=8"),
        ({"population": 8, "chunk": 3}, "chunk=3 is not an even number"),
        ({"population": 8, "rank": 0}, "rank=0"),
        ({"population": 8, "sigma": 0.0}, "sigma=0.0"),
        ({"population": 8, "sigma": math.nan}, "sigma=nan is no positive finite number"),
        ({"population": 8, "sigma": "x"}, "sigma='x' is no positive finite number"),
        ({"population": 8, "sigma": None}, "sigma=None is no positive finite number"),
        ({"population": 8, "sigma": 10**400}, "is no positive finite number"),
        ({"population": 8, "sigma": torch.ones(2)}, "is no positive finite number"),
        ({"population": 8, "group_size": 2, "baseline": True}, "leaves no member with noise in groups of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Eggroll(layer, **{"sigma": 0.1, **wrong})
    with pytest.raises(ValueError, match="weight has 3 dimensions; EGGROLL perturbs matrices and vectors"):
        Eggroll(nn.Conv1d(3, 4, 2), population=4, sigma=0.1)
    with (
        pytest.raises(ValueError, match="5 rows, which are not those of 4 members"),
        Eggroll(layer, population=4, sigma=0.1).perturb(range(4)),
    ):
        layer(torch.zeros(5, 3))


def test_a_table_with_as_many_rows_as_the_batch_is_not_taken_for_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(16, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))

    model = Net()
    estimate = Eggroll(model, population=4, sigma=0.1)
    ids = torch.zeros(2, 8, dtype=torch.int64)  # 8 rows of 8
    with pytest.raises(ValueError, match=r"the model uses positions.weight in torch.nn.functional.embedding"):
        estimate(lambda members: model(ids.repeat(len(members), 1)).view(len(members), -1).sum(1))
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("shape", [(8,), (4, 2, 2), ()])
def test_fitness_is_one_for_each_member(shape: tuple[int, ...]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="for 4 members; it has to be one number, or row, for each"):
        Eggroll(model, population=4, sigma=0.1)(lambda members: torch.zeros(shape))
    assert model.weight.grad is None


def test_a_linear_map_of_a_table_is_not_taken_for_the_batch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 3)
            self.register_buffer("table", torch.eye(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.map(self.table).mT

    model = Net()
    with pytest.raises(ValueError, match="the model uses map.weight and map.bias in torch.nn.functional.linear"):
        Eggroll(model, population=4, sigma=0.1)(
            lambda members: model(torch.ones(2 * len(members), 3)).view(len(members), -1).sum(1)
        )


def test_modules_that_mix_rows_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1 normalises all members' rows together; put it in eval\(\)"):
        Eggroll(model, population=4, sigma=0.1)(
            lambda members: model(torch.ones(3 * len(members), 4)).view(len(members), -1).sum(1)
        )
    norm = nn.LayerNorm(4)
    found = Eggroll(norm, population=4, sigma=0.1)(lambda members: norm(input=torch.eye(4)).sum(1))
    assert found.shape == (4,), "an input may be given by its name"


@pytest.mark.parametrize("options", [{"rank": 1.5}, {"population": 2.0}, {"baseline": "maybe"}, {"noise_reuse": 0.5}])
def test_counts_are_integers(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is no integer, true or false"):
        Eggroll(nn.Linear(2, 2), **{"population": 4, "sigma": 0.1, **options})
