"""Does the protected core of OSFT survive Adam? 1,000 steps towards another linear map, ours and peft's, side by side.

    pip install peft
    python benchmarks/protected_core.py

W is 256 x 256 as nn.Linear draws it, the first 128 singular pairs are protected, and float32 AdamW moves the rest. `core` is the
relative change of U_hᵀ W V_h, and `inside` the part of W's change that lies in the protected directions of outputs or inputs, whichever
is more; both in double precision.
"""

from collections.abc import Callable
from typing import Any

import peft  # type: ignore[import-not-found]
import torch
from torch import Tensor, nn

from lorank.adapters.osft import FORMS
from lorank.adapters.protected import Guard

N, K, STEPS = 256, 128, 1000


def train(forward: Callable[[Tensor], Tensor], optimizer: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    target = torch.randn(N, N, generator=draw) / N**0.5
    for _ in range(STEPS):
        x = torch.randn(16, N, generator=draw)
        (forward(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ours(form: str, dense: nn.Linear, lr: float) -> Tensor:
    layer: Any = FORMS[form](dense, K)  # type: ignore[call-arg]
    optimizer = torch.optim.AdamW(layer.trained(), lr=lr)
    Guard(optimizer, [layer])
    train(layer, optimizer)
    return layer.merged()[0]


def theirs(dense: nn.Linear, lr: float) -> Tensor:
    config = peft.OSFConfig(effective_rank=K, target_modules=["0"])
    model: Any = peft.get_peft_model(nn.Sequential(dense), config)  # type: ignore[arg-type]
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr))
    return model(torch.eye(N)).T


def main() -> None:
    print(f"{f'peft {peft.__version__} and lorank, AdamW':34}{'lr':>8}{'core':>10}{'inside':>10}")
    for lr in (1e-5, 1e-3, 1e-2):
        rows: dict[str, Callable[[nn.Linear], Tensor]] = {
            "peft OSFConfig": lambda dense, lr=lr: theirs(dense, lr),  # type: ignore[misc]
            **{f"lorank osft, form={form}": lambda dense, form=form, lr=lr: ours(form, dense, lr) for form in FORMS},  # type: ignore[misc]
        }
        for name, run in rows.items():
            torch.manual_seed(0)
            dense = nn.Linear(N, N, bias=False)
            W = dense.weight.detach().double().clone()
            U, S, Vh = torch.linalg.svd(W)
            U, S, V = U[:, :K], S[:K], Vh[:K].T
            now = run(dense).detach().double()
            core = ((U.T @ now @ V - S.diag()).norm() / S.norm()).item()
            inside = (torch.maximum((U.T @ (now - W)).norm(), ((now - W) @ V).norm()) / (now - W).norm()).item()
            print(f"{name:34}{lr:8.0e}{core:10.1e}{inside:10.1e}")


if __name__ == "__main__":
    main()
