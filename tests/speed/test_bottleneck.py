"""Half a bottleneck as one operation: against float64 formulas and torch's two operations, in models, and its kernel by Triton's
interpreter."""

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

import lorank
from lorank.checkpointing import keep_bottlenecks
from lorank.layers import LowRankLinear
from lorank.optim.shards import whole
from lorank.speed.bottleneck import silu_linear
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe
from tests.conftest import ARCHITECTURES
from tests.distributed.together import together

IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
def test_outputs_and_gradients_are_those_of_the_formulas(lead: tuple[int, ...]) -> None:
    z, B, b, dy = draw((*lead, 5), (4, 5), (4,), (*lead, 4))
    found = silu_linear(z, B, b)
    s = 1 / (1 + (-z).exp())
    torch.testing.assert_close(found, torch.einsum("...r,dr->...d", z * s, B) + b, rtol=1e-13, atol=1e-13)
    dz, dB, db = torch.autograd.grad(found, (z, B, b), dy)
    torch.testing.assert_close(dz, torch.einsum("...d,dr->...r", dy, B) * s * (1 + z * (1 - s)), rtol=1e-12, atol=1e-13)
    rows, columns = dy.reshape(-1, 4), (z * s).reshape(-1, 5)
    torch.testing.assert_close(dB, sum(torch.outer(p, q) for p, q in zip(rows, columns, strict=True)))
    torch.testing.assert_close(db, rows.sum(0))


def test_torch_finds_nothing_wrong_with_the_operation() -> None:
    z, B, b = draw((3, 5), (4, 5), (4,))
    for given in ((z, B, b), (z, B, None), (z, B.detach(), None)):
        torch.library.opcheck(silu_linear, given)


def cola(*, fused: bool, policy: Any = None) -> Any:
    torch.manual_seed(0)
    model = lorank.convert(ARCHITECTURES["llama"].dense(), lorank.CoLA(rank=8))
    lorank.checkpoint(model, policy)
    return lorank.fuse_bottlenecks(model) if fused else model


def gradients(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def kept_by(model: nn.Module) -> int:
    """Numbers that the forward pass keeps, weights left out."""
    seen: dict[int, Tensor] = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in weights:
            seen[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in seen.values())


def test_a_model_has_the_same_gradients_and_keeps_less() -> None:
    plain, fused = cola(fused=False), cola(fused=True)
    bottlenecks = [m for m in plain.modules() if isinstance(m, LowRankLinear)]
    assert kept_by(plain) - kept_by(fused) == sum(IDS.numel() * m.A.out_features for m in bottlenecks)
    expected = gradients(plain)
    torch.testing.assert_close(gradients(fused), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients(copy.deepcopy(fused)), expected, rtol=1e-4, atol=1e-6)
    assert fused.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cola_m_and_autocast_and_flops_are_as_without(dtype: torch.dtype | None) -> None:
    found = []
    for fused in (False, True):
        model = cola(fused=fused, policy=keep_bottlenecks)
        with FlopCounterMode(display=False) as flops, torch.autocast("cpu", dtype, enabled=dtype is not None):
            found.append((*gradients(model), flops.get_total_flops()))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is None else {"rtol": 0.02, "atol": 0.002}
    torch.testing.assert_close(found[1], found[0], **tolerance)


def test_a_compiled_layer_has_one_graph() -> None:
    torch.manual_seed(0)
    layer, x = lorank.fuse_bottlenecks(LowRankLinear(8, 16, 4, activation="silu")), torch.randn(3, 8)
    expected = torch.autograd.grad(layer(x).sin().sum(), [*layer.parameters()])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sin().sum(), [*layer.parameters()]), expected)
    assert counter.frame_count == 1


def test_what_is_put_in_the_place_of_b_or_on_it_still_acts() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(8, 16, 4, activation="silu", bias=True)
    x = torch.randn(3, 8)
    lorank.fuse_bottlenecks(layer)
    expected = layer(x)
    handle = layer.B.register_forward_hook(lambda module, given, y: 2 * y)
    torch.testing.assert_close(layer(x), 2 * expected)
    handle.remove()
    layer.B = nn.Sequential(layer.B, nn.Linear(16, 16))
    torch.testing.assert_close(layer(x), layer.B[1](expected))


