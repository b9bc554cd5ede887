"""Which methods combine: every structure and every gradient with every optimizer, trained for a few steps.

docs/combinations.md is this test's table. After a change that is meant to move it, write it again with
``python tests/contract/test_pairs.py``.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorank
from lorank.method import Method
from lorank.optim.groups import plain_groups
from lorank.table import find, method_names
from lorank.train.methods import Methods, methods_of
from lorank.train.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
STEPS = 4
GRADIENTS = [name for name in method_names("gradient") if name != "autograd"]
ROWS = method_names("method") + GRADIENTS
COLUMNS = [name for name in method_names("optimizer") if name != "votes"] + GRADIENTS
SMALL: dict[str, dict[str, Any]] = {
    "eggroll": {"population": 4, "chunk": 4},
    "masa": {"residual_rank": 2, "atoms": 1},  # attention has no linear layers without a residual
}
"""Settings for the test's model, on top of `Method.soon`."""
HEAD = """# Which methods combine

Two methods combine if they answer different questions. A row decides what the weights are. A column decides how they move,
or (`eggroll`) where the gradient comes from; the row of `eggroll` has a dense model. "yes" means that a small Llama was
trained with both for a few steps by `tests/contract/test_pairs.py`, which writes this table. A number means that lorank
refuses the combination, for the reason below the table. Join the two names with a plus: `--method cola+galore`. `votes` moves
the integer weights of EGG and combines with `eggroll` alone, as in the recipe `egg`.
"""


def outcome(row: str, column: str) -> str:
    """Empty if the pair trains, or the sentence with which it is refused."""
    options = {name: {**rank_of(find(name)), **find(name).soon, **SMALL.get(name, {})} for name in (row, column)}
    torch.manual_seed(0)
    layers = 1 if find(row).adapts else 2  # those of an adapter know nothing of one another
    shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).train()
    try:
        keys = {find(name).key: {name: options[name]} for name in (row, column)}
        found = methods_of(Recipe(**{"method": "dense", **keys}))  # type: ignore[arg-type]
        return train(model, found)
    except ValueError as refusal:
        return str(refusal).replace(f"{row} and {column} cannot be combined: both", "Both methods").partition(";")[0]


def rank_of(kind: type[Method]) -> dict[str, int]:
    return {"rank": 4} if "rank" in {field.name for field in dataclasses.fields(kind)} else {}


def train(model: Any, found: Methods) -> str:
    if found.method.name != "dense":
        lorank.convert(model, found.method)
    groups = found.mover.parameter_groups(model, plain_groups(model, 0.0), None, None)
    optimizer = found.mover.optimizer(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    hook = lorank.step_hook(model, optimizer, steps=STEPS)
    tokens = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(0))
    estimate = found.gradient.gradient(model, batch_size=4, sequence_length=8, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(STEPS):
        if estimate is None:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        else:
            loss = estimate({"input_ids": tokens, "labels": tokens}, step)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite(), "a pair that trains has finite losses"
    assert hook is None or hook.step == STEPS
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad]
    assert sum(moved) > len(moved) / 2, "training moves most parameters"
    return ""


def table() -> str:
    reasons: list[str] = []
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in ROWS:
        cells = []
        for column in COLUMNS:
            if row == column:
                cells.append("")
                continue
            reason = outcome(row, column)
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(f"[{reasons.index(reason) + 1}](#refusals)" if reason else "yes")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    numbered = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{HEAD}\n" + "\n".join(lines) + f"\n\n(refusals)=\n## Refusals\n\n{numbered}\n"


def test_the_page_says_which_pairs_train() -> None:
    assert PAGE.read_text(encoding="utf-8") == table()


def test_every_method_has_a_row_or_a_column() -> None:
    assert {*ROWS, *COLUMNS, "autograd", "votes"} >= set(method_names())
    assert all(isinstance(find(name)(), Method) for name in method_names())


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
