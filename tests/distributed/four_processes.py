"""Run by test_tensor_parallel.py: a model split over four processes, and over two of them; says what it found as JSON."""

import json
import sys
import tempfile
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lorank import CoLA, CoLAM, LowRank, convert, optimizer
from lorank.distributed.tensor_parallel import TYPES, parallelize
from lorank.distributed.traffic import traffic as traffic_of
from lorank.optim.shards import local, whole
from lorank.sites import blocks
from tests.distributed.together import together

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 45, "num_hidden_layers": 2, "num_attention_heads": 8}
SHAPE |= {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
RANKS = {"q_proj": 5, "gate_proj": 7, ".*": 6}
MOVERS = ("adamw", "muon", "galore", "fira", "apollo", "spectron", "dct-adamw", "trion", "adafactor")


def exact(norm: Any, x: Tensor) -> Tensor:
    """transformers' RMSNorm computes in fp32 whatever it gets."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def built(kind: str, method: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **settings})
    model = convert(AutoModelForCausalLM.from_config(config), method).double().eval()
    for name, module in model.named_modules():
        if "norm" in name:
            module.forward = exact.__get__(module)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        elif getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias)
    return model


IDS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def backward(model: Any, ids: Tensor = IDS) -> Tensor:
    """Logits, after the backward pass of a loss that depends on all of them."""
    logits = model(ids, use_cache=False).logits
    (logits.sin() * torch.arange(logits.numel(), dtype=logits.dtype).view_as(logits).cos()).mean().backward()
    return logits.detach()  # type: ignore[no-any-return]


def grown(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Logits and all gradients."""
    logits = backward(model, ids)
    return {"logits": logits, **{name: whole(p.grad) for name, p in model.named_parameters()}}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest number of each tensor."""
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).abs().max() / one[name].abs().max()).item() for name in one)


def compared(mesh: DeviceMesh, kind: str, method: Any, train: bool = False, **settings: Any) -> float:
    one, split = built(kind, method, **settings), parallelize(built(kind, method, **settings), mesh)
    return apart(grown(one), grown(split.train(train)))


class Sent(TorchDispatchMode):
    """Numbers per token of each sum over processes."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_reduce.default:
            self.sums.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def traffic(mesh: DeviceMesh, method: Any = None, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Messages of a forward pass, of a backward pass, and what each sum has per token."""
    model = parallelize(built("llama", method or CoLA(rank=6), **ONE_LAYER), mesh).to(dtype).train()
    counts = []
    with CommDebugMode() as mode, Sent() as sent:
        logits = model(IDS, use_cache=False).logits
        counts.append(Counter({str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items()}))
        forward = list(sent.sums)
        logits.sum().backward()
        counts.append(Counter({str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items()}) - counts[0])
    return {"forward": counts[0], "backward": counts[1], "sums": forward, "back": sent.sums[len(forward) :]}


def steps(model: Any, mover: Any, count: int) -> None:
    for _ in range(count):
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        mover.step()
        mover.zero_grad()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: whole(p).detach() for name, p in model.named_parameters()}


def moved(mesh: DeviceMesh, name: str) -> float:
    """How far two steps of an optimizer are off those of one process."""
    ends = []
    for place in (None, mesh):
        model = built("llama", CoLA(rank=6), **ONE_LAYER)
        model = model if place is None else parallelize(model, place)
        steps(model, optimizer(model, name, lr=0.01, weight_decay=0.1), 2)
        ends.append(weights(model))
    return apart(*ends)


def saved(pairs: DeviceMesh, four: DeviceMesh, folder: str) -> dict[str, float]:
    """Two processes save after two steps; two, four, and one go on for one more. How far each is off one that never stopped."""

    def made(mesh: DeviceMesh | None) -> tuple[Any, Any]:
        model = built("llama", CoLA(rank=6), **ONE_LAYER)
        model = model if mesh is None else parallelize(model, mesh)
        return model, optimizer(model, lr=0.01, weight_decay=0.1)

    alone, mover = made(None)
    steps(alone, mover, 3)
    two, mover = made(pairs)
    steps(two, mover, 2)
    model_state, optimizer_state = get_state_dict(two, mover)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    found = {}
    for name, mesh in (("two", pairs), ("four", four), ("one", None)):
        model, mover = made(mesh)
        torch.nn.init.ones_(model.lm_head.weight.data)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, mover), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, mover, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        steps(model, mover, 1)
        found[name] = apart(weights(alone), weights(model))
    return found


def both(world: DeviceMesh) -> float:
    """Blocks split over two processes and sharded over two more, each pair with half of a batch."""
    one, split = built("llama", CoLA(rank=6)), parallelize(built("llama", CoLA(rank=6)), world["tensor"])
    for _, _, block in blocks(split):
        fully_shard(block, mesh=world["data"])
    fully_shard(split, mesh=world["data"])
    mean = lambda model, ids: model(ids, use_cache=False).logits.sin().mean().backward()  # noqa: E731
    mean(one, IDS)
    mean(split, IDS.chunk(2)[world["data"].get_local_rank()])
    return apart(*({name: whole(p.grad) for name, p in m.named_parameters()} for m in (one, split)))


def held(mesh: DeviceMesh) -> list[int]:
    """The parameters of each process, and what `traffic` says of the one that has most."""
    model = built("qwen3", CoLA(rank=6), tie_word_embeddings=True)
    said = traffic_of(model, 4).parameters
    parts = [0] * 4
    dist.all_gather_object(parts, sum(local(p).numel() for p in parallelize(model, mesh).parameters()))
    return [said, *parts]


def checks() -> dict[str, Any]:
    four = init_device_mesh("cpu", (4,))
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    two, one = world["tensor"], ONE_LAYER
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if "all" in sys.argv:
        types = {kind: compared(four, kind, CoLA(rank=6), **one) for kind in TYPES}
        return {"types": types, "moved": {name: moved(two, name) for name in MOVERS}}
    return {
        "same": {
            "llama over two": compared(two, "llama", CoLA(rank=RANKS)),
            "llama over four": compared(four, "llama", CoLA(rank=RANKS)),
            "qwen3, norms of heads": compared(four, "qwen3", CoLA(rank=6), **one),
            "qwen2, biases and tied embeddings": compared(
                four, "qwen2", LowRank(rank=6), tie_word_embeddings=True, **one
            ),
            "cola-m, recomputing": compared(four, "llama", CoLAM(rank=6, nonlinearity="low-rank"), train=True, **one),
            "two times two, with fsdp": both(world),
        },
        "traffic": traffic(four),
        "traffic of cola-m": traffic(four, CoLAM(rank=6)),
        "traffic in bf16": traffic(four, dtype=torch.bfloat16),
        "saved": saved(two, four, folder[0]),
        "moved": {name: moved(two, name) for name in ("galore", "spectron")},
        "held": held(four),
    }


if __name__ == "__main__":
    print(json.dumps(together(checks, 4)[0], indent=1))
