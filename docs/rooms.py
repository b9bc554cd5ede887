"""The rooms of lorank, which of them may import which, and what the sources import, read with `ast`: nothing is run.

`ROWS` is the plan of the house. `tests/test_architecture.py` holds the sources to it, and `drawing.py` draws the map of
docs/architecture.md from the same imports.
"""

import ast
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROWS: tuple[dict[str, str], ...] = (
    {"cli": "commands, flags, and errors as one sentence"},
    {
        "comparison": "several methods on the same tokens, and published runs repeated",
        "report": "dictionaries in, pictures and text out",
    },
    {
        "plan": "what a run would cost, counted on models without data",
        "federated": "one model from several owners of text: one rule, one file",
    },
    {"train": "recipes, data, the trainer, run folders, evaluation and generation"},
    {"papers": "published costs next to ours"},
    {
        "fit": "from trained dense weights to factors",
        "analysis": "how many of its dimensions a matrix uses",
        "distributed": "models that several devices share",
        "testing": "what every method must satisfy",
        "trainer": "what methods need of transformers' Trainer",
    },
    {
        "loop": "optimizer, step_hook, lr_schedule, next_task, set_context: what a training loop asks for",
        "adapter_files": "adapters saved without their model, and in peft's format",
        "starts": "blocks that begin as the identity",
    },
    {"conversion": "convert, merge"},
    {"pretrained": "saved and loaded by transformers", "trial": "a conversion tried on shapes alone"},
    {"portable": "a modelling file for machines without lorank"},
    {"table": "every name, and the file that holds its mathematics"},
    {
        "methods": "what the weights are: one paper, one file",
        "adapters": "a frozen matrix and a low-rank one: one paper, one file",
        "evolution": "gradients without a backward pass",
        "optim": "how the weights move: one paper, one file",
        "speed": "fast versions, each tested against a slow one",
    },
    {
        "rewriting": "other layers in the place of a model's projections",
        "accounting": "parameters, FLOPs and bytes of a model",
    },
    {"sites": "where the projections of a model are"},
    {"fusion": "several projections in one matrix", "checkpointing": "what is kept for the backward pass"},
    {
        "method": "Method, Site: what a method can decide",
        "layers": "layers that several methods share",
        "experts": "the experts of a mixture, stacked in one tensor",
        "tape": "what one block leaves for the next",
        "loss": "what a language model is trained on and judged by",
        "factors": "pure functions on two factors",
        "standalone": "layers in a file next to saved weights",
        "dictionary": "matrices that blocks share",
        "pools": "candidates for the vectors of a factor",
        "moments": "what an optimizer remembers about a parameter",
        "architectures": "what is known of models by name",
        "kernels": "which code a configuration may name",
    },
    {
        "fields": "checks a dataclass by its annotations",
        "patterns": "regular expressions that cannot take hours",
        "hooks": "StepHook: what happens between two steps",
        "rounding": "what 16-bit weights lose when they are edited in place",
        "renamed": "where the names of version 0.1 are",
        "needed": "a file next to saved weights that asks for lorank",
        "auto": "what transformers' Auto classes are promised",
        "sizes": "the shapes of the papers' Llamas",
        "accelerators": "data sheets of devices",
        "whole": "files that are whole or not there",
        "panics": "the errors of libraries in Rust that are no Exception",
    },
)
"""From the top down, each room with what it is for. A room may import rooms of lower rows, and rooms of the same row if no
circle of rooms comes of it. A room is a folder or a file of lorank/."""
ROW = {room: number for number, row in enumerate(ROWS) for room in row}
COMMANDS = (
    "analyze",
    "bench",
    "cache",
    "compare",
    "compress",
    "continual",
    "demo",
    "evaluate",
    "export",
    "federated",
    "finetune",
    "generate",
    "papers",
    "plan",
    "pretrain",
    "recipes",
    "repro",
)
"""Each is one file of lorank/cli/."""
LAZY = ("cli", "auto")
"""Rooms whose functions may import: `lorank --help` and `import lorank` answer at once."""
BY_NAME = ("lorank", "lorank.table", "lorank.optim", "lorank.papers")
"""Modules that import others by a name in a table."""
EXTRAS = ("bitsandbytes", "lm_eval", "flwr", "opacus", "ray")
"""Packages that may be missing, so that only a function can import them."""
ASKED_BY = {"federated": "cli"}
"""Rooms that one other room alone may import, so that they weigh on nothing else."""
DATA_ONLY = ("train", "plan", "comparison")
"""Rooms of which `report` may import names for annotations, and nothing else."""
LONGEST, LONGEST_PAPER = 400, 250
PAPERS = ("methods", "optim", "adapters", "fit", "federated", "evolution")
"""Rooms in which a file that names its source is one paper's."""


