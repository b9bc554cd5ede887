"""Costs as the CR-Net paper prints them."""

import bisect
from collections.abc import Callable

from lorank.accounting import (
    block_forward_flops,
    block_training_flops,
    bottleneck_recompute_flops,
    cola_parameters,
    crnet_parameters,
    dense_parameters,
    training_state_bytes,
)
from lorank.methods.crnet import kept_numbers, recompute_flops
from lorank.papers import Paper, PaperTable, shape_of
from lorank.sizes import SIZES

RANK = 448
"""The uniform rank that gives the published parameters; the paper's own ranks differ from layer to layer."""


def one_billion(row: str, column: str) -> float | None:
    shape = shape_of("1b")
    dense, ours = dense_parameters(*shape), crnet_parameters(*shape, RANK)

    def flops(method: str, layers: int) -> int:
        return layers * block_training_flops(method, shape.d, shape.d_ff, RANK, 256)  # type: ignore[arg-type]

    spent = flops("dense", 1) + flops("cola", shape.layers - 1)  # factors cost what CoLA's do
    return {
        "parameters of CR-Net, M": ours / 1e6,
        "parameters of CoLA, M": cola_parameters(*shape, 512) / 1e6,
        "parameters, full-rank, M": dense / 1e6,
        "fewer parameters, %": 100 * (1 - ours / dense),
        "fewer FLOPs per step, %": 100 * (1 - spent / flops("dense", shape.layers)),
    }[row]


BATCH, LENGTHS = 16, range(1, 2**20)
STATE = training_state_bytes(crnet_parameters(*shape_of("7b"), 512)) / 1e9


def extra_memory(n: int) -> float:
    """10^9 bytes in bf16; the paper keeps the inputs of all projections, of which ours keeps the block's alone."""
    shape = shape_of("7b")
    inputs = shape.layers * n * (2 * shape.d + shape.d_ff)
    return 2 * BATCH * (kept_numbers(shape.d, shape.d_ff, 512, n, shape.layers) + inputs) / 1e9


def again(n: int) -> int:
    shape = shape_of("7b")
    return BATCH * recompute_flops(shape.d, shape.d_ff, 512, n, shape.layers)


def again_vanilla(n: int) -> int:
    shape = shape_of("7b")
    return BATCH * shape.layers * block_forward_flops("dense", shape.d, shape.d_ff, 0, n)


def again_cola_m(n: int) -> int:
    shape = shape_of("7b")
    return BATCH * shape.layers * bottleneck_recompute_flops(shape.d, shape.d_ff, SIZES["7b"].rank, n)


SEVEN_BILLION: dict[str, tuple[str, Callable[[int], float]]] = {
    "extra memory, GB": ("23.35", extra_memory),
    "of vanilla checkpointing's memory": (
        "0.456",
        lambda n: extra_memory(n) / (2 * BATCH * shape_of("7b").layers * n * shape_of("7b").d / 1e9),
    ),
    "FLOPs, 10^15": ("0.692", lambda n: again(n) / 1e15),
    "of vanilla checkpointing's FLOPs": ("0.326", lambda n: again(n) / again_vanilla(n)),
    "fewer than CoLA-M, %": ("8.0", lambda n: 100 * (1 - again(n) / again_cola_m(n))),
}
"""What is printed, and our count by the length n of a sequence, which is not known."""


def length_for(row: str) -> int | None:
    """The sequence length at which our count passes what is printed; None: at none."""
    printed, count = SEVEN_BILLION[row]
    sign = 1 if count(LENGTHS[-1]) > count(LENGTHS[0]) else -1
    index = bisect.bisect_left(LENGTHS, sign * float(printed), key=lambda n: sign * count(n))
    return LENGTHS[index] if 0 < index < len(LENGTHS) else None


def seven_billion_reason(row: str) -> str:
    found, at_256 = length_for(row), SEVEN_BILLION[row][1](256)
    if found is None:
        return f"no length n of a sequence gives it; ours is {at_256:.3g} at any"
    return f"the length n of a sequence is not known; ours is that at n = {found:,}, and {at_256:.3g} at 256"


PAPER = Paper(
    name="crnet",
    title="CR-Net: Scaling Parameter-Efficient Training with Cross-Layer Low-Rank Structure",
    arxiv="2509.18993",
    tables=(
        PaperTable(
            title="Llama 1B",
            columns=("1b",),
            rows={
                "parameters of CR-Net, M": ("583",),
                "parameters of CoLA, M": ("609",),
                "parameters, full-rank, M": ("1339",),
                "fewer parameters, %": ("56.5",),
                "fewer FLOPs per step, %": ("63.2",),
            },
            ours=one_billion,
            formula=f"2 V d + L 2 d + d + (4 d² + 3 d d_ff) + (L - 1) (11 d r + 3 d_ff r + 7), r = {RANK} for all layers; "
            "FLOPs of the blocks at n = 256",
            source="two summaries of the paper; the ranks are our inference",
            strays={
                (
                    "fewer FLOPs per step, %",
                    "1b",
                ): "at the published parameters the formula gives 61.4 with attention and 62.6 without"
            },
        ),
        PaperTable(
            title="Recomputation, Llama 7B, r = 512, batch 16",
            columns=("7b",),
            rows={row: (printed,) for row, (printed, _) in SEVEN_BILLION.items()},
            ours=lambda row, column: None,
            formula="16 sequences of n tokens, n unknown: attention and the B products again, the dense first block; bf16 of the inputs of "
            "all projections, of what is r wide, and of every eighth block's outputs. No one n has all five",
            source="two summaries of the paper",
            strays={
                **{(row, "7b"): seven_billion_reason(row) for row in SEVEN_BILLION},
                (
                    "extra memory, GB",
                    "7b",
                ): f"{seven_billion_reason('extra memory, GB')}, with which weights, gradients and moments "
                f"would be {STATE + extra_memory(256):.1f} in all",
            },
        ),
    ),
)
