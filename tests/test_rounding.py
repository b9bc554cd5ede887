"""16-bit weights that methods edit in place keep what rounding takes: edits add up, in a run that stops as well."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank import SST, Method, ReLoRA, SwitchLoRA, accounting, convert, step_hook
from lorank.methods.sst import SSTLinear
from lorank.optim.adamw import VectorAdamW
from lorank.plan.counts import count
from lorank.rounding import Rests
from lorank.sizes import SIZES
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_below_half_a_unit_add_up(dtype: torch.dtype) -> None:
    weight, rests = torch.ones(3, dtype=dtype), Rests()
    for _ in range(100):
        rests.store_("w", rests.exact("w", weight).add_(1e-4), weight)
    assert weight.tolist() == pytest.approx([1.01] * 3, abs=torch.finfo(dtype).eps / 2)
    assert rests.exact("w", weight).tolist() == pytest.approx([1.01] * 3, abs=1e-3)


def test_weights_of_32_bits_are_edited_themselves() -> None:
    weight, rests = torch.ones(3), Rests()
    assert rests.exact("w", weight) is weight
    rests.store_("w", weight, weight)
    assert rests.state_dict() == {}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))])


class Still:
    """One bf16 layer under a method, at learning rate 0."""

    def __init__(self, method: Method):
        torch.manual_seed(0)
        self.model = convert(Net(), method)
        self.layer: Any = self.model.layers[0][0]  # type: ignore[index]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = VectorAdamW(self.trained, lr=0.0, weight_decay=0.0)
        self.hook: Any = step_hook(self.model, self.optimizer, steps=600)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for p in self.trained:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()

    def weight(self) -> Tensor:
        """[d_out, d_in], what the layer amounts to."""
        layer = self.layer
        return (layer.weight() if isinstance(layer, SSTLinear) else layer.W.weight + layer.product()).detach()


MANY: dict[str, Method] = {
    "switchlora": SwitchLoRA(rank=8, interval=2, freeze_steps=1, ratio=1e9),  # 4 rows and 4 columns in each step
    "sst": SST(rank=0.5, interval=1, restart_warmup_steps=1),  # an SVD in every second step
}


@pytest.mark.parametrize("name", MANY)
def test_many_exchanges_at_rate_0_leave_the_function(name: str) -> None:
    """One rounding of W and no more: 2^-9 of each number at most. Without the rest it is 3 % here, and grows."""
    still = Still(MANY[name])
    start = still.weight()
    still.run(60)
    assert (still.weight() - start).norm() / start.norm() < 4e-3


def test_small_merges_in_bf16_add_up() -> None:
    """Each is about half a unit in the last place of W, so that the sum of many roundings would be seen."""
    still = Still(ReLoRA(rank=8, cycle=2, restart_warmup_steps=1, dropout=0.0))
    exact = still.weight().double()
    start = exact.clone()
    for k in range(30):
        still.run(2 if k else 3)  # merged at the end of updates 3, 5, 7, ...
        with torch.no_grad():
            still.layer.B.weight.fill_(2e-4)
        exact += still.layer.product().detach().double()
    still.run(2)
    assert (exact - start).norm() / start.norm() > 0.01, "the merges matter"
    assert (still.weight() - exact).norm() / exact.norm() < 2e-3
    kept = still.hook.rests.exact("layers.0.0", still.layer.W.weight)
    assert (kept - exact).norm() / exact.norm() < 2e-5


@pytest.mark.parametrize("name", [*MANY, "relora"])
def test_what_is_kept_is_counted_and_saved(name: str) -> None:
    method = MANY.get(name) or ReLoRA(rank=8, cycle=2, restart_warmup_steps=1)
    still, other = Still(method), Still(method)
    still.run(6)
    kept = still.hook.rests.state_dict()
    assert sum(rest.nbytes for rest in kept.values()) == accounting.rests_bytes(still.model) == 2 * 256 * 256
    other.hook.load_state_dict(still.hook.state_dict())
    assert all(map(torch.equal, other.hook.rests.state_dict().values(), kept.values()))
    old = {key: value for key, value in still.hook.state_dict().items() if key not in kept}
    other.hook.load_state_dict(old)  # a checkpoint of version 0.1
    assert other.hook.rests.state_dict() == {}


@pytest.mark.parametrize("name", ["relora", "switchlora", "sst"])
def test_a_plan_in_pure_bf16_has_the_rests(name: str) -> None:
    recipe = Recipe(size="tiny", vocab_size=64, method=name, precision="bf16-pure", batch_size=2, sequence_length=16)
    model = empty_model(recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    d, f, layers, _, _ = SIZES["tiny"]
    expected = 2 * (2 * trained + layers * (4 * d * d + 3 * d * f))
    assert count(recipe, model).memory.optimizer_bytes == expected