class Import(NamedTuple):
    source: str
    """The module that imports: lorank.sites."""
    file: str
    """Its file, from the root."""
    target: str
    """What it imports: a module of lorank, or another package."""
    line: int
    in_function: bool
    for_types: bool
    """Under ``if TYPE_CHECKING``: never executed."""


class Module(NamedTuple):
    name: str
    file: str
    lines: int
    docstring: str
    imports: tuple[Import, ...]
    borrowed: tuple[tuple[str, int], ...]
    """Names used of the package itself, lorank.CoLA, with their lines; its version and its files excepted."""
    by_name: tuple[tuple[str, int], ...]
    """Arguments of ``import_module(...)`` as they are written, with their lines."""

    @property
    def room(self) -> str:
        return room_of(self.name)


def room_of(module: str) -> str:
    """The room of a module of lorank; "lorank" for the package itself and "cli" for its entry point.

    >>> room_of("lorank.methods.cola"), room_of("lorank.sites"), room_of("lorank")
    ('methods', 'sites', 'lorank')
    """
    parts = module.split(".")
    return "cli" if parts[-1] == "__main__" else parts[min(1, len(parts) - 1)]


def read(root: Path = ROOT) -> dict[str, Module]:
    """All modules of lorank by name."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / "lorank").rglob("*.py"))
    }
    return {
        name: _module(name, path.relative_to(root).as_posix(), path.read_text(), paths) for name, path in paths.items()
    }


def _module(name: str, file: str, text: str, known: Container[str]) -> Module:
    tree = ast.parse(text)
    imports, borrowed, by_name = [], [], []
    package, loaders = (
        {"lorank"},
        {"importlib.import_module", "import_module", "__import__"},
    )  # and other names for them
    for node, in_function, for_types in _walk(tree):
        if isinstance(node, ast.Import):
            imports += [Import(name, file, alias.name, node.lineno, in_function, for_types) for alias in node.names]
            package |= {alias.asname for alias in node.names if alias.asname and alias.name == "lorank"}
            loaders |= {
                f"{alias.asname}.import_module" for alias in node.names if alias.asname and alias.name == "importlib"
            }
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level + file.endswith("__init__.py") or None] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "importlib":
                loaders |= {alias.asname for alias in node.names if alias.asname and alias.name == "import_module"}
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                target = whole if whole in known else module
                imports.append(Import(name, file, target, node.lineno, in_function, for_types))
                if target == "lorank" and not alias.name.startswith("__"):
                    borrowed.append((whole, node.lineno))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in package:
            if not node.attr.startswith("__") and f"lorank.{node.attr}" not in known:
                borrowed.append((f"lorank.{node.attr}", node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in loaders:
            by_name.append((ast.unparse(node.args[0]), node.lineno))
    lines = len(text.splitlines())
    unique = tuple(dict.fromkeys(imports))
    return Module(name, file, lines, ast.get_docstring(tree) or "", unique, tuple(borrowed), tuple(by_name))


def _walk(node: ast.AST, in_function: bool = False, for_types: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node below, with whether it is in a function and whether it is there for type checkers alone."""
    inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    typed = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                types = for_types or (typed and field == "body")
                yield child, inside, types
                yield from _walk(child, inside, types)


def arrows(modules: Mapping[str, Module]) -> dict[tuple[str, str], list[Import]]:
    """{(room, room): its imports} between two rooms, without those for types and those of `auto` in a function."""
    found: dict[tuple[str, str], list[Import]] = {}
    for one in _executed(modules):
        ends = room_of(one.source), room_of(one.target)
        if ends[0] != ends[1] and "lorank" not in ends:
            found.setdefault(ends, []).append(one)
    return found


def _executed(modules: Mapping[str, Module]) -> Iterator[Import]:
    for module in modules.values():
        for one in module.imports:
            if one.target in modules and not one.for_types and not (module.room == "auto" and one.in_function):
                yield one


def named(modules: Mapping[str, Module]) -> set[tuple[str, str]]:
    """Arrows between rooms that no import shows: the table names classes, and functions of `auto` import."""
    text = (ROOT / modules["lorank.table"].file).read_text()
    found = {("table", room_of(module)) for module in re.findall(r'"(lorank\.[\w.]+):\w+"', text)}
    return found | {("auto", room_of(one.target)) for one in modules["lorank.auto"].imports if one.target in modules}


