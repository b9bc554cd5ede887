"""Structure-aware learning rates: the table of multipliers, the same change of outputs at every width, and groups."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorank
from lorank import FactorLR
from lorank.layers import LowRankLinear, entry_std
from lorank.optim.factor_lr import factor_stds, initialise, multiplier, muon_multiplier
from lorank.optim.pairs import pairs
from lorank.sizes import SIZES
from tests.conftest import ARCHITECTURES


def test_the_table_of_multipliers_and_deviations() -> None:
    """To three digits, at the ranks of the presets; the second and third columns are CoLA's s and the entries of its B A."""
    rows = {
        ("60m", "attention"): (0.5, 2.0, 0.0221, 0.0884, 0.0526, 0.0313),
        ("60m", "up"): (0.5, 2.0, 0.0221, 0.0884, 0.0451, 0.0230),
        ("60m", "down"): (0.5, 5.375, 0.0082, 0.0884, 0.0451, 0.0230),
        ("130m", "attention"): (0.5, 1.5, 0.0208, 0.0625, None, None),
        ("1b", "attention"): (0.5, 2.0, 0.0110, 0.0442, 0.0263, 0.0156),
        ("1b", "down"): (0.5, 5.333, None, 0.0442, None, None),
    }
    for (size, which), printed in rows.items():
        d, f, *_, r = SIZES[size]
        d_in, d_out = {"attention": (d, d), "up": (d, f), "down": (f, d)}[which]
        A, B, s = *factor_stds(d_in, d_out, r), entry_std(d_in, d_out, r)
        found = (multiplier(d_in, d_in, 2), multiplier(d_in, r, 2), A, B, s, r**0.5 * s * s)
        for ours, theirs in zip(found, printed, strict=True):
            assert theirs is None or ours == pytest.approx(theirs, rel=5e-3), (size, which)
    assert [multiplier(768, 768, 1), multiplier(768, 768, 1, 256 / 768)] == [1, 1 / 3], "one factor: a dense layer"


@pytest.mark.parametrize(("d_in", "d_out", "r"), [(512, 512, 128), (1376, 512, 128), (512, 1376, 128)])
def test_a_draw_has_products_of_the_deviation_it_should_have(d_in: int, d_out: int, r: int) -> None:
    layer = LowRankLinear(d_in, d_out, r)
    initialise(layer, torch.Generator().manual_seed(0))
    A, B = factor_stds(d_in, d_out, r)
    found = (layer.B.weight @ layer.A.weight).std().item()
    assert found == pytest.approx(r**0.5 * A * B, rel=0.02) == pytest.approx(A, rel=0.02)


