"""lorank compress: what it prints and writes, how it goes on, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import lorank as library
from lorank.cli import cli
from lorank.conversion import method_of
from lorank.fit.svd import SVD
from lorank.train.compress import divided, unfinished
from lorank.train.saved import load_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def dense(text: Path, quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dense"
    done = CliRunner().invoke(cli, ["pretrain", "--data", str(text), *quick, "--method", "dense", "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


SHORT = ("--tokens", 2000, "--eval-tokens", 500, "--batch-size", 4)


def test_a_run_is_compressed_and_loaded(lorank: Run, dense: Path, tmp_path: Path) -> None:
    code, shown, error = lorank("compress", dense, *SHORT, "--policy", "energy", "--out", "small")
    assert code == 0, error
    assert "q_proj" in shown and "perplexity on held-out text" in shown and "the model is in small" in shown
    found = json.loads((tmp_path / "small/compress.json").read_text())
    parent, small = load_model(str(dense))[0], AutoModelForCausalLM.from_pretrained("small")
    for model, told in ((parent, found["before"]), (small, found["after"])):
        assert told["parameters"] == sum(p.numel() for p in model.parameters())
        assert told["decoded_tokens_per_second"] > 0 and told["perplexity"] > 1
    assert found["after"]["bytes"] == pytest.approx((tmp_path / "small/model.safetensors").stat().st_size, rel=0.05)
    assert sum(one["parameters"] for one in found["projections"]) <= 0.5 * sum(
        one["d_in"] * one["d_out"] for one in found["projections"]
    )
    assert found["calibration_tokens"] >= 3 * found["held_out_tokens"] > 0
    assert isinstance(library.merge(small), type(parent))
    assert not (tmp_path / "small/projections").exists() and not (tmp_path / "small/unfinished.json").exists()
    code, _, error = lorank("compress", dense, *SHORT, "--out", "small")
    assert code == 2 and "must be a folder without a model" in error


@pytest.mark.parametrize(
    ("method", "becomes", "flags"),
    [
        ("masa", "masa", ("--option", "atoms=1", "--budget", 0.8, "--targets", "attn")),
        ("int2", "lora", ("--option", "steps=2", "--targets", "q_proj")),
        ("codebook", "codebook", ("--option", "steps=2", "--targets", "q_proj")),
    ],
)
def test_what_other_structures_write_is_loaded(
    lorank: Run, dense: Path, tmp_path: Path, method: str, becomes: str, flags: tuple[object, ...]
) -> None:
    short = ("--tokens", 600, "--eval-tokens", 150, "--batch-size", 4)
    code, shown, error = lorank("compress", dense, *short, "--method", method, *flags, "--out", "small")
    assert code == 0, error
    assert "q_proj" in shown and "perplexity on held-out text" in shown
    found = json.loads((tmp_path / "small/compress.json").read_text())
    small = AutoModelForCausalLM.from_pretrained("small")
    assert method_of(small).name == becomes and found["method"] == method
    assert found["after"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert type(library.merge(small)) is type(load_model(str(dense))[0])


def test_what_was_finished_is_kept_and_goes_on(
    lorank: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    solve = SVD.solve

    def slowly(self: SVD, *arguments: object) -> dict[str, torch.Tensor]:
        if len(solved) == 9:
            solved.append("interrupted")
            raise KeyboardInterrupt
        solved.append("done")
        return solve(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SVD, "solve", slowly)
    code, shown, _ = lorank("compress", dense, *SHORT, "--metric", "identity", "--out", "part")
    assert code == 130 and "stopped; continue with lorank compress --resume part" in shown
    assert len(list((tmp_path / "part/projections").iterdir())) == 9
    code, _, error = lorank("compress", dense, *SHORT, "--out", "part")
    assert code == 2 and "has a fit that was stopped" in error
    code, _, error = lorank("compress", "--resume", "part", "--budget", "0.3")
    assert code == 2 and "leave out --budget" in error
    code, _, error = lorank("compress", "--resume", "part")
    assert code == 0, error
    every = len(json.loads((tmp_path / "part/compress.json").read_text())["projections"])
    assert solved.count("done") == every
    code, _, error = lorank("compress", "--resume", "part")
    assert code == 2 and "it is finished" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "sdv"), "unknown structure 'sdv'; did you mean 'svd'?"),
        (("--option", "base=int3"), "--option must be a setting of svd, which has solver; got base"),
        (("--method", "cola", "--metric", "identity"), "metric must be 'gram' with cola"),
        (("--budget", "7"), "budget must be between"),
        (("--policy", "break-even", "--budget", "0.5"), "budget must be left out with policy 'break-even'"),
        (("--batch-size", "100000"), "the text must give two batches"),
    ],
)
def test_bad_flags_are_refused_and_leave_nothing(
    lorank: Run, dense: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    code, _, error = lorank("compress", dense, "--tokens", 2000, *flags, "--out", "small")
    assert code == 2 and message in error
    assert not (tmp_path / "small").exists()


def test_text_is_divided_and_no_batch_is_lost() -> None:
    batches = [{"input_ids": torch.full((2, 5), i)} for i in range(9)]
    for held, number in ((1, 1), (10, 1), (20, 2), (1000, 2)):
        first, last = divided(iter(batches), held)
        assert [*first, *last] == batches and len(last) == number


@pytest.mark.parametrize("written", ["{", "[" * 3000, "[]", "3: 4"])
def test_a_damaged_record_of_a_stopped_compression_is_named(written: str, tmp_path: Path) -> None:
    (tmp_path / "unfinished.json").write_text(written)
    with pytest.raises(ValueError, match=r"unfinished\.json cannot be read"):
        unfinished(tmp_path)
