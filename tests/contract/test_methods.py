"""What every method of structure must satisfy, run over the one table: each on Llama, GPT-2 and BERT, and CoLA and CR-Net on
every architecture.

A method is accepted when it passes this file unchanged; what is particular to it is tested in ``tests/methods``.
"""

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lorank import checkpoint, convert, lr_schedule, merge, optimizer, step_hook
from lorank.checkpointing import POLICIES
from lorank.table import find, method_names
from tests.conftest import ARCHITECTURES

METHODS = [name for name in method_names("method") if name != "dense"]
PAIRS = [
    (method, architecture)
    for method in METHODS
    for architecture in ARCHITECTURES
    if architecture in ("llama", "gpt2", "bert") or method in ("cola", "crnet")
]
IN_FP32 = {"crnet": "beta$"}
"""Parameters that a method keeps in single precision, as a pattern of their names."""
WITHOUT_NOISE: dict[str, Any] = {"relora": {"dropout": 0.0}}
"""Settings without which two calls of one model would differ."""
REBUILDS = {"crnet": "recurrence"}
"""Checkpoint policies under which a method rebuilds what it dropped, so that gradients agree up to rounding only."""
FACTORISED = ("cola", "cola-m", "low-rank")
"""Methods whose layers have r (d_in + d_out) weights; others state their count in their own test file."""


class Pair(NamedTuple):
    method: Any
    architecture: Any

    def model(self) -> Any:
        torch.manual_seed(0)
        return convert(self.architecture.dense(), self.method)


def quiet(name: str) -> Any:
    return find(name)(**WITHOUT_NOISE.get(name, {}))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    return quiet(request.param)


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Pair:
    method, architecture = request.param
    return Pair(quiet(method), ARCHITECTURES[architecture])


@pytest.fixture
def model(pair: Pair) -> Any:
    return pair.model()


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def a_step(model: Any, tokens: Tensor, lr: float = 1e-2) -> None:
    moving = optimizer(model, lr=lr)
    loss_of(model.train(), tokens).backward()
    moving.step()
    moving.zero_grad()


@pytest.mark.parametrize(("name", "architecture"), [pair for pair in PAIRS if pair[0] in FACTORISED])
def test_the_number_of_parameters_is_the_closed_form(name: str, architecture: str) -> None:
    """At the default rank, a quarter of each projection's narrower side."""
    method, here = find(name)(), ARCHITECTURES[architecture]
    assert method.rank == 0.25
    model, dense = Pair(method, here).model(), here.dense().num_parameters()
    sizes = here.projections.values()
    saved = sum(d_in * d_out - min(d_in, d_out) // 4 * (d_in + d_out) for d_in, d_out in sizes)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == dense - 2 * saved  # two blocks


def test_every_trained_parameter_gets_a_finite_gradient(model: Any, tokens: Tensor) -> None:
    a_step(model, tokens)  # at the very start a factor that multiplies zero has none
    loss_of(model.train(), tokens).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # a constant added to all keys does not change attention: without rotary positions, a key's bias has no gradient
        if not (re.search(r"(key|k_proj)(\.\w+)?\.bias$", name) and "gpt_neox" not in name):
            assert parameter.grad.abs().max() > 0, name


def test_saved_in_shards_and_loaded_it_is_bitwise_the_same(
    model: Any, pair: Pair, tokens: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, report = pair.architecture.auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is type(model)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(model(tokens).logits, loaded.eval()(tokens).logits)


def test_saved_after_a_step_in_one_file_it_is_the_same(model: Any, pair: Pair, tokens: Tensor, tmp_path: Path) -> None:
    a_step(model, tokens)
    model.eval().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = pair.architecture.auto.from_pretrained(tmp_path).eval()
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize(("name", "architecture"), [pair for pair in PAIRS if ARCHITECTURES[pair[1]].causal])
def test_generation_with_a_cache_is_generation_without(name: str, architecture: str, tokens: Tensor) -> None:
    model = Pair(quiet(name), ARCHITECTURES[architecture]).model()
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    cached, plain = (model.generate(tokens, attention_mask=mask, use_cache=cache, **options) for cache in (True, False))
    assert cached.shape == (2, 22)
    assert torch.equal(cached, plain)
    with torch.no_grad():
        first = model(tokens, use_cache=True)
        second = model(cached[:, 12:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(second, model(cached).logits[:, 12:], rtol=1e-4, atol=1e-5)


def test_a_copy_made_after_a_step_shares_nothing(model: Any, tokens: Tensor) -> None:
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


def test_on_the_meta_device_shapes_are_the_same(pair: Pair, model: Any) -> None:
    with torch.device("meta"):
        dense = pair.architecture.dense()
    empty = convert(dense, pair.method)
    assert all(parameter.is_meta for parameter in empty.parameters())
    expected = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in empty.named_parameters()} == expected
    assert type(empty) is type(model)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert not any(parameter.is_meta for parameter in empty.parameters())


def test_bfloat16_in_bfloat16_out(pair: Pair, tokens: Tensor) -> None:
    method, architecture = pair
    model = convert(architecture.dense().to(torch.bfloat16), method)
    kept = re.compile(IN_FP32.get(method.name, "$."))
    assert {p.dtype for name, p in model.named_parameters() if not kept.search(name)} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if kept.search(name))
    seen = []
    layers = [module for module in model.modules() if hasattr(module, "stands_for_linear")]
    hooks = [layer.register_forward_hook(lambda m, args, y: seen.append(y.dtype)) for layer in layers]
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


def test_autocast_keeps_single_precision_weights(method: Any, tokens: Tensor, small: Any) -> None:
    model = convert(small("llama"), method).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens)
    out.loss.backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


def test_checkpoint_policies_change_no_bit_of_gradients(pair: Pair, model: Any, tokens: Tensor) -> None:
    model.train()
    results: dict[str, list[Tensor]] = {}
    for name, policy in POLICIES.items():
        checkpoint(model, policy)
        assert model.is_activation_checkpointing == (policy is not None)
        model.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        results[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    for name, found in results.items():
        if REBUILDS.get(pair.method.name) == name:
            torch.testing.assert_close(found, results["none"], rtol=1e-4, atol=1e-6)
        else:
            assert all(map(torch.equal, found, results["none"])), name


def test_padding_does_not_change_the_real_tokens(model: Any, tokens: Tensor) -> None:
    """Projections act token by token, so that masked tokens have no influence."""
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    changed = tokens.clone()
    changed[1, 8:] = 5
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask).logits for ids in (tokens, changed))
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    torch.testing.assert_close(a[1, :8], b[1, :8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "blocks"), [*((name, False) for name in METHODS), ("cola-m", True)])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch, compiling a Function
def test_the_compiler_gets_one_graph(name: str, blocks: bool, tokens: Tensor, small: Any) -> None:
    """Forward and backward; with `blocks` they are checkpointed."""
    torch._dynamo.reset()
    model = convert(small("llama", num_hidden_layers=2 if name in ("crnet", "masa") else 1), quiet(name)).train()
    if not blocks:
        checkpoint(model, None)
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


