"""MASA: gradients, frozen coefficients, where atoms are kept, and what is refused."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

import lorank
from lorank import MASA, convert, freeze_coefficients, merge
from lorank.architectures import projection_type
from lorank.dictionary import CoefficientNetwork, CoefficientTable, Dictionary
from lorank.method import SHARED
from tests.methods.masa.conftest import TABLE, deep, dictionaries, elements, layers, loss_of

# ---- 3, 6: gradients


def test_gradients_follow_from_those_of_the_dense_weights(small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(deep(small).double(), MASA(**TABLE))
    dense = merge(model)
    loss_of(model, tokens).backward()
    loss_of(dense, tokens).backward()
    for dictionary in dictionaries(model).values():
        names = [name for name, layer in layers(model).items() if layer.dictionary is dictionary]
        weights: Any = torch.stack([dense.get_submodule(name).weight.grad for name in names])  # [L, d_out, d_in]
        c: Any = dictionary.coefficients.values
        assert len(names) == 6
        expected = torch.einsum("ls,lio->sio", c, weights)
        torch.testing.assert_close(dictionary.atoms.grad, expected, rtol=1e-10, atol=1e-12)
        expected = torch.einsum("lio,sio->ls", weights, dictionary.atoms)
        torch.testing.assert_close(c.grad, expected, rtol=1e-10, atol=1e-12)


def test_projection_types_share_nothing(small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(deep(small), MASA())
    found = dictionaries(model)
    assert [name.rpartition("attn_")[2] for name in found] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    addresses = [parameter.data_ptr() for d in found.values() for parameter in d.parameters()]
    assert len(set(addresses)) == len(addresses) == 4 * 8
    model.model.layers[3].self_attn.q_proj(torch.randn(5, 32)).sum().backward()
    for name, dictionary in found.items():
        assert all((p.grad is None) == (not name.endswith("q_proj")) for p in dictionary.parameters())


# ---- 4: frozen coefficients


@pytest.mark.parametrize("atoms", [1, 2, 3, 5])
def test_freezing_changes_no_bit_of_the_outputs(
    small: Callable[..., Any], tokens: Tensor, tmp_path: Path, atoms: int
) -> None:
    model = convert(deep(small, "gpt2"), MASA(atoms=atoms))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, tokens).backward()
    optimizer.step()
    before, with_networks = model(tokens).logits, copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens).logits

    assert freeze_coefficients(model) is model
    assert torch.equal(model(tokens).logits, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens).logits, rounded)
    assert not any(isinstance(module, CoefficientNetwork) for module in model.modules())
    assert not any("embedding" in name for name, _ in model.transformer.lorank_atoms.named_parameters())
    assert all(d.coefficients.values.shape == (6, atoms) for d in dictionaries(model).values())
    loss_of(model, tokens).backward()
    assert all(d.coefficients.values.grad.abs().max() > 0 for d in dictionaries(model).values())

    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(tokens).logits, before)
    assert torch.equal(merge(loaded)(tokens).logits, merge(with_networks)(tokens).logits)
    assert with_networks.config.lorank["arguments"]["coefficients"] == "network"
    with pytest.raises(ValueError, match="without a coefficient network"):
        freeze_coefficients(loaded)


def test_a_run_keeps_coefficients_and_no_network(tmp_path: Path) -> None:
    from lorank.train import run
    from lorank.train.recipe import Recipe
    from lorank.train.saved import load_model

    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text that counts {i * i}\n" for i in range(900)))
    recipe = Recipe(
        method="masa", data=str(tmp_path / "text.txt"), vocab_size=300, sequence_length=32, batch_size=4, steps=2,
        warmup_steps=1, eval_every=0,
    )  # fmt: skip
    found = run.pretrain(recipe, tmp_path / "run")
    model, _ = load_model(str(tmp_path / "run"))
    assert not any("embedding" in name for name in model.state_dict() if "lorank_atoms" in name)
    assert model.config.lorank["arguments"]["coefficients"] == "table"
    assert found is not None and found.parameters == model.num_parameters()


def test_only_masa_has_coefficients_to_freeze(small: Callable[..., Any]) -> None:
    for model in (small("llama"), convert(small("llama"), "low-rank")):
        with pytest.raises(ValueError, match="must be converted with MASA.* without a coefficient network"):
            freeze_coefficients(model)


# ---- 8, 9: training state, initial values


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_that_of_atoms_and_coefficients(
    small: Callable[..., Any], tokens: Tensor, optimizer: Any
) -> None:
    model = convert(deep(small), MASA())
    built = lorank.optimizer(model, optimizer, lr=1e-3, weight_decay=0.1)
    loss_of(model, tokens).backward()
    built.step()
    shared = sum(elements(d.parameters()) for d in dictionaries(model).values())
    assert shared == 2 * 32 * (32 + 16 + 16 + 32) + 4 * (6 * 32 + 6272 + 65 * 2)
    moments = [t for state in built.state.values() for t in state.values() if t.ndim > 0]
    assert {t.shape for t in moments} <= {p.shape for p in model.parameters()}
    assert not {(6, 32, 32), (6, 16, 32)} & {tuple(t.shape) for t in moments}
    if optimizer == "adamw":
        rest = elements(p for name, p in model.named_parameters() if SHARED not in name)
        assert elements(moments) == 2 * (shared + rest) == 2 * model.num_parameters()


@pytest.mark.parametrize("coefficients", ["network", "table"])
@pytest.mark.parametrize("atoms", [1, 4, 9])
def test_every_block_starts_with_the_variance_of_an_atom(coefficients: str, atoms: int) -> None:
    torch.manual_seed(0)
    drawn = [Dictionary("q", 6, (96, 128), atoms, coefficients) for _ in range(8)]
    weights = torch.stack([dictionary(block).detach() for dictionary in drawn for block in range(6)])
    stds = weights.std((1, 2))
    assert stds.mean().item() == pytest.approx(0.02, rel=0.02)
    # the noise of the coefficients alone moves a block's by 2 % of its size, one standard deviation
    assert (stds / 0.02 - 1).abs().median() < 0.05
    assert abs(weights.mean().item()) < 5e-4


def test_coefficients_start_near_the_inverse_root_of_atoms() -> None:
    torch.manual_seed(0)
    drawn = torch.cat([CoefficientNetwork(1, 16)(0).detach() for _ in range(400)])
    assert drawn.mean().item() == pytest.approx(0.25, abs=1e-3)
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_table_starts_with_the_depth_in_it() -> None:
    table: Any = CoefficientTable(12, 4).values
    assert table.argmax(1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    torch.testing.assert_close(table.square().sum(1), torch.ones(12))


# ---- where the atoms live


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "bert"])
@pytest.mark.parametrize("coefficients", ["network", "table"])
def test_a_body_and_a_model_with_a_head_load_each_others_atoms(
    architectures: Any, tokens: Tensor, tmp_path: Path, name: str, coefficients: Any
) -> None:
    architecture = architectures[name]
    model = convert(architecture.dense(), MASA(coefficients=coefficients))
    model.save_pretrained(tmp_path / "head")
    body, report = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    body.eval()
    if name != "bert":  # whose body has a pooler that the model with a head lacks
        assert not report["missing_keys"]
    assert not any("lorank" in key for key in [*report["missing_keys"], *report["unexpected_keys"]])
    hidden = lambda m: m(tokens)[0]  # noqa: E731
    assert torch.equal(hidden(body), hidden(model.base_model))

    converted = convert(AutoModel.from_config(architecture.config()).eval(), MASA(coefficients=coefficients))
    for source, folder in ((body, "body"), (converted, "converted")):
        source.save_pretrained(tmp_path / folder)
        again, report = architecture.auto.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any("lorank" in key for key in [*report["missing_keys"], *report["unexpected_keys"]])
        assert torch.equal(hidden(again.eval().base_model), hidden(source))


def test_atoms_are_listed_once_and_outside_the_blocks(small: Callable[..., Any]) -> None:
    names = [name for name in convert(small("llama"), MASA(**TABLE)).state_dict() if "atoms" in name or "attn" in name]
    keys = [f"model.lorank_atoms.model_layers_self_attn_{p}_proj" for p in "qkvo"]
    assert names == [f"{key}.{end}" for key in keys for end in ("atoms", "coefficients.values")]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_layers_of_a_copy_use_the_copys_atoms(small: Callable[..., Any], tokens: Tensor, how: Any) -> None:
    model = convert(small("llama"), MASA())
    before = model(tokens).logits
    copied = how(model)
    assert torch.equal(copied(tokens).logits, before)
    for layer in layers(copied).values():
        assert any(layer.dictionary is own for own in dictionaries(copied).values())
        nn.init.zeros_(layer.dictionary.atoms)
    assert not torch.equal(copied(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)


def test_it_works_on_a_model_that_is_not_of_transformers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({f"{p}_proj": nn.Linear(8, 8) for p in "qkvo"})
            self.up = nn.Linear(8, 8)

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(3))
    convert(model, MASA())
    assert len(dictionaries(model)) == 4
    freeze_coefficients(model)
    assert len(layers(model)) == 12


# ---- which modules


def test_exactly_the_attention_projections_are_rewritten(architecture: Any) -> None:
    model = convert(architecture.dense(), MASA())
    found = {name.removeprefix(f"{architecture.blocks}.0.") for name in layers(model) if ".0." in name}
    assert found == {name for name in architecture.projections if "attn" in name or "attention." in name}
    dense = dict(architecture.dense().named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "lorank_atoms" not in name:
            assert type(module) is type(dense[name])
            assert torch.equal(module.weight, dense[name].weight)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "query"),
        ("transformer.h.0.attn.c_attn.key", "key"),
        ("gpt_neox.layers.0.attention.query_key_value.value", "value"),
        ("encoder.layer.0.attention.output.dense", "output"),
        ("transformer.h.0.self_attention.dense", "output"),
        ("transformer.h.0.mlp.c_proj", None),
        ("encoder.layer.0.output.dense", None),
        ("encoder.layer.0.crossattention.self.query", None),
        ("model.decoder.layers.0.encoder_attn.q_proj", None),
        ("model.layers.0.linear_attn.out_proj", None),
    ],
)
def test_types_of_projections(name: str, kind: str | None) -> None:
    assert projection_type(name) == kind


def test_cross_attention_stays_dense() -> None:
    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 80}
    config = BertConfig(vocab_size=96, num_hidden_layers=3, is_decoder=True, add_cross_attention=True, **shape)
    model = convert(BertModel(config), MASA())
    assert len(layers(model)) == 12
    assert not any("cross" in name for name in layers(model))


# ---- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"atoms": 0}, r"atoms must be a positive integer or a number in \(0, 1\), got 0"),
        ({"atoms": 1.0}, "atoms must be .* got 1.0"),
        ({"atoms": True}, "atoms must be .* got True"),
        ({"atoms": "4"}, "atoms must be .* got '4'"),
        ({"variant": "qk"}, "variant must be 'qkv' or 'qkvo', got 'qk'"),
        ({"coefficients": "mlp"}, "coefficients must be 'network' or 'table', got 'mlp'"),
        ({"mlp_width": 0}, "mlp_width must be a positive integer, got 0"),
        (
            {"coefficients": "table", "embedding_width": 8},
            r"embedding_width and mlp_width must be left out with .* got \(8, 64\)",
        ),
        ({"groups": 0}, "groups must be a positive integer or a list .* got 0"),
        ({"groups": True}, "groups must be .* got True"),
        (
            {"groups": (1, 3)},
            r"groups must ascend from 0, the first block of each group, got \(1, 3\)",
        ),
        ({"groups": [0, 3, 3]}, r"groups must ascend from 0, .* got \[0, 3, 3\]"),
        ({"groups": "two"}, "groups must be .* got 'two'"),
        ({"groups": 1.5}, "groups must be .* got 1.5"),
        ({"residual_rank": 0}, "residual_rank must be a positive integer, .* got 0"),
        ({"residual_rank": {}}, "residual_rank must have at least one pattern"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MASA(**fields)


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"targets": "mlp"}, {}, "targets must match linear layers of the blocks, got 'mlp'; they are: .*q_proj"),
        ({"exclude": "v_proj"}, {}, "finds no value among .*; choose another variant, targets or architecture"),
        ({"targets": "o_proj"}, {}, "finds no query or key or value among model"),
        ({}, {"groups": 7}, "each group must contain at least one of the blocks 0 to 5 of .*q_proj, got groups=7"),
        (
            {},
            {"groups": (0, 3, 6)},
            r"one of the blocks 0 to 5 .* got groups=\(0, 3, 6\); use fewer",
        ),
        ({"exclude": r"layers\.[01]\."}, {"groups": (0, 2)}, "one of the blocks 2 to 5 .*"),
        ({}, {"residual_rank": {"q_proj": 4}}, r"must have a pattern for model\.layers\.0\.self_attn\.k_proj"),
        (
            {},
            {"residual_rank": {".": 4, "up_proj": 2}},
            "residual_rank must use all of its patterns, but 'up_proj' decides nothing",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(
    small: Callable[..., Any], options: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    model = deep(small)
    with pytest.raises(ValueError, match=message):
        convert(model, MASA(**fields), **options)
    assert not layers(model)


def test_blocks_of_different_shapes_cannot_share(small: Callable[..., Any]) -> None:
    model = deep(small)
    model.model.layers[2].self_attn.k_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"self_attn\.k_proj must be the same in all blocks .* exclude the others"):
        convert(model, MASA())


def test_a_model_without_known_attention_is_refused() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
    with pytest.raises(ValueError, match=r"masa does not recognise any of this model's projections: blocks\.\*\.0"):
        convert(model, MASA())
