"""Documents do not lie: their examples run, their commands exist, their links lead somewhere."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

import lorank
from lorank.cli import cli
from lorank.train.shipped import recipe_names

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import markup  # noqa: E402
import pages  # noqa: E402
import rooms  # noqa: E402

pytestmark = pytest.mark.usefixtures("forked_processes")

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
TEXT = "".join(f"line {i} of a text that counts {i * i}\n" for i in range(900))


def text_of(document: str) -> str:
    """What is written, and of a method's page also the commands and programs that `make docs` puts there."""
    text = (ROOT / document).read_text()
    if names := pages.method_pages().get(Path(document).stem):
        text += f"\n{pages.usage(names)}\n\n{pages.recipes(names)}\n\n{pages.reproductions(names)}\n"
    return text


def code(document: str, languages: str) -> list[str]:
    blocks = re.findall(rf"^ *```(?:{languages})\n(.*?)^ *```", text_of(document), re.M | re.S)
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


# ---- the examples of CONTRIBUTING.md


class Example(NamedTuple):
    """A method's file, test, table line and page as they are printed."""

    name: str
    folder: str
    file: str
    test: str
    line: str
    page: str


def examples() -> dict[str, Example]:
    files, lines, pages_ = (code("CONTRIBUTING.md", language) for language in ("python", "text", "markdown"))
    names = [line.split('"')[1] for line in lines]
    folders = [line.split(".")[1] for line in lines]
    parts = zip(names, folders, files[:4:2], files[1:4:2], lines, pages_, strict=True)
    return {part[0]: Example(*part) for part in parts}


EXAMPLES = examples()


