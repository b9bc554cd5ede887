"""Forward hooks against their specification: each member on its own, with its weights written out."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import lorank
from lorank.evolution.eggroll import Eggroll
from lorank.evolution.integers import IntegerEggroll
from lorank.layers import ColumnMajorLinear


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, ColumnMajorLinear])
def test_a_member_has_its_weights_and_a_pair_the_mean(kind: Any, rank: int, one_by_one: Any) -> None:
    torch.manual_seed(0)
    layer = (Conv1D(8, 6) if kind is Conv1D else kind(6, 8)).double()
    estimate = Eggroll(layer, population=6, sigma=0.5, rank=rank)
    x = torch.randn(6, 2, 4, 6, dtype=torch.float64)  # a member has 2 x 4 rows
    with estimate.perturb(range(6)), torch.no_grad():
        found = layer(x.flatten(0, 1)).view(6, 2, 4, 8)
    for y, expected in zip(found, one_by_one(estimate, lambda i: layer(x[i])), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    with estimate.perturb(range(6)), torch.no_grad():
        same = layer(x[:1].expand(6, 2, 4, 6).reshape(12, 4, 6)).view(3, 2, 2, 4, 8)
    torch.testing.assert_close(same.mean(1), layer(x[0]).detach().expand(3, 2, 4, 8))


def small_opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.OPTForCausalLM(config).eval()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "qwen3", "opt", "cola", "cola in gpt2", "switchlora"])
def test_a_language_model(name: str, freeze: bool, small: Any, tokens: Tensor, one_by_one: Any) -> None:
    """Norms, biases, a tied head, positions looked up once for all rows, factors, fused projections, members in chunks."""
    if name == "opt":  # whose embedding of positions counts them itself
        model = small_opt()
    elif name in ("cola", "switchlora", "cola in gpt2"):
        model = lorank.convert(small("gpt2" if "gpt2" in name else "llama"), name.split()[0])
    else:
        model = small("llama", tie_word_embeddings=True) if name == "llama tied" else small(name)
    model = model.double()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in ("llama tied", "gpt2", "cola in gpt2", "opt"))
    before = copy.deepcopy(model.state_dict())
    estimate = Eggroll(model, population=4, sigma=0.1, freeze_others=freeze)
    assert any(p.ndim == 1 for p in estimate.perturbed) != freeze
    expected = list(one_by_one(estimate, lambda i: model(tokens).logits))
    for members in (range(0, 4), range(2, 4)):
        with estimate.perturb(members), torch.no_grad():
            found = model(tokens.repeat(len(members), 1)).logits.view(len(members), *tokens.shape, -1)
        torch.testing.assert_close(found, torch.stack(expected)[members.start :], rtol=1e-6, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 0.01
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3.0 * super().forward(input)


def test_an_embedding_that_scales_its_rows(one_by_one: Any) -> None:
    model, ids = Scaled(11, 6).double(), torch.randint(0, 11, (2, 5))
    estimate = Eggroll(model, population=4, sigma=0.3, rank=2)
    with estimate.perturb(range(4)), torch.no_grad():
        found = model(ids.repeat(4, 1)).view(4, 2, 5, 6)
    torch.testing.assert_close(found, torch.stack(list(one_by_one(estimate, lambda i: model(ids)))))


class Twice(nn.Module):
    """A layer and a norm that are called twice, and an input given by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=self.norm(self.layer(self.norm(x)).tanh()))


def test_a_module_that_is_called_twice(one_by_one: Any) -> None:
    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(4, 3, 6, dtype=torch.float64)
    estimate = Eggroll(model, population=4, sigma=0.3)
    seen: list[Tensor] = []
    model.layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with estimate.perturb(range(4)), torch.no_grad():
        found = model(x.flatten(0, 1).view(4, 3, 6))
    inner = seen[0]
    torch.testing.assert_close(found, torch.stack(list(one_by_one(estimate, lambda i: model(x[i])))))
    assert not torch.allclose(inner, F.linear(model.norm(x), model.layer.weight, model.layer.bias)), (
        "a hook of the user's sees what members compute"
    )