def test_replicas_and_pickled_layers_have_weights_of_their_own() -> None:
    layer, x = lorank.fuse_bottlenecks(LowRankLinear(8, 16, 4, activation="silu")), torch.randn(3, 8)
    expected = layer(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected, rtol=0, atol=0)
    replica = layer._replicate_for_data_parallel()  # what nn.DataParallel does for each GPU, before it gives it weights
    replica.A, replica.B = layer.A, nn.Linear(4, 16)
    torch.testing.assert_close(replica(x), replica.B(nn.functional.silu(layer.A(x))))


def sharded() -> list[Any]:
    """Outputs and gradients of a fused layer in two processes that have the same tokens, by FSDP2."""
    torch.manual_seed(0)
    layer, x = lorank.fuse_bottlenecks(LowRankLinear(8, 16, 4, activation="silu", bias=True)), torch.randn(3, 8)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    y = layer(x)
    y.sin().sum().backward()
    return [t.detach().numpy() for t in (y, *(whole(p.grad) for p in layer.parameters()))]  # type: ignore[arg-type]


def test_two_processes_with_shared_weights_have_equal_gradients() -> None:
    torch.manual_seed(0)
    layer, x = LowRankLinear(8, 16, 4, activation="silu", bias=True), torch.randn(3, 8)
    y = layer(x)
    expected = [y, *torch.autograd.grad(y.sin().sum(), [*layer.parameters()])]
    for found in together(sharded, 2):
        torch.testing.assert_close([*map(torch.from_numpy, found)], expected)


def test_a_model_without_such_bottlenecks_is_refused() -> None:
    with pytest.raises(
        ValueError, match="^Linear must have bottlenecks with SiLU to be fused, as method cola gives them"
    ):
        lorank.fuse_bottlenecks(nn.Linear(4, 4))


def test_a_recipe_asks_for_it() -> None:
    recipe = Recipe().but({"size": "tiny", "vocab_size": 64, "shape.num_hidden_layers": 1, "fused": True})
    found = [m for m in empty_model(recipe).modules() if isinstance(m, LowRankLinear)]
    assert len(found) == 7
    assert all(layer.at_once for layer in found)
    assert empty_model(recipe.but({"method": "dense"})), "its dense twin in a comparison has nothing to fuse"
    with pytest.raises(ValueError, match="to be fused, as method cola gives them, but it has none"):
        empty_model(recipe.but({"method": "low-rank"}))


INTERPRETED = """
import torch
from lorank.speed.silu_kernel import product
draw = torch.Generator().manual_seed(0)
for dtype, near in ((torch.float32, 1e-5), (torch.float16, 1e-2)):  # the interpreter takes bfloat16 for integers
    for n, r, d in ((130, 40, 20), (1, 8, 8), (5, 3, 150)):
        z, B, b, dy = (torch.randn(*s, generator=draw).to(dtype) for s in ((n, r), (d, r), (d,), (n, d)))
        Z, W = z.double().requires_grad_(), B.double().requires_grad_()
        y = torch.nn.functional.silu(Z) @ W.T
        dz, dB = torch.autograd.grad(y, (Z, W), dy.double())
        found = (product(z, B.mT, silu=True), product(z, B.mT, silu=True, bias=b), product(dy, B, slope_at=z), product(z.mT, dy, silu=True).mT)
        for one, other in zip(found, (y, y + b.double(), dz, dB)):
            assert one.dtype == dtype
            assert (one.double() - other).norm() < near * other.norm(), (dtype, n, r, d)
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorank.speed import silu_kernel as k
for kind, precision in (("bf16", "tf32"), ("fp32", "ieee")):
    for silu, bias, slope in ((True, True, False), (False, False, True)):
        tensors, sizes = ("P", "Q", "bias", "Z", "out"), k.tile.arg_names[5:16]
        signature = {name: "*" + kind for name in tensors} | {name: "i32" for name in sizes}
        constants = {"SILU": silu, "BIAS": bias, "SLOPE": slope, "PRECISION": precision, "ROWS": k.ROWS, "COLUMNS": k.COLUMNS, "DEPTH": k.DEPTH}
        source = ASTSource(k.tile, signature | {name: "constexpr" for name in constants}, constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert made.asm["cubin"] and (precision == "ieee") != ("wgmma" in made.asm["ptx"])
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton, which torch for GPUs brings, is not installed"
)
@pytest.mark.parametrize(
    ("script", "interpret"),
    [(INTERPRETED, "1"), pytest.param(COMPILED, "0", marks=pytest.mark.slow)],
    ids=["computes", "compiles"],
)
def test_the_kernel(script: str, interpret: str) -> None:
    """By Triton's interpreter it computes what float64 does, and its compiler makes machine code of it for an H100."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
