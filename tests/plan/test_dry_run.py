"""The dry run: what becomes what, and the counts beside the dense twin's."""

import math
from typing import Any

import pytest

from lorank.papers import formulas
from lorank.plan.dry_run import dense_twin, plan
from lorank.train.recipe import Recipe

TINY: dict[str, Any] = {"size": "tiny", "vocab_size": 300, "sequence_length": 32}


def test_the_published_60m_row() -> None:
    found = plan(Recipe(size="60m", vocab_size=32_000, batch_size=1))
    assert (found.dense.parameters.total, found.model.parameters.total) == (58_073_600, 42_770_944)
    blocks = {m: formulas.block_training_flops(m, 512, 1376, 128, 256) * 8 for m in ("dense", "cola")}  # type: ignore[arg-type]
    head = 6 * 256 * 512 * 32_000
    assert found.dense.flops_per_token * 256 == blocks["dense"] + head
    assert found.model.flops_per_token * 256 == blocks["cola"] + head
    assert not found.checkpoint


def test_rows_add_up_to_the_blocks() -> None:
    found = plan(Recipe(size="20m", vocab_size=300))
    norms = 4 * 2 * 256
    assert sum(row.parameters_before for row in found.rows) + norms == found.dense.parameters.blocks
    assert sum(row.parameters_after for row in found.rows) + norms == found.model.parameters.blocks
    assert [row.before for row in found.rows] == ["256 → 256"] * 4 + ["256 → 688"] * 2 + ["688 → 256"]
    assert all(row.depths == 4 and row.after.startswith("CoLALinear(rank=64") for row in found.rows)


def test_what_is_left_out_is_shown_as_dense() -> None:
    found = plan(Recipe(**TINY, exclude=["mlp"]))
    assert [row.after == "stays dense" for row in found.rows] == [False] * 4 + [True] * 3


def test_recomputation_is_counted_and_said() -> None:
    whole, saving = (plan(Recipe(**TINY, method=method)) for method in ("cola", "cola-m"))
    assert saving.checkpoint and saving.model.flops_per_token > whole.model.flops_per_token
    assert saving.model.memory.activations_bytes < whole.model.memory.activations_bytes
    assert saving.model.parameters == whole.model.parameters


@pytest.mark.parametrize(("batch", "micro", "expected"), [(8, None, 8), (8, 2, 2)])
def test_activations_are_those_of_one_micro_batch(batch: int, micro: int | None, expected: int) -> None:
    found = plan(Recipe(batch_size=batch, micro_batch_size=micro, **TINY)).model.memory.activations_bytes
    assert found == plan(Recipe(batch_size=expected, **TINY)).model.memory.activations_bytes
    assert 0 < found < math.inf


def test_autocast_needs_no_more_activations_than_fp32() -> None:
    fp32, bf16 = (plan(Recipe(**TINY, precision=p)).model.memory for p in ("fp32", "bf16"))
    assert bf16.activations_bytes <= fp32.activations_bytes
    assert bf16.weights_bytes == fp32.weights_bytes, "autocast keeps fp32 weights"


@pytest.mark.parametrize("method", ["fira", "trion", "switchlora"])
@pytest.mark.parametrize("optimizer", ["adamw-8bit", "muon"])
def test_what_training_refuses_is_not_planned(method: str, optimizer: str) -> None:
    with pytest.raises(ValueError, match=f"{method}.*(cannot be combined|must be 'adamw')"):
        plan(Recipe(size="tiny", vocab_size=300, sequence_length=16, method=method, rank=8, optimizer=optimizer))


SMALL: dict[str, Any] = {"vocab_size": 64, "sequence_length": 16, "shape": {"num_hidden_layers": 1}}


@pytest.mark.parametrize(
    ("settings", "projected", "others"),
    [
        ({"method": "galore", "rank": 8}, "galore, rank 8", "adamw"),
        (
            {"method": "galore", "optimizer": "muon", "options": {"update_gap": 5}},
            "galore (muon), rank 64, update_gap=5",
            "adamw",
        ),
        ({"method": "galore", "optimizer": "adafactor", "rank": 8}, "galore (adafactor), rank 8", "adafactor"),
        ({"method": "trion", "rank": 8}, "trion, rank 8", "adamw"),
        ({"method": "dense", "optimizer": "muon"}, "muon", "adamw"),
    ],
)
def test_treatments_say_what_each_group_says(settings: dict[str, Any], projected: str, others: str) -> None:
    found = {one.role: one.treatment for one in plan(Recipe(**SMALL, **settings)).treatments}
    assert found["model.layers.*.mlp.up_proj.weight"] == projected
    assert found["model.norm.weight"] == found["lm_head.weight"] == others


def test_a_combination_shows_what_becomes_what_and_who_moves_it() -> None:
    found = plan(Recipe(**SMALL, method="cola+galore", rank=16))
    assert all("CoLALinear(rank=16" in row.after for row in found.rows)
    moved = {one.role: one.treatment for one in found.treatments}
    assert moved["model.layers.*.mlp.up_proj.A.weight"].startswith("galore, rank")
    assert found.dense.memory.optimizer_bytes > found.model.memory.optimizer_bytes


def test_an_optimizer_for_factors_shows_their_rates() -> None:
    ruled = plan(Recipe(**SMALL, method="low-rank+factor-lr", rank=16))
    moved = {one.role: (one.treatment, one.shape) for one in ruled.treatments}
    _, shape = moved["model.layers.*.mlp.down_proj.A.weight"]
    d_in = int(shape.split(" × ")[1])
    assert moved["model.layers.*.mlp.down_proj.A.weight"][0] == "adamw, lr × 0.5"
    assert moved["model.layers.*.mlp.down_proj.B.weight"][0] == f"adamw, lr × {d_in / 32:.4g}"
    pairs = {one.role: one.treatment for one in plan(Recipe(**SMALL, method="low-rank+spectron", rank=16)).treatments}
    assert (pairs["model.layers.*.mlp.down_proj.A.weight"], pairs["lm_head.weight"]) == ("spectron", "adamw")


def test_one_plain_rule_needs_no_table() -> None:
    assert not plan(Recipe(**SMALL)).treatments
    assert not plan(Recipe(**SMALL, method="dense", optimizer="adafactor")).treatments


@pytest.mark.parametrize("changes", [{}, {"method": "cola+galore"}, {"method": "relora", "optimizer": "muon"}])
def test_the_dense_twin_moves_by_the_same_plain_rule(changes: dict[str, Any]) -> None:
    twin = dense_twin(Recipe(**SMALL, **changes, rank=8, targets=["mlp"], checkpoint="blocks"))
    assert (twin.method, twin.optimizer, twin.gradient) == ("dense", changes.get("optimizer", "adamw"), "autograd")
    assert (twin.rank, twin.options, twin.targets, twin.checkpoint, twin.shape) == (None, {}, [], None, SMALL["shape"])
