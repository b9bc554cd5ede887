"""The parts of the documentation that nobody writes by hand: what the README, the code and printed results say already.

In a page, a Markdown file of this folder, these lines stand for:

    % README.md: Commands   that section of that file
    % README.md                what comes before its first section
    % results                  what the benchmarks printed
    % pages                    the names of all methods' pages
    % methods                  the table of methods
    % listing                the table of papers, see listing.py
    % rooms, % map             the folders of lorank, and what imports what

A page in methods/ is written by hand down to when to use the method. Its use, options, cost and figures come from the code.
"""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import drawing
import listing
import rooms
from click.testing import CliRunner
from markup import PICTURE, escaped, relinked, section, twins

from lorank.cli import cli
from lorank.comparison import repro
from lorank.comparison.first_steps import tolerance_of
from lorank.papers import PAPERS, find_paper
from lorank.report.repro import expectation
from lorank.sizes import SIZES
from lorank.table import METHODS, find
from lorank.train.methods import methods_of, rank_of
from lorank.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.txt"))
PLAIN = ("dense", "adamw", "autograd")
"""Names that need no page: what PyTorch does anyway."""


# ---- which method is on which page: one per paper's file


@functools.cache
def method_pages() -> dict[str, list[str]]:
    """{page: names of its methods}; the page has the name of the file."""
    pages: dict[str, list[str]] = {}
    for name in METHODS:
        if name not in PLAIN:
            pages.setdefault(home(name).rpartition(".")[2].replace("_", "-"), []).append(name)
    return pages


def home(name: str) -> str:
    """The module with a method's mathematics."""
    return find(name)().sources[0]


def docstring(names: list[str]) -> str:
    """The head of the file of these methods."""
    found = sys.modules[home(names[0])].__doc__
    assert found is not None, f"{home(names[0])} has no docstring"
    return found.strip()


def arxiv(names: list[str]) -> str | None:
    """The number of the first paper that the file names."""
    found = re.search(r"arXiv\s+(\d{4}\.\d{5})", docstring(names))
    return found and found[1]


def public_name(kind: type) -> str:
    """Under what a user imports it: lorank.CoLA."""
    return f"lorank.{kind.__name__}"


# ---- the table of methods


