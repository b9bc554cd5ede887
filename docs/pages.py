"""The parts of the documentation that are not written by hand: what the README, the code and printed results say already.

A page is a Markdown file of this folder. In it a line ``% README.md: A fair race`` stands for that section of that file,
``% README.md`` for what comes before its first section, ``% results`` for what the benchmarks printed, and ``% pages`` for
the names of all methods' pages. A page of methods/ is hand-written down to when a method is used; the rest, its use,
options, cost and figures, comes from the tables.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import drawing
import rooms
import yaml
from click.testing import CliRunner

from lorank.accounting import flops_per_token
from lorank.cli import cli
from lorank.optim import ESTIMATORS, OPTIMIZERS, options_of
from lorank.papers import PAPERS, find_paper
from lorank.plan.run import empty_model
from lorank.race import repro
from lorank.report.repro import expectation
from lorank.report.tables import quantity
from lorank.sizes import SIZES
from lorank.table import METHODS
from lorank.train.estimators import build_estimator
from lorank.train.model import rank_of
from lorank.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.txt"))
ALL = {**METHODS, **OPTIMIZERS, **ESTIMATORS}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)\)")


# ---- which method is on which page: one per paper's file


@functools.cache
def method_pages() -> dict[str, list[str]]:
    """{page: names of its methods}; what shares a file shares a page, which has the name of the first."""
    homes: dict[str, list[str]] = {}
    for name, where in ALL.items():
        homes.setdefault(where.partition(":")[0], []).append(name)
    return {names[0]: names for names in homes.values()}


def class_of(name: str) -> type:
    module, _, attribute = ALL[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def public_name(kind: type) -> str:
    """Under what a user imports it: lorank.CoLA, lorank.optim.Trion."""
    return f"{'lorank.optim' if kind.__module__.startswith('lorank.optim') else 'lorank'}.{kind.__name__}"


# ---- a page as Sphinx reads it


def expand(docname: str, text: str) -> str:
    """A page with what its lines of `%` stand for, and, for a method, what is generated."""
    depth = docname.count("/")

    def include(found: re.Match[str]) -> str:
        if found[1] == "pages":
            return "\n".join(method_pages())
        if found[1] == "rooms":
            return f"```text\n{rooms.tree(rooms.read())}\n```"
        if found[1] == "map":
            return f"```{{raw}} html\n{drawing.svg(rooms.read())}\n```"
        if found[1] == "results":
            return "\n\n".join(f"### {path.stem}\n\n```text\n{path.read_text().rstrip()}\n```" for path in RESULTS)
        return relinked(section(ROOT / found[1], found[2]), depth)

    text = re.sub(r"^% ([\w.]+)(?:: (.+))?$", include, text, flags=re.M)
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


def section(path: Path, title: str | None) -> str:
    """What stands under a heading of a file, or without one between its first line and its first section."""
    start = rf"## {re.escape(title)}" if title else r"# [^\n]+"
    found = re.search(rf"^{start}\n+(.*?)\s*(?=^## |\Z)", path.read_text(), re.M | re.S)
    if found is None:
        raise ValueError(f"{path.name} has no section {title!r}")
    return found[1]


def relinked(text: str, depth: int) -> str:
    """Links within the repository as links within the site, from a page that lies `depth` folders down."""
    up = "../" * depth

    def link(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        if target.startswith("https://"):
            return found[0]
        if target.startswith("docs/"):
            return f"{picture}[{label}]({up}{target.removeprefix('docs/')})"
        if target.startswith("lorank/"):
            return f'<a href="{up}_modules/{target.removesuffix(".py")}.html">{label}</a>'
        if target.startswith("benchmarks/results/"):
            return f"[{label}]({up}results.md#{slug(Path(target).stem)})"
        if target in SITE:
            return f"[{label}]({up}{SITE[target]})"
        raise ValueError(f"the documentation has no page for {target}; give it one in docs/pages.py")

    return LINK.sub(link, text)


SITE = {
    "CONTRIBUTING.md": "add-a-method.md",
    "README.md": "index.md",
    "examples/": "own-loop.md",
    "recipes/": "methods/index.md",
}


def slug(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def linked_tables(text: str) -> str:
    """First columns of the README's tables that name a method, or its class, lead to its page."""
    for page, names in method_pages().items():
        for shown in [*names, *(class_of(name).__name__ for name in names)]:
            text = text.replace(f"| `{shown}` |", f"| [`{shown}`]({page}.md) |")
    return text


