"""lorank export, and what it needs for ONNX."""

import shutil
import sys
from pathlib import Path

import pytest


def test_a_run_is_exported_as_it_is(lorank, trained: Path, tmp_path: Path) -> None:
    code, out, err = lorank("export", trained, "--format", "trained")
    assert code == 0 and f"runs/export-{trained.name}" in out, err
    folder = tmp_path / "runs" / f"export-{trained.name}"
    assert {"model.safetensors", "modeling_lorank.py", "tokenizer.json"} <= {one.name for one in folder.iterdir()}
    assert lorank("generate", folder, "--prompt", "line", "--max-new-tokens", 2)[0] == 0
    code, _, err = lorank("export", trained, "--format", "trained")
    assert code == 2 and "must be a folder without a model" in err


def test_nothing_is_exported_into_the_text(lorank, trained: Path, text: Path, tmp_path: Path) -> None:
    """Its files would be read as text from then on."""
    run = shutil.copytree(trained, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(text), str(shutil.copytree(text.parent, tmp_path / "texts"))))
    code, _, err = lorank("export", run, "--format", "trained", "--out", "texts")
    assert code == 2 and "--out must be outside of the text" in err
    assert [one.name for one in (tmp_path / "texts").iterdir()] == [text.name]


def test_onnx_is_an_extra(lorank, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    code, _, err = lorank("export", trained, "--format", "onnx", "--out", "x")
    assert code == 2 and "pip install onnx onnxscript" in err and not (tmp_path / "x").exists()
