"""The page "Everything in the listing": a row for each paper, with what works, where, how it was verified and what is our reading.

Files, commands and tests are found in the repository when the page is built. A row whose file does not exist says so.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lorank.fit.door import STRUCTURES
from lorank.table import METHODS, find

ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """A paper: its methods in the table or its files, what more there is to say, and what it does not state itself."""

    paper: str
    source: str
    """A number of arXiv, or an address."""
    where: tuple[str, ...]
    """Names in the table of methods, or files."""
    works: str
    reading: str


# fmt: off
PRE_TRAINING = [
    Row("CoLA, CoLA-M", "2502.10940", ("cola",), "any transformers model; Muon, Spectron and others on its factors", "variant `reduced`; the rest is the paper's"),
    Row("Low-rank training", "2209.13569", ("low-rank",), "the control of comparisons; merges", "initial values are CoLA's"),
    Row("Self-guided training", "2406.16450", ("self-guided",), "leaves a low-rank model", "all chosen projections are guided, not the feed-forward ones alone"),
    Row("SLTrain", "2406.02214", ("sltrain",), "merges; experts of a mixture", "none; support and biases are drawn otherwise than in the code"),
    Row("CR-Net", "2509.18993", ("crnet",), "with its recomputation", "initial values, precision of β; code was not at hand"),
    Row("ReLoRA", "2307.05695", ("relora",), "merges; resumes exactly", "which moments a restart keeps; the code's ways are options"),
    Row("SwitchLoRA", "2406.06564", ("switchlora",), "merges; resumes exactly", "none; draws are seeded"),
    Row("SST", "2405.15481", ("sst",), "merges; Euclidean only", "much: from summaries alone; the file lists it"),
    Row("MASA", "2508.04581", ("masa",), "pre-training; Matrix PCA of a trained model in `lorank.fit`", "widths, initial values, grouping; the appendix was not at hand"),
    Row("LaX", "2505.21732", ("lorank/methods/lax.py",), "`--method cola --option carry=tensor`, also cola-m and low-rank", "the gates for language models; published for vision"),
    Row("DLR", "2606.28932", ("lorank/methods/dlr.py",), "`--method cola --option init=dlr`", "training settings are CoLA's"),
    Row("BOOST", "2512.12131", ("lorank/distributed/tensor_parallel.py",), "tensor parallelism cut at the bottleneck; traffic in `lorank plan`", "none; no GPU cluster was at hand to time it"),
    Row("LOST", "2508.02668", (), "", "the split, the share and the scale are not published in full"),
]
MOVES = [
    Row("GaLore", "2403.03507", ("galore",), "on dense weights or any structure", "none"),
    Row("Fira", "2410.01623", ("fira",), "both forms, the code's and the paper's", "none"),
    Row("DCT-AdamW", "2505.17967", ("dct-adamw",), "", "none; the quantiser has 256 levels"),
    Row("Trion", "2505.17967", ("trion",), "", "none"),
    Row("APOLLO, APOLLO-Mini", "2412.05270", ("apollo",), "", "from the text alone; its code was not read"),
    Row("Spectron", "2602.12429", ("spectron",), "factors of CoLA and low-rank", "CoLA's non-linearity; there is no code of the authors"),
    Row("LORO", "https://openreview.net/forum?id=i0zzO7Hslk", ("loro",), "factors of low-rank", "pairs near a lower rank"),
    Row("Structure-aware rates", "2406.06248", ("factor-lr",), "factors, under AdamW and Muon", "CoLA and Muon"),
    Row("8-bit AdamW", "2110.02861", ("adamw-8bit",), "", "none; not in the listing"),
    Row("Adafactor", "1804.04235", ("adafactor",), "", "none; not in the listing"),
    Row("Muon", "2502.16982", ("muon",), "dense matrices and factors", "none"),
    Row("EGGROLL", "2511.16652", ("eggroll",), "no backward pass", "embeddings are perturbed too"),
    Row("EGG (EGGROLL in integers)", "2511.16652", ("votes",), "recipe `egg`; weights, states and sums are integers", "noise comes from seeds, not from a table"),
]
FIT = [
    Row("Greenformers", "2108.10808", ("lorank/fit/svd.py", "lorank/fit/convolutions.py", "lorank/fit/nmf.py", "examples/linformer.py"), "exact and randomised; `svd.py` is for linear layers, and other files, where they are named, for convolutions, NMF and Linformer's attention", "singular values are divided evenly"),
    Row("PELA", "2310.10700", ("lorank/fit/pela.py",), "both terms of its loss", "all heads stay dense"),
    Row("EoRA", "2410.21271", ("lorank/fit/eora.py",), "over int2 to int8 or pruned weights", "rounding to the nearest and pruning by magnitude stand for GPTQ and SparseGPT"),
    Row("CoSpaDi", "2509.22075", ("lorank/fit/dictionary.py", "sparse-codes"), "", "the start; no kernel for the codes is public, so it saves memory, not time"),
    Row("INT2.1", "2306.08162", ("lorank/fit/int2.py", "lorank/train/distil.py"), "factors next to a base of few bits, trained to the float parent", "the loss: its terms, ranks and data are not published"),
    Row("LR²VQ", "2211.11397", ("lorank/fit/vector_quantised.py", "codebook"), "a codebook after a learned linear map", "much: the map and the relaxed clustering are not published, so codes are hard"),
    Row("Matrix PCA (MASA)", "2508.04581", ("lorank/fit/matrix_pca.py", "lorank/fit/pca.py"), "trained attention as MASA's atoms", "grouping and ranks"),
    Row("CoLA from dense weights", "2502.10940", ("lorank/fit/cola.py",), "", "ours; no paper does it"),
]
ADAPTERS = [
    Row("LoRA", "2106.09685", ("lora",), "saves in peft's format", "all projections by default"),
    Row("MoRAM (MoRA)", "2506.21035", ("moram",), "grows by task; `lorank continual`", "the scale for language models"),
    Row("SMoRA", "2501.15103", ("smora",), "router with counted load", "the router's start"),
    Row("CoDyRA", "2412.01004", ("codyra",), "prunes and merges at a task's end", "none; the proximal step is the closed form"),
    Row("MTLoRA", "2403.20320", ("mtlora",), "one context for each task", "one stream at a time; scales are fixed"),
    Row("PETALface", "2412.07771", ("petalface",), "any score of quality", "none"),
    Row("RecLoRA", "2408.03533", ("reclora",), "any vector of a user; retriever and data are not here", "softmax, one gate for all layers, their number, the rank"),
    Row("SplitFlux", "2511.15258", ("splitflux",), "gate, rank at the boundary, and the complementary loss", "what the gate reads; no diffusion pipeline"),
    Row("Block-LoRA", "2501.16720", ("block-lora",), "equals rank r/N, which a test shows", "how blocks are cut, N, start and scale"),
    Row("CP-LoRA, LoRA-C, convLoRA, DoRA", "2508.01772", ("lorank/adapters/cp_conv.py",), "`lorank.adapt_convolutions` for any model with convolutions", "initial vectors, and which name belongs to which layout"),
    Row("OSFT", "2504.07097", ("osft",), "protects the core under Adam too", "projection after each step; importance of a block"),
    Row("Comp-LoRA", "2501.15040", ("comp-lora",), "sides and k can be chosen", "in the spirit of the paper: sides, k and projection are unknown"),
    Row("Break-for-Make", "2403.19456", ("break-for-make",), "halves, and `join` of two", "frozen product is taken off, so that it starts as the model"),
    Row("ALLoRA", "2410.09692", ("row-adaptive",), "a rule of the backward pass", "a third party's reading of the paper; η is not the paper's"),
]
FEDERATED = [
    Row("Averaging (FedIT)", "2305.05644", ("lorank/federated/average.py",), "`lorank federated --method average` ([page](federated.md)): the control, with what it loses", "none"),
    Row("FLoRA", "2409.05976", ("lorank/federated/flora.py",), "`lorank federated --method flora`: the exact sum; ranks may differ", "the clients' scales are folded in"),
    Row("FFA-LoRA", "2403.12313", ("lorank/federated/ffa.py",), "`lorank federated --method ffa`: A is frozen, which halves the bytes of a square layer", "none"),
    Row("FedSVD", "2505.12805", ("lorank/federated/fedsvd.py",), "`lorank federated --method fedsvd`: orthonormal A after each round", "none; never forms the product"),
    Row("FlexLoRA", "2402.11505", ("lorank/federated/best.py",), "`lorank federated --method best`: the best rank r of the mean; not in the listing", "none"),
    Row("DP-LoRA", "2312.17493", ("lorank/federated/private.py",), "`lorank federated --epsilon 8`: clipping of each sample, noise and an accountant, under any rule", "per sample, where a third party finds the paper's per batch"),
    Row("CELLM (FLASC)", "2407.20557", ("lorank/federated/sparse.py",), "`lorank federated --down 0.25 --up 0.25`: the largest numbers, counted, under any rule", "taken to be FLASC (2406.05233), with which all that is published agrees"),
    Row("FedPGP", "2405.09771", ("lorank/federated/fedpgp.py",), "functions for a loop of yours: shared prompt, personal term, contrastive loss; no command, no CLIP, tried on a toy encoder alone", "none"),
]
LOOPS = [
    Row("PERK", "2507.06415", ("lorank/adapters/perk.py", "examples/perk.py"), "gradients through the last steps of an inner loop, and a toy", "inner steps are plain, not AdamW's; no long-context model was trained"),
    Row("ABMLL", "2508.14285", ("lorank/adapters/abmll.py", "examples/abmll.py"), "the divergence, four pairs, and a toy", "the outer step, and one constant"),
    Row("Rich and lazy learning", "2310.08513", ("lorank/analysis/rich_lazy.py",), "initial values of rank r, and probes", "none"),
    Row("DeiT-LT", "2404.02900", ("examples/blocks/deit_lt.py", "lorank/analysis/spectrum.py"), "DIST token, deferred weights, flat teacher on digits; the probe is `lorank.analysis.feature_rank`. The lower rank of the DIST token, on which the paper rests, does not appear in our small runs", "form of the weights; no contrastive teacher"),
]
BLOCKS = [
    Row("LAMA", "1912.00835", ("examples/blocks/lama.py",), "text classification", "order of tanh and norm is a third party's; the start is ours"),
    Row("BiPFT", "2312.08937", ("examples/blocks/bipft.py",), "a binary BERT with and without the correction. The gain of the correction does not appear clearly in our small runs: two of three seeds are 0.016 and 0.014 nats better with it, one 0.009 worse", "softmax stays real; the correction starts at zero"),
    Row("Hiformer", "2311.05884", ("examples/blocks/hiformer.py",), "clicks from a real table", "queries per feature; heads share factors"),
    Row("Wings", "2406.03496", ("examples/blocks/wings.py",), "digits next to a frozen language model", "what the router reads; text alone goes through the model"),
    Row("DQ-LoRe", "2310.02954", ("examples/blocks/dq_lore.py",), "two-stage retrieval on sentence embeddings", "projects on columns, which the code does not; docstrings stand for thoughts"),
]
# fmt: on
def newcomers(rows: Sequence[Row]) -> list[Row]:
    """Methods of the table that none of the rows names, in the words of their files."""
    known, found = {one for row in rows for one in row.where}, []
    for name in (one for one in METHODS if one not in known):
        words = (ROOT / f"{find(name)().sources[0].replace('.', '/')}.py").read_text().partition('"""')[2]
        source, saves = (re.search(rf"^{title}: (.+)", words, re.M) for title in ("Source", "Saves"))
        paper = re.search(r"arXiv[: ]*(\d+\.\d+)", source[1]) if source else None
        row = Row(
            words.partition("\n")[0].rstrip("."),
            paper[1] if paper else "",
            (name,),
            saves[1] if saves else "",
            "see its file",
        )
        found.append(row)
    return found