def methods_table() -> str:
    """Every paper's file with its equation, what it saves, and where to read more; links are those of the README."""
    rows = ["| method | equation | saves | file | paper |", "|---|---|---|---|---|"]
    for names in method_pages().values():
        file = home(names[0]).replace(".", "/") + ".py"
        shown = ", ".join(f"`{name}`" for name in names)
        code = f"[{Path(file).name}]({file})"
        paper = f"[{number}](https://arxiv.org/abs/{number})" if (number := arxiv(names)) else ""
        if not paper and (found := re.search(r"openreview\s+(\w+)", docstring(names))):
            paper = f"[openreview](https://openreview.net/forum?id={found[1]})"
        rows.append(f"| {shown} | `{equation(names)}` | {saves(names)} | {code} | {paper} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """The README with its table of methods as it should be."""
    rows = re.compile(r"^\| method \| equation \|.*(?:\n\|.*)*", re.M)
    if not rows.search(text):
        raise ValueError("README.md needs a table of methods that begins: | method | equation | saves | file | paper |")
    return rows.sub(lambda _: methods_table(), text, count=1)


def equation(names: list[str]) -> str:
    """The first equation of the docstring, without what stands to its right after a wider space."""
    lines = re.findall(r"^    +(.+)$", docstring(names), re.M)
    parts = [part.strip().rstrip(",") for line in lines for part in re.split(r"\s{2,}", line)]
    return next(part for part in parts if re.search(r"=|←", part)).replace("|", "\\|")


def saves(names: list[str]) -> str:
    """What the docstring's line "Saves: ..." says."""
    found = re.search(r"^Saves: (.+?)\.$", docstring(names), re.M | re.S)
    if found is None:
        raise ValueError(f"the docstring of {names[0]}'s file needs a line such as: Saves: compute, weights.")
    return " ".join(found[1].split())


# ---- a page as Sphinx reads it


def expand(docname: str, text: str) -> str:
    """A page with what its lines of `%` stand for, and, for a method, what is generated."""
    depth = docname.count("/")

    def include(found: re.Match[str]) -> str:
        if generated := GENERATED.get(found[1]):
            return generated(depth)
        shown = relinked(section(ROOT / found[1], found[2]), depth)
        under_title = not re.search("^## ", text[: found.start()], re.M)
        return re.sub("^###", "##", shown, flags=re.M) if under_title else shown

    text = re.sub(r"^% ([\w.]+)(?:: (.+))?$", include, text, flags=re.M)
    text = PICTURE.sub(twins, text)
    folder, _, page = docname.rpartition("/")
    if folder == "methods" and page in method_pages():
        names = method_pages()[page]
        parts = (
            usage(names),
            options(names),
            cost(names),
            published(names),
            reproductions(names),
            measured(names),
            notes(names),
        )
        text = "\n\n".join([text.rstrip(), *(part for part in parts if part)]) + "\n"
    return linked_tables(text) if docname == "methods/index" else text


GENERATED = {
    "pages": lambda depth: "\n".join(method_pages()),
    "methods": lambda depth: relinked(methods_table(), depth),
    "listing": lambda depth: listing.tables(method_pages()),
    "rooms": lambda depth: f"```text\n{rooms.tree(rooms.read())}\n```",
    "map": lambda depth: f"```{{raw}} html\n{drawing.svg(rooms.read())}\n```",
    "results": lambda depth: "\n\n".join(f"### {p.stem}\n\n```text\n{p.read_text().rstrip()}\n```" for p in RESULTS),
}


def linked_tables(text: str) -> str:
    """The first column of the table of methods leads to their pages."""
    for page, names in method_pages().items():
        shown = ", ".join(f"`{name}`" for name in names)
        text = text.replace(f"| {shown} |", f"| [{shown}]({page}.md) |")
    return text


# ---- the generated sections of a method


def with_structure(name: str) -> str:
    """A method joined with the structure that it needs."""
    structure = getattr(find(name), "structure", None)
    return f"{structure}+{name}" if structure else name


def on_any_model(names: list[str]) -> list[str]:
    """Those that are not for one type of model alone."""
    return [name for name in names if not hasattr(find(name), "model_type")]


def usage(names: list[str]) -> str:
    """How each is run and how it is called; every block is executed by the tests."""
    usual = on_any_model(names)
    shell = [f"lorank pretrain --method {with_structure(name)}" for name in usual if not find(name).adapts]
    if not usual:  # it is for models that a recipe builds
        shell = [f"lorank pretrain {path.stem}" for path, recipe in shipped().items() if uses(recipe, names)]
    python = [example(name) for name in usual if find(name).key != "gradient"]
    blocks = [
        *([f"```sh\n{chr(10).join(shell)}\n```"] if shell else []),
        *(f"```python\n{code}\n```" for code in python),
    ]
    return "\n\n".join(["## How to use it", *blocks])


def example(name: str) -> str:
    """A whole program: a small model under the method, ready to be trained."""
    kind = find(name)
    method = f"lorank.{kind.__name__}({'rank=16' if 'rank' in kind.__dataclass_fields__ else ''})"
    lines = ["import lorank", "from transformers import LlamaConfig, LlamaForCausalLM", ""]
    lines += [
        "shape = LlamaConfig(",
        "    vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3",
        ")",
    ]
    trained = "  # or a trained one: AutoModelForCausalLM.from_pretrained(...)" if kind.adapts else ""
    lines += [f"model = LlamaForCausalLM(shape){trained}"]
    if kind.key == "optimizer":
        lines += [f'lorank.convert(model, "{kind.structure}")'] if getattr(kind, "structure", None) else []
        return "\n".join([*lines, f"optimizer = lorank.optimizer(model, {method}, lr=0.01)"])
    lines += [f"lorank.convert(model, {method})"]
    if kind.answers() & {"optimizer", "hook"}:
        lines += ["optimizer = lorank.optimizer(model, lr=3e-3)"]
    if "hook" in kind.answers():
        lines += ["lorank.step_hook(model, optimizer, steps=1000)  # from here on the optimizer's steps are enough"]
    elif kind.adapts:
        lines += ["optimizer = lorank.optimizer(model, lr=1e-3)"]
    return "\n".join(lines)


def options(names: list[str]) -> str:
    """Fields with what they mean, from the class itself."""
    parts = [
        "## Options",
        "On the command line `--option NAME=VALUE`, in a recipe `{NAME: VALUE}` under the method's name.",
    ]
    for name in names:
        kind = find(name)
        directive = [f".. autoclass:: {public_name(kind)}", "   :show-inheritance:"]
        fields = [field.name for field in dataclasses.fields(kind)]
        if fields:
            directive.append(f"   :members: {', '.join(fields)}")
        parts.append("\n".join(["```{eval-rst}", *directive, "```"]))
    return "\n\n".join(parts)


def cost(names: list[str]) -> str:
    """What `lorank plan` prints for the 60M shape."""
    alone = " --devices 1" if find(names[0]).key == "gradient" else ""
    usual = on_any_model(names)
    if not usual:
        return ""
    command = f"lorank plan --size 60m --method {','.join(['dense', *map(with_structure, usual)])}{alone}"
    said = ["Counted when this page was built"]
    ranks = [rank for name in usual if (rank := rank_of(Recipe(size="60m", method=with_structure(name))))]
    shown = [f"{rank} of the width" if isinstance(rank, float) else str(rank) for rank in ranks]
    said += [f", at the rank that a run of this size has unless you say otherwise, {shown[0]}"] if shown else []
    said += [". `lorank plan --help` has other sizes, budgets and accelerators."]
    return f"## What it costs\n\n{''.join(said)}\n\n```console\n$ {command}\n{printed(command)}\n```"


def published(names: list[str]) -> str:
    """Figures of papers: perplexities from the recipes' heads, costs next to ours."""
    parts = ["## Published", recipes(names)]
    known = re.findall(r"arXiv\s+(\d{4}\.\d{5})", docstring(names))
    for paper in (name for name in PAPERS if find_paper(name).arxiv in known):
        command = f"lorank papers {paper}"
        parts.append(f"Published costs next to ours:\n\n```console\n$ {command}\n{printed(command)}\n```")
    return "\n\n".join(parts)


def recipes(names: list[str]) -> str:
    """Commands for the published runs, and what each recipe says of its settings."""
    found = [path for path, recipe in shipped().items() if uses(recipe, names)]
    found.sort(key=lambda path: list(SIZES).index(shipped()[path].size))
    if not found:
        return "No recipe here repeats a published run of this method, and no published figure of its quality is reproduced."
    head = "Perplexities are the papers'. None is reproduced here: that needs C4 and GPUs, and these commands are how it would be done."
    commands = "\n".join(f"lorank pretrain {path.stem}" for path in found)
    said = "\n".join(f"- `{path.name}`: {recipe_head(path)}" for path in found)
    return f"{head}\n\n```sh\n{commands}\n```\n\n{said}"


@functools.cache
def shipped() -> dict[Path, Recipe]:
    return {path: Recipe.read(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))}


