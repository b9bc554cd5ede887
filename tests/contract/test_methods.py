"""What every method must satisfy on every architecture, run over the table METHODS.

A method earns its place by passing this file unchanged; what is particular to it is tested in ``tests/methods``.
"""

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import SST, checkpoint, convert, lr_schedule, merge, optimizer, step_hook
from lorank.checkpointing import POLICIES
from lorank.table import find, method_names

IN_FP32 = {"crnet": "beta$"}
"""Parameters that a method keeps in single precision, as a pattern of their names."""
WITHOUT_NOISE: dict[str, Any] = {"relora": {"dropout": 0.0}}
"""Settings without which two calls of one model would differ; default: the method's own."""
REBUILDS = {"crnet": "recurrence"}
"""Checkpoint policies under which a method rebuilds what it dropped, so that gradients agree up to rounding only."""
SHORT_LIVED: dict[str, Any] = {
    "relora": find("relora")(cycle=2, restart_warmup_steps=1, reset="magnitude", dropout=0.1),
    "switchlora": find("switchlora")(interval=2, freeze_steps=1, ratio=10.0),
    "sst": SST(rank=0.5, interval=2, restart_warmup_steps=1),
}
"""Settings with which whatever a method does between steps happens within eight of them; default: its own."""
FACTORISED = ("cola", "cola-m", "low-rank")
"""Methods whose layers hold r (d_in + d_out) weights; one that does not states its count in its own test file."""


@pytest.fixture(params=[name for name in method_names("method") if name != "dense"])
def method(request: pytest.FixtureRequest) -> Any:
    return find(request.param)(**WITHOUT_NOISE.get(request.param, {}))


