"""`step_hook` and `lr_schedule` on models and optimizers that are wrapped in something else."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

import lorank
from lorank import SST, CoLA, Method, ReLoRA, StepHook, SwitchLoRA, convert, lr_schedule, step_hook
from lorank.optim.shards import whole

RESTARTS = ReLoRA(rank=4, cycle=2, dropout=0.0)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Within(nn.Module):
    """As Lightning's modules hold a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class Hiding(nn.Module):
    """A wrapper that is not seen to contain anything."""

    def __init__(self, model: nn.Module):
        super().__init__()
        object.__setattr__(self, "module", model)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
    "a module": Within,
}


@pytest.mark.parametrize("name", ["relora", "switchlora", "sst"])
def test_a_first_step_without_the_hook_is_warned_of(name: str, small: Callable[..., Any], tokens: Tensor) -> None:
    model = convert(small("llama"), name).train()
    warned, hooked = lorank.optimizer(model, lr=1e-3), lorank.optimizer(model, lr=1e-3)
    step_hook(model, hooked, steps=100)
    model(input_ids=tokens, labels=tokens).loss.backward()
    hooked.step()
    with pytest.warns(UserWarning, match=f"^{name} acts between steps, but this optimizer has no hook for it; call "):
        warned.step()
    warned.step()
    others = torch.optim.SGD(small("gpt2").parameters(), lr=1e-3)  # of another model
    others.step()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_restarts_as_the_model_itself(
    wrap: Callable[[nn.Module], Any], small: Callable[..., Any], tokens: Tensor, one_process: None
) -> None:
    ends = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        inner = convert(small("llama"), RESTARTS).train()
        model = wrap(inner) if wrapped else inner
        moving = lorank.optimizer(model, lr=1e-2)
        hook = step_hook(model, moving, steps=6, seed=3)
        rates = lr_schedule(model, steps=6, warmup_steps=1)
        assert hook is not None
        for _ in range(6):
            inner(tokens, labels=tokens).loss.backward()
            moving.step()
            moving.zero_grad()
        ends.append((inner.state_dict(), [rates(step) for step in range(6)], hook.step))
    assert ends[0][1:] == ends[1][1:]
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())


def test_the_optimizer_of_accelerate_calls_the_hook(small: Callable[..., Any], tokens: Tensor) -> None:
    torch.manual_seed(0)
    inner = convert(small("llama"), RESTARTS).train()
    model, moving = Accelerator(cpu=True).prepare(inner, lorank.optimizer(inner, lr=1e-2))
    hook = step_hook(model, moving, steps=4)
    model(tokens, labels=tokens).loss.backward()
    moving.step()
    assert hook is not None and hook.step == 1


def test_flattened_parameters_are_refused(small: Callable[..., Any], one_process: None) -> None:
    inner = convert(small("llama"), RESTARTS)
    no_shard = ShardingStrategy.NO_SHARD
    model = FullyShardedDataParallel(
        inner, device_id=torch.device("cpu"), sharding_strategy=no_shard, use_orig_params=True
    )
    with pytest.raises(
        ValueError, match="^relora cannot act on parameters that FullyShardedDataParallel has flattened"
    ):
        step_hook(model, torch.optim.AdamW(model.parameters()), steps=4)


@pytest.mark.parametrize("method", [RESTARTS, SwitchLoRA(), SST(rank=4)], ids=lambda method: method.name)
def test_sharded_weights_are_refused_before_a_step(
    method: Method, small: Callable[..., Any], tokens: Tensor, one_process: None
) -> None:
    """However late they were sharded."""
    model: Any = convert(small("llama"), method).train()
    optimizer = lorank.optimizer(model, lr=0.01)
    step_hook(model, optimizer, steps=400)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    before = whole(next(iter(model.model.layers.parameters()))).clone()
    with pytest.raises(
        ValueError, match=rf"^{method.name} changes whole weights between steps, but they are sharded \(FSDP2"
    ):
        optimizer.step()
    assert torch.equal(before, whole(next(iter(model.model.layers.parameters()))))


