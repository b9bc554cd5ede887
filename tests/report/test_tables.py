"""Tables for the terminal."""

import io

import pytest
from rich.console import Console

from lorank.report.federated import federated_table
from lorank.report.tables import evaluation_table, quantity, runs_table, tasks_table
from lorank.train.evaluation import Evaluation


@pytest.mark.parametrize(("value", "text"), [(42_770_944, "42.8 M"), (1e9, "1 G"), (999, "999"), (0.5, "0.5")])
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


def render(table: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_show_each_figure_under_its_full_name() -> None:
    run = {
        "parameters": 1000,
        "block_parameters": 400,
        "flops_per_token": 6e3,
        "peak_memory_gib": 0.5,
        "tokens_per_second": 1234.5,
        "mfu": 0.5,
        "tokens": 10_000,
        "validation_loss_nats_per_token": 3.0,
        "validation_perplexity": 20.09,
        "validation_bits_per_byte": 1.5,
        "lr": 5e-3,
    }
    text = render(runs_table({"dense": run, "cola": run}))
    for words in ("1,000", "6 k", "512 MiB", "1,234", "50%", "20.09", "0.005", "dense", "cola"):
        assert words in text
    assert "optimizer's too" not in text, "a row without values is left out"
    text = render(evaluation_table(Evaluation(30.0, 10, 49, 147.0, 3.0)))
    assert "perplexity (unbiased)" in text and "20.086" in text and "published-compatible perplexity" in text
    assert "18.916" in text  # exp(147 / 50)
    assert "published-compatible" not in render(evaluation_table(Evaluation(30.0, 10, 2, 6.0, 3.0)))  # exp(6 / 3) = 7.4
    path = "/home/somebody/" + "folder/" * 20 + "english.jsonl"
    text = render(evaluation_table(Evaluation(30.0, 10, 49, 147.0, 3.0, text=f"held-out part of {path}")))
    assert path in "".join(text.split()), "a long name is whole"


def test_results_of_tasks_stand_beside_their_standard_errors() -> None:
    found = {"arc_easy": {"acc,none": 0.25, "acc_stderr,none": 0.0125}, "gsm8k": {"exact_match,strict": 0.5}}
    console = Console(width=80, file=io.StringIO())
    console.print(tasks_table(found))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == [["arc_easy", "acc", "0.2500", "±", "0.0125"], ["gsm8k", "exact_match,strict", "0.5000"]]


def test_columns_of_many_clients_go_into_tables_below() -> None:
    rows = [
        {"round": i, "loss": 4.0, "losses": {f"client {k}": 4.0 + k for k in range(9)}, "left_out": {}} for i in (0, 1)
    ]
    results = {"rounds": [{**row, "down": 10**6, "up": 254_976, "epsilon": {"client 0": 2.5}} for row in rows]}
    console = Console(file=io.StringIO(), width=60)
    console.print(federated_table(results))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round  client 4" in text and "…" not in text
    assert all(word in text for word in ("client 8", "12.000", "255.0 kB", "2.50"))
