"""LaX: the equation of the chain, its gates, what it costs, and that it is local to a token and to a call."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lorank
from lorank import CoLA, CoLAM, LowRank, checkpoint, convert, merge
from lorank.accounting import measure_flops, measure_saved
from lorank.architectures import llama_config
from lorank.checkpointing import POLICIES
from lorank.methods.cola import CoLALinear
from lorank.methods.lax import LaXLinear, TensorGate, split
from lorank.sizes import SIZES
from lorank.tape import Tape
from tests.conftest import ARCHITECTURES

LAYERS, N = 3, 12
GATES = ["identity", "tensor", "linear"]
ADDED = {"60m": 28_224, "130m": 78_848, "350m": 164_864, "1b": 370_944}
"""Parameters of tensor gates and norms in a paper's model."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chain(depths: int, rank: int = 6, **options: Any) -> list[Any]:
    torch.manual_seed(0)
    tape = Tape("somewhere", depths, dense_start=False)
    options = {"carry": "tensor", "norm": True, "activation": "silu", "dtype": torch.float64, **options}
    return [LaXLinear(10, 14, rank, tape=tape, depth=depth, **options) for depth in range(depths)]


def model_of(method: Any, **shape: Any) -> Any:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": LAYERS, "num_key_value_heads": 4, **shape}
    return convert(ARCHITECTURES["llama"].dense(**shape), method).train()


# ---- the equation


@torch.no_grad()
def test_a_chain_is_the_formula_with_a_bare_first_block() -> None:
    layers, xs = chain(3), [numbers(2, 5, 10, seed=seed) for seed in range(3)]
    for layer in layers[1:]:
        layer.norm.weight.uniform_(0.5, 2)
        layer.norm.bias.uniform_(-1, 1)
    z = None
    for layer, x in zip(layers, xs, strict=True):
        h = x @ layer.A.weight.T
        if z is not None:
            h = h + z @ torch.kron(layer.gate.G1, layer.gate.G2).T
            centred = h - h.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            h = scaled * layer.norm.weight + layer.norm.bias
        z = h / (1 + torch.exp(-h))
        torch.testing.assert_close(layer(x), z @ layer.B.weight.T, rtol=1e-12, atol=1e-12)
    assert layers[0].gate is layers[0].norm is None


@torch.no_grad()
def test_the_simplest_chain_is_a_block_matrix() -> None:
    """[B₁ A₁, B₁ A₀] on (x₁, x₀): rank r from two sources."""
    first, second = chain(2, carry="identity", norm=False, activation=None)
    x0, x1 = numbers(5, 10), numbers(5, 10, seed=1)
    first(x0)
    W = torch.cat([second.B.weight @ second.A.weight, second.B.weight @ first.A.weight], 1)
    torch.testing.assert_close(second(x1), torch.cat([x1, x0], 1) @ W.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [128, 256, 512])