def change(width: int, rule: bool, seed: int) -> tuple[float, float, float]:
    """Root mean squares of what a step of AdamW changes in an output: in all, and the first order of A's and of B's part."""
    g = torch.Generator().manual_seed(seed)
    layer = LowRankLinear(width, width, width // 4)
    initialise(layer, g)
    x, along = torch.randn(1, width, generator=g), torch.randn(1, width, generator=g)
    method: Any = FactorLR(base_width=64) if rule else FactorLR()
    layer.get_input_embeddings = lambda: nn.Embedding(1, width)  # type: ignore[assignment]
    groups = [{"params": list(layer.parameters()), "weight_decay": 0.0}]
    if rule:
        groups = method.parameter_groups(layer, groups, None, None)
    optimizer = method.optimizer(groups, lr=1e-3, eps=0.0)
    before, A, B = layer(x).detach(), layer.A.weight.detach().clone(), layer.B.weight.detach().clone()
    (layer(x) * along).sum().backward()
    optimizer.step()
    with torch.no_grad():
        parts = (layer(x) - before, (x @ (layer.A.weight - A).T) @ B.T, (x @ A.T) @ (layer.B.weight - B).T)
        return tuple(part.square().mean().sqrt().item() for part in parts)  # type: ignore[return-value]


def test_a_step_changes_outputs_alike_at_every_width() -> None:
    """Without the rule in proportion to the width."""
    widths = (128, 256, 512, 1024, 2048)
    mean = lambda rule: [torch.tensor([change(w, rule, s) for s in range(5)]).mean(0).tolist() for w in widths]  # noqa: E731
    ruled, plain = mean(True), mean(False)
    assert [total for total, _, _ in ruled] == pytest.approx([0.0346, 0.0333, 0.0334, 0.0330, 0.0335], rel=0.1)
    assert [total for total, _, _ in plain] == pytest.approx([0.11, 0.23, 0.46, 0.91, 1.86], rel=0.15)
    for _, of_A, of_B in ruled:
        assert of_A == pytest.approx(ruled[0][1], rel=0.1) and of_B == pytest.approx(ruled[0][2], rel=0.1)
        assert of_A / of_B == pytest.approx(2.1, rel=0.15), "z is half as large as x at a rank of a quarter"


def test_muons_rule_is_the_spectral_norm_per_factor() -> None:
    """0.2 √w₀ √(m/n) / k in place of 0.2 √max(m, n), whatever the width."""
    for (m, n), k, base in itertools.product([(128, 512), (512, 128), (1376, 128), (512, 512)], (1, 2), (64, 512)):
        length = 0.2 * max(m, n) ** 0.5 * muon_multiplier(m, n, k, base)
        assert length == pytest.approx(0.2 * (base * m / n) ** 0.5 / k)
    W = nn.Parameter(torch.zeros(24, 6, dtype=torch.float64))
    given = {"params": [W], "rule": "muon", "lr_multiplier": muon_multiplier(24, 6, 2, 16)}
    optimizer = FactorLR(rule="muon").optimizer([given], lr=0.1)
    W.grad = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    spectral = torch.linalg.svdvals(W.detach()) / (0.1 * 0.2 * (16 * 24 / 6) ** 0.5 / 2)
    assert spectral.min() > 0.68 and spectral.max() < 1.21  # Newton-Schulz brings singular values near 1


# ---- groups


@pytest.mark.parametrize("method", ["low-rank", "cola", "cola-m", "crnet", "sltrain"])
def test_one_group_for_each_multiplier(method: str) -> None:
    model = lorank.convert(ARCHITECTURES["llama"].dense(), lorank.table.find(method)(rank=4))
    optimizer = lorank.optimizer(model, FactorLR(), lr=0.01)
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(given) == len(set(given)) and set(given) == set(model.parameters())
    times = [group["lr_multiplier"] for group in optimizer.param_groups]
    assert len(set(times)) == len(times) == len({pair.d_in for pair in pairs(model)}) + 2
    of = {p: group["lr_multiplier"] for group in optimizer.param_groups for p in group["params"]}
    found = list(pairs(model))
    assert found and all((of[pair.A], of[pair.B]) == (0.5, pair.d_in / 8) for pair in found)
    factors = {p for pair in found for p in (pair.A, pair.B)}
    assert all(times == 1 for p, times in of.items() if p not in factors)


def test_a_base_width_slows_all_matrices_but_embeddings() -> None:
    model = lorank.convert(ARCHITECTURES["llama"].dense(), "sltrain")
    width = model.config.hidden_size
    method = FactorLR(base_width=width // 2, input_lr=0.1)
    times = {name: method.multipliers(model).get(p, 1.0) for name, p in model.named_parameters()}
    for name, value in times.items():
        if name.endswith("A.weight"):
            assert value == 1 / 4
        elif name.endswith(("values", "lm_head.weight")):
            assert value == 1 / 2
        elif name.endswith(("norm.weight", "bias")):
            assert value == 1
    assert times["model.embed_tokens.weight"] == 0.1
    model.lm_head.weight = model.model.embed_tokens.weight
    assert method.multipliers(model)[model.lm_head.weight] == 0.1, "a tied head follows the embedding"
    with pytest.raises(ValueError, match="must have input embeddings.* leave out base_width"):
        FactorLR(base_width=8).multipliers(nn.Linear(4, 4))


def test_decay_may_be_left_as_it_is() -> None:
    model = lorank.convert(ARCHITECTURES["llama"].dense(), "low-rank")
    for constant in (False, True):
        optimizer = lorank.optimizer(model, FactorLR(constant_decay=constant), lr=0.01, weight_decay=0.1)
        shrunk = {round(g["lr_multiplier"] * g["weight_decay"], 6) for g in optimizer.param_groups if g["weight_decay"]}
        assert (shrunk == {0.1}) == constant


def curve(optimizer: Any, W: nn.Parameter, steps: range) -> Tensor:
    for step in steps:
        W.grad = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return W.detach().clone()


def test_schedules_and_resumes_keep_the_multiplier() -> None:
    """Also a schedule that sets the rate of all groups, as torch's OneCycleLR does."""
    start = torch.ones(3, 4, dtype=torch.float64)
    ours, theirs, resumed = (nn.Parameter(start.clone()) for _ in range(3))
    make = lambda W: FactorLR().optimizer([{"params": [W], "lr_multiplier": 2.0}], lr=0.1)  # noqa: E731
    one, other, later = make(ours), torch.optim.AdamW([theirs], lr=0.2, weight_decay=0.0), make(resumed)
    assert torch.allclose(curve(one, ours, range(3)), curve(other, theirs, range(3)), rtol=1e-12)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    later.load_state_dict(torch.load(file))
    resumed.data.copy_(ours.data)
    for optimizer, lr in ((one, 0.01), (later, 0.01), (other, 0.02)):
        optimizer.param_groups[0]["lr"] = lr
    assert torch.equal(curve(later, resumed, range(3, 6)), curve(one, ours, range(3, 6)))
    assert torch.allclose(ours, curve(other, theirs, range(3, 6)), rtol=1e-12)
    with pytest.raises(ValueError, match="lr_multiplier must be a number of at least 0, got -1"):
        one.add_param_group({"params": [nn.Parameter(start)], "lr_multiplier": -1})


class Perceptron(nn.Module):
    """Tokens through an embedding, a low-rank layer and a head that starts at zero."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(64, width), nn.Linear(width, 8, bias=False)
        self.hidden = LowRankLinear(width, width, width // 4)
        initialise(self.hidden)
        nn.init.zeros_(self.head.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids).mean(1)
        return self.head(torch.tanh(h * 2 + self.hidden(torch.tanh(h * 2))))


def best(width: int, seed: int, rates: list[float], rule: bool = True) -> int:
    ids = torch.randint(0, 64, (128, 4), generator=torch.Generator().manual_seed(seed))
    labels = (ids.sum(1) * 5 // 7) % 8
    losses = []
    for lr in rates:
        model = Perceptron(width, seed)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        method = FactorLR(base_width=64)
        groups = method.parameter_groups(model, groups, None, None) if rule else groups
        optimizer = method.optimizer(groups, lr=lr)
        for _ in range(30):
            loss = nn.functional.cross_entropy(model(ids), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return min(range(len(rates)), key=losses.__getitem__)


def test_the_best_rate_of_a_small_model_is_that_of_a_large_one() -> None:
    """Within one step of a grid of factors of three; two seeds."""
    rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    for seed in range(2):
        small, large = (best(width, seed, rates) for width in (64, 512))
        assert 0 < small < len(rates) - 1 and abs(small - large) <= 1, (seed, small, large)
    assert best(64, 0, rates, rule=False) - best(512, 0, rates, rule=False) == 2, (
        "without the rule it moves by a factor of 9"
    )


def test_a_copy_of_groups_is_left_as_it_was() -> None:
    model = lorank.convert(ARCHITECTURES["llama"].dense(), "cola")
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    before = copy.copy(groups[0])
    FactorLR().parameter_groups(model, groups, None, None)
    assert groups == [before]