# ---- the generated sections of a method


def usage(names: list[str]) -> str:
    """How each is run and how it is called; every block is executed by the tests."""
    shell = [f"lorank pretrain --method {name}" for name in names]
    python = [example(name) for name in names if name not in ESTIMATORS]
    blocks = [f"```sh\n{chr(10).join(shell)}\n```", *(f"```python\n{code}\n```" for code in python)]
    return "\n\n".join(["## How to use it", *blocks])


def example(name: str) -> str:
    """A whole program: a small model under the method, ready to be trained."""
    kind, lines = class_of(name), ["from transformers import LlamaConfig, LlamaForCausalLM", ""]
    lines += [
        "shape = LlamaConfig(",
        "    vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3",
        ")",
    ]
    lines += ["model = LlamaForCausalLM(shape)"]
    if name in OPTIMIZERS:
        lines = [f"from lorank.optim import {kind.__name__}, low_rank_groups", *lines]
        return "\n".join([*lines, f"optimizer = {kind.__name__}(low_rank_groups(model, 16), lr=0.01)"])
    from lorank import Method

    assert issubclass(kind, Method)
    rank = "rank=16" if "rank" in kind.__dataclass_fields__ else ""
    lines = ["import lorank", *lines, f"lorank.convert(model, lorank.{kind.__name__}({rank}))"]
    if kind.hook is not Method.hook:  # it acts between steps
        adamw = f"lorank.optim.{kind.adamw.__name__}" if kind.adamw else "torch.optim.AdamW"
        lines[0] = "import lorank.optim" if kind.adamw else "import lorank\nimport torch"
        lines += ["", f"optimizer = {adamw}(model.parameters(), lr=3e-3)"]
        lines += ["lorank.step_hook(model, optimizer, steps=1000)  # from here on the optimizer's steps are enough"]
    return "\n".join(lines)


def options(names: list[str]) -> str:
    """Fields or arguments with what they mean, from the class itself."""
    parts = ["## Options", "On the command line `--option NAME=VALUE`, in a recipe `options: {NAME: VALUE}`."]
    for name in names:
        kind, directive = class_of(name), [f".. autoclass:: {public_name(class_of(name))}", "   :show-inheritance:"]
        if name in OPTIMIZERS:
            known = ", ".join(f"`{option}`" for option in options_of(kind))
            where = "those that it does not explain itself are explained in {py:class}`lorank.optim.Subspace`"
            parts.append(f"`{name}` takes {known}; {where}.")
        elif fields := [
            field for field in inspect.get_annotations(kind) if field in getattr(kind, "__dataclass_fields__", {})
        ]:
            directive.append(f"   :members: {', '.join(fields)}")
        parts.append("\n".join(["```{eval-rst}", *directive, "```"]))
    return "\n\n".join(parts)


def cost(names: list[str]) -> str:
    """What `lorank plan` prints for the 60M shape; of an estimator, which it does not take, the operations."""
    if names[0] in ESTIMATORS:
        return f"## What it costs\n\n{estimator_cost(names[0])}"
    command = f"lorank plan --size 60m --method {','.join(['dense', *names])}"
    said = ["Counted when this page was built"]
    taken = {name: rank_of(Recipe(size="60m", method=name)) for name in names}
    ranks = [f"{rank} of the width" if isinstance(rank, float) else str(rank) for rank in taken.values() if rank]
    said += [f", at the rank that a run of this size takes unless told otherwise, {ranks[0]}"] if ranks else []
    said += [". `lorank plan --help` has other sizes, budgets and accelerators."]
    return f"## What it costs\n\n{''.join(said)}\n\n```console\n$ {command}\n{printed(command)}\n```"


