"""MASA: its sizes and limits, groups of blocks and residuals."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BartConfig, BartModel, GPT2Config, GPT2LMHeadModel

from lorank import MASA, convert, freeze_coefficients, merge
from lorank.accounting import count_parameters
from lorank.dictionary import Dictionary
from lorank.method import SHARED
from lorank.methods.masa import MASALinear
from lorank.plan.dry_run import plan
from lorank.train.recipe import Recipe
from tests.methods.masa.conftest import TABLE, deep, dictionaries, elements, layers, loss_of

# ---- 1, 5: sizes


@pytest.mark.parametrize(
    ("d", "blocks", "heads", "total", "attention", "atoms", "coefficients"),
    [
        (768, 12, 12, 109_510_656, 28_311_552, 9_437_184, 192),
        (1024, 24, 16, 334_757_888, 100_663_296, 33_554_432, 768),
        (1536, 24, 12, 728_629_248, 226_492_416, 75_497_472, 768),
    ],
)
def test_the_papers_sizes(
    d: int, blocks: int, heads: int, total: int, attention: int, atoms: int, coefficients: int
) -> None:
    with torch.device("meta"):
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=32_000, n_embd=d, n_layer=blocks, n_head=heads))

    def matrices() -> int:  # the paper's formula omits biases, norms and positions
        inside = [p for p in model.transformer.parameters() if p.ndim > 1]
        return elements(inside) - model.transformer.wpe.weight.numel()

    before = matrices()
    assert before == total
    convert(model, MASA(**TABLE))
    found = dictionaries(model).values()
    assert elements(d.atoms for d in found) == atoms
    assert elements(d.coefficients.values for d in found) == coefficients
    assert before - matrices() == attention - atoms - coefficients
    assert 1 - atoms / attention == pytest.approx(2 / 3, abs=1e-12)
    if d == 768:
        assert 1 - (atoms + coefficients) / attention == pytest.approx(0.66665988, abs=5e-9)


@pytest.mark.parametrize("atoms", [1, 2, 4])
def test_without_the_output_projection_a_quarter_less_is_saved(small: Callable[..., Any], atoms: int) -> None:
    heads = {"num_key_value_heads": 4}  # four square projections, as in the paper
    dense, model = (deep(small, **heads) for _ in range(2))
    convert(model, MASA(atoms=atoms, variant="qkv", **TABLE))
    for before, after in zip(dense.model.layers, model.model.layers, strict=True):
        assert type(after.self_attn.o_proj) is nn.Linear
        assert torch.equal(after.self_attn.o_proj.weight, before.self_attn.o_proj.weight)
    saved = dense.num_parameters() - model.num_parameters() + 3 * 6 * atoms  # coefficients aside
    assert saved / (4 * 6 * 32 * 32) == pytest.approx(0.75 * (1 - atoms / 6), abs=1e-12)


def test_parameters_of_the_coefficient_network(small: Callable[..., Any]) -> None:
    network: Any = next(iter(dictionaries(convert(deep(small), MASA())).values())).coefficients
    assert elements(network.parameters()) == 6 * 32 + 6272 + 65 * 2
    other = convert(deep(small), MASA(embedding_width=5, mlp_width=7))
    network = next(iter(dictionaries(other).values())).coefficients
    assert [p.shape for p in network.parameters()] == [(6, 5), (7, 5), (7,), (7, 7), (7,), (2, 7), (2,)]


def test_atoms_count_as_part_of_the_blocks(small: Callable[..., Any]) -> None:
    dense, model = deep(small), convert(deep(small), MASA(**TABLE))
    saved = dense.num_parameters() - model.num_parameters()
    assert saved > 0
    assert count_parameters(dense).blocks - count_parameters(model).blocks == saved
    assert all(name.startswith(SHARED) for name, _ in model.model.named_children() if "atoms" in name)
    planned = plan(Recipe(method="masa", rank=None))
    after = sum(row.parameters_after for row in planned.rows)
    assert after == pytest.approx(planned.model.parameters.blocks, rel=0.01)  # but for norms


def test_flops_of_a_layer() -> None:
    layer = MASALinear(Dictionary("q", 6, (24, 16), 3, "network"), 2, False)
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.randn(10, 16, requires_grad=True))
        assert counter.get_total_flops() == 2 * 10 * 24 * 16 + 2 * 3 * 24 * 16
        y.sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 10 * 24 * 16 + 2 * 3 * 24 * 16)


# ---- 2: limits


def test_one_atom_per_block_is_the_dense_model(small: Callable[..., Any], tokens: Tensor) -> None:
    dense = deep(small)
    with pytest.warns(UserWarning, match="masa saves no weights in model.* as many atoms as matrices"):
        model = convert(deep(small), MASA(atoms=6, **TABLE))
    for name, layer in layers(model).items():
        assert not torch.equal(layer.dictionary(layer.depth), dense.get_submodule(name).weight)
        with torch.no_grad():
            layer.dictionary.atoms[layer.depth] = dense.get_submodule(name).weight
            nn.init.eye_(layer.dictionary.coefficients.values)  # type: ignore[arg-type]
    assert torch.equal(model(tokens).logits, dense(tokens).logits)


def test_a_single_atom_is_one_matrix_for_all_blocks(small: Callable[..., Any], tokens: Tensor) -> None:
    dense, model = deep(small), convert(deep(small), MASA(atoms=1, **TABLE))
    for name, layer in layers(model).items():
        nn.init.ones_(layer.dictionary.coefficients.values)  # type: ignore[arg-type]
        dense.get_submodule(name).weight.data = layer.dictionary.atoms[0].detach()
    assert torch.equal(model(tokens).logits, dense(tokens).logits)


# ---- one dictionary for all projections


COMMON: dict[str, Any] = {"common_dictionary": True}
SQUARE: dict[str, Any] = {"num_key_value_heads": 4}
WHAT = {"layers": 3, "attention_heads": 4, "ffn_dim": 64}


@pytest.mark.parametrize(("variant", "types"), [("qkvo", 4), ("qkv", 3)])
@pytest.mark.parametrize("coefficients", ["network", "table"])
def test_all_projections_mix_the_same_atoms(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path, variant: Any, types: int, coefficients: Any
) -> None:
    widths = {"embedding_width": 5, "mlp_width": 7} if coefficients == "network" else {}
    fields: dict[str, Any] = {"variant": variant, "coefficients": coefficients, **widths}
    model = convert(deep(small, **SQUARE), MASA(**COMMON, **fields))
    ((key, dictionary),) = dictionaries(model).items()
    matrices, atoms = 6 * types, 2 * types  # a third, as with one dictionary for each
    assert (key, dictionary.atoms.shape) == ("model_layers_common", (atoms, 32, 32))
    each = layers(model)
    assert sorted(layer.depth for layer in each.values()) == [*range(matrices)]
    assert [name.split(".")[2] for name in sorted(each, key=lambda name: each[name].depth)] == [
        str(block) for block in range(6) for _ in range(types)
    ]
    network = matrices * 5 + 7 * (5 + 7 + 2) + atoms * (7 + 1)
    held = deep(small, **SQUARE).num_parameters() - (matrices - atoms) * 32 * 32
    held += network if coefficients == "network" else matrices * atoms
    assert model.num_parameters() == held

    C = torch.stack([dictionary.coefficients(i) for i in range(matrices)]).detach()
    for name, layer in each.items():
        weight = torch.einsum("s,sio->io", C[layer.depth], dictionary.atoms.detach())
        torch.testing.assert_close(merge(model).get_submodule(name).weight, weight)
    loss_of(model.train(), tokens).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in dictionary.parameters())

    before = model.eval()(tokens).logits
    model.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(loaded(tokens).logits, before)
    assert len(dictionaries(loaded)) == 1
    if coefficients == "network":
        freeze_coefficients(loaded).save_pretrained(tmp_path / "frozen")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "frozen").eval()(tokens).logits, before)


def test_a_plan_counts_a_common_dictionary_and_its_network() -> None:
    options = {**COMMON, "embedding_width": 5, "mlp_width": 7, "atoms": 3}
    found = plan(Recipe(method="masa", size="tiny", vocab_size=64, rank=None, options=options))
    shown = {row.role: row.parameters_after for row in found.rows}
    assert shown["model.lorank_atoms"] == 3 * 256**2 + 8 * 5 + 7 * (5 + 7 + 2) + 3 * 8


def test_groups_of_a_common_dictionary_cut_between_blocks(small: Callable[..., Any]) -> None:
    for groups, blocks in ((4, [2, 1, 2, 1]), ((0, 5), [5, 1])):
        model = convert(deep(small, **SQUARE), MASA(**COMMON, groups=groups, residual_rank=2, **TABLE))
        found = [d.coefficients.values.shape for d in dictionaries(model).values()]
        assert found == [(4 * count, round(4 * count / 3)) for count in blocks]
        numbers = {(name.split(".")[2], layer.dictionary.key) for name, layer in layers(model).items()}
        assert len(numbers) == 6


def test_projections_of_two_shapes_cannot_share_atoms(small: Callable[..., Any]) -> None:
    model = deep(small)  # fewer key than query heads
    with pytest.raises(ValueError, match=r"q_proj, .*k_proj.* must be the same .*; leave out common_dictionary"):
        convert(model, MASA(**COMMON))
    assert not layers(model)


def test_an_encoder_and_a_decoder_have_a_dictionary_each() -> None:
    shape: dict[str, Any] = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in WHAT.items()}
    with torch.device("meta"):
        model = convert(BartModel(BartConfig(vocab_size=96, d_model=32, **shape)), MASA(**COMMON))
    assert [*dictionaries(model)] == ["encoder_layers_common", "decoder_layers_common"]


# ---- groups and residuals


GROUPED: dict[str, Any] = {"groups": (0, 4), "residual_rank": 6}


@pytest.mark.parametrize("variant", ["qkv", "qkvo"])
@pytest.mark.parametrize("coefficients", ["network", "table"])
@pytest.mark.parametrize("heads", [4, 2])
def test_parameters_of_groups_and_residuals(
    small: Callable[..., Any], variant: Any, coefficients: Any, heads: int
) -> None:
    shape = {"num_key_value_heads": heads}
    model = convert(deep(small, **shape), MASA(variant=variant, coefficients=coefficients, **GROUPED))
    held = deep(small, **shape).num_parameters()
    for d_out, rank in ((32, 6), (8 * heads, 3), (8 * heads, 3), (32, 6))[: len(variant)]:
        held += -6 * 32 * d_out + 6 * rank * (32 + d_out)  # for six dense matrices six residuals
        for blocks, atoms in ((4, 1), (2, 1)):  # a third of each group's blocks
            network = 32 * blocks + 6272 + 65 * atoms
            held += atoms * 32 * d_out + (network if coefficients == "network" else blocks * atoms)
    assert model.num_parameters() == held
    assert count_parameters(model).blocks == held - 2 * 96 * 32 - 32


@pytest.mark.parametrize("coefficients", ["network", "table"])
def test_groups_with_an_atom_for_each_block_have_no_residual(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path, coefficients: Any
) -> None:
    """Groups of one, two and three blocks with two atoms at most: the last alone is not exact."""
    fields: dict[str, Any] = {"atoms": 2, "groups": (0, 1, 3), "coefficients": coefficients}
    model = convert(deep(small, num_key_value_heads=4), MASA(**fields, residual_rank=4))
    plain = convert(deep(small, num_key_value_heads=4), MASA(**fields))
    depths = {name.split(".")[2] for name, _ in model.named_parameters() if name.endswith((".A.weight", ".B.weight"))}
    assert depths == {"3", "4", "5"}
    residuals = 3 * (4 + 2 + 2 + 4) * (32 + 32)
    assert model.num_parameters() - plain.num_parameters() == residuals
    assert count_parameters(model).blocks - count_parameters(plain).blocks == residuals
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_a_plan_counts_groups_and_residuals(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_attention_heads": 4}))
    options = {"groups": [0, 3], "residual_rank": 6, "variant": "qkv"}
    counted = plan(
        Recipe(method="masa", model=str(tmp_path / "config.json"), vocab_size=64, rank=None, options=options)
    )
    shown = {row.role: row for row in counted.rows}
    assert (
        shown["model.layers.*.self_attn.q_proj"].after
        == "MASALinear(atoms=1, residual_rank=6), then MASALinear(atoms=1)"
    )
    assert shown["model.layers.*.self_attn.v_proj"].parameters_after == 3 * 3 * (
        32 + 32
    )  # none in the last group, of one block
    assert shown["model.layers.*.self_attn.o_proj"].after == "stays dense"
    assert shown["model.lorank_atoms"].parameters_after == 3 * (2 * 32 * 32 + 4 * 32 + 2 * (6272 + 65))
    norms = 4 * 2 * 32
    assert sum(row.parameters_after for row in counted.rows) + norms == counted.model.parameters.blocks


def test_flops_of_a_layer_with_a_residual() -> None:
    layer = MASALinear(Dictionary("q", 6, (24, 16), 3, "network"), 2, False, 5)
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.randn(10, 16, requires_grad=True))
        forward = 2 * 10 * 24 * 16 + 2 * 3 * 24 * 16 + 2 * 10 * 5 * (24 + 16)
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_one_group_by_either_name_is_what_it_was(small: Callable[..., Any]) -> None:
    models = []
    for fields in ({}, {"groups": 1}, {"groups": [0]}):
        torch.manual_seed(3)
        models.append(convert(deep(small), MASA(**fields)))
    first, *others = (model.state_dict() for model in models)
    assert all(
        first.keys() == other.keys() and all(map(torch.equal, first.values(), other.values())) for other in others
    )


def test_groups_of_a_number_are_as_equal_as_can_be(small: Callable[..., Any]) -> None:
    for groups, sizes in ((2, [3, 3]), (4, [2, 1, 2, 1]), (5, [2, 1, 1, 1, 1]), ((0, 1, 5), [1, 4, 1])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of groups of one block
            model = convert(deep(small), MASA(groups=groups, **TABLE))
        found = [d.coefficients.values.shape for key, d in dictionaries(model).items() if "q_proj" in key]
        assert found == [(size, max(1, round(size / 3))) for size in sizes]
        depths = [layer.depth for name, layer in layers(model).items() if "q_proj" in name]
        assert depths == [depth for size in sizes for depth in range(size)]


def test_groups_share_nothing_and_residuals_start_at_nothing(small: Callable[..., Any], tokens: Tensor) -> None:
    plain, model = (convert(deep(small), MASA(groups=(0, 4), residual_rank=r, **TABLE)) for r in (None, 6))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    model.model.layers[5].self_attn.q_proj(torch.randn(5, 32)).sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    key = "model.lorank_atoms.model_layers_self_attn_q_proj_1"
    assert touched == {f"{key}.atoms", f"{key}.coefficients.values", "model.layers.5.self_attn.q_proj.B.weight"}


@pytest.mark.parametrize("coefficients", ["network", "table"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_groups_and_residuals_are_trained_saved_and_merged(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path, name: str, coefficients: Any
) -> None:
    table = {"residual_rank": {"(query|q_proj|o_proj|c_proj)$": 6, ".": 0.1}}
    model = convert(deep(small, name), MASA(**{**GROUPED, **table}, coefficients=coefficients)).train()
    assert {layer.A.out_features for layer in layers(model).values()} == {6, 3 if name == "gpt2" else 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss_of(model, tokens))
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "key" not in name)
    assert loss_of(model.eval(), tokens) < 0.95 * losses[0]
    before = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(tokens).logits, before)
    assert loaded.config.lorank["arguments"] == model.config.lorank["arguments"]
    if coefficients == "network":
        assert torch.equal(freeze_coefficients(loaded)(tokens).logits, before)
    torch.testing.assert_close(merge(loaded)(tokens).logits, before, rtol=1e-4, atol=1e-5)


def test_residuals_that_save_nothing_are_a_warning(small: Callable[..., Any]) -> None:
    with pytest.warns(
        UserWarning,
        match="masa saves no weights in .*q_proj, .*o_proj: .* lower residual_rank",
    ):
        convert(deep(small), MASA(residual_rank=12))  # 2 of 6 atoms and 6 · 12 · 64 weights instead of 6 · 32²
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(deep(small), MASA(residual_rank={"[qo]_proj": 10, "[kv]_proj": 7}))


@pytest.mark.parametrize(
    ("blocks", "fields", "message", "better"),
    [
        (6, {"atoms": 6}, "as many atoms as matrices; use fewer atoms", {"atoms": 5}),
        (6, {"atoms": 6, "residual_rank": 1}, "as many atoms as matrices; use fewer atoms", {"atoms": 5, "residual_rank": 1}),
        (6, {"atoms": 0.75, "groups": 3}, "as many atoms as matrices; use fewer atoms", {"atoms": 0.5, "groups": 3}),
        (6, {"groups": 6}, "each group is one block; use fewer groups", {"groups": 5}),
        (2, {"groups": 2, "residual_rank": 4}, "each group is one block; use fewer groups", {"residual_rank": 4}),
        (1, {}, "in one block alone; exclude them", None),
        (6, {"atoms": 5, "residual_rank": 3}, "q_proj.*: residuals .*; lower residual_rank", {"atoms": 5, "residual_rank": 1}),
        (18, {"atoms": 17, "residual_rank": 1}, "residuals .*; drop residual_rank", {"atoms": 17}),
    ],
)  # fmt: skip
def test_a_warning_names_the_setting_to_change(
    small: Callable[..., Any], blocks: int, fields: dict[str, Any], message: str, better: dict[str, Any] | None
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        convert(small("llama", num_hidden_layers=blocks), MASA(**fields))
    assert len(caught) == 1
    if better is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(small("llama", num_hidden_layers=blocks), MASA(**better))
