"""Published costs: every cell is what its mark says, and the closed forms behind them are what our models have."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorank
from lorank import accounting, papers
from lorank.architectures import llama_config
from lorank.cli import cli
from lorank.method import Method
from lorank.methods import sltrain, sst
from lorank.optim import apollo, dct_adamw, fira, galore, trion
from lorank.papers import cola, masa
from lorank.papers.formulas import cola_parameters, crnet_parameters, dense_parameters, shape_of
from lorank.papers.table import PaperTable, last_digit
from lorank.sizes import SIZES
from lorank.train.methods import state_bytes
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe

TABLES = [
    pytest.param(table, id=f"{name}: {table.title}") for name, paper in papers.PAPERS.items() for table in paper.tables
]


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_what_its_mark_says(table: PaperTable) -> None:
    assert any(cell.mark != "unchecked" for cell in table.cells)
    for cell in table.cells:
        if cell.mark == "unchecked":
            assert cell.ours is None and cell.reason, cell
        else:
            assert cell.ours is not None and math.isfinite(cell.ours)
            off = abs(cell.ours - float(cell.printed)) / last_digit(cell.printed)
            if table.within is not None:
                met = abs(cell.ours / float(cell.printed) - 1) <= table.within
                assert cell.mark == ("met" if met else "does not follow"), cell
                continue
            expected = "follows" if off <= 0.5 + 1e-6 else "other rounding" if off < 1 else "does not follow"
            assert cell.mark == expected, f"{cell}: off by {off:.2f} units of the last digit"
            assert bool(cell.reason) == (cell.mark == "does not follow"), cell


@pytest.mark.parametrize("table", TABLES)
def test_reasons_name_cells_that_exist(table: PaperTable) -> None:
    there = {(cell.row, cell.column) for cell in table.cells}
    for row, column in table.strays:
        assert (row, column) in there or (column == "*" and row in table.rows)


def test_what_the_specs_name_as_stray_is_marked() -> None:
    def mark(paper: str, title: str, row: str, column: str) -> papers.Mark:
        table = next(t for t in papers.find_paper(paper).tables if t.title.startswith(title))
        return next(c.mark for c in table.cells if (c.row, c.column) == (row, column))

    assert mark("sltrain", "Memory", "GaLore", "350m") == "does not follow"
    assert mark("sltrain", "Memory", "ReLoRA", "1b") == "does not follow"
    assert mark("sltrain", "Memory", "GaLore", "1b") == "follows"
    assert mark("cola", "Memory", "GaLore", "350m") == "follows"
    assert mark("cola", "Recomputation", "less recomputation, times (authors' code)", "n = 256") == "does not follow"
    assert mark("crnet", "Llama 1B", "fewer FLOPs per step, %", "1b") == "does not follow"
    assert mark("galore", "7B", "states saved", "7b") == "does not follow"
    assert mark("galore", "7B", "states saved, %", "7b") == "does not follow"
    assert [mark("apollo", "Weights", "APOLLO-Mini", size) for size in ("130m", "350m")] == ["follows"] * 2
    assert mark("eggroll", "Batch", "EGGROLL with r = 1, members", "batch") == "follows"


def test_what_we_cannot_count_is_unchecked() -> None:
    cells = {
        (name, cell.row, cell.column): cell
        for name in ("cola", "galore", "dct")
        for table in papers.find_paper(name).tables
        for cell in table.cells
    }
    for key in (
        ("cola", "smaller dense model", "130m"),
        ("galore", "AdamW", "by layer"),
        ("dct", "Dion", "800m"),
    ):
        assert cells[key].mark == "unchecked", key
    assert cells["cola", "CoLA, larger rank", "350m"].reason.endswith("0.7 at r = 445")


def test_masas_flops_are_those_of_weights_that_share() -> None:
    assert [masa.attention_flops(row, "k d²") for row in ("dense", "MASA-QKV", "MASA-QKVO")] == [0, 3 * 2, 4 * 2]


def test_a_paper_is_found_by_name() -> None:
    assert all(papers.find_paper(name).name == name for name in papers.PAPERS)
    others = ("cola-m", "dct-adamw", "trion", "apollo-mini")
    assert [papers.find_paper(name).name for name in others] == ["cola", "dct", "dct", "apollo"]
    with pytest.raises(ValueError, match="did you mean 'cola'.*crnet.*trion"):
        papers.find_paper("colla")


def test_blocks_alike_give_the_peak_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured table uses two and three blocks, and whole logits as the authors do."""
    monkeypatch.setitem(SIZES, "7b", SIZES["20m"])
    monkeypatch.setattr("lorank.train.model.loss_without_logits", lambda model: model)
    recipe = Recipe(size="7b", method="cola-m", rank=64, options={"nonlinearity": "low-rank"}, vocab_size=32_000)
    recipe = dataclasses.replace(recipe, precision="bf16-pure", attention="eager", batch_size=16, sequence_length=256)
    model = empty_model(recipe)
    moments = state_bytes(recipe, model)
    whole = accounting.memory_estimate(model, optimizer_bytes=moments, batch=16, sequence_length=256).peak_bytes
    assert cola.measured_gb.__wrapped__("CoLA-M", "7b, 16") == pytest.approx(whole / 1e9, rel=1e-4)