def test_the_tensor_gate_is_a_kronecker_product(rank: int) -> None:
    gate = TensorGate(rank, dtype=torch.float64)
    torch.manual_seed(0)
    gate.draw()
    dense = torch.einsum("ij,kl->ikjl", gate.G1, gate.G2).reshape(rank, rank)
    z = numbers(3, rank)
    torch.testing.assert_close(gate(z), z @ dense.T, rtol=1e-12, atol=1e-12)
    a, b = split(rank)
    assert (a * b, b - a) == (rank, min(rank // d - d for d in range(1, rank) if rank % d == 0 and d <= rank // d))


def test_gates_start_as_the_authors_do() -> None:
    torch.manual_seed(0)
    [_, linear] = chain(2, rank=256, carry="linear")
    [_, tensor] = chain(2, rank=1024)
    assert linear.gate.weight.abs().max().item() == pytest.approx(1 / 16, rel=1e-3)
    assert 0 < linear.gate.bias.abs().max().item() <= 1 / 16
    for G in (tensor.gate.G1, tensor.gate.G2):
        assert G.abs().max().item() == pytest.approx((6 / 32) ** 0.5, rel=0.01)
    before = tensor.gate.G1.detach().clone()
    tensor.norm.weight.data.fill_(3)
    tensor.reset_parameters()
    assert not torch.equal(tensor.gate.G1, before) and tensor.norm.weight.max() == 1


@pytest.mark.parametrize("carry", ["tensor", "linear"])
def test_with_gates_of_zero_it_is_cola_to_the_bit(carry: Any, tokens: Tensor) -> None:
    model, cola = model_of(CoLA(rank=8, carry=carry, carry_norm=False)), model_of(CoLA(rank=8))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".gate." in name:
                p.zero_()
    missing = cola.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and all(".gate." in name for name in missing.unexpected_keys)
    assert torch.equal(model(tokens).logits, cola(tokens).logits)


def test_gradients_of_a_layer_by_finite_differences() -> None:
    _, layer = chain(2)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, before: Tensor, *values: Tensor) -> Tensor:
        layer.tape.put(0, before)
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = numbers(2, 10), numbers(2, 6, seed=1), *(p.detach() for p in layer.parameters())
    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in inputs))


# ---- a model


@pytest.mark.parametrize(("method", "carry"), [(CoLA, "tensor"), (CoLAM, "linear"), (LowRank, "identity")])
def test_gradients_do_not_depend_on_what_is_kept(method: Any, carry: Any, tokens: Tensor) -> None:
    model, found = model_of(method(rank=8, carry=carry)).double(), {}
    for name, every in [*((name, 1) for name in POLICIES), ("bottlenecks", 2)]:
        checkpoint(model, POLICIES[name], every=every)
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found[name, every] = {n: p.grad.clone() for n, p in model.named_parameters()}
    for gradients in found.values():
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found["none", 1][name], rtol=0, atol=1e-12)
    assert all(g.abs().max() > 0 for g in found["none", 1].values())


