"""ALLoRA: a learning rate for each output row, in the backward pass."""

import pytest
import torch
from torch import nn

from lorank.adapters.lora import LoRALinear
from lorank.adapters.row_adaptive import RowAdaptiveLinear, row_factors


def pair() -> tuple[RowAdaptiveLinear, LoRALinear]:
    """It and a LoRA of scale 1 with the same weights."""
    torch.manual_seed(0)
    dense = nn.Linear(12, 10)
    ours, plain = RowAdaptiveLinear(dense, 3, eta=2.0), LoRALinear(dense, 3, scale=1.0)
    nn.init.normal_(ours.B.weight)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer(x).sin().sum().backward()
    return [x.grad, layer.A.weight.grad, layer.B.weight.grad]  # type: ignore[list-item, union-attr]


def test_the_factor_is_eta_at_zero_and_falls_with_the_row() -> None:
    A = torch.randn(3, 12, dtype=torch.float64)
    B = torch.randn(1, 3, dtype=torch.float64) * torch.tensor([[0.0], [0.1], [1.0], [10.0]])
    f = row_factors(A, B, 2.0)
    assert f[0] == 2.0 and (f[:-1] > f[1:]).all()
    torch.testing.assert_close(f, 1 / ((B @ A).norm(dim=1) + 0.25).sqrt())


def test_factors_get_scaled_gradients_and_the_input_plain_ones() -> None:
    ours, plain = pair()
    x = torch.randn(4, 5, 12)
    assert torch.equal(ours(x), plain(x))
    found, lora = gradients(ours, x), gradients(plain, x)
    assert torch.equal(found[0], lora[0]), "bit for bit"
    f = row_factors(ours.A.weight, ours.B.weight, 2.0)
    torch.testing.assert_close(found[2], f[:, None] * lora[2])
    g = plain(x).detach().cos() * f  # of the output, times f
    torch.testing.assert_close(found[1], torch.einsum("tno,or,tni->ri", g, ours.B.weight, x))


def test_a_doubled_row_shrinks_its_gradient_as_the_formula_says() -> None:
    ours, _ = pair()
    norm = (ours.B.weight[4] @ ours.A.weight).norm()
    before = row_factors(ours.A.weight, ours.B.weight, 2.0)
    with torch.no_grad():
        ours.B.weight[4] *= 2
    after = row_factors(ours.A.weight, ours.B.weight, 2.0)
    torch.testing.assert_close(after[4] / before[4], ((norm + 0.25) / (2 * norm + 0.25)).sqrt())
    assert torch.equal(after[:4], before[:4])


def test_row_norms_of_the_factors_are_another_rule() -> None:
    """Public optimizers scale rows of A and of B by their own lengths: neither gradient is then the paper's."""
    ours, plain = pair()
    x = torch.randn(20, 12)
    found, lora = gradients(ours, x), gradients(plain, x)
    for mine, theirs, factor in zip(found[1:], lora[1:], (ours.A.weight, ours.B.weight), strict=True):
        common = theirs / (factor.norm(dim=1, keepdim=True) + 0.25).sqrt()
        assert (common - mine).norm() > 0.1 * mine.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_reaches_backward(dtype: torch.dtype) -> None:
    ours, _ = pair()
    x = torch.randn(4, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours(x).float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and ours.B.weight.grad is not None
