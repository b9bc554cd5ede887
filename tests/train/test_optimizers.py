"""Parameter groups, and Muon beside AdamW as one optimizer."""

import copy
import io
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorank
from lorank.optim import find_optimizer
from lorank.optim.groups import ranks as low_rank_ranks
from lorank.train.optimizers import (
    MuonAdamW,
    build_low_rank_optimizer,
    build_optimizer,
    parameter_groups,
    step_flops,
)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def names(model: torch.nn.Module, groups: list[dict], weight_decay: float) -> set[str]:
    wanted = {id(p) for group in groups if group["weight_decay"] == weight_decay for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_matrices_decay_and_norms_biases_embeddings_do_not() -> None:
    model = lorank.convert(llama(attention_bias=True), "cola")
    hidden, others = parameter_groups(model, 0.1, "matrices")
    assert names(model, hidden, 0.0) == set()
    assert names(model, others, 0.1) == {"lm_head.weight"}
    assert names(model, others, 0.0) == {n for n, p in model.named_parameters() if p.ndim == 1} | {
        "model.embed_tokens.weight"
    }
    assert {n.rpartition(".")[0][-1] for n in names(model, hidden, 0.1)} == {"A", "B"}


def test_all_means_all_as_in_the_papers() -> None:
    model = llama()
    hidden, others = parameter_groups(model, 0.1, "all")
    assert names(model, hidden + others, 0.1) == {name for name, _ in model.named_parameters()}


def test_each_parameter_is_in_one_group_also_when_tied() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    hidden, others = parameter_groups(model, 0.1, "matrices")
    grouped = [id(p) for group in hidden + others for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "transformer.wte.weight" in names(model, others, 0.0)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 40, (2, 8), generator=generator)
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_and_adamw_together_equal_the_two_apart() -> None:
    together = llama()
    apart = copy.deepcopy(together)
    one = build_optimizer(together, "muon", lr=0.01, weight_decay=0.1)
    hidden, others = parameter_groups(apart, 0.1, "matrices")
    muon = torch.optim.Muon(hidden, lr=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01)
    for seed in range(3):
        step(together, one, seed)
        x = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(seed))
        apart(input_ids=x, labels=x).loss.backward()
        muon.step(), adamw.step()
        muon.zero_grad(), adamw.zero_grad()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_muon_adamw_state_travels_through_a_safe_file() -> None:
    model = llama()
    optimizer = build_optimizer(model, "muon", lr=0.01, weight_decay=0.1)
    for seed in range(2):
        step(model, optimizer, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, "muon", lr=0.5, weight_decay=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_scheduler_drives_both_halves() -> None:
    model = llama()
    optimizer = build_optimizer(model, "muon", lr=0.01, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 0)
    scheduler.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_closures_are_refused() -> None:
    optimizer = build_optimizer(llama(), "muon", lr=0.01, weight_decay=0.0)
    assert isinstance(optimizer, MuonAdamW)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


# ---- operations of a step


def in_place(out: Any, *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Of W.addmm_(a, b), which PyTorch's counter does not know."""
    (m, r), (_, n) = shapes
    return 2 * m * r * n


@pytest.mark.parametrize(
    ("method", "rule", "options"),
    [
        ("dense", "adamw", {}),
        ("dense", "muon", {}),
        ("dense", "adafactor", {}),
        ("galore", "adamw", {}),
        ("galore", "adamw", {"in_backward": True}),
        ("galore", "adamw", {"projection": "reverse_std"}),
        ("galore", "muon", {"projection": "full", "basis": "svd"}),
        ("galore", "adafactor", {"projection": "left", "basis": "randomised"}),
        ("fira", "adamw", {}),
        ("dct-adamw", "adamw", {}),
        ("dct-adamw", "adamw", {"error_feedback": "full", "transform": "fft"}),
        ("trion", "adamw", {}),
        ("trion", "adamw", {"transform": "fft"}),
    ],
)
def test_operations_of_a_step_are_those_of_the_counter(method: str, rule: Any, options: dict[str, Any]) -> None:
    """To the number, over the steps from one refresh to the next, with two micro-batches each."""
    model, gap = llama(intermediate_size=24), 3
    kind, ranks = find_optimizer(method), low_rank_ranks(model, 5) if method != "dense" else {}
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0}
    if kind is None:
        optimizer = build_optimizer(model, rule, **settings)
    else:
        options = options | ({"update_gap": gap} if method != "trion" else {})
        optimizer = build_low_rank_optimizer(model, kind, ranks, rule, options=options, **settings)
    weights = [(p, torch.randn_like(p)) for p in model.parameters()]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        for _ in range(gap):
            for _ in range(2):
                torch.stack([(p * gradient).sum() for p, gradient in weights]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = step_flops(model, rule, kind, ranks, options, micro_batches=2)
    assert counter.get_total_flops() == pytest.approx(gap * found, rel=1e-12)
    assert (found > 0) == ((method, rule) != ("dense", "adamw"))


def test_an_optimizer_that_does_not_say_what_it_costs_is_named() -> None:
    model = llama()
    with pytest.raises(ValueError, match="SGD does not say what it costs; give it step_flops"):
        step_flops(model, kind=torch.optim.SGD, ranks=low_rank_ranks(model, 4))
