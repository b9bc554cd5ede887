"""Costs as the EGGROLL paper prints them."""

import bisect

from lorank.evolution.eggroll import operations_per_byte
from lorank.papers.table import Paper, PaperTable

WIDTH, ENOUGH = 8192, 300.0
"""Width of the square matrix; operations per byte above which an accelerator does not wait for its memory."""
RANKS = {"one matrix for all, members": 0, "EGGROLL with r = 1, members": 1}


def members(row: str, column: str) -> float:
    """The fewest members with `ENOUGH` operations per byte."""

    def intensity(count: int) -> float:
        return operations_per_byte(WIDTH, WIDTH, count, RANKS[row])

    return 1 + bisect.bisect_left(range(1, WIDTH), ENOUGH, key=intensity)


PAPER = Paper(
    name="eggroll",
    title="Evolution Strategies at the Hyperscale",
    arxiv="2511.16652",
    tables=(
        PaperTable(
            title="Batch with 300 operations per byte, width 8192, bf16",
            columns=("batch",),
            rows={"one matrix for all, members": ("324",), "EGGROLL with r = 1, members": ("352",)},
            ours=members,
            formula="the fewest members with N (2 a b + 2 r (a + b) + a) operations for 300 times 2 (a b + N (1 + r) (a + b) + 2 N r) "
            "bytes; without noise 2 N a b for 2 (a b + N (a + b))",
            source="the paper's section on arithmetic intensity, read in a rendering of it",
        ),
    ),
    left_out="hours of its runs; speed measured on a GH200",
)
