"""What every method of structure must satisfy: a small model, once converted, trains, is saved, loaded, merged and resumed.

Each check is a function of a `Subject`. Its name is the claim, and AssertionError says where the claim does not hold.
"""

import copy
import dataclasses
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lorank.checkpointing import POLICIES, checkpoint
from lorank.conversion import convert, merge
from lorank.loop import lr_schedule, optimizer, step_hook
from lorank.method import Method
from lorank.testing.saying import equal_models, refused

VOCABULARY = 96
TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
"""Two sequences of twelve tokens, none of them a special one."""
REBUILDS = "recurrence"
"""The checkpoint policy that rebuilds what it dropped, so that gradients agree up to rounding only."""


class Small(NamedTuple):
    """An architecture, small and without dropout."""

    name: str
    config_name: str
    settings: Mapping[str, Any]
    causal: bool = True

    @property
    def auto(self) -> Any:
        return transformers.AutoModelForCausalLM if self.causal else transformers.AutoModelForMaskedLM

    def dense(self, **changes: Any) -> Any:
        """In evaluation mode, the same on every call."""
        config = getattr(transformers, self.config_name)(**{"vocab_size": VOCABULARY, **self.settings, **changes})
        torch.manual_seed(0)
        return self.auto.from_config(config).eval()


_WIDTHS = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT2 = {
    "n_embd": 32,
    "n_inner": 80,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SMALL = (
    Small("llama", "LlamaConfig", {**_WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 64}),
    Small("gpt2", "GPT2Config", {**_GPT2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    Small("bert", "BertConfig", {**_WIDTHS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, False),
)
"""Fewer key than query heads, and gates; one matrix for query, key and value, transposed, with biases; an encoder."""


class Subject(NamedTuple):
    """A method and the architecture on which it is examined."""

    method: Method
    architecture: Any
    """A `Small`, or what has its `name`, `causal`, `auto` and `dense`."""
    fp32: str | None = None
    """A pattern of the parameters that stay in single precision whatever the model's dtype is."""

    def model(self, **changes: Any) -> Any:
        dense = self.architecture.dense(**changes)
        torch.manual_seed(0)
        return convert(dense, self.method)

    def stays_in_fp32(self, name: str) -> bool:
        return self.fp32 is not None and re.search(self.fp32, name) is not None


def loss_of(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def a_step(model: Any, lr: float = 1e-2) -> None:
    moving = optimizer(model, lr=lr)
    step_hook(model, moving, steps=1000)
    loss_of(model.train()).backward()
    moving.step()
    moving.zero_grad()


def every_trained_parameter_gets_a_finite_gradient(subject: Subject) -> None:
    model = subject.model()
    a_step(model)  # at the very start a factor that multiplies zero has none
    loss_of(model.train()).backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, f"{name} does not train, but has a gradient"
            continue
        assert p.grad is not None, f"{name} must have a gradient; leave out requires_grad if it does not train"
        assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
        # a constant added to all keys does not change attention: without rotary positions, a key's bias has no gradient
        if not (re.search(r"(key|k_proj)(\.\w+)?\.bias$", name) and "gpt_neox" not in name):
            assert p.grad.abs().max() > 0, f"the gradient of {name} is zero"


def saved_in_shards_and_loaded_it_is_bitwise_the_same(subject: Subject) -> None:
    model = subject.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="15KB")
        assert len([*Path(folder).glob("*.safetensors")]) > 1
        loaded, report = subject.architecture.auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), f"transformers reports of the saved weights: {report}"
    assert type(loaded) is type(model)
    equal_models(loaded, model)
    kinds = [[type(module) for module in each.modules()] for each in (loaded, model)]
    assert kinds[0] == kinds[1], "the loaded model has other modules"
    assert torch.equal(model(TOKENS).logits, loaded.eval()(TOKENS).logits), "the loaded model computes something else"


def saved_after_a_step_in_one_file_it_is_the_same(subject: Subject) -> None:
    model = subject.model()
    a_step(model)
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        assert [file.name for file in Path(folder).glob("*.safetensors")] == ["model.safetensors"]
        loaded = subject.architecture.auto.from_pretrained(folder).eval()
    assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits), "the loaded model computes something else"


def generation_with_a_cache_is_generation_without(subject: Subject) -> None:
    if not subject.architecture.causal:
        return
    model = subject.model()
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(TOKENS)
    cached, plain = (model.generate(TOKENS, attention_mask=mask, use_cache=cache, **options) for cache in (True, False))
    assert cached.shape == (2, 22)
    assert torch.equal(cached, plain), "greedy text with a cache differs from that without"
    with torch.no_grad():
        first = model(TOKENS, use_cache=True)
        second = model(cached[:, 12:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(second, model(cached).logits[:, 12:], rtol=1e-4, atol=1e-5)


def a_copy_made_after_a_step_shares_nothing(subject: Subject) -> None:
    model = subject.model()
    a_step(model)
    copied = copy.deepcopy(model)
    originals = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert not originals.intersection(map(id, copied.state_dict(keep_vars=True).values())), "a copy shares tensors"
    before = model.eval()(TOKENS).logits
    assert torch.equal(copied.eval()(TOKENS).logits, before), "a copy computes something else"
    a_step(copied)
    assert not torch.equal(copied.eval()(TOKENS).logits, before), "a copy does not train"
    assert torch.equal(model.eval()(TOKENS).logits, before), "training a copy changes the original"


def training_lowers_the_loss(subject: Subject) -> None:
    """What is added to frozen weights takes longer, as it begins at zero."""
    model = subject.model()
    first = loss_of(model).item()
    steps = 40 if subject.method.adapts else 5
    for _ in range(steps):
        a_step(model, lr=1e-2 if subject.method.adapts else 3e-3)
    last = loss_of(model.eval()).item()
    assert last < 0.95 * first, f"{steps} steps of AdamW must lower the loss by 5 %, got {first:.4f}, then {last:.4f}"


def on_the_meta_device_shapes_are_the_same(subject: Subject) -> None:
    model = subject.model()
    with torch.device("meta"):
        dense = subject.architecture.dense()
    empty = convert(dense, subject.method)
    assert all(p.is_meta for p in empty.parameters()), "build must keep the device of the dense layer"
    found, expected = (
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in each.named_parameters()} for each in (empty, model)
    )
    assert found == expected
    assert type(empty) is type(model)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert not any(p.is_meta for p in empty.parameters())


def bfloat16_in_bfloat16_out(subject: Subject) -> None:
    model = convert(subject.architecture.dense().to(torch.bfloat16), subject.method)
    for name, p in model.named_parameters():
        expected = torch.float32 if subject.stays_in_fp32(name) else torch.bfloat16
        assert p.dtype == expected, f"{name} must be {expected}, got {p.dtype}"
    layers = [module for module in model.modules() if hasattr(module, "stands_for_linear")]
    assert layers, "no layer was converted"
    seen: list[torch.dtype] = []
    hooks = [layer.register_forward_hook(lambda m, args, y: seen.append(y.dtype)) for layer in layers]
    loss = loss_of(model.train())
    assert model(TOKENS).logits.dtype == torch.bfloat16
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert set(seen) == {torch.bfloat16}, f"layers must put out bfloat16, got {set(seen)}"
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == p.dtype, name
            assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
    reference = subject.model().train()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(loss.float(), loss_of(reference), rtol=0.02, atol=0.02)


def autocast_keeps_single_precision_weights(subject: Subject) -> None:
    model = subject.model().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(TOKENS, labels=TOKENS)
    out.loss.backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), f"the gradient of {name}"


def checkpoint_policies_change_no_bit_of_gradients(subject: Subject) -> None:
    model = subject.model().train()
    results: dict[str, list[Tensor]] = {}
    for name, policy in POLICIES.items():
        checkpoint(model, policy)
        assert model.is_activation_checkpointing == (policy is not None)
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        results[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    for name, found in results.items():
        if name == REBUILDS:
            torch.testing.assert_close(found, results["none"], rtol=1e-4, atol=1e-6)
        else:
            assert all(map(torch.equal, found, results["none"])), f"gradients differ with checkpoint={name!r}"


def padding_does_not_change_the_real_tokens(subject: Subject) -> None:
    model = subject.model()
    mask = torch.ones_like(TOKENS)
    mask[1, 8:] = 0
    changed = TOKENS.clone()
    changed[1, 8:] = 5
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask).logits for ids in (TOKENS, changed))
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    torch.testing.assert_close(a[1, :8], b[1, :8], rtol=1e-5, atol=1e-6)


def the_compiler_gets_one_graph(subject: Subject) -> None:
    """Forward and backward, with the checkpoints that the method brings."""
    torch._dynamo.reset()
    model = subject.model().train()
    checkpoint(model, POLICIES[subject.method.policy or "none"])
    expected = loss_of(model)
    expected.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in trained]
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)  # by torch's compiler
        loss = torch.compile(model, fullgraph=True, backend=counter)(
            input_ids=TOKENS, labels=TOKENS, use_cache=False
        ).loss
        loss.backward()
    assert counter.frame_count == 1, f"one graph was expected, got {counter.frame_count}"
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([p.grad for p in trained], gradients, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def is_linear(model: nn.Module) -> bool:
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
        model(TOKENS)
        for hook in hooks:
            hook.remove()
        return answers

    close = partial(torch.allclose, rtol=1e-4, atol=1e-5)
    answers = zip(given(), given(1), given(2), given(1, 2), strict=True)
    return all(
        close(b, b.flatten(0, -2)[0].expand_as(b)) and close(both + b, one + other) for b, one, other, both in answers
    )


def merged_it_is_a_dense_model_with_equal_outputs(subject: Subject) -> None:
    """If its layers are linear maps; otherwise merging is refused."""
    model = subject.model()
    a_step(model)
    model.eval()
    before = copy.deepcopy(model)
    if not is_linear(model):
        refused(f"{subject.method.name} cannot be merged: ", lambda: merge(model))
        return
    with torch.no_grad():
        dense = merge(model)
    assert all(p.requires_grad for p in dense.parameters()), "all of a merged model trains"
    original = subject.architecture.dense()
    assert type(dense) is type(original)
    shapes = [[(n, p.shape) for n, p in each.named_parameters()] for each in (dense, original)]
    assert shapes[0] == shapes[1], "a merged model must have the parameters of the dense one"
    torch.testing.assert_close(dense(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        config = (Path(folder) / "config.json").read_text()
        assert "lorank" not in config, "the configuration of a merged model names lorank"
        assert json.loads(config)["model_type"] == original.config.model_type
        again = subject.architecture.auto.from_pretrained(folder).eval()
    assert torch.equal(again(TOKENS).logits, dense(TOKENS).logits)
    equal_models(model, before)


def a_run_without_steps_is_refused(subject: Subject) -> None:
    model = subject.model()
    for steps in (0, -1):
        message = f"^steps must be the optimizer steps of the whole run, a positive integer, got {steps} "
        refused(message, lambda: step_hook(model, optimizer(model, lr=0.1), steps=steps))  # noqa: B023
        refused(message, lambda: lr_schedule(model, steps=steps))  # noqa: B023


def a_run_saved_after_each_step_goes_on_bit_for_bit(subject: Subject) -> None:
    """Model, optimizer and hook are loaded into fresh objects after each of eight steps, in which the method acts."""
    acting = subject._replace(method=dataclasses.replace(subject.method, **subject.method.soon))

    def fresh() -> tuple[Any, Any, Any]:
        model = acting.model().train()
        moving = optimizer(model, lr=1e-2)
        return model, moving, step_hook(model, moving, steps=8, seed=3)

    def train(model: Any, moving: Any, step: int) -> None:
        torch.manual_seed(step)
        loss_of(model, TOKENS.roll(step, 1)).backward()
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
    equal_models(model, restarted[0])


EVERYWHERE: tuple[Callable[[Subject], None], ...] = (
    every_trained_parameter_gets_a_finite_gradient,
    saved_in_shards_and_loaded_it_is_bitwise_the_same,
    saved_after_a_step_in_one_file_it_is_the_same,
    generation_with_a_cache_is_generation_without,
    a_copy_made_after_a_step_shares_nothing,
    training_lowers_the_loss,
    on_the_meta_device_shapes_are_the_same,
    bfloat16_in_bfloat16_out,
    checkpoint_policies_change_no_bit_of_gradients,
    padding_does_not_change_the_real_tokens,
    merged_it_is_a_dense_model_with_equal_outputs,
)
"""Examined on each architecture."""
ONCE: tuple[Callable[[Subject], None], ...] = (
    autocast_keeps_single_precision_weights,
    the_compiler_gets_one_graph,
    a_run_without_steps_is_refused,
    a_run_saved_after_each_step_goes_on_bit_for_bit,
)
"""Examined on a Llama alone."""