# ---- the closed forms against models and optimizers


def counted(size: str, method: object) -> accounting.Parameters:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(size))
    return accounting.count_parameters(lorank.convert(model, method))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["60m", "350m"])
def test_published_parameters_are_those_of_our_models(size: str) -> None:
    shape, rank = shape_of(size), SIZES[size].rank
    cola = cola_parameters(*shape, rank)
    assert counted(size, lorank.CoLA(rank=rank)).total == cola
    values = sltrain.model_values(shape.d, shape.d_ff, shape.layers, 0.03)
    assert counted(size, lorank.SLTrain(rank=rank)).total == cola + values
    relora = counted(size, lorank.ReLoRA(rank=128))
    factors = shape.over_projections(lambda m, n: 128 * (m + n))
    assert relora == (
        dense_parameters(*shape) + factors,
        cola_parameters(*shape, 128),
        relora.blocks,
    )
    assert counted(size, lorank.SwitchLoRA(rank=rank)).trainable == cola
    assert counted(size, lorank.CRNet(rank=rank)).total == crnet_parameters(*shape, rank)
    trained = shape.over_projections(lambda m, n: sst.trained_numbers(n, m, rank))
    outside = cola - shape.over_projections(lambda m, n: rank * (m + n))
    assert counted(size, lorank.SST(rank=rank)).trainable == outside + trained


def test_compression_by_masa_is_that_of_our_model() -> None:
    blocks, d = SIZES["60m"].layers, SIZES["60m"].hidden_size
    dense = 4 * d * d * blocks
    found = counted("60m", lorank.MASA(atoms=4, coefficients="table"))
    gone = dense_parameters(*shape_of("60m")) - found.total
    assert (gone + 4 * blocks * 4) / dense == masa.compression(blocks, 4, 4)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (galore.GaLore(), galore.state_elements),
        (fira.Fira(), fira.state_elements),
        (dct_adamw.DCTAdamW(), dct_adamw.state_elements),
        (trion.Trion(), trion.state_elements),
        (apollo.APOLLO(), apollo.state_elements),
    ],
)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_optimizer_state_is_what_the_closed_form_says(method: Method, count, shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.randn(shape))
    moving = method.optimizer([{"params": [weight], "rank": 4}], lr=0.01)
    weight.grad = torch.randn(shape)
    moving.step()

    def tensors(state: dict) -> int:
        return sum(
            tensors(value) if isinstance(value, dict) else value.numel() if isinstance(value, torch.Tensor) else 0
            for name, value in state.items()
            if name not in ("step", "steps")
        )

    assert tensors(moving.state[weight]) == count(*shape, 4)


# ---- at the command line


def test_the_table_says_what_does_not_follow(in_this_process) -> None:
    code, said, _ = in_this_process("papers", "sltrain")
    assert code == 0 and "1.389" in said and "✗ GaLore 350m" in said
    assert max(map(len, said.splitlines())) <= 80, "narrow enough for a terminal"


def test_all_papers_as_records(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of them, which are counted at once."""
    for name in set(papers.PAPERS) - {"galore", "dct", "switchlora"}:
        monkeypatch.delitem(papers.PAPERS, name)
    cli(["papers", "all", "--json"], standalone_mode=False)
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert {cell["paper"] for cell in cells} == set(papers.PAPERS)
    assert all(cell["source"] and cell["formula"] for cell in cells)
