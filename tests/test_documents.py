"""Documents do not lie: their examples run, their commands exist, their links lead somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

import lorank
from lorank.cli import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]


def code(document: str, language: str) -> list[str]:
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", (ROOT / document).read_text(), re.M | re.S)
    return [re.sub(r"^   ", "", block, flags=re.M) if block.startswith("   ") else block for block in blocks]


def small() -> LlamaForCausalLM:
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2))


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in code("README.md", "python"):
        exec(block, {})
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained("out").config.lorank["method"] == "cola"


def test_the_example_method_of_contributing_is_a_whole_method(tmp_path: Path) -> None:
    """A package of somebody else's adds it through its entry point: trained, resumed, generating, without an edit here."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/gained.py").write_text(code("CONTRIBUTING.md", "python")[0])
    line = 'gained = "my_package.gained:Gained"'
    assert line in (ROOT / "CONTRIBUTING.md").read_text()
    unquoted = line.replace('"', "")
    (tmp_path / "my_package-1.dist-info").mkdir()  # what pip would have written
    (tmp_path / "my_package-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1\n")
    (tmp_path / "my_package-1.dist-info/entry_points.txt").write_text(f"[lorank.methods]\n{unquoted}\n")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text that counts {i * i}\n" for i in range(900)))

    def lorank_says(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "lorank", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = (
        "--data text.txt --vocab-size 300 --sequence-length 32 --batch-size 4 --steps 4 --warmup-steps 1 --save-every 2"
    )
    lorank_says("pretrain", "--method", "gained", *small.split(), "--out", "run")
    (tmp_path / "run/summary.json").rename(tmp_path / "summary.json")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    lorank_says("pretrain", "--resume", "run")
    found, again = (json.loads((tmp_path / p).read_text()) for p in ("summary.json", "run/summary.json"))
    assert found["validation_loss_nats_per_token"] == again["validation_loss_nats_per_token"]
    assert lorank_says("generate", "run", "--prompt", "line", "--max-new-tokens", "5").startswith("line")
    assert json.loads((tmp_path / "run/config.json").read_text())["lorank"]["method"] == "gained"


def test_a_method_of_a_script_is_registered_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorank.methods._registered", {})
    scope: dict[str, Any] = {"__name__": "script"}
    exec(code("CONTRIBUTING.md", "python")[0], scope)
    with pytest.raises(ValueError, match="unknown method 'gained'.* is found after lorank.register"):
        lorank.convert(small(), "gained")
    model = lorank.convert(small(), scope["Gained"]()).eval()
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("lorank.methods._registered", {})  # as in another process
    with pytest.raises(ValueError, match="unknown method 'gained'.* is found after lorank.register"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    lorank.register(scope["Gained"])
    x = torch.arange(8)[None]
    assert torch.equal(model(x).logits, AutoModelForCausalLM.from_pretrained(tmp_path).eval()(x).logits)
    with pytest.raises(ValueError, match="there is a method 'cola' already"):
        lorank.register(type("Mine", (lorank.LowRank,), {"name": "cola"}))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_shown_exist(document: str) -> None:
    for block in code(document, "sh"):
        for line in block.splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
            elif words[:1] == ["lorank"]:
                shown = CliRunner().invoke(cli, [words[1], "--help"]).output
                for flag in (word for word in words[2:] if word.startswith("--")):
                    assert re.search(rf"{flag}\b", shown), line
                for recipe in (word for word in words[2:] if word.endswith(".yaml")):
                    assert any(ROOT.glob(recipe)), line  # may be a pattern


def test_every_method_has_a_row_in_the_readme() -> None:
    for name in lorank.METHODS:
        assert f"| `{name}` |" in (ROOT / "README.md").read_text()


def test_one_version_everywhere() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lorank.__version__ == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("example", [path.name for path in (ROOT / "examples").glob("*.py")])
@pytest.mark.parametrize("method", ["cola", "low-rank"])
def test_the_examples_run_and_learn(example: str, method: str, fresh_python) -> None:
    program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    said = fresh_python(program, str(ROOT / "examples" / example), method)
    losses = [float(loss) for loss in re.findall(r"\bloss'?:? '?([0-9.]+)", said)]
    assert len(losses) >= 3 and losses[-1] < 0.8 * losses[0], said