# ---- refusals


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("sltrain", "EGGROLL perturbs only .* freeze model.layers.0.self_attn.q_proj.values of SLTrainLinear"),
        ("sst", "q_proj.U_active and model.layers.0.self_attn.q_proj.V_active and model.layers.0.self_attn.q_proj.S"),
        (
            "crnet",
            "EGGROLL perturbs only .* freeze model.layers.1.self_attn.q_proj.beta of CRNetLinear.*or set freeze_others=true",
        ),
    ],
)
def test_parameters_outside_of_known_modules(method: str, name: str, small: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Eggroll(lorank.convert(small("llama"), method), population=4, sigma=0.1)


def test_crnet_with_frozen_betas(small: Any, tokens: Tensor, one_by_one: Any) -> None:
    model = lorank.convert(small("llama"), "crnet").double()
    estimate = Eggroll(model, population=2, sigma=0.1, freeze_others=True)
    with estimate.perturb(range(2)), torch.no_grad():
        found = model(tokens.repeat(2, 1)).logits.view(2, *tokens.shape, -1)
    expected = torch.stack(list(one_by_one(estimate, lambda i: model(tokens).logits)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_factors_that_are_multiplied_first(small: Any) -> None:
    """SLTrain forms B A: its factors are no layers that EGGROLL knows, which it says before the first step."""
    model = lorank.convert(small("llama"), "sltrain")
    with pytest.raises(ValueError, match=r"freeze model.layers.0.self_attn.q_proj.A.weight of Factor"):
        Eggroll(model, population=2, sigma=0.1, freeze_others=True)


class Product(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.wte, self.use = nn.Embedding(8, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda m, x: F.linear(x, m.wte.weight),
            "the model uses wte.weight in torch.nn.functional.linear, where EGGROLL",
        ),
        (lambda m, x: x @ m.wte.weight.T, r"the model uses wte.weight in torch.Tensor.T.__get__, where"),
        (lambda m, x: x @ m.wte.weight.t(), "the model uses wte.weight in torch.Tensor.t, where EGGROLL cannot"),
        (lambda m, x: torch.matmul(x, m.wte.weight.mT), "wte.weight"),
        (lambda m, x: F.linear(x, m.wte.weight.float()), "wte.weight in torch.Tensor.float"),
        (lambda m, x: torch.cat([m.wte.weight, x]), "wte.weight in torch.cat"),
        (
            lambda m, x: m.wte(torch.zeros(4, 2).long()) + m.wte(torch.zeros(8, 2).long())[:4],
            "looks up 8 rows for a batch of 4",
        ),
    ],
)
def test_a_use_outside_of_modules_is_refused(use: Any, message: str) -> None:
    model = Product(use)
    estimate = Eggroll(model, population=4, sigma=0.1)
    with estimate.perturb(range(4)), torch.no_grad(), pytest.raises(ValueError, match=message):
        model(torch.zeros(4, 4))
    model.wte.weight.requires_grad_(False)  # what has no noise may be used in any way
    with Eggroll(model, population=4, sigma=0.1).perturb(range(4)), torch.no_grad():
        model(torch.zeros(4, 4))


class Table(nn.Module):
    """What is computed of a table, with as many rows as the batch."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.tokens, self.positions, self.map, self.use = nn.Embedding(11, 6), nn.Embedding(16, 6), nn.Linear(3, 6), use
        self.register_buffer("table", torch.eye(8, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.use(self, ids)


@pytest.mark.parametrize(
    ("use", "names"),
    [
        (lambda m, ids: m.positions(torch.arange(ids.shape[1])), "positions.weight: the model computes Embedding"),
        (lambda m, ids: m.map(m.table), "map.weight and map.bias: the model computes Linear"),
    ],
)
def test_a_table_is_not_taken_for_the_batch(use: Any, names: str) -> None:
    model = Table(use)
    ids = torch.zeros(2, 8, dtype=torch.int64)  # 8 rows of 8
    with pytest.raises(
        ValueError, match=f"EGGROLL cannot perturb {names} of a table that does not come from the batch"
    ):
        Eggroll(model, population=4, sigma=0.1)(
            lambda members: model(ids.repeat(len(members), 1)).view(len(members), -1).sum(1)
        )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_modules_that_mix_rows_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1 normalises over the rows of all members; call eval\(\)"):
        Eggroll(model, population=4, sigma=0.1)(
            lambda members: model(torch.ones(3 * len(members), 4)).view(len(members), -1).sum(1)
        )


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.weight * x + shift


def test_a_module_of_vectors_has_one_input() -> None:
    layer = Affine()
    with (
        pytest.raises(ValueError, match="cannot perturb weight: Affine has 2 inputs"),
        Eggroll(layer, population=4, sigma=0.1).perturb(range(4)),
    ):
        layer(torch.ones(4, 4), torch.ones(4, 4))


def test_shapes_that_cannot_be_perturbed() -> None:
    with pytest.raises(ValueError, match="EGGROLL perturbs only .* freeze weight of Conv1d"):
        Eggroll(nn.Conv1d(3, 4, 2, bias=False), population=4, sigma=0.1)
    layer = nn.Linear(3, 4)
    with (
        pytest.raises(ValueError, match="5 rows, which cannot be divided among 4 members"),
        Eggroll(layer, population=4, sigma=0.1).perturb(range(4)),
    ):
        layer(torch.zeros(5, 3))


# ---- memory


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that torch makes inside."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_no_tensor_is_a_matrix_per_member() -> None:
    """The largest tensor of an estimate is an activation or a factor, far below [pairs, a, b]."""
    a, b, N, r = 96, 80, 64, 2
    layer = nn.Linear(b, a)
    x = torch.randn(1, b)
    estimate = Eggroll(layer, population=N, sigma=0.1, rank=r)
    with Largest() as largest:
        estimate(lambda members: layer(x.expand(len(members), b)).sum(1))
    assert largest.numbers <= N * r * (a + b)
    assert N * r * (a + b) < N // 2 * a * b / 5


def test_no_tensor_is_a_matrix_per_member_in_integers(egg: Any) -> None:
    """The largest is the logits of all rows; M1 alone would be 16 times as many numbers per pair, the embedding 32 times."""
    D, pairs = 64, 128
    estimate = IntegerEggroll(egg(D, layers=1), population=2 * pairs, chunk=2 * pairs)
    with Largest() as largest:
        estimate(torch.randint(0, 256, (pairs, 3)))
    assert largest.numbers == pairs * 2 * 256 < pairs * 4 * D * D / 16