SECTIONS = {
    "What the weights are": PRE_TRAINING,
    "How they move, and where the gradient comes from": MOVES,
    "From trained weights to factors": FIT,
    "What is added to trained weights": ADAPTERS,
    "Federated": FEDERATED,
    "Inner loops, objectives and probes": LOOPS,
    "Blocks of models": BLOCKS,
}
"""Headings of the page."""
if others := newcomers([row for rows in SECTIONS.values() for row in rows]):
    SECTIONS["Not in the listing"] = others


def tables(pages: Mapping[str, Sequence[str]]) -> str:
    """All rows, in Markdown; `pages` names the methods that each page of methods/ has."""
    parts = []
    for title, rows in SECTIONS.items():
        lines = ["| paper | what works | where | verified by | our reading |", "|---|---|---|---|---|"]
        parts.append("\n".join([f"## {title}", "", *lines, *(line(row, pages) for row in rows)]))
    return "\n\n".join(parts)


def line(row: Row, pages: Mapping[str, Sequence[str]]) -> str:
    """One row of a table."""
    address = row.source if row.source.startswith("http") else f"https://arxiv.org/abs/{row.source}"
    paper = f"[{row.paper}]({address})" if row.source else row.paper
    if not (found := files(row)):
        return f"| {paper} | **not in the repository** | | | {row.reading} |"
    works = "; ".join(part for part in (*commands(row), row.works) if part)
    where = ", ".join(f"`{file}`" for file in found)
    shown = [page for page, names in pages.items() if set(names) & set(row.where)]
    where += "".join(f" ([page](methods/{page}.md))" for page in shown)
    checks = ", ".join(f"`{file}`" for file in (*tests(row), *benchmarks(row)))
    return f"| {paper} | {works} | {where} | {checks} | {row.reading} |"


