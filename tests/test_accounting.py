"""Closed forms against the papers' integers, and measurements against both."""

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lorank
from lorank import accounting
from lorank.accounting.twin import twin_of, without_data
from lorank.architectures import llama_config
from lorank.checkpointing import POLICIES
from lorank.papers import formulas
from lorank.sizes import SIZES
from lorank.train.methods import build_optimizer, state_bytes
from lorank.train.recipe import Recipe

# Training FLOPs per block on 256 tokens, dense and CoLA (arXiv 2502.10940, re-derived)
PUBLISHED = {
    "60m": (5_259_657_216, 2_321_547_264, 0.4414),
    "130m": (11_475_615_744, 6_341_787_648, 0.5526),
    "350m": (20_157_825_024, 8_462_008_320, 0.4198),
    "1b": (78_916_878_336, 32_211_468_288, 0.4082),
    "7b": (314_069_483_520, 126_030_446_592, 0.4013),
}
N = 256


@pytest.mark.parametrize("name", PUBLISHED)
def test_block_flops_are_the_published_integers(name: str) -> None:
    dense, cola, ratio = PUBLISHED[name]
    size = SIZES[name]
    shape = (size.hidden_size, size.intermediate_size, size.rank, N)
    assert formulas.block_training_flops("dense", *shape) == dense
    assert formulas.block_training_flops("cola", *shape) == cola
    assert cola / dense == pytest.approx(ratio, abs=5e-5)


def test_the_other_methods_as_the_papers_table_writes_them() -> None:
    d, f, r, n = 512, 1376, 128, 256
    dense = 24 * n * d**2 + 12 * n**2 * d + 18 * n * d * f
    relora = 16 * n * d**2 + 12 * n**2 * d + 12 * n * d * f + 48 * n * d * r + 18 * n * r * (d + f)
    assert formulas.block_training_flops("relora", d, f, r, n) == relora
    assert formulas.block_training_flops("sltrain", d, f, r, n) == dense + 24 * d**2 * r + 18 * d * f * r
    assert formulas.block_training_flops("galore", d, f, r, n) == dense + 16 * d**2 * r + 12 * d * f * r


def test_sltrain_overhead_at_1b_depends_on_tokens_per_call() -> None:
    """+196 % at 256 tokens per call, +6 % at 8,192, of the linear layers only."""
    d, f, r = 2048, 5461, 512
    for n, overhead in ((256, 1.96), (8192, 0.06)):
        linear = 24 * n * d**2 + 18 * n * d * f
        dense = formulas.block_training_flops("dense", d, f, r, n)
        extra = formulas.block_training_flops("sltrain", d, f, r, n) - dense
        assert extra / linear == pytest.approx(overhead, abs=0.05)


def test_break_even_rank() -> None:
    assert formulas.break_even_ratio(512, 1376) == pytest.approx(0.6328, abs=5e-5)
    assert formulas.break_even_ratio(2048, 5461) == pytest.approx(0.6316, abs=5e-5)
    at = round(formulas.break_even_ratio(2048, 5461) * 2048)
    dense = formulas.block_training_flops("dense", 2048, 5461, 0, N)
    assert formulas.block_training_flops("cola", 2048, 5461, at - 1, N) < dense
    assert formulas.block_training_flops("cola", 2048, 5461, at + 1, N) > dense


def test_recompute_ratios_of_the_paper() -> None:
    """4.585 by the formula, 2.41 if whole segments are run again."""
    blocks, paper, authors = (formulas.recompute_flops(s, 2048, 512, N) for s in ("blocks", "cola-m", "cola-m authors"))
    assert blocks / paper == pytest.approx(4.585, abs=5e-4)
    assert blocks / authors == pytest.approx(2.41, abs=5e-3)


def test_memory_column_of_the_paper() -> None:
    for parameters, gib in ((42_770_944, 0.319), (609_310_720, 4.540), (1_339_082_752, 9.977)):
        assert formulas.training_state_bytes(parameters) / 2**30 == pytest.approx(gib, abs=5e-4)


@pytest.fixture(scope="module")
def cola_1b() -> LlamaForCausalLM:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config("1b"))
    del model.model.layers[2:]
    return lorank.convert(model, lorank.CoLA(rank=512, nonlinearity="low-rank"))


