"""ReLoRA: its schedule, merges, resets and warm start, against the specification's numbers and by hand."""

import copy
from typing import Any

import pytest
import torch
from lorank.train.optimizers import build_optimizer
from torch import Tensor, nn

import lorank
from lorank import convert, step_hook
from lorank.architectures import llama_config
from lorank.methods.relora import ReLoRA, ReLoRALinear, jagged_cosine, prune_
from lorank.sizes import Size

SIZES_250M = Size(768, 2560, 24, 16, 128)


def layers_of(model: nn.Module) -> list[ReLoRALinear]:
    return [module for module in model.modules() if isinstance(module, ReLoRALinear)]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def trainer(model: Any, steps: int, lr: float = 1e-2, seed: int = 0) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    return optimizer, step_hook(model, optimizer, steps=steps, seed=seed)


def a_step(model: Any, optimizer: Any, tokens: Tensor, lr: float | None = None) -> None:
    if lr is not None:
        optimizer.param_groups[0]["lr"] = lr
    loss_of(model, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("size", "total", "trainable"),
    [
        ("60m", 58_073_600, 42_770_944),
        ("130m", 134_105_856, 71_584_512),
        ("250m", 247_370_496, 98_734_848),
        ("350m", 367_969_280, 125_404_160),
        ("1b", 1_339_082_752, 250_706_944),
    ],
)
def test_trainable_parameters(size: str, total: int, trainable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lorank.sizes.SIZES, "250m", SIZES_250M)
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = convert(LlamaForCausalLM(llama_config(size)), ReLoRA(rank=128))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    factors = sum(p.numel() for layer in layers_of(model) for p in (layer.A.weight, layer.B.weight))
    assert trainable - factors + frozen == total


def test_the_schedule_of_the_specification() -> None:
    expected = {4_999: 0.802615, 5_000: 0, 5_050: 0.397203, 5_100: 0.794406, 9_999: 0.339302, 10_000: 0}
    expected |= {10_100: 0.330652, 14_999: 0.1}
    for step, value in expected.items():
        assert jagged_cosine(step, 15_000, 500, 100, 5_000, 0.1) == pytest.approx(value, abs=1e-6)
    assert [jagged_cosine(s, 15_000, 500, 100, 5_000, 0.1) for s in (0, 250, 500)] == [0, 0.5, 1]
    method = ReLoRA(cycle=5_000, restart_warmup_steps=100)
    assert method.schedule(15_000, 500, 0.1)(5_050) == pytest.approx(0.397203, abs=1e-6)


def test_a_merge_changes_no_output_and_starts_the_factors_anew(small: Any, tokens: Tensor) -> None:
    model = convert(small("llama"), ReLoRA(rank=4, cycle=4, restart_warmup_steps=1, dropout=0.0)).train()
    optimizer, _ = trainer(model, 8)
    for step in range(5):
        before = model(tokens).logits
        a_step(model, optimizer, tokens, lr=0.0 if step == 4 else 1e-2)  # the schedule's rate before a merge is 0
        if step < 4:
            assert not torch.equal(model(tokens).logits, before)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-6)
    assert all(not layer.B.weight.any() and layer.A.weight.any() for layer in layers_of(model))
    loss_of(model, tokens).backward()  # check 8: at first only B learns
    assert all(not layer.A.weight.grad.any() and layer.B.weight.grad.any() for layer in layers_of(model))


def test_merges_come_after_updates_k_plus_1_and_2k_plus_1_of_the_low_rank_stage(small: Any, tokens: Tensor) -> None:
    for warm_start in (0, 3):
        method = ReLoRA(rank=4, cycle=3, restart_warmup_steps=1, warm_start=warm_start)
        model = convert(small("llama"), method).train()
        optimizer, _ = trainer(model, 9 + warm_start)
        merged, W = [], layers_of(model)[0].W.weight
        for step in range(1, 10 + warm_start):
            before = W.detach().clone()
            a_step(model, optimizer, tokens)
            if step > warm_start and not torch.equal(W, before):
                merged.append(step - warm_start)
        assert merged == [4, 7]