def uses(recipe: Recipe, names: list[str]) -> bool:
    return any(method.name in names for method in methods_of(recipe))


def recipe_head(path: Path) -> str:
    """The comment at its top, without the command that it ends in."""
    lines = re.match(r"(#.*\n)+", path.read_text())
    assert lines is not None, f"{path.name} says nowhere where its settings come from"
    text = re.sub(r"^# ?", "", lines[0], flags=re.M)
    return escaped(" ".join(re.sub(r"Run: lorank pretrain \S+\s*$", "", text).split()))


def reproductions(names: list[str]) -> str:
    """What `lorank repro` has of these methods: commands, what is expected of a whole run, and of its first steps."""
    found = [one for one in map(repro.find, repro.names()) if uses(one.recipe, names)]
    if not found:
        return ""
    shell = [
        line
        for name in (one.name for one in found)
        for line in (f"lorank repro {name} --first-steps", f"lorank repro {name} --out runs/{name}")
    ]
    said = "\n".join(
        f"- `lorank repro {one.name}`: {escaped(expectation(one.published._asdict()))}. First steps: every loss within {tolerance_of(one.recipe) * 100:g} % "
        f"of `{one.curve_file.name}`."
        for one in found
    )
    return (
        "## Reproductions\n\nIn miniature on a CPU, in seconds, against a recorded curve; then all of it, which takes a GPU and C4:\n\n"
        f"```sh\n{chr(10).join(shell)}\n```\n\nWhat is expected; the perplexities are those of the papers named, not reproduced here. "
        f"[What a verdict says](../repro.md), and what it cannot.\n\n{said}"
    )


def measured(names: list[str]) -> str:
    """What benchmarks printed in this repository, if it names one of these methods."""
    wanted = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in names), re.I)
    blocks = [
        f"`benchmarks/{path.stem}.py` printed:\n\n```text\n{path.read_text().rstrip()}\n```"
        for path in RESULTS
        if wanted.search(path.read_text())
    ]
    return "\n\n".join(["## Measured here", *blocks]) if blocks else ""


def notes(names: list[str]) -> str:
    """The head of the method's file: equation, cost, source and departures in plain text."""
    module = home(names[0])
    href = f"../_modules/{module.replace('.', '/')}.html"
    text = docstring(names).partition("\n\n")[2]
    blocks = [block if block.startswith("    ") else escaped(block) for block in text.split("\n\n")]
    return (
        f'## What the source says\n\nThe head of <a href="{href}">{module.replace(".", "/")}.py</a>:\n\n'
        + "\n\n".join(blocks)
    )


@functools.cache
def printed(command: str) -> str:
    """What a command of ours prints, 88 columns wide."""
    done = CliRunner(env={"COLUMNS": "88"}).invoke(cli, command.split()[1:], catch_exceptions=False)
    assert done.exit_code == 0, f"{command}: {done.output}"
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


if __name__ == "__main__":  # make table
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))
