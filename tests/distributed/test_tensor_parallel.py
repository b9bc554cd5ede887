"""A model that processes share computes what one process does, and they send what the formulas say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorank import CoLA, CRNet, convert
from lorank.architectures import llama_config
from lorank.distributed.tensor_parallel import check
from lorank.distributed.traffic import traffic

pytestmark = pytest.mark.usefixtures("forked_processes")

PROGRAM = Path(__file__).parent / "four_processes.py"


def said(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", PROGRAM, *arguments]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `four_processes.py` finds."""
    return said()


def test_two_and_four_processes_compute_what_one_does(found: dict[str, Any]) -> None:
    """Logits and all gradients in float64, relative to the largest number of each."""
    assert len(found["same"]) == 6 and max(found["same"].values()) < 1e-12, found["same"]


def test_a_block_sends_four_messages_each_way(found: dict[str, Any]) -> None:
    """Of 3r + 1, r, 2r + 1 and r numbers a token, and one for the whole model; CoLA-M recomputes without sending any again."""
    for name in ("traffic", "traffic of cola-m"):
        sent, r = found[name], 6
        assert sent["forward"] == {"all_reduce": 4, "all_gather_into_tensor": 1} and sent["backward"] == {
            "all_reduce": 4
        }
        assert sent["sums"] == [3 * r + 1, r, 2 * r + 1, r] == sent["back"][::-1], name


def test_16_bits_do_not_carry_the_sum_of_squares(found: dict[str, Any]) -> None:
    assert found["traffic in bf16"]["sums"] == [18, 1, 6, 12, 1, 6]


def test_two_save_and_one_two_or_four_go_on(found: dict[str, Any]) -> None:
    """With torch.distributed.checkpoint; AdamW with weight decay and clipped gradients, as far as one process came."""
    assert found["saved"].keys() == {"one", "two", "four"} and max(found["saved"].values()) < 1e-8, found["saved"]


def test_optimizers_of_matrices_and_of_pairs_move_parts(found: dict[str, Any]) -> None:
    assert max(found["moved"].values()) < 1e-8, found["moved"]


def test_parameters_of_a_process_are_counted(found: dict[str, Any]) -> None:
    said, *held = found["held"]
    assert said == max(held) and held[-1] < held[0], "45 columns of the MLP are 12, 12, 12 and 9"


@pytest.mark.slow
def test_every_type_and_every_optimizer() -> None:
    found = said("all")
    assert max(found["types"].values()) < 1e-12 and max(found["moved"].values()) < 1e-8, found


@pytest.mark.parametrize(
    ("size", "dense", "between", "cut"),
    [
        ("130m", 0.047, 0.242, 0.055),
        ("1b", 0.125, 0.646, 0.109),
        ((3072, 8192, 768), 0.188, 0.969, 0.164),
        ("7b", 0.250, 1.297, 0.219),
        ((5120, 13824, 1280), 0.312, 1.625, 0.273),
    ],
)
def test_the_volumes_are_those_of_boost(size: Any, dense: float, between: float, cut: float) -> None:
    """GiB of a block's forward pass for 4 sequences of 4,096 in bf16 (arXiv 2512.12131); 3B and 13B by their shapes."""
    config = llama_config(size if isinstance(size, str) else "60m")
    rank: Any = CoLA.published[size]["rank"] if isinstance(size, str) else size[2]
    if not isinstance(size, str):
        config.hidden_size, config.intermediate_size, config.num_attention_heads = size[0], size[1], 32
        config.num_key_value_heads, config.head_dim = 32, size[0] // 32
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = convert(AutoModelForCausalLM.from_config(config), CoLA(rank=rank))
    found = traffic(model, 2)
    gib = [n * 4 * 4096 * 2 / 2**30 for n in (found.dense, found.between, found.cut)]  # type: ignore[operator]
    assert gib == pytest.approx([dense, between, cut], abs=6e-4)
    assert found.pays == (size != "130m") and found.norms == 2
    assert not found._replace(cut=found.dense).pays, "equal traffic is no gain"


SMALL = {"vocab_size": 20, "hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1, "num_attention_heads": 6}


def small(kind: str = "llama", method: Any = None, **settings: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**SMALL, "num_key_value_heads": 2, "head_dim": 4, **settings})
    with torch.device("meta"):
        return convert(AutoModelForCausalLM.from_config(config), method or CoLA(rank=4))


@pytest.mark.parametrize(
    ("model", "processes", "message"),
    [
        (small(), 4, "num_attention_heads must be a multiple of the 4 processes that share a model, got 6"),
        (small(), 3, "num_key_value_heads must be a multiple of the 3 processes that share a model, got 2"),
        (small(), 5, "hidden_size must be a multiple of the 5 processes that share a model, got 24"),
        (small("gemma"), 2, "model must be a converted llama, .* or ernie4_5 model, got gemma"),
        (small(method=CRNet(rank=4)), 2, r"layers.0.self_attn.q_proj must be two factors .* got CRNet"),
        (small(method=CoLA(rank=4, init="dlr", decay_to="reuse")), 2, "decay_to must be 'zero'"),
    ],
    ids=["heads", "kv", "width", "type", "crnet", "hook"],
)
def test_what_cannot_be_cut_is_named(model: Any, processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(model, processes)


def test_a_width_of_the_mlp_need_not_divide() -> None:
    check(small(intermediate_size=31), 2)
