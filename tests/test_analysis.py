"""What `lorank analyze` says is what the singular values of the whole matrices say, without ever keeping them."""

import gc
import itertools
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lorank.analysis.effective_rank.effective_rank import Streams, analyze
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorank
from lorank.analysis.ranks import read_budget, suggest_ranks
from lorank.analysis.spectrum import effective_rank, rank_leaving
from lorank.sites import places
from tests.conftest import ARCHITECTURES, VOCABULARY, D

CASES = [
    (name, method) for name in ("llama", "gpt2") for method in ("dense", "cola", "relora", "crnet", "masa", "sltrain")
]
CASES += [(name, method) for name in ("gpt_neox", "phi3") for method in ("dense", "cola")]


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    drawn = torch.randint(3, VOCABULARY, (3, 4, 24), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": batch} for batch in drawn]


def whole(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs [n, d] of every projection, kept whole."""
    seen: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = {}, {}
    hooks = []
    for place in places(model):

        def keep(module: nn.Module, args: Any, output: Tensor, place: Any = place) -> None:
            seen[0].setdefault(place.name, []).append(args[0].flatten(0, -2))
            seen[1].setdefault(place.name, []).append(place.rows(output.flatten(0, -2).T).T)

        hooks.append(place.module.register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    inputs, outputs = ({name: torch.cat(parts) for name, parts in one.items()} for one in seen)
    return inputs, outputs


def assert_spectrum(found: Tensor | None, matrix: Tensor, places: float = 1e-6) -> None:
    expected = torch.linalg.svdvals(matrix.detach().double())
    assert found is not None
    n = min(len(found), len(expected))
    torch.testing.assert_close(found[:n], expected[:n], rtol=1e-6, atol=places * float(expected[0]))
    assert not len(found[n:]) or float(found[n:].max()) < places * float(expected[0])


@pytest.mark.parametrize(("name", "method"), CASES)
def test_activations_and_weights_are_those_of_the_whole_matrices(name: str, method: str, small, batches) -> None:
    model = small(name).double()
    if method != "dense":
        lorank.convert(model, method)
    found = analyze(model, batches, gradient_batches=0)
    inputs, outputs = whole(model, batches)
    assert [one.name for one in found.projections] == [place.name for place in places(model)]
    assert found.tokens == 3 * 4 * 24
    by_name = {one.name: one for one in found.projections}
    for one in found.projections:
        assert_spectrum(one.output, outputs[one.name])
        assert_spectrum(by_name[one.reads].input, inputs[one.name])
        before = one.name.replace(f".{one.depth}.", f".{one.depth - 1}.", 1)
        if before in outputs:
            y, previous = outputs[one.name], outputs[before]
            beta = (y * previous).sum() / previous.square().sum()
            assert one.beta == pytest.approx(float(beta))
            assert_spectrum(one.difference, y - beta * previous)
        else:
            assert one.difference is None and one.beta is None


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "dense"), ("gpt2", "dense"), ("llama", "crnet"), ("phi3", "cola")]
)
def test_with_little_room_the_text_is_gone_through_again_and_all_is_the_same(name, method, small, batches) -> None:
    model = small(name, num_hidden_layers=3) if name != "gpt2" else small(name)
    if method != "dense":
        lorank.convert(model, method)
    whole, said = analyze(model, batches), []
    survey = Streams(list(places(model)), only=())
    with torch.no_grad(), survey.attached():
        survey.add(model, batches[0])
    needed = survey.bytes_of([one.name for one in whole.projections])
    for room, least in ((needed, 1), (needed / 3, 3), (1.0, len(whole.projections))):
        parts = list(survey.passes(room))
        assert len(parts) >= least and all(survey.bytes_of(part) <= room or len(part) == 1 for part in parts)
        found = analyze(model, iter(batches), room_bytes=room, say=said.append)
        assert found.to_dict() == {**whole.to_dict(), "notes": found.notes} and found.tokens == whole.tokens
        assert any("more than the" in note for note in found.notes) == any(survey.bytes_of(one) > room for one in parts)
    assert any(f"part {len(whole.projections)} of" in line for line in said)


def test_the_sums_take_what_was_foretold(small, batches) -> None:
    model = small("llama", num_hidden_layers=4)
    survey = Streams(list(places(model)), only=())
    with torch.no_grad(), survey.attached():
        survey.add(model, batches[0])
    assert not survey.outputs and not survey.inputs and not survey.crosses
    for part in survey.passes(survey.bytes_of(list(survey.shapes)) / 4):
        streams = Streams(list(places(model)), only=part, before=survey.before)
        with torch.no_grad(), streams.attached():
            streams.add(model, batches[0])
        sums = [gram for one in (streams.inputs, streams.outputs, streams.crosses) for gram in one.values()]
        assert sum(gram.numel() * 8 for gram in sums) <= survey.bytes_of(part)


def test_the_weight_is_the_linear_map(small) -> None:
    model = small("gpt2")
    expected = {place.name: place for place in places(model)}
    fused = model.transformer.h[1].attn.c_attn
    assert isinstance(fused, Conv1D)
    found = {one.name: one for one in analyze(model, [{"input_ids": torch.arange(3, 20)[None]}]).projections}
    assert list(found) == list(expected)
    for k, part in enumerate(("query", "key", "value")):
        assert_spectrum(found[f"transformer.h.1.attn.c_attn.{part}"].weight, fused.weight[:, k * D : (k + 1) * D], 1e-5)
    assert_spectrum(found["transformer.h.0.mlp.c_fc"].weight, model.transformer.h[0].mlp.c_fc.weight, 1e-5)


def test_of_what_is_not_linear_it_says_product(small, batches) -> None:
    model = lorank.convert(small("llama"), lorank.CoLA(rank=3))
    found = analyze(model, batches)
    for one in found.projections:
        assert one.weight_is == "product" and one.weight is not None and effective_rank(one.weight, 0.9999) <= 3
        assert sorted(one.gradients) == ["A", "B"]
        assert one.to_dict(0.95)["output"]["rank"] <= 3  # Y = silu(X Aᵀ) Bᵀ
    assert any("product B·A" in note for note in found.notes)
    merged = analyze(lorank.convert(small("llama"), "low-rank"), batches)
    assert {one.weight_is for one in merged.projections} == {"merged"} and not any("B·A" in n for n in merged.notes)


def test_an_input_that_several_read_is_counted_once(small, batches) -> None:
    for model in (small("llama"), lorank.convert(small("llama"), "cola")):
        found = {one.name: one for one in analyze(model, batches, gradient_batches=0).projections}
        block = "model.layers.1."
        assert {found[f"{block}self_attn.{name}_proj"].reads for name in "qkv"} == {f"{block}self_attn.q_proj"}
        assert {found[f"{block}mlp.{name}_proj"].reads for name in ("gate", "up")} == {f"{block}mlp.gate_proj"}
        assert found[f"{block}mlp.up_proj"].input is None and found[f"{block}mlp.down_proj"].input is not None


def test_a_known_rank_is_found(small, batches) -> None:
    """Embeddings in five dimensions that norms cannot widen: the first block reads rank 5."""
    model = small("llama").double()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(VOCABULARY, 5) @ torch.randn(5, D))
    one = analyze(model, batches, gradient_batches=0).projections[0]
    assert one.input is not None and rank_leaving(one.input, 1e-9 * float(one.input.square().sum())) == 5
    assert rank_leaving(one.output, 1e-9 * float(one.output.square().sum())) == 5


def test_a_block_that_repeats_its_neighbour_has_no_difference() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16, bias=False)}) for _ in range(3))
            with torch.no_grad():
                for k in (1, 2):
                    self.layers[k]["up"].weight.copy_((k + 1) * self.layers[0]["up"].weight)

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            x = nn.functional.one_hot(input_ids, 8).float()
            return torch.stack([layer["up"](x) for layer in self.layers])

    found = analyze(Echo(), [{"input_ids": torch.randint(0, 8, (2, 50))}], gradient_batches=0).projections
    assert [one.beta for one in found] == [None, pytest.approx(2), pytest.approx(1.5)]
    for one in found[1:]:
        told = one.to_dict(0.95)["difference"]
        assert told["part_of_output_energy"] < 1e-9 and told["rank_at_output_error"] == 0
    assert {one.reads for one in found} == {"layers.0.up"}  # the same tensor, also in another block


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("number", [1, 2])
def test_gradients_are_those_of_the_loss(name: str, number: int, small, batches) -> None:
    model = small(name).double()
    found = analyze(model, batches, gradient_batches=number)
    assert found.gradient_tokens == number * 4 * 24
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for batch in batches[:number]:
        (model(**batch, labels=batch["input_ids"]).loss / number).backward()
    by_name = {one.name: one for one in found.projections}
    for place in places(model):
        [gradient] = [p.grad for n, p in place.module.named_parameters() if n == "weight"]
        gradient = gradient.T if isinstance(place.module, Conv1D) else gradient
        assert_spectrum(by_name[place.name].gradients["W"], place.rows(gradient))


def test_gradients_of_one_batch_are_not_kept_together(small, batches) -> None:
    """When the last of them is made, those of earlier matrices are gone."""
    model = small("llama", num_hidden_layers=4)
    held = []

    def count(parameter: Tensor) -> None:
        held.append(sum(other.grad is not None for other in model.parameters()))

    for place in places(model):
        place.module.weight.register_post_accumulate_grad_hook(count)
    analyze(model, batches)
    assert len(held) == 4 * 7 and max(held) <= 1


def test_the_model_is_left_as_it_was(small, batches) -> None:
    model = small("llama").train()
    weight, frozen = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.gate_proj.weight
    weight.grad = torch.ones_like(weight)
    frozen.requires_grad_(False)
    found = analyze(model, batches)
    assert model.training and not frozen.requires_grad and weight.requires_grad
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not any(module._forward_hooks for module in model.modules())
    by_name = {one.name: one for one in found.projections}
    assert not by_name["model.layers.0.mlp.gate_proj"].gradients and by_name["model.layers.0.mlp.up_proj"].gradients


def test_nothing_of_a_batch_is_kept(small) -> None:
    model = small("llama")
    alive: list[weakref.ref] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.extend(map(weakref.ref, (args[0], output)))

    for place in places(model):
        place.module.register_forward_hook(watch)

    class Batches:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for _ in range(3):
                yield {"input_ids": torch.randint(3, VOCABULARY, (8, 60))}
                gc.collect()
                assert not any(ref() is not None for ref in alive)
                assert not any(
                    type(one) is Tensor and one.ndim == 2 and len(one) == 480 and one.is_floating_point()
                    for one in gc.get_objects()
                )

    analyze(model, Batches(), gradient_batches=0)
    assert alive


def test_padding_does_not_count(small) -> None:
    """Two sequences of 20 in a batch of 30 positions: the same as without the ten."""
    model = small("llama").double()
    ids = torch.randint(3, VOCABULARY, (2, 20))
    padded = {
        "input_ids": nn.functional.pad(ids, (0, 10)),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, 10)),
        "labels": nn.functional.pad(ids, (0, 10), value=-100),
    }
    one, other = analyze(model, [{"input_ids": ids}]), analyze(model, [padded])
    assert one.tokens == other.tokens == 40
    for a, b in zip(one.projections, other.projections, strict=True):
        torch.testing.assert_close(a.output, b.output, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(a.gradients["W"], b.gradients["W"], atol=1e-9, rtol=1e-6)


def test_experts_are_said_to_be_left_out(batches) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=3, **shape)
    found = analyze(MixtralForCausalLM(config), batches, gradient_batches=0)
    experts = "model.layers.*.mlp.experts."
    sizes = {f"{experts}gate_up_proj": 2 * 3 * 48 * 16, f"{experts}down_proj": 2 * 3 * 16 * 24}
    assert sizes.items() <= found.left_out.items() and set(found.left_out) - set(sizes) == {
        "model.layers.*.mlp.gate.weight"
    }
    assert any("left out" in note and f"{experts}down_proj" in note for note in found.notes)


def test_a_module_applied_several_times_is_said_to_be(batches) -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    shape = {"embedding_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=VOCABULARY, num_hidden_layers=3, **shape))
    [note] = [note for note in analyze(model, batches, gradient_batches=0).notes if "3 times" in note]
    assert "ffn_output" in note


def test_a_head_that_is_no_language_models_gives_no_gradients(batches) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    found = analyze(BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **shape)), batches)
    assert any("head of BertForSequenceClassification is no language model's" in note for note in found.notes)
    assert not found.gradient_tokens


def test_layers_that_do_more_than_a_linear_one_are_named(batches) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.ModuleList([nn.ModuleDict({"up": Twice(4, 4)})]))
    with pytest.raises(ValueError, match="Twice"):
        analyze(model, batches)


def test_it_stops_when_there_are_tokens_enough_and_says_when_they_are_few(small, batches) -> None:
    found = analyze(small("llama"), batches, tokens=100)
    assert found.tokens == 192 and any("few" in note for note in found.notes)


def test_masa_tells_that_shared_atoms_have_no_gradient_of_their_own(small, batches) -> None:
    notes = " ".join(analyze(lorank.convert(small("llama"), "masa"), batches).notes)
    assert "lorank_atoms" in notes and "q_proj" in notes


def test_bad_input_is_a_sentence(small, batches) -> None:
    with pytest.raises(ValueError, match="no linear layer inside a repeated block of this Linear"):
        analyze(nn.Linear(3, 3), batches)
    with pytest.raises(ValueError, match="not a single batch"):
        analyze(small("llama"), [])
    model = small("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj are not finite"):
        analyze(model, batches)


# ---- ranks for a budget


def projections(layers: int = 8, width: int = 512) -> list[dict[str, Any]]:
    """As `Analysis.to_dict` gives them, with spectra that fall off at a rate that differs by depth."""
    return [
        {
            "name": f"model.layers.{depth}.{inner}",
            "role": f"model.layers.*.{inner}",
            "depth": depth,
            "d_in": d_in,
            "d_out": d_out,
            "output": {"singular_values": [math.exp(-i / (5 + 3 * depth + 7 * k)) for i in range(d_out)]},
        }
        for depth in range(layers)
        for k, (inner, d_in, d_out) in enumerate((("q_proj", width, width), ("up_proj", width, 3 * width)))
    ]


@pytest.mark.parametrize("budget", ["0.5", "0.1", "0.9", "1M", "3_000_000"])
def test_a_budget_is_met_within_a_percent(budget: str) -> None:
    found = suggest_ranks(projections(), budget)
    wanted = read_budget(budget, found.dense_parameters)
    assert 0.99 * wanted <= found.parameters <= wanted
    spent = sum(found.ranks[one["name"]] * (one["d_in"] + one["d_out"]) for one in projections())
    assert spent == found.parameters
    for one in projections():
        assert 1 <= found.ranks[one["name"]] < one["d_in"] * one["d_out"] / (one["d_in"] + one["d_out"])


def lost(spectra: list[Tensor], ranks: tuple[int, ...]) -> float:
    """Mean part of the energy that is beyond so many singular values."""
    return float(
        torch.stack([s[r:].square().sum() / s.square().sum() for s, r in zip(spectra, ranks, strict=True)]).mean()
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_ranks_of_a_budget_lose_less(seed: int) -> None:
    """All ranks of four small projections tried: within what one more rank saves at every budget, and nothing at all where the
    ranks cost the whole of it and each is worth its price."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 12), (12, 6), (12, 12), (8, 8)]
    spectra = [torch.rand(d_out, generator=generator).pow(3).sort(descending=True).values for _, d_out in shapes]
    given = [
        {
            "name": f"h.0.{k}",
            "role": f"h.*.{k}",
            "depth": 0,
            "d_in": a,
            "d_out": b,
            "output": {"singular_values": s.tolist()},
        }
        for k, ((a, b), s) in enumerate(zip(shapes, spectra, strict=True))
    ]
    tried = [
        (sum(rank * (a + b) for rank, (a, b) in zip(ranks, shapes, strict=True)), lost(spectra, ranks))
        for ranks in itertools.product(range(1, 4), range(1, 4), range(1, 6), range(1, 4))
    ]
    exact = 0
    for budget in range(min(tried)[0], max(tried)[0] + 1):
        found = suggest_ranks(given, str(budget))
        least = min(loss for cost, loss in tried if cost <= budget)
        gain = max(
            float(s[r].square() / s.square().sum()) / 4 for s, r in zip(spectra, found.ranks.values(), strict=True)
        )
        assert found.parameters <= budget and found.lost["mean"] == pytest.approx(
            lost(spectra, tuple(found.ranks.values()))
        )
        assert least - 1e-6 <= found.lost["mean"] <= min(least + gain, found.uniform_lost["mean"]) + 1e-6
        exact += found.lost["mean"] < least + 1e-6
    assert exact > 0.7 * (max(tried)[0] - min(tried)[0])


@pytest.mark.parametrize("budget", ["0.3", "0.7"])
def test_suggested_ranks_lose_less_than_one_rank_for_all(budget: str) -> None:
    found = suggest_ranks(projections(), budget)
    price = [one["d_in"] + one["d_out"] for one in projections()]
    assert 0 <= read_budget(budget, found.dense_parameters) / sum(price) - found.uniform_rank < 1
    spectra = [torch.tensor(one["output"]["singular_values"]) for one in projections()]
    same = lost(spectra, (found.uniform_rank,) * len(spectra))
    more = lost(spectra, (found.uniform_rank + 1,) * len(spectra))
    assert found.lost["mean"] < more <= found.uniform_lost["mean"] <= same


def test_the_table_gives_every_projection_its_rank(small) -> None:
    from lorank.method import check_table, rank_at
    from lorank.sites import find_sites

    model = ARCHITECTURES["gpt2"].dense(n_layer=11)
    listed = analyze(model, [{"input_ids": torch.randint(3, VOCABULARY, (2, 40))}], gradient_batches=0).to_dict()
    found = suggest_ranks(listed["projections"], "0.6")
    sites = find_sites(model)
    check_table(found.table, sites)
    assert {site.name: rank_at(found.table, site) for site in sites} == found.ranks
    lorank.convert(model, lorank.CoLA(rank=found.table))


@pytest.mark.parametrize("budget", ["0.9999", "3", "1e4", "a lot", "0", "5T", "-1"])
def test_a_budget_that_cannot_be_met_is_a_sentence(budget: str) -> None:
    with pytest.raises(ValueError, match="budget="):
        suggest_ranks(projections(), budget)


# ---- at the door


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a dense model of it and a converted one, each with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lorank.train.data import load_corpus  # noqa: F401  (the import is slow; it is not what is timed here)

    folder = tmp_path_factory.mktemp("saved")
    (folder / "fox.txt").write_text("".join(f"line {i}: the quick fox counts {i * i} lazy dogs\n" for i in range(400)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([(folder / "fox.txt").read_text()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", bos_token="<s>")
    for name, method in (("dense", None), ("masa", "masa")):
        model = ARCHITECTURES["llama"].dense()
        if method:
            lorank.convert(model, method)
        model.save_pretrained(folder / name)
        wrapped.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["dense", "masa"])
def test_the_suggested_recipe_is_one(name: str, saved: Path, tmp_path: Path) -> None:
    from lorank.plan.run import plan
    from lorank.train.analysis import analyze_folder
    from lorank.train.recipe import Recipe

    results = analyze_folder(
        str(saved / name), tmp_path, data=str(saved / "fox.txt"), sequence_length=32, tokens=2000, budget="0.5"
    )
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "analysis.html").read_text().startswith("<!doctype html>")
    recipe = Recipe.read(tmp_path / "suggested.yaml")
    assert recipe.method == "cola" and recipe.rank == results["suggestion"]["table"]
    planned = plan(recipe)
    suggestion = results["suggestion"]
    assert suggestion["parameters"] / suggestion["dense_parameters"] == pytest.approx(0.5, abs=0.01)
    assert planned is not None


def families() -> dict[str, nn.Module]:
    """Models whose recipe needs more than their own names and defaults."""
    import transformers as t

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
    }
    return {
        "bloom": t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)),
        "gemma2": t.Gemma2ForCausalLM(t.Gemma2Config(head_dim=16, num_key_value_heads=2, **shape)),
        "falcon": t.FalconForCausalLM(
            t.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        ),
        "mamba": t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
        "classifier": t.BertForSequenceClassification(t.BertConfig(**shape)),
        "electra": t.ElectraForPreTraining(t.ElectraConfig(embedding_size=32, **shape)),
    }


@pytest.mark.parametrize("family", ["bloom", "gemma2", "falcon", "mamba", "classifier", "electra"])
def test_recipes_of_other_families_train(family: str, saved: Path, tmp_path: Path, monkeypatch) -> None:
    """From another folder than the analysis was made in, with the tokenizer and form of text that it was given."""
    import dataclasses

    from transformers import AutoTokenizer

    from lorank.methods.cola import CoLALinear
    from lorank.train import run
    from lorank.train.analysis import analyze_folder
    from lorank.train.model import build_config, build_model
    from lorank.train.recipe import Recipe

    monkeypatch.chdir(saved)
    families()[family].save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(saved / "dense").save_pretrained(tmp_path / "words")
    given = {"tokenizer": str(tmp_path / "words"), "documents": "padded", "seed": 7, "sequence_length": 32}
    found = analyze_folder(str(tmp_path / "model"), tmp_path / "out", data="fox.txt", tokens=500, budget="0.6", **given)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.read(tmp_path / "out/suggested.yaml")
    assert {name: getattr(recipe, name) for name in given} == given and recipe.data == str(saved / "fox.txt")
    model = build_model(recipe, build_config(recipe))
    ranks = [module.A.out_features for module in model.modules() if isinstance(module, CoLALinear)]
    assert sorted(ranks) == sorted(found["suggestion"]["ranks"].values())
    if family == "classifier":
        assert any("the body of BertForSequenceClassification, whose head is no" in note for note in found["notes"])
    if family in ("bloom", "classifier"):  # of the others it does that the model is built
        short = {
            "documents": "packed",
            "steps": 2,
            "warmup_steps": 1,
            "log_every": 1,
            "eval_tokens": 200,
            "save_every": 0,
        }
        assert run.pretrain(dataclasses.replace(recipe, **short), tmp_path / "run") is not None


def test_without_a_causal_model_there_are_ranks_but_no_recipe(saved: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """And an earlier recipe does not stay, unless nobody asked for ranks."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

    from lorank.cli import main

    config = DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    DistilBertForMaskedLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(saved / "dense").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "suggested.yaml").write_text("method: cola")
    flags = ["--data", str(saved / "fox.txt"), "--sequence-length", "32", "--tokens", "500", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["lorank", "analyze", str(tmp_path / "model"), *flags])
    main()
    assert (out / "suggested.yaml").exists() and "ranks:" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["lorank", "analyze", str(tmp_path / "model"), *flags, "--budget", "0.5"])
    main()
    said = " ".join(capsys.readouterr().out.split())
    assert "no recipe" in said and "no causal language model of 'distilbert'" in said and "up to the same price" in said
    assert {one.name for one in out.iterdir()} == {"results.json", "analysis.html"}
    found = json.loads((out / "results.json").read_text())["suggestion"]
    assert len(found["ranks"]) == 12 and "distilbert" in found["no_recipe"]


@pytest.fixture(scope="module")
def berts(saved: Path) -> Path:
    """Beside the others: a masked language model, the same with a tokenizer without masks, its body; an encoder-decoder; a model
    with a broken weight and one without a tokenizer."""
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForMaskedLM,
        BertModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape)
    plain, masking = (AutoTokenizer.from_pretrained(saved / "dense") for _ in range(2))
    masking.mask_token = masking.convert_ids_to_tokens(5)
    broken = ARCHITECTURES["llama"].dense()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    masked = BertForMaskedLM(config)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    for name, model, tokenizer in (
        ("masked", masked, masking),
        ("maskless", masked, plain),
        ("body", BertModel(config), masking),
        ("t5", t5, plain),
        ("nan", broken, plain),
        ("wordless", ARCHITECTURES["llama"].dense(), None),
    ):
        model.save_pretrained(saved / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(saved / name)
    return saved


def test_a_masked_language_model_is_looked_at_as_it_is_trained(berts: Path, tmp_path: Path) -> None:
    """A seventh or so of the tokens are to be guessed, and the gradient is that of guessing them."""
    from torch.utils.data import DataLoader
    from transformers import AutoModelForMaskedLM

    from lorank.train import analysis

    seen: list[list[dict[str, Tensor]]] = []

    def watched(model: nn.Module, batches: DataLoader, **settings: Any) -> Any:
        seen.append(list(batches))
        assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, seen[0], strict=True) for k in a)  # the same again
        return analyze(model, batches, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "analyze", watched)
        found = analysis.analyze_folder(
            str(berts / "masked"), tmp_path, data=str(berts / "fox.txt"), sequence_length=32, tokens=2000
        )
    assert not found["notes"] or not any("no gradients" in note for note in found["notes"])
    guessed = torch.cat([batch["labels"].flatten() for batch in seen[0]]) != -100
    assert 0.1 < guessed.float().mean() < 0.2
    model = AutoModelForMaskedLM.from_pretrained(berts / "masked").eval()
    model(**seen[0][0]).loss.backward()
    told = {one["name"]: one["gradients"]["W"]["singular_values"] for one in found["projections"]}
    for name, values in told.items():
        expected = torch.linalg.svdvals(model.get_parameter(f"{name}.weight").grad)
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "reason"), [("body", "body without a head"), ("maskless", "no mask token")])
def test_without_a_loss_there_are_no_gradients_and_a_sentence(name, reason, berts: Path, tmp_path: Path) -> None:
    from lorank.train.analysis import analyze_folder

    found = analyze_folder(
        str(berts / name), tmp_path, data=str(berts / "fox.txt"), sequence_length=32, tokens=1000, tokenizer=None
    )
    assert any("no gradients" in note and reason in note for note in found["notes"])
    assert len(found["projections"]) == 12 and not any(one["gradients"] for one in found["projections"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{saved}/t5"], "is an encoder-decoder (t5)"),
        (["{saved}/nan"], "weights that are not finite numbers: model.layers.1.mlp.up_proj.weight"),
        (["{saved}/wordless"], "name one with --tokenizer"),
        ([""], "name is empty"),
        (["nowhere/at-all"], "no model could be loaded"),
        (["{saved}"], "no config.json"),
        (["{saved}/dense", "--data", "{saved}/fox.txt", "--alpha", "1"], "alpha=1.0"),
        (["{saved}/dense", "--data", "{saved}/fox.txt", "--sequence-length", "128"], "64 positions"),
        (["{saved}/dense", "--data", "{saved}/fox.txt", "--sequence-length", "32", "--budget", "9M"], "choose between"),
        (["{saved}/dense", "--budget", "half"], "such as 10M"),
        (["{saved}/dense", "--memory", "nan"], "memory=nan"),
        (["{saved}/dense", "--data", "{saved}/no.txt", "--sequence-length", "32"], "no.txt"),
        (["{saved}/dense", "--data", "{saved}/fox.txt", "--out", "{saved}/fox.txt"], "is a file"),
    ],
)
def test_mistakes_at_the_command_line(
    arguments, message, saved: Path, berts: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from lorank.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lorank", "analyze", *(part.format(saved=saved) for part in arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.startswith("lorank: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("suggested.yaml"))
    assert not list(tmp_path.rglob("analysis.html"))


def test_the_command_line_prints_a_table_and_a_recipe_that_trains(
    saved: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from lorank.cli import main

    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(saved / "fox.txt"), "--sequence-length", "32", "--tokens", "1500", "--budget", "0.5"]
    monkeypatch.setattr("sys.argv", ["lorank", "analyze", str(saved / "dense"), *flags])
    main()
    said = capsys.readouterr().out
    assert "gate_proj" in said and "lorank pretrain runs/analyze-dense/suggested.yaml" in said and "block 1" in said
    monkeypatch.setattr("sys.argv", ["lorank", "pretrain", "runs/analyze-dense/suggested.yaml", "--dry-run"])
    main()
    assert "parameters" in capsys.readouterr().out
