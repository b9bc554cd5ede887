"""Matrix PCA of trained models: atoms, groups by drift, whitened residuals, and the model that comes out."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorank import convert, fit_masa, matrix_pca, merge
from lorank.factors import RIDGE, nearest, whitening
from lorank.fit.pca import calibrate, cuts, drifts
from lorank.methods.masa import MASALinear

VOCABULARY = 96


def deep(small: Callable[..., Any], name: str = "llama", **changes: Any) -> Any:
    """Six blocks, in double precision, with biases that are not zero, as after training."""
    model = small(name, num_hidden_layers=6, **changes).double()
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.fixture
def data() -> list[Tensor]:
    """Three batches of different sizes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (b, 20), generator=generator) for b in (4, 3, 2)]


def layers(model: nn.Module) -> dict[str, MASALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MASALinear)}


# ---- atoms


@pytest.mark.parametrize("atoms", [1, 3, 5])
def test_matrix_pca_keeps_the_leading_eigenvalues(atoms: int) -> None:
    weights = torch.randn(5, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d, c, error = matrix_pca(weights, atoms)
    inner = torch.einsum("iab,jab->ij", d, d)
    torch.testing.assert_close(inner, torch.eye(atoms, dtype=torch.float64), rtol=0, atol=1e-12)
    for block in range(5):
        for s in range(atoms):
            torch.testing.assert_close(c[block, s], torch.trace(d[s].T @ weights[block]))
    residual = weights - sum(c[:, s, None, None] * d[s] for s in range(atoms))
    eigenvalues = torch.linalg.eigvalsh(torch.einsum("iab,jab->ij", weights, weights))  # ascending
    discarded = eigenvalues[: 5 - atoms].sum()
    torch.testing.assert_close(residual.square().sum(), discarded, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(error, discarded, rtol=1e-10, atol=1e-12)
    assert error > 0.1 or atoms == 5


def test_atoms_stay_orthonormal_where_blocks_are_equal() -> None:
    weights = torch.ones(4, 3, 5) * torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None, None]
    d, c, error = matrix_pca(weights, 3)
    torch.testing.assert_close(torch.einsum("iab,jab->ij", d, d), torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.einsum("ls,sab->lab", c, d), weights)
    assert error < 1e-9


def test_matrix_pca_needs_as_many_matrices_as_atoms() -> None:
    for atoms in (0, 4):
        with pytest.raises(ValueError, match=f"atoms must be from 1 to 3, the number of matrices, got {atoms}"):
            matrix_pca(torch.randn(3, 2, 2), atoms)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_trained_model_is_kept(small: Callable[..., Any], tokens: Tensor, tmp_path: Path, name: str) -> None:
    dense = deep(small, name)
    with pytest.warns(UserWarning, match="masa saves no weights"):
        whole = fit_masa(copy.deepcopy(dense), atoms=9)
    torch.testing.assert_close(whole(tokens).logits, dense(tokens).logits, rtol=1e-10, atol=1e-12)

    model = fit_masa(copy.deepcopy(dense), atoms=4)
    if name == "llama":
        for role in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights = torch.stack([block.self_attn.get_submodule(role).weight for block in dense.model.layers])
            kept = torch.stack([block.self_attn.get_submodule(role).weight() for block in model.model.layers])
            eigenvalues = torch.linalg.eigvalsh(torch.einsum("iab,jab->ij", weights, weights))
            torch.testing.assert_close((weights - kept).square().sum(), eigenvalues[:2].sum())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(model.config)  # no weights to analyse: a random start
    assert all(0.015 < d.atoms.std() < 0.025 for d in fresh.base_model.lorank_atoms.values())


def test_one_dictionary_for_all_projections_is_the_nearest(small: Callable[..., Any]) -> None:
    dense = small("llama", num_hidden_layers=3, num_key_value_heads=4).double()
    model = fit_masa(copy.deepcopy(dense), atoms=5, common_dictionary=True)
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
    weights = torch.stack([dense.get_submodule(name).weight for name in names])
    kept = torch.stack([model.get_submodule(name).weight() for name in names])
    eigenvalues = torch.linalg.eigvalsh(torch.einsum("iab,jab->ij", weights, weights))
    torch.testing.assert_close((weights - kept).square().sum(), eigenvalues[:7].sum())


# ---- groups


def test_drift_is_the_divergence_of_mean_predictions(small: Callable[..., Any], data: list[Tensor]) -> None:
    model = deep(small)
    states: list[list[Tensor]] = [[] for _ in range(6)]
    hooks = [
        b.register_forward_hook(lambda m, a, y, i=i: states[i].append(y)) for i, b in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids in data:
            model(ids)
        for hook in hooks:
            hook.remove()
        means = torch.stack([torch.cat([y.flatten(0, 1) for y in seen]).mean(0) for seen in states])
        p = model.lm_head(model.model.norm(means)).softmax(-1)
    expected = [F.kl_div(p[block].log(), p[block - 1], reduction="sum") for block in range(1, 6)]
    model.train()
    found = calibrate(model, iter(data), ["model.layers.0.self_attn.q_proj"], inputs=False)
    torch.testing.assert_close(found.drift, torch.stack(expected), rtol=1e-9, atol=0)
    assert found.whitening == {}
    assert model.training
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_a_block_keeps_a_forward_of_its_own(small: Callable[..., Any], data: list[Tensor]) -> None:
    model, called = deep(small), []
    block = model.model.layers[2]
    plain = block.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return plain(*args, **kwargs)

    expected = calibrate(model, data, ["model.layers.0.self_attn.q_proj"], inputs=False).drift
    block.forward = wrapped
    assert torch.equal(calibrate(model, data, ["model.layers.0.self_attn.q_proj"], inputs=False).drift, expected)
    assert vars(block)["forward"] is wrapped and len(called) >= len(data)


def silence(block: Any, factor: float = 0.0) -> None:
    """A block of Llama that adds nothing, or little, to what it reads."""
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(factor)
        block.mlp.down_proj.weight.mul_(factor)


def test_a_block_that_does_nothing_drifts_nowhere(small: Callable[..., Any], data: list[Tensor]) -> None:
    model = deep(small)
    silence(model.model.layers[2])
    drift = calibrate(model, data, ["model.layers.0.self_attn.q_proj"], inputs=False).drift
    assert drift[1] == 0
    assert all(drift[block - 1] > 1e-6 for block in (1, 3, 4, 5))


def test_groups_are_cut_where_a_block_changes_much(small: Callable[..., Any], data: list[Tensor]) -> None:
    model = deep(small)
    for block in (1, 2, 3, 5):  # so that what the model predicts changes in block 4 alone
        silence(model.model.layers[block], 0.01)
    assert fit_masa(copy.deepcopy(model), data=data, groups=2).config.lorank["arguments"]["groups"] == [0, 4]
    given = fit_masa(copy.deepcopy(model), groups=(0, 4), atoms=1)
    found = fit_masa(model, data=data, groups=2, atoms=1)
    assert [layer.dictionary.key[-1] for name, layer in layers(found).items() if "q_proj" in name] == [*"000011"]
    assert all(map(torch.equal, found.state_dict().values(), given.state_dict().values()))


def test_cuts_leave_the_least_drift_within_groups() -> None:
    drift = torch.rand(7, generator=torch.Generator().manual_seed(0))
    within = lambda firsts: sum(d for block, d in enumerate(drift, 1) if block not in firsts)  # noqa: E731
    for groups in range(1, 9):
        choices = [(0, *c) for c in itertools.combinations(range(1, 8), groups - 1)]
        assert cuts(drift, groups) == min(choices, key=within)
    for groups in (0, 9):
        with pytest.raises(ValueError, match=f"groups must be from 1 to 8, the number of blocks, got {groups}"):
            cuts(drift, groups)


def test_drift_of_distributions_that_are_known() -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]], dtype=torch.float64)
    expected = torch.tensor([0.5 * torch.tensor(4 / 3).double().log().item(), 0.0], dtype=torch.float64)
    torch.testing.assert_close(drifts(p.log() + 3.0), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:masa saves no weights")
def test_groups_of_one_block_are_the_dense_model(architecture: Any, tokens: Tensor, tmp_path: Path) -> None:
    """Also that what blocks give can be replaced in all of them when their outputs are judged."""
    dense = architecture.dense().double()
    model = fit_masa(copy.deepcopy(dense), data=[tokens], groups=2)
    assert model.config.lorank["arguments"]["groups"] == [0, 1]
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-10, atol=1e-12)
    model.save_pretrained(tmp_path)
    assert torch.equal(architecture.auto.from_pretrained(tmp_path).eval()(tokens).logits, model(tokens).logits)