@torch.no_grad()
def test_it_is_causal_and_a_cache_needs_nothing_more(tokens: Tensor) -> None:
    model = model_of(CoLA(rank=8, carry="tensor")).eval()
    full, changed = model(tokens).logits, tokens.clone()
    changed[:, 7] = 5
    assert torch.equal(model(changed).logits[:, :7], full[:, :7])
    first = model(tokens[:, :6], use_cache=True)
    for t in range(6, N):
        first = model(tokens[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(first.logits[:, 0], full[:, t], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nothing_leaks_between_rows_or_calls(tokens: Tensor) -> None:
    model = model_of(CoLA(rank=8, carry="tensor")).eval()
    first = model(tokens).logits
    assert torch.equal(model(tokens.flip(0)).logits, first.flip(0))
    assert torch.equal(model(tokens).logits, first)
    assert not any(module.tape.waiting for module in model.modules() if isinstance(module, LaXLinear))


def test_each_projection_has_a_chain_of_its_own_and_is_saved(tokens: Tensor, tmp_path: Path) -> None:
    model = model_of(CoLA(rank=8, carry="linear", init="dlr"))
    tapes = [{id(m.tape) for m in block.modules() if isinstance(m, LaXLinear)} for block in model.model.layers]
    assert len(tapes[0]) == 7 and tapes[0] == tapes[1] == tapes[2]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    assert {type(m).__name__ for m in again.modules()} >= {"ReusingLaX", "LinearGate"}


# ---- what it costs


@pytest.mark.parametrize("size", ADDED)
def test_the_number_of_parameters_of_the_papers_models(size: str) -> None:
    """Of each block after the first, times these blocks."""
    shape, r = llama_config(size), SIZES[size].rank
    shape.num_hidden_layers = 2

    def count(**settings: Any) -> int:
        with torch.device("meta"):
            return convert(LlamaForCausalLM(shape), CoLA(rank=r, **settings)).num_parameters()

    plain = count()
    assert (count(carry="tensor") - plain) * (SIZES[size].layers - 1) == ADDED[size]
    if size == "60m":
        assert count(carry="linear", carry_norm=False) - plain == 7 * (r * r + r)


def test_flops_and_bytes_are_those_of_the_docstring() -> None:
    r, (a, b), layers = 12, (3, 4), 2
    plain, tensor, linear = (model_of(CoLA(rank=r, carry=carry), num_hidden_layers=layers) for carry in ("none", "tensor", "linear"))  # type: ignore[arg-type]  # fmt: skip
    flops = [measure_flops(model, sequence_length=N) for model in (plain, tensor, linear)]
    for one, forward in zip(flops[1:], (2 * r * (a + b), 2 * r * r), strict=True):
        assert one.forward - flops[0].forward == 7 * (layers - 1) * N * forward
        assert one.backward - flops[0].backward == 2 * (one.forward - flops[0].forward)
    ids = torch.zeros(1, N, dtype=torch.int64)
    kept = []
    for model in (plain, tensor):
        checkpoint(model, POLICIES["bottlenecks"])
        shapes = measure_saved(model, {"input_ids": ids, "labels": ids}).shapes
        kept.append(sum(math.prod(shape) == N * r for shape in shapes))
    assert kept == [7 * layers, 7 * layers + 7 * (layers - 1)], "z of the block before"


@pytest.mark.parametrize("name", ["muon", "spectron", "factor-lr"])
def test_adamw_moves_gates_and_decay_pulls_at_matrices_only(name: str) -> None:
    model = model_of(LowRank(rank=8, carry="linear"))
    method = lorank.table.find(name)(**({"rule": "muon"} if name == "factor-lr" else {}))
    optimizer = lorank.optimizer(model, method, lr=0.1, weight_decay=0.5)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, p in model.named_parameters():
        rule = group_of[p].get("rule") or "adamw"
        if ".gate." in parameter_name or ".norm." in parameter_name:
            assert rule == "adamw", parameter_name
            assert (group_of[p]["weight_decay"] > 0) == (p.ndim == 2), parameter_name
        elif parameter_name.endswith(("A.weight", "B.weight")):
            assert rule != "adamw"


# ---- refusals


def test_what_makes_no_chain_is_refused() -> None:
    for method in (CoLA, LowRank):
        with pytest.raises(ValueError, match="carry must be 'none', 'identity', 'tensor' or 'linear', got 'gate'"):
            method(carry="gate")
        with pytest.raises(ValueError, match="carry must be .* with carry_norm=False, got 'none'"):
            method(carry_norm=False)
    carrying = CoLA(rank=8, carry="tensor")
    with pytest.raises(ValueError, match="needs a projection in two blocks"):
        model_of(carrying, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"carry chains .*up_proj .* depth 2 was chosen without depth 1; choose"):
        convert(ARCHITECTURES["llama"].dense(num_hidden_layers=3), carrying, exclude=r"layers\.1\.mlp\.up_proj")
    with pytest.raises(
        ValueError, match=r"needs one rank for model\.layers\.\*\.self_attn\.q_proj in all blocks, got 4 at"
    ):
        model_of(CoLA(rank={r"layers\.0\.": 4, ".*": 8}, carry="tensor"))
    model = model_of(LowRank(rank=8, carry="tensor"))
    with pytest.raises(ValueError, match="low-rank cannot be merged: with carry='tensor' a layer's output depends"):
        merge(model)


def test_the_experts_of_a_mixture_pass_nothing_on(tokens: Tensor) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    mixture = MixtralForCausalLM(
        MixtralConfig(**shape, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1, vocab_size=96)
    )
    model: Any = convert(mixture, CoLA(rank=8, carry="tensor"))
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.model.layers[1].named_modules()}
    assert kinds["q_proj"] is LaXLinear and not issubclass(kinds["up_proj"], LaXLinear | CoLALinear | nn.Linear)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