@torch.no_grad()
def is_linear(model: nn.Module, tokens: Tensor) -> bool:
    """Whether each layer of the later block is y = W x + b: at x = 0 only b, the same everywhere, and additive otherwise."""
    layers = [module for module in model.modules() if hasattr(module, "stands_for_linear")]

    def given(*seeds: int) -> list[Tensor]:
        """Their outputs for a sum of random inputs, zero without seeds."""
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


def test_merged_it_is_a_dense_model_with_equal_outputs(pair: Pair, model: Any, tokens: Tensor, tmp_path: Path) -> None:
    method, architecture = pair
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
    original = architecture.dense()
    assert type(dense) is type(original)
    shapes = [[(n, p.shape) for n, p in each.named_parameters()] for each in (dense, original)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(dense(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path)
    assert "lorank" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == original.config.model_type
    again = architecture.auto.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, dense(tokens).logits)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_without_steps_is_refused(method: Any, small: Any) -> None:
    model = convert(small("llama"), method)
    for steps in (0, -1):
        message = f"^steps must be the optimizer steps of the whole run, a positive integer, got {steps} "
        with pytest.raises(ValueError, match=message):
            step_hook(model, optimizer(model, lr=0.1), steps=steps)
        with pytest.raises(ValueError, match=message):
            lr_schedule(model, steps=steps)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_saved_after_each_step_goes_on_bit_for_bit(name: str, tokens: Tensor, small: Any) -> None:
    """Model, optimizer and hook are loaded into fresh objects after each of eight steps, in which the method acts."""

    def fresh() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = convert(small("llama"), find(name)(**find(name).soon)).train()
        moving = optimizer(model, lr=1e-2)
        return model, moving, step_hook(model, moving, steps=8, seed=3)

    def train(model: Any, moving: Any, step: int) -> None:
        torch.manual_seed(step)
        loss_of(model, tokens.roll(step, 1)).backward()
        moving.step()
        moving.zero_grad()

    model, moving, hook = fresh()
    restarted = fresh()
    for step in range(8):
        train(model, moving, step)
        train(*restarted[:2], step)
        state = copy.deepcopy([part and part.state_dict() for part in restarted])
        restarted = fresh()
        for part, saved in zip(restarted, state, strict=True):
            if part is not None:
                part.load_state_dict(saved)
    assert hook is None or hook.step == 8
    assert all(map(torch.equal, model.state_dict().values(), restarted[0].state_dict().values()))
