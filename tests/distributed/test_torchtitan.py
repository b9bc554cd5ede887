"""CoLA inside torchtitan: its model with our layers computes what transformers' model with them does. Needs torchtitan, which nothing
else here does: see examples/torchtitan. Its compiler warns when it is imported."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import lorank
from lorank.layers import LowRankLinear

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.filterwarnings("default")

from torchtitan.config.override import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402

from lorank.distributed.torchtitan import Bottlenecks, LowRank, cola  # noqa: E402

HERE = "lorank.distributed.torchtitan"
WIDTH, HEADS, LAYERS, RANK, VOCABULARY = 256, 16, 2, 64, 512


def config(*imports: Any, layers: int = LAYERS) -> Any:
    found = llama3_debugmodel()
    model = found.model_spec.model
    del model.layers[layers:]
    for one in model.layers:
        one.attention.rope.scaling = "none"
    apply_overrides(OverrideConfig(imports=[*imports]), found)
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    built = config((f"{HERE}.cola", {"rank": RANK})).model_spec.model.build()
    built.init_states()
    return built


def as_transformers(titan: Any) -> LlamaForCausalLM:
    """The same weights in transformers' model, converted by lorank. torchtitan turns neighbours, transformers halves of a head."""
    layer = titan.layers["0"]
    shape = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=layer.feed_forward.w1.B.out_features,
        vocab_size=titan.tok_embeddings.num_embeddings,
        rms_norm_eps=layer.ffn_norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    twin = lorank.convert(LlamaForCausalLM(shape), lorank.CoLA(rank=RANK))
    halves = torch.arange(WIDTH).view(HEADS, WIDTH // HEADS // 2, 2).transpose(1, 2).flatten()
    names = {"attention.qkv_linear.wq": "self_attn.q_proj", "attention.qkv_linear.wk": "self_attn.k_proj"}
    names |= {"attention.qkv_linear.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj"}
    names |= {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(titan.tok_embeddings.weight)
        twin.lm_head.weight.copy_(titan.lm_head.weight)
        twin.model.norm.weight.copy_(titan.norm.weight)
        for i, block in enumerate(twin.model.layers):
            theirs = titan.layers[str(i)]
            for name, ours in names.items():
                to, source = block.get_submodule(ours), theirs.get_submodule(name)
                to.A.weight.copy_(source.A.weight)
                turned = ours.endswith(("q_proj", "k_proj"))
                to.B.weight.copy_(source.B.weight[halves] if turned else source.B.weight)
            block.input_layernorm.weight.copy_(theirs.attention_norm.weight)
            block.post_attention_layernorm.weight.copy_(theirs.ffn_norm.weight)
    return twin.eval()


def test_it_is_the_model_of_transformers(model: Any) -> None:
    """Logits, and parameters one by one; the head and the embedding are dense."""
    ids, n = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0)), 64
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, n, n, device="cpu")
    twin = as_transformers(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, attention_masks=mask), twin(ids).logits, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_has_the_gradients_of_ours(bias: bool) -> None:
    theirs = LowRank.Config(in_features=12, out_features=20, bias=bias, rank=3).build().double()
    theirs.init_states()
    ours = LowRankLinear(12, 20, 3, bias=bias, activation="silu").double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 12, dtype=torch.float64)
    for layer in (ours, theirs):
        layer(x).sin().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_a_query_is_not_what_a_key_is(model: Any) -> None:
    """torchtitan has one matrix for the three; each has a bottleneck here."""
    qkv = model.layers["0"].attention.qkv_linear
    assert {name for name, _ in qkv.named_parameters()} == {f"{w}.{f}.weight" for w in ("wq", "wk", "wv") for f in "AB"}
    x = torch.randn(1, 3, WIDTH)
    q, k, v = qkv(x)
    torch.testing.assert_close(k.flatten(2), qkv.wk(x))
    assert q.shape == k.shape == v.shape == (1, 3, HEADS, WIDTH // HEADS)


def test_cola_m_computes_no_bottleneck_again(model: Any) -> None:
    """Of a block's MLP, in FLOPs: without recomputation, and with that of the gate's and up's B alone."""
    found = config((f"{HERE}.cola", {"rank": RANK}), f"{HERE}.cola_m")
    policy = found.activation_checkpoint.build()
    assert isinstance(policy, Bottlenecks)
    plain = model.layers["0"].feed_forward
    kept = policy._wrap_block(copy.deepcopy(plain))
    flops = []
    for mlp in (plain, kept):
        x = torch.randn(1, 8, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            mlp(x).sin().sum().backward()
        flops.append((counter.get_total_flops(), x.grad))
    (once, gradient), (again, same) = flops
    assert torch.equal(gradient, same)
    width = plain.w1.B.out_features
    assert again - once == 2 * 2 * 8 * RANK * width


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_factors_are_sharded(model: Any, one_process: None) -> None:
    mlp = copy.deepcopy(model.layers["0"].feed_forward)
    x = torch.randn(1, 8, WIDTH)
    expected = mlp(x)
    fully_shard(mlp, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    assert all(isinstance(p, DTensor) for p in mlp.parameters())
    torch.testing.assert_close(mlp(x), expected)


def test_what_cannot_work_is_refused(model: Any) -> None:
    class Two:
        tp = 2

    with pytest.raises(ValueError, match="tensor_parallel_degree must be 1"):
        model.layers["0"].attention.wo.parallelize(Two())
    block = llama3_debugmodel().model_spec.model.layers[0]
    block.moe = nn.Identity()
    with pytest.raises(ValueError, match="must have no experts"):
        cola(block)
