"""Federated rules: exact identities in double precision, against dense products."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorank.factors import Pair
from lorank.federated.average import AVERAGE, lost
from lorank.federated.fedpgp import Prompt, begin, contrast, fedpgp
from lorank.federated.rule import Factors, Reduced, Rule, shares, shortened
from lorank.federated.rule import begin as factors_at_first
from lorank.federated.table import RULES, find, register

EXACT = {"rtol": 0, "atol": 1e-12}
SHAPES = {"x": (9, 7), "y": (5, 11)}
COUNTS = (50, 30, 20)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(ranks: Sequence[int], *, shared_A: bool = False) -> list[dict[str, Pair]]:
    return [
        {
            name: (draw(m, r, seed=10 * i + m), draw(r, n, seed=n + (0 if shared_A else 100 * i)))
            for name, (m, n) in SHAPES.items()
        }
        for i, r in enumerate(ranks)
    ]


def mean_update(after: Sequence[Factors], name: str) -> Tensor:
    return sum(count / 100 * one[name][0] @ one[name][1] for count, one in zip(COUNTS, after, strict=True))  # type: ignore[return-value]


def reduced(rule: str, after: Sequence[Factors]) -> Reduced:
    before, given = copy.deepcopy(after[0]), copy.deepcopy([*after])
    found = find(rule).reduce(before, after, COUNTS)
    for one, copied in zip(after, given, strict=True):
        assert all(torch.equal(a, b) for name in SHAPES for a, b in zip(one[name], copied[name], strict=True)), "pure"
    return found


def test_flora_loses_nothing_of_clients_with_different_ranks() -> None:
    after = states((2, 4, 1))
    found = reduced("flora", after)
    assert found.factors is None and found.merged is not None
    for name, (m, n) in SHAPES.items():
        B, A = found.merged[name]
        assert B.shape == (m, 7) and A.shape == (7, n)
        torch.testing.assert_close(B @ A, mean_update(after, name), **EXACT)
        wrong = sum((p / 100) ** 2 * one[name][0] @ one[name][1] for p, one in zip(COUNTS, after, strict=True))
        assert (B @ A - wrong).norm() > 0.3 * (B @ A).norm(), "weights on both factors would count twice"


def test_averaging_both_factors_loses_their_covariance() -> None:
    after = states((3, 3, 3))
    found = reduced("average", after).factors
    assert found is not None
    for name in SHAPES:
        B, A = found[name]
        covariance = sum(
            p / 100 * (one[name][0] - B) @ (one[name][1] - A) for p, one in zip(COUNTS, after, strict=True)
        )
        exact = mean_update(after, name)
        torch.testing.assert_close(exact - B @ A, covariance, **EXACT)
        part = lost([one[name] for one in after], COUNTS)
        assert part == pytest.approx(float(covariance.norm() / exact.norm()), abs=1e-12) and part > 0.3
    same = states((3, 3, 3), shared_A=True)
    assert lost([one["x"] for one in same], COUNTS) < 1e-12


@pytest.mark.parametrize("rule", ["ffa", "fedsvd"])
def test_rules_with_one_A_are_exact(rule: str) -> None:
    """Without reading the A of a client, which did not train it."""
    after = states((3, 3, 3), shared_A=True)
    unread = [{name: (B, torch.full_like(A, torch.nan)) for name, (B, A) in one.items()} for one in after]
    found = find(rule).reduce(after[0], unread, COUNTS).factors
    assert found is not None
    for name in SHAPES:
        B, A = found[name]
        torch.testing.assert_close(B @ A, mean_update(after, name), **EXACT)
        if rule == "ffa":
            assert A is after[0][name][1]
        else:
            torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=A.dtype), **EXACT)
            assert torch.linalg.matrix_norm(A, 2) == pytest.approx(1, abs=1e-12)
    zero = [{name: (0 * B, A) for name, (B, A) in one.items()} for one in after]
    first = find("fedsvd").reduce(zero[0], zero, COUNTS).factors
    assert first is not None and not first["x"][0].any()
    torch.testing.assert_close(first["x"][1] @ first["x"][1].T, torch.eye(3, dtype=torch.float64), **EXACT)


def test_with_an_orthonormal_A_the_gradient_of_B_is_bounded() -> None:
    """|∂l/∂B| <= |∂l/∂y| |x|."""
    A = find("fedsvd").reduce(*_one_client()).factors["x"][1]  # type: ignore[index]
    B, x = draw(9, 3, seed=1).requires_grad_(), draw(7, seed=2)
    y = B @ A @ x
    y.retain_grad()
    (y.sin().sum()).backward()
    assert B.grad is not None and y.grad is not None
    assert B.grad.norm() <= y.grad.norm() * x.norm() + 1e-12


def _one_client() -> tuple[Factors, Sequence[Factors], Sequence[float]]:
    (one,) = states((3,))
    return one, [one], [1.0]


def test_best_is_the_nearest_pair_of_that_rank() -> None:
    after = states((2, 3, 1))
    before = states((3,))[0]
    found = find("best").reduce(before, after, COUNTS).factors
    assert found is not None
    for name in SHAPES:
        exact, (B, A) = mean_update(after, name), found[name]
        assert A.shape[0] == 3
        tail = torch.linalg.svdvals(exact)[3:].square().sum().sqrt()
        torch.testing.assert_close((exact - B @ A).norm(), tail, **EXACT)


def test_all_rules_are_pure_and_agree_on_one_client() -> None:
    """The update of a single client is kept, by whatever rule. A new rule is tested here too."""
    before, after, weights = _one_client()
    for rule in RULES.values():
        found = rule.reduce(before, after, weights)
        pairs = found.merged or found.factors
        assert pairs is not None
        for name, (B, A) in after[0].items():
            torch.testing.assert_close(pairs[name][0] @ pairs[name][1], B @ A, **EXACT)
    with pytest.raises(ValueError, match=r"did you mean 'flora'\? The rules are: average, flora"):
        find("florra")
    with pytest.raises(ValueError, match="the rule name 'ffa' is already in use"):
        register(Rule(name="ffa", reduce=AVERAGE.reduce))
    with pytest.raises(ValueError, match=r"positive sum, got \[0, 0\]"):
        shares([0, 0])


def test_new_factors_follow_from_the_seed_and_ranks_are_nested() -> None:
    drawn = [factors_at_first(SHAPES, r, torch.Generator().manual_seed(3)) for r in (4, 4)]
    assert all(torch.equal(drawn[0][name][1], drawn[1][name][1]) and not drawn[0][name][0].any() for name in SHAPES)
    assert drawn[0]["x"][1].abs().max() <= 7**-0.5
    short = shortened(drawn[0], 2)
    assert short["y"][0].shape == (5, 2) and torch.equal(short["y"][1], drawn[0]["y"][1][:2])


# ---- FedPGP


def test_the_personal_term_of_low_rank_stays_with_its_client() -> None:
    clients = [begin(6, 10, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for one in clients:
        assert torch.linalg.matrix_rank(one.whole() - one.shared, atol=1e-6) == 2
    sent = [one.shared for one in clients]
    after = [fedpgp(one, sent, COUNTS) for one in clients]
    wanted = sum(c / 100 * p for c, p in zip(COUNTS, sent, strict=True))
    for now, then in zip(after, clients, strict=True):
        torch.testing.assert_close(now.shared, wanted)
        assert now.U is then.U and now.V is then.V
    without = begin(6, 10, 0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(without.whole(), without.shared), "with rank 0 and without the contrast it is federated CoOp"
    for part in begin(60, 80, 50, generator=torch.Generator().manual_seed(0)):
        assert part.std() == pytest.approx(0.02, rel=0.05)


def test_contrast_is_a_cross_entropy_of_two_cosines() -> None:
    a, t, p = (draw(4, 10, seed=i) for i in range(3))
    cosines = torch.stack([(t * other).sum(1) / t.norm(dim=1) / other.norm(dim=1) for other in (a, p)], 1)
    wanted = torch.nn.functional.cross_entropy(cosines / 0.5, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(contrast(a, t, p), wanted, **EXACT)


def test_personal_prompts_fit_what_clients_disagree_about() -> None:
    """A toy encoder, and two clients with opposite labels for a third of the classes. Without a personal term it is federated CoOp."""
    generator = torch.Generator().manual_seed(0)
    encoder = torch.nn.utils.skip_init(torch.nn.Linear, 8, 8)
    torch.nn.init.orthogonal_(encoder.weight, generator=generator)
    torch.nn.init.zeros_(encoder.bias)
    written, names = torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)
    images = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1)
    labels = [torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([1, 0, 2, 3, 4, 5])]

    def features(prompt: Tensor) -> Tensor:  # of the 6 classes
        return torch.nn.functional.normalize(torch.tanh(encoder(names + prompt)), dim=1)

    def losses(rank: int, mu: float) -> float:
        clients = [begin(6, 8, rank, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        clients = [Prompt(clients[0].shared, one.U, one.V) for one in clients]
        for _ in range(8):
            trained = []
            for one, wanted in zip(clients, labels, strict=True):
                now = Prompt(*(tensor.clone().requires_grad_() for tensor in one))
                moving = torch.optim.SGD([tensor for tensor in now if tensor.numel()], lr=2.0)
                for _ in range(3):
                    ours = features(now.whole())
                    loss = torch.nn.functional.cross_entropy(10 * images @ ours.T, wanted)
                    loss = loss + mu * contrast(features(written), features(now.shared), ours) if mu else loss
                    moving.zero_grad()
                    loss.backward()
                    moving.step()
                trained.append(Prompt(*(tensor.detach() for tensor in now)))
            clients = [fedpgp(one, [each.shared for each in trained], [1, 1]) for one in trained]
        with torch.no_grad():
            found = [
                torch.nn.functional.cross_entropy(10 * images @ features(one.whole()).T, wanted)
                for one, wanted in zip(clients, labels, strict=True)
            ]
        return float(sum(found)) / 2

    shared_alone = losses(0, 0.0)
    assert losses(4, 1.0) < 0.5 * shared_alone
