"""Costs as the paper on DCT-AdamW and Trion prints them."""

from lorank.papers import Paper, PaperTable


def above_muon(row: str, column: str) -> float | None:
    return 0.0 if row == "Trion" else None


def below_adamw(row: str, column: str) -> float | None:
    return 8 * 0.8 if row == "DCT-AdamW" else None


PAPER = Paper(
    name="dct",
    title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    arxiv="2505.17967",
    tables=(
        PaperTable(
            title="Measured memory above Muon's, GB",
            columns=("350m", "800m", "1.3b"),
            rows={"Trion": ("0.00", "0.00", "-0.02"), "Dion": ("3.17", "4.30", "4.94")},
            ours=above_muon,
            formula="Trion and Muon keep m n numbers for a matrix alike",
            source="a note on the paper: 42.42, 67.45, 63.62 (Trion), 42.42, 67.45, 63.64 (Muon), 45.59, 71.75, 68.58 (Dion)",
            strays={
                ("Trion", "1.3b"): "measured on 8 devices; 0.02 of 63.6 is within what an allocator varies",
                ("Dion", "*"): "we have no Dion to count",
            },
        ),
        PaperTable(
            title="Measured memory below AdamW's, Llama 800M, GB",
            columns=("800m",),
            rows={"DCT-AdamW": ("15.90",), "LDAdamW": ("1.62",)},
            ours=below_adamw,
            formula="at most both moments of all 0.8 B parameters in fp32, 8 bytes each",
            source="a note on the paper: 73.72 (AdamW), 57.82 (DCT-AdamW), 72.10 (LDAdamW); its rank is not known",
            strays={
                ("DCT-AdamW", "800m"): "more than AdamW's whole state: the rest is not optimizer state",
                ("LDAdamW", "800m"): "we have no LDAdamW to count",
            },
        ),
    ),
    left_out="times",
)