def files(row: Row) -> list[str]:
    """Those of its files that exist; of a method, the file with its mathematics."""
    named = (f"{find(one)().sources[0].replace('.', '/')}.py" if one in METHODS else one for one in row.where)
    return [file for file in dict.fromkeys(named) if (ROOT / file).exists()]


def commands(row: Row) -> Iterator[str]:
    """How its methods in the table are run, and models of its structure made."""
    for name in (one for one in row.where if one in METHODS):
        command = "lorank finetune MODEL" if find(name).adapts else "lorank pretrain"
        if not hasattr(find(name), "model_type"):
            structure = getattr(find(name), "structure", None)
            yield f"`{command} --method {f'{structure}+' if structure else ''}{name}`"
    here = files(row)
    for name, structure in STRUCTURES.items():
        if f"{structure.__module__.replace('.', '/')}.py" in here:
            yield f"`lorank compress MODEL --method {name}`"


@cache
def _texts(folder: str, pattern: str) -> dict[str, str]:
    return {f.relative_to(ROOT).as_posix(): f.read_text() for f in sorted((ROOT / folder).rglob(pattern))}


def tests(row: Row) -> list[str]:
    """Files of tests that import its files, or name them where tests of their kind are; and the contract of all methods."""
    nearest: dict[str, None] = {}
    others: dict[str, None] = {}
    methods = [one for one in row.where if one in METHODS]
    for file in files(row):
        module, stem, kind = file.removesuffix(".py").replace("/", "."), Path(file).stem, file.split("/")[-2]
        room = "tests/examples/" if file.startswith("examples/") else f"tests/{kind}/"
        package, _, name = module.rpartition(".")
        imports = re.compile(
            rf"\b{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{name}\b|examples/{name}\b"
        )
        named = re.compile("|".join(f'"{re.escape(one)}"' for one in (stem, stem.replace("_", "-"), *methods)))
        for test, text in _texts("tests", "test_*.py").items():
            if test.startswith((f"{room}test_{stem}.py", f"{room}{stem}/")):
                nearest[test] = None
            elif imports.search(text) or (test.startswith(room) and named.search(text)):
                others[test] = None
    found = [
        *nearest,
        *sorted((one for one in others if one not in nearest), key=lambda one: one.split("/")[1] != kind),
    ]
    return [*found[: max(2, len(nearest))], *(["tests/contract/"] if methods else [])]


def benchmarks(row: Row) -> list[str]:
    """Printed results that name its methods, or its file if their program imports the folder."""
    methods = [one for one in row.where if one in METHODS]
    stems = [Path(file).stem for file in files(row)]
    found = []
    for file, text in _texts("benchmarks/results", "*.txt").items():
        program = ROOT / f"benchmarks/{Path(file).stem}.py"
        used = program.read_text() if program.exists() else ""
        folders = [one.rpartition("/")[0].replace("/", ".") for one in files(row)]
        words = [*methods, *(s for s, f in zip(stems, folders, strict=True) if f in SHOWN and SHOWN[f] in used)]
        if any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text, re.I) for word in words):
            found.append(file)
    return found


SHOWN = {"lorank.fit": "lorank.fit", "examples.blocks": "examples/blocks", "lorank.federated": "lorank.federated"}
"""Folders whose files benchmarks name in what they print, and what their programs then say."""
