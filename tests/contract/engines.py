"""How methods and optimizers train in several processes under each engine, as in one; the table of docs/distributed.md.

``python tests/contract/engines.py`` writes that table into docs/distributed.md, as four processes find it; ``check`` compares.
"""

import copy
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lorank import CoLA, LowRank, convert, optimizer, step_hook
from lorank.distributed.sharding import DATA, TENSOR, shard
from lorank.distributed.tensor_parallel import check
from lorank.optim.shards import whole
from lorank.table import find, method_names

STRUCTURES = method_names("method")
OPTIMIZERS = [name for name in method_names("optimizer") if name not in ("votes", "adamw-8bit")]
"""All but votes, which move integers, and the one that needs bitsandbytes."""
ENGINES = ("ddp", "fsdp", "tensor parallel", "both")
"""The last, FSDP2 over pairs of processes that share each matrix, needs four processes."""
SMALL: Mapping[str, Mapping[str, Any]] = {
    "masa": {"residual_rank": 2, "atoms": 1},
    "relora": {"dropout": 0.0},  # whose masks depend on the number of processes
}
STEPS = 4
CLOSE, NEAR = 1e-6, 1e-3
"""Norms and losses of transformers are float32. Bases that optimizers find of a gradient magnify that; with exact norms
tests/distributed/four_processes.py finds less than 1e-8."""
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
BEGIN, END = "<!-- engines: written by tests/contract/engines.py -->\n", "<!-- end of engines -->\n"


def dense(layers: int) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).double()


def own_part(ids: Tensor) -> Tensor:
    """The rows of this process."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def all_rows(ids: Tensor) -> Tensor:
    return ids


def rows_of_pair(ids: Tensor) -> Tensor:
    return ids.chunk(dist.get_world_size() // 2)[dist.get_rank() // 2]


PARTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "ddp": own_part,
    "fsdp": own_part,
    "tensor parallel": all_rows,
    "both": rows_of_pair,
}


def by_both(model: Any) -> Any:
    check(model, 2)
    pairs = dist.get_world_size() // 2
    return shard(model, init_device_mesh("cpu", (pairs, 2), mesh_dim_names=(DATA, TENSOR)))


def by_fsdp(model: Any) -> Any:
    return shard(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(DATA,)))


def by_tensor_parallel(model: Any) -> Any:
    check(model, dist.get_world_size())
    return shard(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(TENSOR,)))


def trained(
    model: Any, mover: str | None, wrap: Callable[[Any], Any], part: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The loss of each step, and all weights after the last."""
    wrapped, curve = wrap(model), []
    moving = optimizer(model, mover, lr=1e-2)
    if (hook := step_hook(model, moving, steps=STEPS)) is not None:
        hook.check_whole()
    for step in range(STEPS):
        ids = part(torch.randint(0, 24, (4, 10), generator=torch.Generator().manual_seed(step)))
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        moving.step()
        moving.zero_grad()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        curve.append(mean)
    return {"losses": torch.stack(curve), **{name: whole(p).detach() for name, p in model.named_parameters()}}


def compared(make: Callable[[], Any], mover: str | None) -> dict[str, float | str]:
    """For each engine the largest difference from one process, relative to the norm of each weight, or why it is refused."""
    wraps: dict[str, Any] = {"ddp": DistributedDataParallel, "fsdp": by_fsdp, "tensor parallel": by_tensor_parallel}
    wraps |= {"both": by_both} if dist.get_world_size() == 4 else {}
    alone, found = trained(make(), mover, lambda model: model, all_rows), dict[str, float | str]()
    for engine, wrap in wraps.items():
        try:
            ends = trained(make(), mover, wrap, PARTS[engine])
        except ValueError as refusal:
            found[engine] = str(refusal)
        else:
            assert alone.keys() == ends.keys()
            found[engine] = max(
                ((alone[name] - ends[name]).norm() / alone[name].norm().clamp(min=1e-9)).item() for name in alone
            )
    return found


def engines(names: Collection[str] = (*STRUCTURES, *OPTIMIZERS)) -> dict[str, Any]:
    """What `compared` says of structures, adapters and optimizers."""
    models, found = {layers: dense(layers) for layers in (1, 2)}, dict[str, Any]()
    for name in (name for name in STRUCTURES if name in names):
        kind = find(name)
        settings = {
            **kind.soon,
            **SMALL.get(name, {}),
            **({"rank": 4} if "rank" in kind.__annotations__ or kind.adapts else {}),
        }

        def make(name: str = name, kind: Any = kind, settings: Any = settings) -> Any:
            model = copy.deepcopy(models[1 if kind.adapts else 2])
            torch.manual_seed(1)
            return model if name == "dense" else convert(model, kind(**settings))

        found[name] = compared(make, None)
    for name in (name for name in OPTIMIZERS if name in names):

        def made(name: str = name) -> Any:
            torch.manual_seed(1)
            method = LowRank(rank=4) if name == "loro" else CoLA(rank=4)  # which moves W = B A
            return convert(copy.deepcopy(models[1]), method)

        found[name] = compared(made, name)
    return found


# ---- the table


def table(found: Mapping[str, Mapping[str, float | str]]) -> str:
    """One row for each name, with the numbers of what is refused, and the reasons below."""
    reasons: list[str] = []
    lines = ["| | DDP | FSDP2 | tensor parallel | both |", "|---|---|---|---|---|"]
    for name, its in found.items():
        cells = []
        for engine in ENGINES:
            said = its[engine]
            near = NEAR if name in OPTIMIZERS and engine in ("tensor parallel", "both") else CLOSE
            assert isinstance(said, str) or said < near, f"{name}, {engine}: {said}"
            if isinstance(said, str):
                reason = re.sub(r"(layers|model\.layers)\.\d+\.\S+ must|[\w-]+ (changes whole)", _general, said)
                reason = re.sub(r", got \w+$|; use another optimizer.*", "", reason)
                reasons += [reason] * (reason not in reasons)
                cells.append(f"no [{reasons.index(reason) + 1}]")
            else:
                cells.append("yes")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    numbered = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n".join(lines) + f"\n\n{numbered}\n"


def _general(found: re.Match[str]) -> str:
    return f"the method {found[2]}" if found[2] else "each projection must"


def page(text: str, found: Mapping[str, Any]) -> str:
    """The page with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE} needs the lines {BEGIN!r} and {END!r}"
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.distributed.together import together

    everything = together(engines, 4, 900)[0]
    written = page(before := PAGE.read_text(encoding="utf-8"), everything)
    if "check" in sys.argv:
        sys.exit(0 if written == before else f"{PAGE} should have this table:\n{table(everything)}")
    PAGE.write_text(written, encoding="utf-8")