def test_an_example_works_from_a_package(tmp_path: Path) -> None:
    """Somebody else's package adds it by its entry point: trained, resumed and generating, without an edit here."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/gained.py").write_text(EXAMPLES["gained"].file)
    [entry] = re.findall(r"\[project.entry-points.*\n.*", code("CONTRIBUTING.md", "toml")[0])
    (tmp_path / "my_package-1.dist-info").mkdir()  # what pip would have written
    (tmp_path / "my_package-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1\n")
    written = entry.replace("project.entry-points.", "").replace('"', "")
    (tmp_path / "my_package-1.dist-info/entry_points.txt").write_text(written)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts/some.txt").write_text(TEXT)

    program = """
        import shutil, sys
        from pathlib import Path
        from lorank.cli import cli
        first, *further = sys.argv[1:]
        cli(first.split(), standalone_mode=False)
        Path("run/summary.json").rename("summary.json")
        shutil.rmtree("run/checkpoint-4")
        for command in further:
            cli(command.split(), standalone_mode=False)
    """
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(tmp_path)}
    commands = (
        f"pretrain --method gained {RUN_WITH['pretrain']} --data my_texts --out run",
        "pretrain --resume run",
        "generate run --prompt line --max-new-tokens 5",
    )
    command = [sys.executable, "-c", textwrap.dedent(program), *commands]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, again = (json.loads((tmp_path / p).read_text()) for p in ("summary.json", "run/summary.json"))
    assert found["validation_loss_nats_per_token"] == again["validation_loss_nats_per_token"]
    assert re.search("^line", done.stdout, re.M)
    assert json.loads((tmp_path / "run/config.json").read_text())["lorank"]["method"] == "gained"


CONTRACTS = {
    "gained": (["test_methods.py"], "(llama or docs) and not (compiler or policies)"),  # those take long
    "signed": (["test_optimizers.py", "test_processes.py"], "not compile"),
}
"""The contracts that an example is examined by, and with what part of them."""


def test_an_example_added_here_passes_its_contract(tmp_path: Path) -> None:
    """File, test, line and page as they are printed, a recipe with its curve, and the table of methods; nothing else is changed."""
    for part in ("lorank", "tests", "docs", "examples", "recipes", "benchmarks"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "CITATION.cff"):
        shutil.copy(ROOT / file, tmp_path)
    table = tmp_path / "lorank/table.py"
    for name, example in EXAMPLES.items():
        (tmp_path / f"lorank/{example.folder}/{name}.py").write_text(example.file)
        (tmp_path / f"tests/{example.folder}/test_{name}.py").write_text(example.test)
        (tmp_path / f"docs/methods/{name}.md").write_text(example.page)
        table.write_text(table.read_text().replace("METHODS = {\n", f"METHODS = {{\n    {example.line}"))

    for end in ("yaml", "json"):  # of low-rank, whose settings a gain shares
        text = (ROOT / f"recipes/low-rank-60m.{end}").read_text()
        (tmp_path / f"recipes/gained-60m.{end}").write_text(text.replace("low-rank", "gained"))
    with (tmp_path / "tests/methods/test_gained.py").open("a") as file:
        file.write(code("CONTRIBUTING.md", "python")[4])
    files, asked = ["tests/test_documents.py"], "every_page_ or everything_public or table_of_methods or gained-60m"
    files += ["tests/test_recipes.py", "tests/comparison/test_first_steps.py", "tests/test_listing.py"]
    asked += " or has_a_row or say_what_is_not"
    expected = ["test_documents.py::test_the_readme_has_the_table_of_methods", "test_the_recipe_is_that_of_the_paper"]
    expected += [
        r"published_model\[gained-60m",
        r"as_recorded\[gained-60m",
        "of_the_folders_has_a_row",
        "say_what_is_not",
    ]
    for name, (contracts, part) in CONTRACTS.items():
        files += [f"tests/{EXAMPLES[name].folder}/test_{name}.py", *(f"tests/contract/{one}" for one in contracts)]
        asked += f" or ({name} and {part} and not example) or test_{name}"
        expected += [rf"{one}::test_\w+\[{name}" for one in contracts]
        expected += [rf"test_{name}.py::", rf"page_runs\[docs/methods/{name}.md\]"]
    program = """
        import runpy, sys
        for path, *words in (["benchmarks/first_steps.py", "record", "gained-60m"], ["docs/pages.py"]):
            sys.argv, sys.path[0] = [path, *words], path.partition("/")[0]
            runpy.run_path(path, run_name="__main__")
        sys.path[0] = ""
        print("EXAMINED")
        import pytest
        sys.exit(pytest.main(%r))
    """ % ["-q", "-rA", "-p", "xdist.plugin", "-p", "no:cacheprovider", "-k", asked, *files]
    command = [sys.executable, "-c", textwrap.dedent(program)]  # one process, as each imports torch and transformers
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    recorded, _, said = done.stdout.partition("EXAMINED")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gained-60m" in recorded
    for passed in expected:
        assert re.search(rf"PASSED tests/.*{passed}", said), said


def test_a_script_registers_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorank.table._registered", {})
    scope: dict[str, Any] = {"__name__": "script"}
    exec(EXAMPLES["gained"].file, scope)
    with pytest.raises(ValueError, match="unknown method 'gained'.* is found after lorank.register"):
        lorank.convert(small(), "gained")
    model = lorank.convert(small(), scope["Gained"]()).eval()
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("lorank.table._registered", {})  # as in another process
    with pytest.raises(ValueError, match="unknown method 'gained'.* is found after lorank.register"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    lorank.register(scope["Gained"])
    x = torch.arange(8)[None]
    assert torch.equal(model(x).logits, AutoModelForCausalLM.from_pretrained(tmp_path).eval()(x).logits)
    with pytest.raises(ValueError, match="the method name 'cola' is already in use"):
        lorank.register(type("Mine", (lorank.LowRank,), {"name": "cola"}))


# ---- pages


@pytest.mark.parametrize("document", [page for page in PAGES if code(page, "python")])
def test_the_python_of_a_page_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in code(document, "python"):
        exec(block, {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    """Into the pages that are built `make docs` looks as well."""
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = (ROOT / document).parent / name if name else ROOT / document
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)", pages.expand(found.stem, found.read_text()), re.M)
            assert anchor in [markup.slug(heading) for heading in headings], target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_shown_exist(document: str) -> None:
    typed = re.findall(r"^\$ (.+)", "".join(code(document, "console")), re.M)
    for line in [*"".join(code(document, "sh|bash")).splitlines(), *typed]:
        words = shlex.split(re.sub(r"^torchrun .* -m lorank", "lorank", line), comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        elif words[:1] == ["lorank"]:
            if words[1] in ("--help", "--version"):
                continue
            command = cli.commands.get(words[1])
            assert command is not None, line
            command.make_context(words[1], words[2:], parent=click.Context(cli))  # parses, runs nothing
            for recipe in (word for word in words[2:] if word.endswith(".yaml")):
                assert any(ROOT.glob(recipe)), line  # may be a pattern
    prose = re.sub(r"^ *```.*?^ *```", "", text_of(document), flags=re.M | re.S)
    for line in re.findall(r"`lorank ([^`]+)`", prose):  # it may have RECIPE or NAME in it, so it cannot be parsed
        name, *words = line.split()
        if name in ("--help", "--version"):
            continue
        assert name in cli.commands, line
        flags = {flag for option in cli.commands[name].params for flag in (*option.opts, *option.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= {*flags, "--help"}, line


RUN_WITH = {
    "pretrain": "--set vocab_size=300 --sequence-length 32 --batch-size 4 --steps 4 --warmup-steps 1 --save-every 2",
    "pretrain --resume": "",
    "evaluate": "",
    "generate": "",
    "export": "",
    "analyze": "--sequence-length 32",
}
"""What is added to the commands of the quick start to make them short."""
TEXTS = {"pretrain": "my_texts", "evaluate": "held_out.txt", "analyze": "held_out.txt"}
"""What they read if they do not say."""
ELSEWHERE = {
    "bench": "tests/plan/test_bench.py",
    "demo": "tests/comparison/test_demo.py",
    "compare": "tests/comparison/test_compare_command.py",
    "plan": "tests/plan/test_forecast.py",
    "papers": "tests/test_papers.py",
}
"""Commands that take many runs or train nothing, and where they are tested."""


def test_the_quick_start_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    for file in ("my_texts/some.txt", "held_out.txt"):
        (tmp_path / file).write_text(TEXT)
    GPT2Config(n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path / "gpt2")  # else its sizes are the real one's
    ran = set()
    for line in "".join(code("docs/quickstart.md", "sh")).splitlines():
        name, *words = shlex.split(line, comments=True)
        if name == "lorank" and set(words) & {*recipe_names()}:
            continue  # its text comes from the hub; tests/test_recipes.py has its first steps
        if name != "lorank" or words[0] in ELSEWHERE:
            assert name == "lorank" or [name, *words] == ["pip", "install", "."], line
            continue
        if words[1:2] == ["--resume"] and words[-2] == "--steps":  # a run of four is trained longer
            words[-1] = "6"
        elif "--resume" in words:  # as if it had been stopped
            (tmp_path / "runs/first/summary.json").unlink()
            shutil.rmtree(tmp_path / "runs/first/checkpoint-4")
        kind = " ".join(words[:2]) if "--resume" in words else words[0]
        text = ["--data", TEXTS[kind]] if kind in TEXTS and "--data" not in words else []
        code_, out, err = in_this_process(*words, *RUN_WITH[kind].split(), *text)
        assert code_ == 0 and out, f"{line}\n{out}{err}"
        ran.add(kind)
    assert ran == set(RUN_WITH) and all((ROOT / file).exists() for file in ELSEWHERE.values())


@pytest.mark.parametrize("page", pages.method_pages())
def test_every_page_of_a_method_is_complete(page: str) -> None:
    text = (ROOT / f"docs/methods/{page}.md").read_text()
    for part in (r"^# .+", r"^\$\$ .+ \$\$$", "^## When to use it$", "^## When not$"):
        assert re.search(part, text, re.M), f"{page}.md has no {part}"


def test_every_page_of_a_method_has_a_method() -> None:
    assert {Path(page).stem for page in PAGES if page.startswith("docs/methods/")} == {"index", *pages.method_pages()}


def test_everything_public_is_documented() -> None:
    shown = "".join((ROOT / page).read_text() for page in PAGES)
    shown += "".join(pages.options(names) for names in pages.method_pages().values())
    for name in lorank.__all__:
        assert re.search(rf":: lorank\.{name}$", shown, re.M), f"lorank.{name}"


def test_a_page_includes_sections_with_their_links() -> None:
    shown = pages.expand("folder/page", "# Page\n\n% README.md: Where to go next\n")
    assert "](../quickstart.md)" in shown and "](../add-a-method.md)" in shown and "## " not in shown
    whole = pages.expand("page", "% README.md")
    assert whole.startswith("Train language models") and "## " not in whole
    assert "\n## A recipe\n" in pages.expand("page", "# Page\n\n% CONTRIBUTING.md: Add a method\n")
    both = pages.expand("compare", (ROOT / "docs/compare.md").read_text())
    assert "{image} report.png\n:class: only-light" in both and "{image} report-dark.png\n:class: only-dark" in both
    assert "\n### A recipe\n" in pages.expand("page", "# Page\n\n## Part\n\n% CONTRIBUTING.md: Add a method\n")
    with pytest.raises(ValueError, match=r"README\.md has no section 'Where to gone'"):
        pages.expand("page", "% README.md: Where to gone")
    with pytest.raises(ValueError, match=r"no page for tests/conftest\.py"):
        markup.relinked("[a test](tests/conftest.py)", 0)


def test_the_readme_has_the_table_of_methods() -> None:
    text = (ROOT / "README.md").read_text()
    assert pages.with_table(text) == text, "run: make table"
    assert len(text.splitlines()) <= 130, "a stranger reads the README in three minutes; the rest goes into docs/"


def test_files_and_functions_that_pages_name_exist() -> None:
    modules = rooms.read()
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for name in re.findall(r"`((?:lorank|tests|docs|benchmarks|examples)/[\w/.-]+\.\w+)`", text):
            assert (ROOT / name).exists() or "NAME" in name, f"{document} names {name}"
        for name in re.findall(r"`(lorank(?:\.\w+)+)`", text):
            module = max((m for m in modules if f"{name}.".startswith(f"{m}.")), key=len)
            rest = name.removeprefix(module).strip(".").split(".") if name != module else []
            found: Any = importlib.import_module(module)
            for part in rest:
                found = getattr(found, part, None)
            is_example = rest and rest[-1].lower() in EXAMPLES
            assert found is not None or is_example or name == "lorank.methods", f"{document} names {name}"


def test_one_version_everywhere() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lorank.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    [latest] = re.findall(
        r"## \[Unreleased\]\n.*?^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M | re.S
    )
    assert latest == version