# ---- residuals


def test_the_residual_has_the_least_error_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 12, dtype=torch.float64, generator=generator) @ torch.diag(torch.linspace(3, 0.1, 12).double())
    X = X @ torch.randn(12, 12, dtype=torch.float64, generator=generator)
    residual = torch.randn(9, 12, dtype=torch.float64, generator=generator)
    error = lambda low: (X @ (residual - low).T).norm() / 200**0.5  # noqa: E731
    sigma = torch.linalg.svdvals(X @ residual.T) / 200**0.5  # of the outputs themselves: no factor of Cholesky
    R = whitening(X.T @ X / 200)
    torch.testing.assert_close(R @ R.T, X.T @ X / 200)
    U, s, V = torch.linalg.svd(residual, full_matrices=False)
    for rank in range(1, 10):
        B, A = nearest(residual, rank, R)
        assert B.shape == (9, rank) and A.shape == (rank, 12)
        torch.testing.assert_close(error(B @ A), sigma[rank:].square().sum().sqrt(), rtol=1e-8, atol=1e-10)
        if rank < 9:
            assert error(B @ A) < 0.95 * error(U[:, :rank] * s[:rank] @ V[:rank])


@pytest.mark.parametrize("width", [0, 1, 5])
def test_directions_that_the_data_do_not_enter_cost_a_little(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, width, dtype=torch.float64, generator=generator)
    X = X @ torch.randn(width, 8, dtype=torch.float64, generator=generator)
    gram = X.T @ X / 50
    R = whitening(gram)
    ridge = RIDGE * gram.diagonal().mean() if width else 1.0
    torch.testing.assert_close(R @ R.T, gram + ridge * torch.eye(8))
    residual = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    B, A = nearest(residual, 6, R)
    torch.testing.assert_close(B @ A, residual, rtol=1e-6, atol=1e-6)
    B, A = nearest(residual, max(width, 1), R)  # enough for all that the data see
    assert (X @ (residual - B @ A).T).norm() <= 1e-2 * (X @ residual.T).norm()
    assert (B @ A).norm() < 10 * residual.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors_are_those_of_what_each_projection_reads(
    small: Callable[..., Any], data: list[Tensor], name: str
) -> None:
    model = deep(small, name)
    reader = {"llama": "model.layers.3.self_attn.{}_proj", "gpt2": "transformer.h.3.attn.{}"}[name]
    hear = (
        [reader.format("q"), reader.format("o")]
        if name == "llama"
        else [reader.format("c_attn"), reader.format("c_proj")]
    )
    seen: dict[str, list[Tensor]] = {name: [] for name in hear}
    for one in hear:
        model.get_submodule(one).register_forward_pre_hook(
            lambda m, args, one=one: seen[one].append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        for ids in data:
            model(ids)
    X, Z = (torch.cat(seen[one]) for one in hear)
    wanted = [f"{hear[0]}.query", f"{hear[0]}.value", hear[1]]
    if name == "llama":
        wanted = [hear[0], reader.format("v"), hear[1]]
    found = calibrate(model, data, wanted, drift=False).whitening
    assert [*found] == wanted
    for one, rows in zip(wanted, (X, X, Z), strict=True):
        expected = rows.T @ rows / len(rows)
        ridge = RIDGE * expected.diagonal().mean().item()  # where LayerNorm leaves a direction out
        torch.testing.assert_close(
            found[one] @ found[one].T, expected, rtol=1e-9, atol=1.01 * ridge if name == "gpt2" else 0
        )


@pytest.mark.filterwarnings("ignore:masa saves no weights")
@pytest.mark.parametrize("variant", ["qkv", "qkvo"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_residual_of_full_rank_is_the_dense_model(
    small: Callable[..., Any], data: list[Tensor], tokens: Tensor, name: str, variant: Any
) -> None:
    dense = deep(small, name)
    model = fit_masa(copy.deepcopy(dense), data=data, atoms=1, variant=variant, residual_rank={".": 1.0}, groups=(0, 2))
    assert len(layers(model)) == 6 * (3 if variant == "qkv" else 4)
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-8, atol=1e-9)


def test_each_step_brings_the_outputs_of_a_projection_nearer(
    small: Callable[..., Any], data: list[Tensor], tokens: Tensor, tmp_path: Path
) -> None:
    """Atoms alone, a residual of the weights, a whitened residual; then the model is saved, loaded and merged."""
    dense = deep(small)
    alone = fit_masa(copy.deepcopy(dense), atoms=2, groups=(0, 3))
    model = fit_masa(copy.deepcopy(dense), data=data, atoms=2, groups=(0, 3), residual_rank=4)
    R = calibrate(dense, data, layers(model), drift=False).whitening
    for name, layer in layers(model).items():
        weight = dense.get_submodule(name).weight
        atoms = alone.get_submodule(name).weight()
        U, s, V = torch.linalg.svd(weight - atoms)
        rank = layer.A.out_features
        assert rank == (2 if "k_proj" in name or "v_proj" in name else 4)
        plain = atoms + U[:, :rank] * s[:rank] @ V[:rank]
        errors = [((weight - found) @ R[name]).norm() for found in (layer.weight(), plain, atoms)]
        assert errors == sorted(errors) and errors[0] < errors[1]
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(merge(loaded)(tokens).logits, model(tokens).logits, rtol=1e-9, atol=1e-11)


def test_exact_groups_carry_no_residual(small: Callable[..., Any], data: list[Tensor]) -> None:
    dense = deep(small)
    model = fit_masa(copy.deepcopy(dense), data=data, atoms=0.5, groups=(0, 1), residual_rank=6)
    plain = fit_masa(copy.deepcopy(dense), atoms=0.5, groups=(0, 1))
    for name, layer in layers(model).items():
        exact = ".0." in name
        assert (layer.A is None) == (layer.B is None) == exact
        if exact:
            torch.testing.assert_close(layer.weight(), dense.get_submodule(name).weight, rtol=1e-12, atol=1e-14)
    assert model.num_parameters() - plain.num_parameters() == 5 * (2 * 6 * (32 + 32) + 2 * 3 * (32 + 16))


def test_what_is_excluded_stays_dense(small: Callable[..., Any], data: list[Tensor]) -> None:
    dense = deep(small)
    model = fit_masa(copy.deepcopy(dense), data=data, exclude=r"layers\.0\.", atoms=2, groups=(0, 3), residual_rank=2)
    assert len(layers(model)) == 20
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, dense.model.layers[0].self_attn.q_proj.weight)
    keys = [layers(model)[f"model.layers.{depth}.self_attn.o_proj"].dictionary.key[-1] for depth in range(1, 6)]
    assert keys == [*"00111"]


# ---- bad input


IDS = torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 2}, "data must be batches of token ids .* for a number of groups or for residuals, got None"),
        ({"groups": (0, 3), "residual_rank": 2}, "data must be batches of token ids"),
        ({"data": [IDS]}, "data must be left out without residual_rank or a number of groups"),
        ({"data": [IDS], "groups": (0, 3)}, "data must be left out"),
        ({"data": [], "groups": 2}, "data must have at least one batch"),
        (
            {"data": IDS, "groups": 2},
            r"data must be batches of token ids, tensors \[b, n\] of int64 or int32, got torch.int64 \[4\]",
        ),
        ({"data": [{"input_ids": IDS}], "groups": 2}, "data must be batches of token ids, tensors"),
        ({"data": [IDS.float()], "groups": 2}, "data must be batches of token ids, tensors"),
        ({"data": [IDS.bool()], "groups": 2}, "data must be batches of token ids, tensors"),
        ({"data": [IDS.to(torch.int16)], "groups": 2}, "of int64 or int32, got torch.int16"),
        (
            {"data": [IDS, IDS[:0]], "groups": 2},
            r"data must be batches with tokens, got one of shape \[0, 4\]; leave it out",
        ),
        ({"data": [IDS[:, :0]], "residual_rank": 2}, r"data must be batches with tokens, got one of shape \[1, 0\]"),
        ({"data": [IDS, IDS + VOCABULARY], "groups": 2}, "data must be token ids from 0 to 95, .* got 96; use"),
        ({"data": [IDS - 1], "residual_rank": 2}, "data must be token ids from 0 to 95, .* got -1"),
        (
            {"data": [IDS.repeat(1, 1000)], "groups": 2},
            "data must be sequences of at most .* tokens, .* got 4000; cut them",
        ),
        ({"data": [IDS], "groups": 7}, "each group must contain at least one of the blocks 0 to 5"),
        ({"coefficients": "network"}, "coefficients must be 'table' with Matrix PCA"),
        ({"targets": "o_proj"}, "finds no query or key or value"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(small: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    model = deep(small)
    with pytest.raises(ValueError, match=message):
        fit_masa(model, **fields)
    assert not layers(model)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_groups_need_a_head_and_a_model_that_has_not_diverged(small: Callable[..., Any], data: list[Tensor]) -> None:
    model = deep(small)
    with pytest.raises(
        ValueError, match="model must predict tokens, got LlamaModel; give the model with its head, or the first"
    ):
        fit_masa(model.model, data=data, groups=2)
    assert len(layers(fit_masa(model.model, data=data, groups=(0, 2), residual_rank=2))) == 24
    model = deep(small)
    nn.init.constant_(model.model.layers[2].mlp.down_proj.weight, torch.nan)
    for fields in ({"groups": 2}, {"residual_rank": 2}):
        with pytest.raises(ValueError, match="must be finite numbers; it has diverged"):
            fit_masa(model, data=data, **fields)
    with pytest.raises(ValueError, match="already converted"):
        fit_masa(convert(deep(small), "masa"), data=data, groups=2)