@pytest.fixture
def model(method: Any, architecture: Any) -> Any:
    torch.manual_seed(0)
    return convert(architecture.dense(), method)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def weights_of_block(method: Any, projections: dict[str, tuple[int, int]]) -> int:
    """Closed form at the default rank, a quarter of each projection's narrower side."""
    if method.name not in FACTORISED:
        pytest.skip(f"the parameter count of {method.name!r} is stated in its own test file")
    assert method.rank == 0.25
    return sum((min(d_in, d_out) // 4) * (d_in + d_out) for d_in, d_out in projections.values())


def test_the_number_of_parameters_is_the_closed_form(method: Any, architecture: Any, model: Any) -> None:
    dense = sum(p.numel() for p in architecture.dense().parameters())
    dense_block = sum(d_in * d_out for d_in, d_out in architecture.projections.values())
    expected = dense + 2 * (weights_of_block(method, architecture.projections) - dense_block)  # two blocks, biases kept
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.num_parameters() == expected


def test_every_trainable_parameter_gets_a_finite_gradient_that_is_not_zero(model: Any, tokens: Tensor) -> None:
    a_step(model, tokens)  # at the very start a factor that multiplies zero has none
    loss_of(model.train(), tokens).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # attention does not notice a constant added to all keys: without rotary positions, a key's bias has no gradient
        if not (re.search(r"(key|k_proj)(\.\w+)?\.bias$", name) and "gpt_neox" not in name):
            assert parameter.grad.abs().max() > 0, name


def test_saved_in_shards_and_loaded_it_is_bitwise_the_same(
    model: Any, architecture: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, report = architecture.auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is type(model)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(model(tokens).logits, loaded.eval()(tokens).logits)


def test_saved_in_one_file_after_a_step_and_loaded_it_is_bitwise_the_same(
    model: Any, architecture: Any, tokens: Tensor, tmp_path: Path
) -> None:
    a_step(model, tokens)
    model.eval().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = architecture.auto.from_pretrained(tmp_path).eval()
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_generation_with_a_cache_is_generation_without(model: Any, architecture: Any, tokens: Tensor) -> None:
    if not architecture.causal:
        pytest.skip("does not generate")
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    cached, plain = (model.generate(tokens, attention_mask=mask, use_cache=cache, **options) for cache in (True, False))
    assert cached.shape == (2, 22)
    assert torch.equal(cached, plain)
    with torch.no_grad():
        first = model(tokens, use_cache=True)
        second = model(cached[:, 12:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(second, model(cached).logits[:, 12:], rtol=1e-4, atol=1e-5)


def optimizer_for(model: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    return optimizer(model, lr=lr)


def a_step(model: Any, tokens: Tensor, lr: float = 1e-2) -> None:
    optimizer = optimizer_for(model, lr)
    loss_of(model.train(), tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_copy_made_after_a_training_step_lives_a_life_of_its_own(model: Any, tokens: Tensor) -> None:
    a_step(model, tokens)
    copied = copy.deepcopy(model)
    originals = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert not originals.intersection(map(id, copied.state_dict(keep_vars=True).values()))
    before = model.eval()(tokens).logits
    assert torch.equal(copied.eval()(tokens).logits, before)
    a_step(copied, tokens)
    assert not torch.equal(copied.eval()(tokens).logits, before)
    assert torch.equal(model.eval()(tokens).logits, before)


def test_training_lowers_the_loss(model: Any, tokens: Tensor) -> None:
    first = loss_of(model, tokens).item()
    for _ in range(5):
        a_step(model, tokens, lr=3e-3)
    assert loss_of(model.eval(), tokens).item() < 0.95 * first


def test_conversion_on_the_meta_device_allocates_nothing_and_gives_the_same_shapes(
    method: Any, architecture: Any, model: Any
) -> None:
    with torch.device("meta"):
        dense = architecture.dense()
    empty = convert(dense, method)
    assert all(parameter.is_meta for parameter in empty.parameters())
    expected = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in empty.named_parameters()} == expected
    assert type(empty) is type(model)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert not any(parameter.is_meta for parameter in empty.parameters())


def test_bfloat16_in_bfloat16_out(method: Any, architecture: Any, tokens: Tensor) -> None:
    model = convert(architecture.dense().to(torch.bfloat16), method)
    kept = re.compile(IN_FP32.get(method.name, "$."))
    assert {p.dtype for name, p in model.named_parameters() if not kept.search(name)} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if kept.search(name))
    seen = []
    hooks = [m.register_forward_hook(lambda m, args, y: seen.append(y.dtype)) for m in layers_of(model)]
    loss = loss_of(model.train(), tokens)
    assert model(tokens).logits.dtype == torch.bfloat16
    loss.backward()
    assert hooks
    assert set(seen) == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == parameter.dtype, name
            assert parameter.grad.isfinite().all(), name
    reference = convert(architecture.dense(), method).train()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(loss.float(), loss_of(reference, tokens), rtol=0.02, atol=0.02)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that stand in place of the dense layers."""
    ours = [module for module in model.modules() if type(module).__module__.startswith("lorank.methods")]
    nested = {id(inner) for module in ours for inner in list(module.modules())[1:]}
    return [module for module in ours if id(module) not in nested]


def test_autocast_computes_in_bfloat16_and_keeps_single_precision_weights(
    method: Any, tokens: Tensor, small: Any
) -> None:
    model = convert(small("llama"), method).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens)
    out.loss.backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy is not None])
def test_checkpoint_policies_change_no_bit_of_loss_and_gradients(
    method: Any, model: Any, policy: str, tokens: Tensor
) -> None:
    model.train()
    results = []
    for choice in (None, POLICIES[policy]):
        checkpoint(model, choice)
        assert model.is_activation_checkpointing == (choice is not None)
        model.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    if REBUILDS.get(method.name) == policy:
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    else:
        assert all(map(torch.equal, *results))


def test_padding_does_not_change_the_real_tokens(model: Any, architecture: Any, tokens: Tensor) -> None:
    """Projections act token by token: what a mask hides stays hidden."""
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    changed = tokens.clone()
    changed[1, 8:] = 5
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask).logits for ids in (tokens, changed))
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    torch.testing.assert_close(a[1, :8], b[1, :8], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, compiling a Function
def test_the_compiler_gets_one_graph_forward_and_backward(method: Any, tokens: Tensor, small: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = convert(small("llama"), method).train()
    checkpoint(model, None)  # the checkpointed graph is the next test's
    expected = loss_of(model, tokens)
    expected.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in trained]
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_compiler_takes_the_checkpointed_blocks_too(tokens: Tensor, small: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = convert(small("llama"), "cola-m").train()
    expected = loss_of(model, tokens)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(model, fullgraph=True, backend=counter)(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def is_linear(model: nn.Module, tokens: Tensor) -> bool:
    """Whether each layer of the later block is y = W x + b: at x = 0 nothing but b, the same everywhere, and additive beside it."""
    layers = [module for module in model.modules() if hasattr(module, "stands_for_linear")]

    def given(*seeds: int) -> list[Tensor]:
        """Their answers to a sum of random inputs; none is zero."""
        answers: list[Tensor] = []

        def put(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            drawn = [torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return sum(drawn, torch.zeros_like(inputs[0]))

        later = layers[len(layers) // 2 :]
        hooks: list[Any] = [layer.register_forward_pre_hook(put) for layer in later]
        hooks += [layer.register_forward_hook(lambda _, inputs, y: answers.append(y)) for layer in later]
        model(tokens)
        for hook in hooks:
            hook.remove()
        return answers

    close = partial(torch.allclose, rtol=1e-4, atol=1e-5)
    answers = zip(given(), given(1), given(2), given(1, 2), strict=True)
    return all(
        close(b, b.flatten(0, -2)[0].expand_as(b)) and close(both + b, one + other) for b, one, other, both in answers
    )


def test_merged_it_is_a_dense_model_that_says_the_same(
    method: Any, model: Any, architecture: Any, tokens: Tensor, tmp_path: Path
) -> None:
    a_step(model, tokens)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if not is_linear(model, tokens):
        with pytest.raises(ValueError, match=f"{method.name} cannot be merged: "):
            merge(model)
        return
    with torch.no_grad():
        dense = merge(model)
    assert all(p.requires_grad for p in dense.parameters())
    assert type(dense) is type(architecture.dense())
    assert [(n, p.shape) for n, p in dense.named_parameters()] == [
        (n, p.shape) for n, p in architecture.dense().named_parameters()
    ]
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path)
    assert "lorank" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == architecture.dense().config.model_type
    again = architecture.auto.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, dense(tokens).logits)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_without_steps_is_refused(method: Any, small: Any, steps: int) -> None:
    model = convert(small("llama"), method)
    with pytest.raises(ValueError, match=f"^steps={steps} is not positive; give the optimizer steps of the whole run"):
        step_hook(model, optimizer_for(model), steps=steps)
    with pytest.raises(ValueError, match=f"^steps={steps} is not positive"):
        lr_schedule(model, steps=steps)


def test_a_hook_stopped_and_started_again_changes_nothing(method: Any, tokens: Tensor, small: Any) -> None:
    """Model, optimizer and hook saved after each of eight steps and loaded into fresh objects: the same weights, bit by bit."""

    def fresh() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = convert(small("llama"), SHORT_LIVED.get(method.name, method)).train()
        optimizer = optimizer_for(model)
        return model, optimizer, step_hook(model, optimizer, steps=8, seed=3)

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            loss_of(model, tokens.roll(step, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer, hook = fresh()
    restarted = fresh()
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        train(*restarted[:2], range(step, step + 1))
        state = restarted[0].state_dict(), restarted[1].state_dict(), restarted[2] and restarted[2].state_dict()
        state = copy.deepcopy(state)
        restarted = fresh()
        for part, saved in zip(restarted, state, strict=True):
            if part is not None:
                part.load_state_dict(saved)
    assert hook is None or hook.step == 8
    assert all(map(torch.equal, model.state_dict().values(), restarted[0].state_dict().values()))