def test_ranks_of_merges_add_up(small: Any) -> None:
    torch.manual_seed(0)
    layer = layers_of(convert(small("llama").double(), ReLoRA(rank=3)))[0]
    start = layer.W.weight.detach().clone()
    for k in range(1, 5):
        nn.init.normal_(layer.A.weight)
        nn.init.normal_(layer.B.weight)
        layer.restart(torch.Generator().manual_seed(k))
        assert torch.linalg.matrix_rank(layer.W.weight - start) == min(3 * k, 32)


@pytest.mark.parametrize(
    ("reset", "ratio", "kept"), [("reset", 0.5, 0.001), ("random", 0.8, 0.2), ("magnitude", 0.9, 0.1)]
)
def test_what_a_reset_leaves(reset: Any, ratio: float, kept: float) -> None:
    moment = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    before = moment.clone()
    prune_(moment, reset, ratio, torch.Generator().manual_seed(1))
    stays = moment != 0
    assert torch.equal(moment[stays], before[stays])
    if reset == "magnitude":
        assert stays.sum() == 20_000
        assert before[stays].abs().min() > before[~stays].abs().max()
    else:
        assert stays.float().mean().item() == pytest.approx(kept, rel=0.15)


def test_a_reset_touches_moments_of_factors_only(small: Any, tokens: Tensor) -> None:
    model = convert(small("llama"), ReLoRA(rank=4, cycle=2, restart_warmup_steps=1, reset="magnitude")).train()
    optimizer, hook = trainer(model, 4)
    factors = {id(p) for layer in layers_of(model) for p in (layer.A.weight, layer.B.weight)}
    for _ in range(2):
        a_step(model, optimizer, tokens)
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters() if p.requires_grad}
    hook._prune(layers_of(model)[0], torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        now, then = optimizer.state[p], state[name]
        assert torch.equal(now["step"], then["step"])
        pruned = id(p) in factors and "layers.0.self_attn.q_proj" in name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(now[moment], then[moment]) != pruned or not then[moment].any(), name


def test_the_repository_s_start_learns_nothing_before_the_first_merge(small: Any, tokens: Tensor) -> None:
    model = convert(small("llama"), ReLoRA(rank=4, cycle=4, restart_warmup_steps=1, start="repo")).train()
    optimizer, _ = trainer(model, 8)
    for _ in range(4):
        a_step(model, optimizer, tokens)
        assert all(not layer.A.weight.any() and not layer.B.weight.any() for layer in layers_of(model))
    a_step(model, optimizer, tokens)
    assert all(layer.A.weight.any() for layer in layers_of(model))

    model = convert(small("llama"), ReLoRA(rank=4, cycle=4, restart_warmup_steps=1)).train()
    optimizer, _ = trainer(model, 8)
    A, B = layers_of(model)[0].A.weight, layers_of(model)[0].B.weight
    start = A.detach().clone()
    a_step(model, optimizer, tokens)
    assert B.any() and torch.equal(A, start)
    a_step(model, optimizer, tokens)
    assert not torch.equal(A, start)


def test_optimizer_state_is_that_of_the_trained_parameters(small: Any, tokens: Tensor) -> None:
    model = convert(small("llama").to(torch.bfloat16), ReLoRA(rank=4, cycle=2, restart_warmup_steps=1)).train()
    optimizer, _ = trainer(model, 4)
    a_step(model, optimizer, tokens)
    held = sum(t.nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step")
    assert held == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not any(layer.W.weight in optimizer.state for layer in layers_of(model))


def test_a_warm_start_moves_w_alone_and_then_gives_up_its_state(small: Any, tokens: Tensor) -> None:
    model = convert(small("llama"), ReLoRA(rank=4, cycle=3, restart_warmup_steps=1, warm_start=2)).train()
    dense = small("llama").train()
    optimizer, _ = trainer(model, 8)
    plain = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        assert all(layer.W.weight.requires_grad for layer in layers_of(model))
        a_step(model, optimizer, tokens)
        a_step(dense, plain, tokens)
    torch.testing.assert_close(model.eval()(tokens).logits, dense.eval()(tokens).logits, rtol=1e-5, atol=1e-6)
    assert not any(layer.B.weight.any() for layer in layers_of(model))
    assert not any(layer.W.weight.requires_grad or layer.W.weight in optimizer.state for layer in layers_of(model))
    W = [layer.W.weight.detach().clone() for layer in layers_of(model)]
    a_step(model.train(), optimizer, tokens)
    assert all(torch.equal(layer.W.weight, before) for layer, before in zip(layers_of(model), W, strict=True))
    assert all(layer.B.weight.any() for layer in layers_of(model))


def test_idle_factors_are_not_in_the_norm_that_is_clipped(small: Any, tokens: Tensor) -> None:
    model = convert(small("llama"), ReLoRA(rank=4, cycle=3, warm_start=2, dropout=0.0)).train()
    dense = small("llama").train()
    optimizer, _ = trainer(model, 8)
    norms = []
    for m in (model, dense):
        m(input_ids=tokens, labels=tokens).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5))
    torch.testing.assert_close(*norms)
    for _ in range(2):
        optimizer.step()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.A.weight.grad is not None for layer in layers_of(model))


