"""lorank plan: tables for people, records for programs."""

import json
from pathlib import Path

import pytest

PLAN = ["plan", "--size", "tiny", "--set", "vocab_size=300", "--set", "shape.num_hidden_layers=1"]
PLAN += ["--sequence-length", "32", "--method", "dense,cola-m"]


def test_plan_prints_tables_narrow_enough_for_a_terminal(
    lorank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorank.plan.fits.SIZES", ["tiny"])
    shape = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    flags = [
        "--model",
        tmp_path / "config.json",
        *PLAN[3:5],
        *PLAN[7:],
        "--fits",
        0.2,
        "--tokens",
        "1B",
        "--accelerator",
        "l4",
    ]
    code, out, err = lorank("plan", *flags, "--devices", 1)
    assert code == 0, err
    for word in (
        "cola-m",
        "in the blocks",
        "peak",
        "A run of 1 G tokens on L4",
        "What fits in 0.2 GiB",
        "Assumed",
        "$0.60",
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80


def test_plan_for_programs(lorank) -> None:
    code, out, err = lorank(*PLAN, "--price", 9, "--watts", 100, "--flops", 1e14, "--utilisation", 0.5, "--json")
    assert code == 0, err
    dense, cola = json.loads(out)["forecasts"]
    assert (dense["method"], cola["method"]) == ("dense", "cola-m")
    assert dense["dollars"] == pytest.approx(9 * 8 * dense["hours"])
    assert dense["hours"] * 3600 * 8 * 5e13 == pytest.approx(dense["flops_per_token"] * dense["tokens"])
    code, out, _ = lorank(*PLAN[:-1], "cola-m", "--flops", 1e14, "--precision", "fp32", "--json")
    assert [one["accelerator_flops"] for one in json.loads(out)["forecasts"]] == [1e14], "given for any precision"
    code, out, _ = lorank(*PLAN, "--csv")
    header, *rows = out.strip().splitlines()
    assert code == 0 and len(rows) == 2 and header.startswith("shape,method,rank")


def test_plan_of_a_configuration(lorank, tmp_path: Path) -> None:
    shape = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    flags = ("--method", "cola", "--sequence-length", 32, "--batch-size", 24, "--devices", 1)
    code, out, err = lorank("plan", "--model", tmp_path / "config.json", *flags)
    assert code == 0 and "cola" in out and "8 sequences of 32 at a time" in out, err


def test_plan_of_recipes(lorank, tmp_path: Path) -> None:
    common = "size: tiny\nvocab_size: 300\nsequence_length: 32\nsteps: 40\nwarmup_steps: 4\ntokenizer: no/such\n"
    for name, text in (("dense", "method: dense\n"), ("mine", "method: galore\noptions: {update_gap: 5}\n")):
        (tmp_path / f"{name}.yaml").write_text(common + text)
    files = [tmp_path / "dense.yaml", tmp_path / "mine.yaml"]
    code, out, err = lorank("plan", *files)
    assert code == 0, err
    assert "A run of 10.2 k tokens" in out and "galore" in out and max(map(len, out.splitlines())) <= 80
    flags = ["--option", "in_backward=true", "--targets", "mlp", "--precision", "bf16", "--json"]
    code, out, err = lorank("plan", files[1], *flags)
    [record] = json.loads(out)["forecasts"]
    assert record["options"] == {"in_backward": True} and record["devices"] == 1 and record["precision"] == "bf16"
    assert (record["recipe"], record["steps"], record["batch_size"]) == (str(files[1]), 40, 8)
    code, out, err = lorank("plan", files[0], "--size", "1b")
    assert code == 2 and "a recipe has its own model and method" in err


@pytest.mark.parametrize("unit", ["steps", "tokens", "tokens-per-parameter", "epochs"])
def test_a_plan_has_the_length_that_is_asked_for(lorank, unit: str, text: Path) -> None:
    """Parameters are those of each row's model; 30 epochs are counted on the text."""
    flags = ["--batch-size", 8, "--micro-batch-size", 1, "--set", "tokenizer=bytes", "--data", text, "--json"]
    amount = {"steps": 7, "tokens": 7 * 8 * 32, "tokens-per-parameter": 2, "epochs": 30}[unit]
    code, out, err = lorank(*PLAN[:-1], "cola-m", *flags, f"--{unit}", amount)
    assert code == 0, err
    rows = json.loads(out)["forecasts"]
    if unit == "epochs":
        whole = text.stat().st_size * 0.95 // 32 // 8
        assert all(row["steps"] == pytest.approx(30 * whole, rel=0.1) and row["steps"] % 30 == 0 for row in rows)
    elif unit == "tokens-per-parameter":
        assert [row["tokens"] for row in rows] == [2 * row["parameters"] for row in rows]
    else:
        assert [(row["steps"], row["tokens"]) for row in rows] == [(7, 7 * 8 * 32)]


def test_plan_says_what_devices_that_share_a_model_send(lorank) -> None:
    shape = [
        "--size",
        "tiny",
        "--set",
        "shape.num_hidden_layers=1",
        "--sequence-length",
        32,
        "--micro-batch-size",
        2,
        "--set",
        "vocab_size=300",
    ]
    code, out, err = lorank(
        "plan", *shape, "--method", "cola,crnet", "--rank", 64, "--tensor-parallel", 2, "--devices", 1
    )
    assert code == 0, err
    said = " ".join(out.split())
    assert "cola 512 2,656 448 " in said and "crnet cannot be shared by 2 devices: " in said
    assert "not advised" not in said, "7 times 64 is below 2 times 256"
    code, out, err = lorank("plan", *shape, "--method", "cola", "--rank", 80, "--tensor-parallel", 3, "--json")
    [row] = json.loads(out)["forecasts"]
    assert (row["tensor_parallel_numbers_per_token_dense"], row["tensor_parallel_numbers_per_token_at_bottleneck"]) == (
        512,
        7 * 80,
    )