def test_a_sharded_adapter_is_not_saved_alone(small: Callable[..., Any], tmp_path: Path, one_process: None) -> None:
    model: Any = convert(small("llama"), "lora")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for write in (lorank.save_adapter, lorank.export_peft):
        with pytest.raises(ValueError, match=r"^weights must be whole, but they are sharded \(FSDP2\)"):
            write(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_another_holder_of_the_parameters_is_refused(small: Callable[..., Any], tokens: Tensor) -> None:
    """What has the parameters of a converted model, but not its modules, and a copy that the optimizer does not move."""
    model: Any = convert(small("llama"), RESTARTS)
    optimizer = torch.optim.AdamW(model.parameters())
    held = nn.ParameterList(list(model.parameters()))
    for ask in (lambda: step_hook(held, optimizer, steps=8), lambda: lr_schedule(held, steps=8)):
        with pytest.raises(ValueError, match="got a ParameterList that has its parameters but not its modules"):
            ask()
    with pytest.raises(ValueError, match="it moves none of this Lorank.*; give the model itself, not a copy"):
        step_hook(copy.deepcopy(model), optimizer, steps=8)


def test_what_is_not_found_is_not_taken_for_not_needed(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), RESTARTS)
    moving = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="must move parameters of the model, but it moves none of this Linear"):
        step_hook(nn.Linear(2, 2), moving, steps=4)
    with pytest.raises(ValueError, match="must have parameters, got a Hiding without any"):
        lr_schedule(Hiding(model), steps=4)
    with pytest.raises(ValueError, match="must be the whole converted model, got only a ModuleList from it"):
        lr_schedule(model.model.layers, steps=4)
    with pytest.raises(ValueError, match="must contain one converted model, got LorankLlamaForCausalLM and Lorank"):
        lr_schedule(nn.ModuleList([model, convert(small("llama"), SST(rank=4))]), steps=400)
    with pytest.raises(ValueError, match="model must be a torch module, got str"):
        lr_schedule("model", steps=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer must be a torch optimizer, got str"):
        step_hook(model, "adamw", steps=4)  # type: ignore[arg-type]
    assert step_hook(model, moving, steps=4) is not None


def test_models_that_need_no_hook_get_none(small: Callable[..., Any]) -> None:
    for model in (small("llama"), convert(small("llama"), CoLA(rank=4)), Within(convert(small("llama"), CoLA(rank=4)))):
        assert step_hook(model, lorank.optimizer(model, lr=0.1), steps=4) is None
        assert lr_schedule(model, steps=4)(0) == 1.0


def test_a_second_hook_on_an_optimizer_is_refused(small: Callable[..., Any]) -> None:
    model = convert(small("llama"), RESTARTS)
    moving = lorank.optimizer(model, lr=0.1)
    step_hook(model, moving, steps=4)
    with pytest.raises(ValueError, match="optimizer must have one hook, but it has one already"):
        step_hook(model, moving, steps=4)


@dataclass(frozen=True, kw_only=True)
class Halving(Method):
    """An optimizer method with a schedule and a hook of its own."""

    name: ClassVar[str] = "halving"
    key: ClassVar[str] = "optimizer"

    def optimizer(self, groups: Any, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr)

    def schedule(self, steps: int, warmup_steps: int, min_lr_ratio: float) -> Callable[[int], float]:
        return lambda step: 0.5**step

    def hook(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, seed: int) -> StepHook:
        return StepHook(optimizer)


def test_an_optimizer_brings_its_own_hook_and_schedule(small: Callable[..., Any]) -> None:
    model = small("llama")
    moving = lorank.optimizer(model, Halving(), lr=0.1)
    assert lr_schedule(model, steps=4, optimizer=moving)(2) == 0.25
    hook = step_hook(model, moving, steps=4)
    assert hook is not None
    model(torch.ones(1, 3, dtype=torch.int64)).logits.sum().backward()
    moving.step()
    assert hook.step == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda m: lorank.convert("x", "cola"), "model must be a torch module, got str"),
        (lambda m: lorank.optimizer("x", lr=0.1), "model must be a torch module, got str"),
        (lambda m: lorank.optimizer(m, lr="0.1"), "lr must be a number of at least 0, got '0.1'"),
        (lambda m: lorank.optimizer(m, lr=1.0, eps="a"), "eps must be a number of at least 0, got 'a'"),
        (lambda m: lorank.lr_schedule(m, steps="5"), "steps must be .*, got '5'"),
        (lambda m: lorank.lr_schedule(m, steps=5, warmup_steps=True), "warmup_steps must be an integer"),
        (lambda m: lorank.lr_schedule(m, steps=5, min_lr_ratio=2.0), "min_lr_ratio must be"),
    ],
)
def test_values_of_another_kind_are_refused(asked: Callable[[nn.Module], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        asked(nn.Linear(2, 2))
