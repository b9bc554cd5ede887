"""Self-guided training: the mixture, its schedule and draws, the end of the guide, and what it costs."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import lorank
from lorank import LowRank, SelfGuided, convert
from lorank.accounting import Flops, measure_flops
from lorank.methods.self_guided import FadingGuide, GuidedLinear, factors_of, share
from tests.conftest import ARCHITECTURES

PAPER = {"s": (768, 12, 192, 0.30), "m": (1024, 24, 256, 0.38), "l": (1536, 24, 384, 0.41), "xl": (2048, 24, 512, 0.43)}
"""Width, layers, rank, and how many further steps the guide may take for the dense model's FLOPs."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(**options: Any) -> Any:
    torch.manual_seed(0)
    return GuidedLinear(10, 14, 4, **{"passes": 0.25, "bias": True, "dtype": torch.float64, **options})


def model_of(**settings: Any) -> Any:
    torch.manual_seed(0)
    return convert(ARCHITECTURES["llama"].dense(), SelfGuided(rank=8, **settings)).train()


def guided(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GuidedLinear)]


def started(model: Any, steps: int = 8) -> tuple[Any, Any]:
    optimizer = lorank.optimizer(model, lr=1e-2, weight_decay=0.1)
    return optimizer, lorank.step_hook(model, optimizer, steps=steps, seed=3)


def train(model: Any, optimizer: Any, tokens: Tensor, micro: int = 2) -> None:
    for rows in tokens.split(micro):
        (model(input_ids=rows, labels=rows).loss * len(rows) / len(tokens)).backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- the layer


def test_it_starts_as_its_factors_whatever_the_share() -> None:
    layer, x = layer_of(), numbers(3, 5, 10)
    want = x @ layer.A.weight.T @ layer.B.weight.T + layer.B.bias
    for a in (0, 0.3, 1):
        layer.share.fill_(a)
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    W = numbers(14, 10, seed=1)
    A, B = factors_of(W, 10)
    torch.testing.assert_close(B @ A, W)
    torch.testing.assert_close((A @ A.T).diag(), torch.linalg.svdvals(W))
    torch.testing.assert_close((B.T @ B).diag(), torch.linalg.svdvals(W))


def test_gradients_of_a_guided_and_of_a_skipped_step() -> None:
    layer, x = layer_of(), numbers(5, 10)
    plain: Any = copy.deepcopy(layer)
    plain.drop()
    found = []
    for one, runs in ((plain, False), (layer, True), (layer, False)):
        layer.share.fill_(0.3)
        layer.runs = runs
        layer.zero_grad()
        y = one(x)
        y.sum().backward()
        found.append((y, one.A.weight.grad.clone(), one.B.weight.grad.clone()))
        if one is layer:
            assert (layer.W.weight.grad is None) != runs
    (y, A, B), mixed, skipped = found
    for a, b in zip(mixed[1:], (A, B), strict=True):
        torch.testing.assert_close(a, 0.7 * b, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, skipped, (y, A, B)))
    layer.W.weight.data.add_(1)
    layer.eval()
    assert not torch.allclose(layer(x), y), "evaluation is of the mixture"
    torch.testing.assert_close(layer(x), x @ layer.merged().T + layer.B.bias)


# ---- the schedule


def test_the_share_falls_as_a_cosine() -> None:
    assert [share(t, 10) for t in (0, 5, 10, 11)] == [1, 0.5, 0, 0]
    assert share(2, 8) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_draws_are_for_a_step_and_half_of_them_guide() -> None:
    layer = layer_of()
    hooks = [FadingGuide(SelfGuided(), layer, torch.optim.SGD(layer.parameters(), lr=0.1), 10_000, 5) for _ in range(2)]
    used = []
    for hooks[0].step in range(10_000):
        hooks[0].prepare()
        used.append(layer.runs)
        if hooks[0].step % 1000 == 0:
            hooks[1].step = hooks[0].step
            hooks[1].prepare()
            assert layer.runs == used[-1], "another process"
    assert sum(used) / len(used) == pytest.approx(0.5, abs=0.015)
    assert sum(used[:2000]) > 1900 and sum(used[-2000:]) < 100


def test_micro_batches_see_one_share_and_one_draw(tokens: Tensor) -> None:
    weights, seen = [], []
    for micro in (2, 1):
        model = model_of()
        optimizer, _ = started(model)
        shares = []
        guided(model)[0].register_forward_hook(lambda m, *_: shares.append((m.W and float(m.share), m.runs)))  # noqa: B023
        for _ in range(5):
            train(model, optimizer, tokens, micro)
        seen.append(shares)
        weights.append([p.detach() for p in model.parameters()])
    assert seen[1][::2] == seen[1][1::2] == seen[0]
    assert [a for a, _ in seen[0]] == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, None])
    torch.testing.assert_close(*weights, rtol=0, atol=2e-3)


# ---- the end of the guide