@pytest.mark.parametrize("method", ["dense", "cola"])
@pytest.mark.parametrize("name", ["60m", "350m"])
def test_counted_flops_are_those_of_the_formula(name: str, method: str) -> None:
    """On the meta device, with two of the blocks."""
    size, config = SIZES[name], llama_config(name)
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if method == "cola":
            lorank.convert(model, lorank.CoLA(rank=size.rank))
        ids = torch.zeros(1, N, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    head = 3 * 2 * N * size.hidden_size * 32_000
    expected = PUBLISHED[name][0 if method == "dense" else 1] * 2 + head
    assert counter.get_total_flops() == expected
    measured = accounting.measure_flops(model, sequence_length=N)
    assert measured.total == expected and measured.recompute == 0
    assert accounting.flops_per_token(model, N) == expected / N


def test_cola_m_runs_only_b_and_attention_again(cola_1b: LlamaForCausalLM) -> None:
    d, f, r = 2048, 5461, 512
    plain = accounting.measure_flops(cola_1b, sequence_length=N)
    lorank.checkpoint(cola_1b, lorank.keep_bottlenecks)
    measured = accounting.measure_flops(cola_1b, sequence_length=N)
    per_block = 2 * N * r * (4 * d + 2 * f) + 4 * N**2 * d
    assert (measured.forward, measured.backward) == (plain.forward, plain.backward)
    assert measured.recompute == 2 * per_block == 2 * formulas.bottleneck_recompute_flops(d, f, r, N)
    # the paper's count is 18.5 n d r + 4 n² d at d_ff = 2.5 d; d_ff is 2.67 d here
    assert per_block < 18.5 * N * d * r * (4 * d + 2 * f) / (4 * d + 2 * 2.5 * d) + 4 * N**2 * d
    assert per_block < formulas.recompute_flops("cola-m authors", d, r, N) / 1.8

    lorank.checkpoint(cola_1b, POLICIES["bottlenecks+attention"])
    assert accounting.measure_flops(cola_1b, sequence_length=N).recompute == 2 * 2 * N * r * (4 * d + 2 * f)
    lorank.checkpoint(cola_1b, lorank.keep_bottlenecks, every=2)
    assert accounting.measure_flops(cola_1b, sequence_length=N).recompute == per_block
    lorank.checkpoint(cola_1b, None)
    assert accounting.measure_flops(cola_1b, sequence_length=N) == plain


def small(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=2
    )
    return LlamaForCausalLM(shape).train()


def kept_per_block(policy: str) -> int:
    """Bytes that one more block keeps on 3 x 16 real tokens: the difference of models with 3 and with 2 blocks."""
    ids = torch.zeros(3, 16, dtype=torch.int64)
    sizes = []
    for layers in (2, 3):
        model = lorank.convert(small(layers), lorank.CoLA(rank=8))
        lorank.checkpoint(model, POLICIES[policy])
        sizes.append(accounting.measure_saved(model, {"input_ids": ids, "labels": ids}).bytes)
    return sizes[1] - sizes[0]


def test_cola_m_keeps_block_inputs_and_bottlenecks() -> None:
    """From real tensors: n d + 7 n r numbers of 4 bytes, one n d below the paper's 2 n d + 7 n r."""
    n, d, r = 3 * 16, 32, 8
    dice = torch.get_rng_state().numel()  # bytes: each checkpoint keeps the random state, for dropout
    assert kept_per_block("blocks") == dice + 4 * n * d
    assert kept_per_block("bottlenecks") == dice + 4 * (n * d + 7 * n * r)
    assert kept_per_block("bottlenecks+attention") == dice + 4 * (
        n * d + 7 * n * r + n * d + n * 2
    )  # and its log-sum-exp, 2 heads
    assert kept_per_block("none") > 2 * kept_per_block("bottlenecks+attention")


def test_the_measured_bottlenecks_are_the_seven_of_each_block() -> None:
    ids = torch.zeros(3, 16, dtype=torch.int64)
    model = lorank.convert(small(), lorank.CoLAM(rank=8))
    shapes = accounting.measure_saved(model, {"input_ids": ids, "labels": ids}).shapes
    assert sum(shape in ((48, 8), (3, 16, 8)) for shape in shapes) == 2 * 7


def test_a_measurement_leaves_the_model_as_it_was() -> None:
    model = lorank.convert(small(), lorank.CoLAM(rank=8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accounting.measure_flops(model, sequence_length=16)
    accounting.memory_estimate(model, batch=2, sequence_length=16)
    assert model.is_activation_checkpointing and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_in_use_has_a_twin() -> None:
    """Also where it keeps tensors that are neither parameters nor buffers: counts of experts, a context."""
    ids = torch.zeros(1, 16, dtype=torch.int64)
    for method in (lorank.SMoRA(rank=8), lorank.MTLoRA(rank=8)):
        model = lorank.convert(small(), method).train()
        if method.name == "mtlora":
            lorank.set_context(model, torch.tensor([1]))
        model(ids)
        with without_data("counted"):
            twin_of(model)(torch.zeros(1, 16, dtype=torch.int64))  # all in it is without data, or this fails


def test_memory_estimate_equals_what_a_real_step_keeps() -> None:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    for method in (None, "cola", "cola-m"):
        model = small() if method is None else lorank.convert(small(), method)
        estimate = accounting.memory_estimate(model, batch=2, sequence_length=16)
        real = accounting.measure_saved(model, {"input_ids": ids, "labels": ids}).bytes
        if method == "cola-m":  # the random state of each checkpointed block; no operation makes it
            real -= 2 * torch.get_rng_state().numel()
        assert estimate.activations_bytes == pytest.approx(real, rel=0.02)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        state = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
        assert estimate.optimizer_bytes == sum(t.numel() * t.element_size() for t in state)
        assert estimate.gradients_bytes == sum(p.grad.numel() * 4 for p in model.parameters())
        assert estimate.weights_bytes == sum(p.numel() * 4 for p in model.parameters())


def test_muon_keeps_one_moment_for_the_blocks_matrices() -> None:
    model, recipe = lorank.convert(small(), "cola"), Recipe(method="cola", optimizer="muon", weight_decay=0.0)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = build_optimizer(recipe, model)
    optimizer.step()
    state = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
    estimate = accounting.memory_estimate(
        model, optimizer_bytes=state_bytes(recipe, model), batch=2, sequence_length=16
    )
    assert estimate.optimizer_bytes == sum(t.numel() * t.element_size() for t in state)


def test_counts_of_parameters() -> None:
    counts = accounting.count_parameters(small())
    block = 4 * 32**2 + 3 * 32 * 80 + 2 * 32
    assert counts == (2 * 50 * 32 + 2 * block + 32, 2 * 50 * 32 + 2 * block + 32, 2 * block)


def test_the_peak_of_this_device_names_its_source() -> None:
    rate, source = accounting.achievable_flops()
    assert rate > 1e9 and ("measured" in source or "data sheet" in source)


def test_only_chosen_experts_are_counted() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    n, found = 16, {}
    for experts in (4, 8):
        config = MixtralConfig(
            vocab_size=96, num_hidden_layers=1, num_local_experts=experts, num_experts_per_tok=2, **shape
        )
        model = MixtralForCausalLM(config)
        found[experts] = accounting.measure_flops(model, sequence_length=n)
    projections = 2 * n * (2 * 32 * 32 + 2 * 32 * 16)
    chosen = 2 * n * 2 * 3 * 32 * 64
    for experts, flops in found.items():
        assert flops.forward == projections + 4 * n * n * 32 + 2 * n * 32 * experts + chosen + 2 * n * 32 * 96
        assert flops.backward == 2 * flops.forward
    # with real data, and experts in a form that torch's own table knows
    model.set_experts_implementation("batched_mm")
    ids = torch.arange(n)[None]
    with FlopCounterMode(display=False, custom_mapping=accounting.MORE_FLOPS) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == found[8].total


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {**HEADS, "intermediate_size": 128, "num_local_experts": 8},
    "qwen2_moe": {**HEADS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8},
    "gpt_oss": {**HEADS, "intermediate_size": 96, "num_local_experts": 8, "head_dim": 16},
    "mamba": {"state_size": 8},
}


def peak_of_the_allocator(call: Callable[[], object]) -> int:
    """The most bytes that torch allocated at once on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    moments = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(moments, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("kind", KINDS)
def test_peaks_are_those_of_the_allocator(kind: str, precision: str) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=96, hidden_size=64, num_hidden_layers=2, pad_token_id=0, use_cache=False, **KINDS[kind]
    )
    dtype = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").train()
    ids = torch.arange(64).view(4, 16)

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    found = accounting.measure_peak(model, batch=4, sequence_length=16, autocast=precision == "bf16")
    assert found.most_bytes == pytest.approx(peak_of_the_allocator(train), rel=0.1)


def test_a_measurement_leaves_no_tensors_behind() -> None:
    # by type and not `isinstance`, which reads `__class__`: some objects of torch then warn
    model, ids = small(), torch.zeros(1, 16, dtype=torch.int64)
    counts = []
    for _ in range(3):
        accounting.measure_saved(model, {"input_ids": ids, "labels": ids})
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[2] <= counts[1]
