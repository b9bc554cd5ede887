"""Documents do not lie: their examples run, their commands exist, their links lead somewhere."""

import importlib.metadata
import re
import sys
from pathlib import Path

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


def test_the_example_method_of_contributing_is_a_whole_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of somebody else's adds it through the entry point: converting, saving, loading, without an edit here."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/gained.py").write_text(code("CONTRIBUTING.md", "python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    point = importlib.metadata.EntryPoint("gained", "my_package.gained:Gained", "lorank.methods")
    monkeypatch.setattr("lorank.methods.entry_points", lambda group: [point])
    model = lorank.convert(small(), "gained").eval()
    assert 'gained = "my_package.gained:Gained"' in (ROOT / "CONTRIBUTING.md").read_text()
    x = torch.arange(8)[None]
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(model(x).logits, again(x).logits)
    assert "my_package" in type(again.model.layers[0].self_attn.q_proj).__module__
    sys.modules.pop("my_package.gained")


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
                    assert (ROOT / recipe).exists(), line


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