def test_its_end_changes_no_output_and_leaves_low_rank(tokens: Tensor, tmp_path: Path) -> None:
    model = model_of()
    optimizer, hook = started(model)
    for _ in range(3):
        train(model, optimizer, tokens)
    [W, *_] = [layer.W.weight for layer in guided(model)]
    assert W in optimizer.state
    with hook.aside()["without_guide"]:
        alone = model.eval()(tokens).logits
    assert not torch.equal(model(tokens).logits, alone)
    hook.step = 3
    for layer in guided(model):
        layer.share.zero_()  # what the fourth step would leave
    hook.step, before = 4, model(tokens).logits
    hook.prepare()
    assert torch.equal(model(tokens).logits, before) and torch.equal(before, alone)
    assert W not in optimizer.state and W.untyped_storage().nbytes() == 4 and not hook.aside()
    plain = convert(ARCHITECTURES["llama"].dense(), LowRank(rank=8))
    assert model.state_dict().keys() == plain.state_dict().keys()
    train(model.train(), optimizer, tokens)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    assert lorank.step_hook(again, lorank.optimizer(again, lr=0.1), steps=8) is None


def test_a_resumed_run_begins_with_its_guide() -> None:
    """Whether that is over, the hook finds out."""
    from lorank.train.model import build_config, build_model
    from lorank.train.recipe import Recipe

    recipe = Recipe(method="self-guided", rank=8, vocab_size=96)
    with torch.device("meta"):
        config = build_config(recipe)
        model: Any = build_model(recipe, config)
        SelfGuided().finalize(model)
        assert not guided(model)[0].W and model.config.lorank["arguments"]["guide"] == 0
        assert all(layer.W for layer in guided(build_model(recipe, config, model.config)))


def test_weights_saved_after_the_guide_are_loaded_first(tokens: Tensor) -> None:
    """As Trainer does; the contract test resumes at every step in another order."""
    model = model_of()
    optimizer, hook = started(model)
    for step in range(7):
        if step == 5:
            state = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, hook)]
        train(model, optimizer, tokens)
    again = model_of()
    assert not any(again.load_state_dict(state[0], strict=False))
    parts = started(again)
    for part, saved in zip(parts, state[1:], strict=True):
        part.load_state_dict(saved)
    assert not any(layer.W for layer in guided(again))
    for _ in range(2):
        train(again, parts[0], tokens)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_one_process_of_ddp_takes_the_steps_of_none(tokens: Tensor, tmp_path: Path) -> None:
    """DDP waits for gradients of guides that are skipped or gone."""
    found = []
    for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
        if wrap is nn.parallel.DistributedDataParallel:
            torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = model_of()
            outer = wrap(model)
            optimizer, _ = started(outer)
            for _ in range(6):
                train(outer, optimizer, tokens)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# ---- what it costs


@pytest.mark.parametrize(
    "size", ["s", pytest.param("m", marks=pytest.mark.slow), pytest.param("l", marks=pytest.mark.slow), "xl"]
)
def test_the_papers_steps_at_equal_flops(size: str) -> None:
    """(dense - low) / (low + guide / 2), each block like the second and third, the first dense."""
    d, layers, rank, want = PAPER[size]

    def flops(**settings: Any) -> int:
        totals = []
        for blocks in (2, 3):
            shape = {"hidden_size": d, "intermediate_size": 4 * d, "num_attention_heads": d // 64}
            with torch.device("meta"):
                config = GPTNeoXConfig(**shape, num_hidden_layers=blocks, vocab_size=32_000, tie_word_embeddings=True)
                model = GPTNeoXForCausalLM(config)
                if settings:
                    model = convert(model, SelfGuided(rank=rank, **settings), targets="mlp", exclude=r"layers\.0\.")
            totals.append(measure_flops(model, sequence_length=1024).total)
        return totals[0] + (layers - 2) * (totals[1] - totals[0])

    dense, low, always = flops(), flops(guide=0.0), flops(guide=1.0, reduce_flops=False)
    assert (dense - low) / (low + (always - low) / 2) == pytest.approx(want, abs=0.005)


def test_flops_are_means_and_memory_is_the_peak() -> None:
    """From the plan: a guide in half of the steps, used in half of these, costs a quarter of a dense matrix."""
    from lorank.plan.dry_run import plan
    from lorank.train.recipe import Recipe

    costs = {
        method: plan(Recipe(size="tiny", vocab_size=300, sequence_length=32, method=method, rank=64))
        for method in ("self-guided", "low-rank")
    }
    guided, low, dense = (x.model for x in costs.values()), costs["low-rank"].model, costs["low-rank"].dense
    [guided, _] = guided
    assert dense is not None
    products = 2 * 2 * (4 * 256 * 256 + 3 * 256 * 688)  # of the dense matrices of two blocks, for a token
    assert guided.flops.forward == pytest.approx(low.flops.forward + guided.tokens * products / 4, rel=1e-9)
    assert isinstance(guided.flops, Flops)
    for figure in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        extra = getattr(guided.memory, figure) - getattr(low.memory, figure)
        assert extra == pytest.approx(products / 2 * 4 * (2 if figure == "optimizer_bytes" else 1), rel=1e-3)
    assert guided.memory.peak_bytes > dense.memory.peak_bytes