@pytest.mark.parametrize(
    ("steps", "warm_start", "cycle"), [(400, 0, 100), (401, 0, 101), (30, 0, 8), (7, 0, 2), (420, 20, 100)]
)
def test_a_cycle_that_nobody_gave_is_a_quarter_of_the_run(steps: int, warm_start: int, cycle: int) -> None:
    method = ReLoRA(warm_start=warm_start)
    assert method.period(steps) == cycle
    multiplier = method.schedule(steps, 0, 0.1)
    assert [s - warm_start for s in range(warm_start, steps) if multiplier(s) == 0] == [cycle, 2 * cycle, 3 * cycle]


def test_a_warm_start_leaves_something_to_the_factors() -> None:
    with pytest.raises(ValueError, match="steps=20 leave too few after warm_start=30"):
        ReLoRA(warm_start=30).period(20)
    with pytest.raises(ValueError, match="are not several times cycle=100"):
        ReLoRA(cycle=100).period(100)


@pytest.mark.parametrize("reset", ["reset", "random", "magnitude"])
@pytest.mark.parametrize("warm_start", [0, 3])
def test_stopped_and_started_again_at_any_step(reset: Any, warm_start: int, small: Any, tokens: Tensor) -> None:
    method = ReLoRA(rank=4, cycle=3, restart_warmup_steps=1, reset=reset, warm_start=warm_start)
    steps = 6 + warm_start

    def fresh() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = convert(small("llama"), method).train()
        return model, *trainer(model, steps, seed=5)

    whole, restarted = fresh(), fresh()
    for step in range(steps):
        for model, optimizer, _ in (whole, restarted):
            torch.manual_seed(step)
            a_step(model, optimizer, tokens.roll(step, 1))
        state = copy.deepcopy([part.state_dict() for part in restarted])
        restarted = fresh()
        for part, saved in zip(restarted, state, strict=True):
            part.load_state_dict(saved)
    assert all(map(torch.equal, whole[0].state_dict().values(), restarted[0].state_dict().values()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cycle": 1}, "cycle=1 leaves no update"),
        ({"reset": "all"}, "reset='all' is none of"),
        ({"start": "zero"}, "start='zero' is none of"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"reset_ratio": -0.1}, "reset_ratio=-0.1"),
        ({"restart_warmup_steps": -1}, "restart_warmup_steps=-1 is negative"),
        ({"warm_start": -1}, "warm_start=-1"),
        ({"alpha": 0.0}, "alpha=0.0 not positive"),
        ({"rank": 0}, "rank=0 is not positive"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReLoRA(**options)


def test_a_run_of_broken_cycles_and_an_optimizer_without_moments_are_refused(small: Any) -> None:
    method = ReLoRA(rank=4, cycle=4, restart_warmup_steps=1)
    with pytest.raises(ValueError, match="steps=10 less warm_start=0 are not several times cycle=4"):
        method.schedule(10, 1, 0.1)
    with pytest.raises(ValueError, match="warmup_steps=5 do not fit into cycle=4"):
        method.schedule(8, 5, 0.1)
    model = convert(small("llama"), method)
    with pytest.raises(ValueError, match="relora prunes the moments of Adam, which MuonAdamW does not keep"):
        step_hook(model, build_optimizer(model, "muon", lr=0.1, weight_decay=0.0), steps=8)
    assert ReLoRA().period(400) == 100