def estimator_cost(name: str) -> str:
    recipe = Recipe(size="60m", method=name, vocab_size=32_000)
    dense = dataclasses.replace(recipe, method="dense")
    model = empty_model(dense)
    estimator = build_estimator(recipe, model)
    assert estimator is not None
    backward = flops_per_token(model, recipe.sequence_length, batch=recipe.batch_size)
    return (
        f"For the 60M shape, with the options' defaults of `lorank pretrain`, forward passes of {quantity(estimator.flops_per_token)}FLOPs "
        f"per token of the batch, where a step by backpropagation takes {quantity(backward)}FLOPs in all. Nothing is kept for a backward pass."
    )


def published(names: list[str]) -> str:
    """Figures of papers: perplexities out of the recipes' heads, costs beside ours."""
    parts = ["## Published", recipes(names)]
    arxiv = re.findall(r"arXiv\s+(\d{4}\.\d{5})", docstring(names))
    for paper in (name for name in PAPERS if find_paper(name).arxiv in arxiv):
        command = f"lorank plan --paper {paper}"
        parts.append(f"Published costs beside ours:\n\n```console\n$ {command}\n{printed(command)}\n```")
    return "\n\n".join(parts)


def recipes(names: list[str]) -> str:
    """Commands for the published runs, and what each recipe says of its own."""
    settings = {path: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    found = [path for path in settings if settings[path]["method"] in names]
    found.sort(key=lambda path: list(SIZES).index(settings[path]["size"]))
    if not found:
        return "No recipe here repeats a published run of this method, and no published figure of its quality is reproduced."
    head = "Perplexities are the papers'. None is reproduced here: that needs C4 and GPUs, and these commands are how it would be done."
    commands = "\n".join(f"lorank pretrain recipes/{path.name}" for path in found)
    said = "\n".join(f"- `{path.name}`: {recipe_head(path)}" for path in found)
    return f"{head}\n\n```sh\n{commands}\n```\n\n{said}"


def recipe_head(path: Path) -> str:
    """The comment at its top, without the command that it ends in."""
    lines = re.match(r"(#.*\n)+", path.read_text())
    assert lines is not None, f"{path.name} says nowhere where its settings come from"
    text = re.sub(r"^# ?", "", lines[0], flags=re.M)
    return escaped(" ".join(re.sub(r"Run: lorank pretrain \S+\s*$", "", text).split()))


def reproductions(names: list[str]) -> str:
    """What `lorank repro` has of these methods: commands, what is expected of a whole run, and of its first steps."""
    found = [one for one in map(repro.find, repro.PUBLISHED) if one.recipe.method in names]
    if not found:
        return ""
    shell = [
        line
        for name in (one.name for one in found)
        for line in (f"lorank repro {name} --first-steps", f"lorank repro {name} --out runs/{name}")
    ]
    said = "\n".join(
        f"- `lorank repro {one.name}`: {escaped(expectation(one))}. First steps: every loss within {repro.tolerance_of(one.recipe) * 100:g} % "
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
    module = class_of(names[0]).__module__
    href = f"../_modules/{module.replace('.', '/')}.html"
    text = docstring(names).partition("\n\n")[2]
    blocks = [block if block.startswith("    ") else escaped(block) for block in text.split("\n\n")]
    return (
        f'## What the source says\n\nThe head of <a href="{href}">{module.replace(".", "/")}.py</a>:\n\n'
        + "\n\n".join(blocks)
    )


def docstring(names: list[str]) -> str:
    found = importlib.import_module(class_of(names[0]).__module__).__doc__
    assert found is not None
    return found.strip()


def escaped(text: str) -> str:
    """Prose that is no Markdown, between its code in backticks, as Markdown."""
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_\[\]<>$|{}])", r"\\\1", part) for i, part in enumerate(parts))


@functools.cache
def printed(command: str) -> str:
    """What a command of ours prints, 88 columns wide."""
    done = CliRunner(env={"COLUMNS": "88"}).invoke(cli, command.split()[1:], catch_exceptions=False)
    assert done.exit_code == 0, f"{command}: {done.output}"
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())
