"""The streamed spectra are those of the whole matrices, which the analysis never keeps."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import lorank
from lorank.analysis import analyze
from lorank.analysis.spectrum import effective_rank, rank_leaving
from lorank.analysis.streams import Streams
from lorank.sites import places
from tests.conftest import VOCABULARY, D

CASES = [("llama", method) for method in ("dense", "cola", "relora", "crnet", "masa", "sltrain")]
CASES += [("gpt2", "dense"), ("gpt2", "crnet"), ("gpt_neox", "dense"), ("phi3", "cola")]


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
def test_activations_are_those_of_the_whole_matrices(name: str, method: str, small, batches) -> None:
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


@pytest.mark.parametrize(("name", "method"), [("gpt2", "dense"), ("llama", "crnet"), ("phi3", "cola")])
def test_several_passes_give_the_same(name, method, small, batches) -> None:
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
        assert any("more than the" in note and "requested" in note for note in found.notes) == any(
            survey.bytes_of(one) > room for one in parts
        )
    assert any(f"part {len(whole.projections)} of" in line for line in said)


def test_the_sums_fit_in_the_announced_bytes(small, batches) -> None:
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


def test_weights_of_nonlinear_layers_are_products(small, batches) -> None:
    model = lorank.convert(small("llama"), lorank.CoLA(rank=3))
    found = analyze(model, batches)
    for one in found.projections:
        assert one.weight_is == "product" and one.weight is not None and effective_rank(one.weight, 0.9999) <= 3
        assert sorted(one.gradients) == ["A", "B"]
        assert one.to_dict(0.95)["output"]["rank"] <= 3  # Y = silu(X Aᵀ) Bᵀ
    assert any("the product B·A" in note for note in found.notes)
    merged = analyze(lorank.convert(small("llama"), "low-rank"), batches)
    assert {one.weight_is for one in merged.projections} == {"merged"} and not any("B·A" in n for n in merged.notes)


def test_an_input_with_several_readers_counts_once(small, batches) -> None:
    for model in (small("llama"), lorank.convert(small("llama"), "cola")):
        found = {one.name: one for one in analyze(model, batches, gradient_batches=0).projections}
        block = "model.layers.1."
        assert {found[f"{block}self_attn.{name}_proj"].reads for name in "qkv"} == {f"{block}self_attn.q_proj"}
        assert {found[f"{block}mlp.{name}_proj"].reads for name in ("gate", "up")} == {f"{block}mlp.gate_proj"}
        assert found[f"{block}mlp.up_proj"].input is None and found[f"{block}mlp.down_proj"].input is not None


def test_a_known_rank_is_found(small, batches) -> None:
    """Embeddings of rank 5, which norms cannot increase: the first block reads rank 5."""
    model = small("llama").double()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(VOCABULARY, 5) @ torch.randn(5, D))
    one = analyze(model, batches, gradient_batches=0).projections[0]
    assert one.input is not None and rank_leaving(one.input, 1e-9 * float(one.input.square().sum())) == 5
    assert rank_leaving(one.output, 1e-9 * float(one.output.square().sum())) == 5


def test_a_block_that_repeats_its_neighbour_has_rank_zero() -> None:
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
        listed = one.to_dict(0.95)["difference"]
        assert listed["part_of_output_energy"] < 1e-9 and listed["rank_at_output_error"] == 0
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
    """When backward makes one, earlier ones are gone."""
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


def test_no_activation_outlives_its_batch(small) -> None:
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
    """Two sequences of 20 in a batch of 30 positions give the same as without padding."""
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


def test_experts_are_left_out_and_named(batches) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=3, **shape)
    found = analyze(MixtralForCausalLM(config), batches, gradient_batches=0)
    experts = "model.layers.*.mlp.experts."
    sizes = {f"{experts}gate_up_proj": 2 * 3 * 48 * 16, f"{experts}down_proj": 2 * 3 * 16 * 24}
    assert sizes.items() <= found.left_out.items() and set(found.left_out) - set(sizes) == {
        "model.layers.*.mlp.gate.weight"
    }
    assert any("left out" in note and f"{experts}down_proj" in note for note in found.notes)


def test_a_module_applied_several_times_is_named(batches) -> None:
    shape = {"embedding_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=VOCABULARY, num_hidden_layers=3, **shape))
    [note] = [note for note in analyze(model, batches, gradient_batches=0).notes if "3 times" in note]
    assert "ffn_output" in note


def test_a_classifiers_head_gives_no_gradients(batches) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    found = analyze(BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **shape)), batches)
    assert any("head of BertForSequenceClassification is not a language model's" in note for note in found.notes)
    assert not found.gradient_tokens


def test_derived_linear_layers_are_named(batches) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.ModuleList([nn.ModuleDict({"up": Twice(4, 4)})]))
    with pytest.raises(ValueError, match="Twice"):
        analyze(model, batches)


def test_it_stops_at_enough_tokens_and_warns_of_few(small, batches) -> None:
    found = analyze(small("llama"), batches, tokens=100)
    assert found.tokens == 192 and any("few" in note for note in found.notes)


def test_shared_atoms_have_no_gradients_in_blocks(small, batches) -> None:
    notes = " ".join(analyze(lorank.convert(small("llama"), "masa"), batches).notes)
    assert "lorank_atoms" in notes and "q_proj" in notes


def test_bad_input_is_refused(small, batches) -> None:
    with pytest.raises(ValueError, match="no linear layer inside a repeated block of this Linear"):
        analyze(nn.Linear(3, 3), batches)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        analyze(small("llama"), [])
    model = small("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj are not finite; .* use an earlier"):
        analyze(model, batches)
