"""`lorank.fit`: factors against independent mathematics in double precision, and models that come out of it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, MixtralConfig, MixtralForCausalLM

import lorank
from lorank.analysis.ranks import suggest_ranks
from lorank.fit import SVD, EoRA, Fitted, fit
from lorank.fit.bases import pruned, rounded, two_of_four
from lorank.fit.budget import choose_ranks
from lorank.fit.structure import Metric
from lorank.method import Site
from lorank.rewriting import put
from lorank.sites import find_sites

VOCABULARY = 96


@pytest.fixture
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (b, 20), generator=generator) for b in (4, 3)]


def sites_of(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in find_sites(model)}


def inputs_of(model: Any, data: list[Tensor], name: str) -> Tensor:
    """All that a layer reads, row by row."""
    rows: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize(("kind", "part"), [("llama", ""), ("gpt_neox", ".query_key_value")])
def test_errors_are_the_tails_on_what_comes_through(
    small: Callable[..., Any], data: list[Tensor], kind: str, part: str
) -> None:
    """Each block is fitted to inputs that come through the fitted blocks before it, and no rank-r matrix does better on them."""
    dense = small(kind).double()
    for site in sites_of(dense).values():  # biases are zero in new models
        if site.linear.bias is not None:
            torch.nn.init.normal_(site.linear.bias, std=0.02)
    fitted, seen = copy.deepcopy(dense), {}
    fit(fitted, "svd", data, budget=0.5, see=lambda one: seen.update({one.name: one}))
    stack = "model.layers" if kind == "llama" else "gpt_neox.layers"
    weights = sites_of(dense)
    for depth in (0, 1):
        mixed = copy.deepcopy(dense)
        if depth == 1:
            put(mixed, f"{stack}.0", fitted.get_submodule(f"{stack}.0"))
        for name in [name for name in weights if name.startswith(f"{stack}.{depth}.")]:
            owner = name.rpartition(".")[0] if part and part in name else name
            layer, X, W = fitted.get_submodule(name), inputs_of(mixed, data, owner), weights[name].linear.weight
            sigma, r = torch.linalg.svdvals(X @ W.T), layer.A.out_features
            assert r == int(0.5 * W.shape[0] * W.shape[1] / sum(W.shape))
            error = torch.linalg.norm(X @ (W - layer.B.weight @ layer.A.weight).T)
            torch.testing.assert_close(error, sigma[r:].square().sum().sqrt(), rtol=1e-9, atol=0)
            told: Fitted = seen[name]
            assert told.output_error == pytest.approx((error / sigma.norm()).item(), rel=1e-5)  # R has a ridge
            assert told[1:5] == (*reversed(W.shape), r, r * sum(W.shape))


def test_without_text_errors_are_the_tails_of_weights(small: Callable[..., Any]) -> None:
    dense = small("gpt2").double()
    fitted = lorank.fit(copy.deepcopy(dense), SVD(), budget=0.4)
    for name, site in sites_of(dense).items():
        layer, W = fitted.get_submodule(name), site.linear.weight
        sigma = torch.linalg.svdvals(W)
        error = torch.linalg.norm(W - layer.B.weight @ layer.A.weight)
        torch.testing.assert_close(error, sigma[layer.A.out_features :].square().sum().sqrt(), rtol=1e-12, atol=0)
        assert torch.equal(layer.B.bias, site.linear.bias)


def test_a_sketch_is_close_to_the_tail() -> None:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    X = draw(400, 60) * torch.arange(1, 61) ** -0.5
    R = torch.linalg.cholesky(X.T @ X)
    W, exact = draw(50, 60), draw(50, 6) @ draw(6, 60)
    for root in (None, R):
        found = SVD(solver="randomised").solve(W, Metric(root), 12)
        sigma = torch.linalg.svdvals(W if root is None else W @ root)
        rest = W - found["B"] @ found["A"]
        tail = sigma[12:].norm()
        assert tail * (1 - 1e-9) <= torch.linalg.norm(rest if root is None else rest @ root) <= 1.02 * tail
        low = SVD(solver="randomised").solve(exact, Metric(root), 6)
        torch.testing.assert_close(low["B"] @ low["A"], exact, rtol=0, atol=1e-9)


def test_eora_gives_back_what_rounding_takes(small: Callable[..., Any], data: list[Tensor]) -> None:
    dense = small("llama").double()
    name = "model.layers.0.mlp.up_proj"
    W, X = sites_of(dense)[name].linear.weight, inputs_of(dense, data, name)
    lack = W - rounded(W, 3, 16)
    errors = {}
    for metric, text in (("gram", data), ("identity", None)):
        layer = fit(copy.deepcopy(dense), EoRA(base="int3", group=16), text, budget=0.3).get_submodule(name)
        assert torch.equal(layer.W.weight, W - lack)
        residual = layer.scale * layer.B.weight @ layer.A.weight
        errors[metric] = torch.linalg.norm(X @ (lack - residual).T)
    r = layer.A.out_features
    torch.testing.assert_close(
        errors["gram"], torch.linalg.svdvals(X @ lack.T)[r:].square().sum().sqrt(), rtol=1e-9, atol=0
    )
    assert errors["gram"] < errors["identity"]
    for base in ("2:4", "magnitude", "int2"):
        found = EoRA(base=base).solve(W, Metric(torch.linalg.cholesky(X.T @ X)), rank=min(W.shape))
        torch.testing.assert_close(found["W"] + found["B"] @ found["A"], W, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "auto"), [("gpt2", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)])
@pytest.mark.parametrize("method", ["svd", "eora"])
def test_a_fitted_model_is_saved_loaded_and_merged(
    small: Callable[..., Any], data: list[Tensor], tmp_path: Path, method: str, kind: str, auto: Any
) -> None:
    model = fit(small(kind), method, data, budget=0.3, policy="energy")
    wanted = model(data[0]).logits
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(loaded(data[0]).logits, wanted)
    torch.testing.assert_close(lorank.merge(loaded)(data[0]).logits, wanted, rtol=0, atol=1e-5)


def test_a_mixture_keeps_its_experts(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    model = MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=1, num_local_experts=2)).eval()
    with pytest.raises(ValueError, match=r"does not replace the experts of a mixture, mlp.experts.gate_proj"):
        fit(model, "svd")
    fit(model, "svd", exclude="experts")
    wanted = model(torch.arange(8)[None]).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(8)[None]).logits, wanted)


# ---- ranks


def site(name: str, d_in: int, d_out: int) -> Site:
    return Site(name, "layers.*.w", int(name.split(".")[1]), nn.Linear(d_in, d_out, bias=False, device="meta"))


def test_ranks_follow_from_the_budget() -> None:
    """Greenformers' break-even rank, and PELA's c = 3."""
    square, wide = site("layers.0.w", 768, 768), site("layers.1.w", 768, 3072)
    assert wide.break_even_rank == pytest.approx(614.4)
    assert choose_ranks(SVD(), [square, wide], None, "break-even", dict) == {"layers.0.w": 383, "layers.1.w": 614}
    third = choose_ranks(SVD(), [square], 196_608, "uniform", dict)
    assert third == {"layers.0.w": 128} and 128 * (768 + 768) == 196_608 == 768 * 768 // 3
    sigma = {"layers.0.w": torch.linspace(2, 0, 768), "layers.1.w": torch.linspace(1, 0.9, 768)}
    found = choose_ranks(SVD(), [square, wide], 0.5, "energy", lambda: sigma)
    described = [
        {
            "name": s.name,
            "role": s.role,
            "depth": s.depth,
            "d_in": s.d_in,
            "d_out": s.d_out,
            "output": {"singular_values": v},
        }
        for s, v in zip((square, wide), (sigma[n].tolist() for n in sigma), strict=True)
    ]
    assert found == suggest_ranks(described, "0.5").ranks
    assert sum(found[s.name] * (s.d_in + s.d_out) for s in (square, wide)) <= 0.5 * 768 * (768 + 3072)


# ---- bases


def test_bases_are_what_their_formats_can_hold() -> None:
    W = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        found = rounded(W, bits, 8)
        for columns in (slice(0, 8), slice(8, 16), slice(16, 20)):
            for row, old in zip(found[:, columns], W[:, columns], strict=True):
                step = (max(old.max(), 0) - min(old.min(), 0)) / (2**bits - 1)
                assert (row - old).abs().max() <= step * (1 + 1e-9)
                on_grid = row / step
                torch.testing.assert_close(on_grid, on_grid.round(), rtol=0, atol=1e-9)
                assert on_grid.max() - on_grid.min() < 2**bits
    halves = two_of_four(W).view(6, 5, 4)
    assert ((halves != 0).sum(-1) == 2).all()
    assert (W.view(6, 5, 4)[halves == 0].view(6, 5, 2).abs().amax(-1) <= halves.abs().topk(2).values[..., 1]).all()
    few = pruned(W, 0.7)
    assert (few != 0).sum() == 36 and few.abs()[few != 0].min() > W[few == 0].abs().max()


def test_torchao_packs_rounded_bases_as_they_are() -> None:
    """They are on the grid of its asymmetric configuration, so that its tensors of so many bits stand for the same numbers."""
    ao = pytest.importorskip("torchao.quantization", reason="optional: pip install torchao")
    W = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        layer = nn.Linear(64, 6, bias=False)
        layer.weight = nn.Parameter(base := rounded(W.double(), bits, 32).float())
        kind = ao.IntxWeightOnlyConfig(
            getattr(torch, f"int{bits}"), ao.PerGroup(32), mapping_type=ao.MappingType.ASYMMETRIC
        )
        ao.quantize_(layer, kind)
        assert type(layer.weight) is not nn.Parameter
        torch.testing.assert_close(layer.weight.dequantize(), base, rtol=1e-6, atol=1e-6)


# ---- going on, and what is refused


def test_an_interrupted_fit_goes_on(small: Callable[..., Any], data: list[Tensor]) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    model = small("llama")
    before = model(data[0]).logits

    def interrupt(one: Fitted) -> None:
        if one.name == "model.layers.1.self_attn.k_proj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, "svd", data, finished=kept, see=interrupt)
    assert torch.equal(model(data[0]).logits, before)
    assert len(kept) == 9
    solved: list[str] = []

    class Counted(SVD):
        def solve(self, *arguments: Any) -> dict[str, Tensor]:
            solved.append("")
            return super().solve(*arguments)

    at_once = fit(small("llama"), "svd", data)
    assert torch.equal(fit(model, Counted(), data, finished=kept)(data[0]).logits, at_once(data[0]).logits)
    assert len(solved) == 5


def test_what_cannot_be_fitted_is_refused(small: Callable[..., Any], data: list[Tensor]) -> None:
    model = small("llama")
    before = model(data[0]).logits
    refused: list[tuple[dict[str, Any], str]] = [
        ({"method": "sdv"}, "unknown structure 'sdv'; did you mean 'svd'"),
        ({"method": 3}, "method must be a structure such as SVD"),
        ({"policy": "best"}, "policy must be 'uniform', 'energy' or 'break-even', got 'best'"),
        ({"policy": "break-even", "budget": 0.5}, "budget must be left out"),
        ({"budget": "lots"}, "budget must be a number of parameters"),
        ({"budget": 1.5}, r"budget must be between .* got 1.5"),
        ({"data": []}, "data must have at least one batch"),
        ({"data": [torch.full((1, 4), 99)]}, "token ids from 0 to 95"),
        ({"targets": "nothing"}, "targets must match"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            fit(
                model,
                **{"method": "svd", "budget": 0.5, **({"budget": None} if "policy" in changes else {}), **changes},
            )
    assert torch.equal(model(data[0]).logits, before) and not hasattr(model.config, "lorank")
    with pytest.raises(ValueError, match="must be dense, got one that is already converted"):
        fit(fit(model, "svd"), "svd")
    broken = small("llama")
    torch.nn.init.constant_(broken.model.layers[1].mlp.up_proj.weight, float("nan"))
    with pytest.raises(ValueError, match=r"must be finite numbers, but those of model.layers.1.mlp.up_proj are not"):
        fit(broken, "svd")