def tree(modules: Mapping[str, Module]) -> str:
    """The rooms that exist, one line each, in the order of their rows."""
    ends = {module.room: "/" if module.file.count("/") > 1 else ".py" for module in modules.values()}
    lines = [f"  {room + ends[room]:<20}{line}" for row in ROWS for room, line in row.items() if room in ends]
    return "\n".join(["lorank/", *lines])


def circles(arrows: set[tuple[str, str]]) -> list[list[str]]:
    """Groups of nodes of which each leads to all others, by Tarjan's algorithm.

    >>> circles({("a", "b"), ("b", "c"), ("c", "b")})
    [['b', 'c']]
    """
    after: dict[str, list[str]] = {}
    for start, end in sorted(arrows):
        after.setdefault(start, []).append(end)
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in after.get(node, ()):
            if other not in number:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[-len(group) :]
            if len(group) > 1 or (node, node) in arrows:
                found.append(sorted(group))

    for node in after:
        if node not in number:
            visit(node)
    return sorted(found)


def complaints(root: Path = ROOT) -> list[str]:
    """One sentence for each thing that breaks the plan."""
    modules = read(root)
    checks = (_wrong_rooms, _wrong_arrows, _wrong_circles, _wrong_imports, _wrong_lengths, _wrong_commands)
    return [sentence for check in checks for sentence in check(modules)]


def _wrong_rooms(modules: Mapping[str, Module]) -> Iterator[str]:
    for room in sorted({module.room for module in modules.values()} - {*ROW, "lorank"}):
        yield f"lorank/{room} has no place in the plan; give it a row in docs/rooms.py"


def _wrong_arrows(modules: Mapping[str, Module]) -> Iterator[str]:
    for one in (one for module in modules.values() for one in module.imports if one.target in modules):
        start, end = room_of(one.source), room_of(one.target)
        if not {start, end} <= ROW.keys() or (start == "auto" and one.in_function):
            continue
        if start == "report" and end in DATA_ONLY:
            if not one.for_types:
                yield f"{one.file}:{one.line} imports {one.target}; report may import {end} for annotations only"
        elif start not in (end, ASKED_BY.get(end, start)):
            yield f"{one.file}:{one.line} imports {one.target}; only {ASKED_BY[end]} may import {end}"
        elif ROW[end] < ROW[start]:
            yield f"{one.file}:{one.line} imports {one.target}; {end} is above {start}"
    for module in modules.values():
        for name, line in module.borrowed:
            yield f"{module.file}:{line} uses {name}; import it from the module that defines it"


def _wrong_circles(modules: Mapping[str, Module]) -> Iterator[str]:
    for group in circles({(one.source, one.target) for one in _executed(modules)}):
        yield f"these modules import each other in a circle: {', '.join(group)}"
    for group in circles({*arrows(modules)}):
        if len({ROW.get(room) for room in group}) == 1:  # arrows between rows are complained of above
            yield f"these rooms of one row import each other in a circle: {', '.join(group)}"


def _wrong_imports(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.room in LAZY:
            continue
        for one in module.imports:
            if one.in_function and one.target.partition(".")[0] not in EXTRAS:
                yield f"{one.file}:{one.line} imports {one.target} in a function; import it at the top"
        if module.name not in BY_NAME:
            for name, line in module.by_name:
                if not name.strip("'").startswith(EXTRAS):
                    yield f"{module.file}:{line} imports {name} by name; import it at the top"


def _wrong_lengths(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        paper = module.room in PAPERS and re.search(r"^Sources?:", module.docstring, re.M)
        most = LONGEST_PAPER if paper else LONGEST
        if module.lines > most:
            kind = "the file of a paper" if paper else "a file"
            yield f"{module.file} has {module.lines} lines; {kind} may have {most}"


def _wrong_commands(modules: Mapping[str, Module]) -> Iterator[str]:
    for command in COMMANDS:
        if f"lorank.cli.{command}" not in modules:
            yield f"the command `lorank {command}` must be in lorank/cli/{command}.py"


def long_tests(root: Path = ROOT) -> list[str]:
    """One sentence for each test file that is too long to read in one sitting."""
    lengths = {path: len(path.read_text().splitlines()) for path in sorted((root / "tests").rglob("*.py"))}
    return [
        f"{p.relative_to(root)} has {n} lines; a file may have {LONGEST}" for p, n in lengths.items() if n > LONGEST
    ]
