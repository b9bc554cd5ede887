"""Is a bottleneck faster as one autograd function, or q, k and v as one group? Forward and backward of three CoLA layers on a CPU, fp32.

    OMP_NUM_THREADS=1 python benchmarks/fused.py [--rounds 30]

"layers" are three `lorank.methods.cola.CoLALinear`, and "fused" the same after `lorank.fuse_bottlenecks`. "functions" keep x and z = A x alone too, but
are one autograd function each. "group" does the same with one product for the three A and batched products for the three B. All take turns in one process, on the same
weights and 512 tokens, and their outputs and gradients are compared first. Seconds are of processor time. Kept in results/fused.json.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from turns import in_turns, ratios

from lorank.methods.cola import CoLALinear
from lorank.sizes import SIZES
from lorank.speed.allocator import keep_freed_memory
from lorank.speed.bottleneck import fuse_bottlenecks

FILE = Path(__file__).with_name("results") / "fused.json"
TOKENS, LAYERS = 512, 3


class Bottleneck(torch.autograd.Function):
    """y = B SiLU(A x) of a group of k: x [n, d], A [k r, d], B [k, d_out, r], y [k, n, d_out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        z = x @ A.mT
        ctx.save_for_backward(x, z, A, B)
        return Bottleneck.split(F.silu(z), len(B)) @ B.mT

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, z, A, B = ctx.saved_tensors
        dB = g.mT @ Bottleneck.split(F.silu(z), len(B))
        dz = torch.ops.aten.silu_backward((g @ B).transpose(0, 1).reshape(z.shape), z)
        return dz @ A, dz.mT @ x, dB

    @staticmethod
    def split(h: Tensor, k: int) -> Tensor:
        """[n, k r] as [k, n, r]."""
        return h.view(len(h), k, -1).transpose(0, 1)


def ways(d: int, r: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Each computes outputs and all gradients, and returns them as one list in one order."""
    torch.manual_seed(0)
    layers = [CoLALinear(d, d, r) for _ in range(LAYERS)]
    fused = fuse_bottlenecks(nn.ModuleList(copy.deepcopy(layers)))
    data, g = torch.randn(TOKENS, d), torch.randn(TOKENS, d)
    A = [layer.A.weight.detach().clone().requires_grad_() for layer in layers]
    B = [layer.B.weight.detach()[None].clone().requires_grad_() for layer in layers]
    A_all, B_all = (torch.cat([w.detach() for w in many]).requires_grad_() for many in (A, B))

    def run(outputs: Callable[[Tensor], list[Tensor]], weights: list[Tensor]) -> list[Tensor]:
        x = data.clone().requires_grad_()
        y = outputs(x)
        return [*y, *torch.autograd.grad(y, [x, *weights], [g] * LAYERS)]

    def pairs(x: Tensor) -> list[Tensor]:
        return [Bottleneck.apply(x, a, b)[0] for a, b in zip(A, B, strict=True)]  # type: ignore[no-untyped-call]

    return {
        "layers": lambda: run(
            lambda x: [layer(x) for layer in layers],
            [layer.A.weight for layer in layers] + [layer.B.weight for layer in layers],
        ),
        "fused": lambda: run(
            lambda x: [layer(x) for layer in fused],
            [layer.A.weight for layer in fused] + [layer.B.weight for layer in fused],
        ),
        "functions": lambda: run(pairs, A + B),
        "group": lambda: run(lambda x: [*Bottleneck.apply(x, A_all, B_all)], [A_all, B_all]),  # type: ignore[no-untyped-call]
    }


def measure(d: int, r: int, rounds: int) -> dict[str, Any]:
    calls = ways(d, r)
    flat = {name: torch.cat([t.flatten() for t in call()]) for name, call in calls.items()}
    assert all(torch.allclose(flat["layers"], other, rtol=1e-4, atol=1e-5) for other in flat.values())
    times = in_turns(calls, rounds)
    return {f"layers / {name}": ratios(times["layers"], each) for name, each in times.items() if name != "layers"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    found: dict[str, Any] = {"tokens": TOKENS, "rounds": rounds, "torch": torch.__version__}
    for size in ("tiny", "60m", "130m", "1b"):
        found[size] = measure(SIZES[size].hidden_size, SIZES[size].rank, rounds)
        print(size, json.dumps(found[size]), flush=True)
    FILE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
