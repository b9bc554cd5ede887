"""The sources keep to the plan in docs/rooms.py: arrows lead down, nothing goes in a circle, and files stay short."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import drawing  # noqa: E402
import rooms  # noqa: E402


def test_the_sources_keep_to_the_plan() -> None:
    if wrong := rooms.complaints():
        said = [f"{len(wrong)} things break the plan in docs/rooms.py:", *wrong, *rooms.long_tests()]
        pytest.fail("\n".join(said), pytrace=False)


def test_names_of_tests_have_60_characters_at_most() -> None:
    names = [
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    assert len(names) > 1000 and not [name for name in names if len(name) > 60]


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"sites": "import lorank.table"}, "lorank/sites.py:1 imports lorank.table; table is above sites"),
        ({"sites": "from lorank import table"}, "lorank/sites.py:1 imports lorank.table; table is above sites"),
        ({"table": "from lorank import CoLA"}, "lorank/table.py:1 uses lorank.CoLA; import it from the module that defines it"),
        ({"table": "import lorank\nlorank.CoLA"}, "lorank/table.py:2 uses lorank.CoLA; import it from the module that defines it"),
        ({"table": "import lorank\nlorank.__version__"}, None),
        ({"table": "import lorank as house\nhouse.CoLA"}, "lorank/table.py:2 uses lorank.CoLA; import it from the module that defines it"),
        ({"report/a": "import lorank.train.b", "train/b": ""}, "lorank/report/a.py:1 imports lorank.train.b; report may import train for annotations only"),
        ({"report/a": "if TYPE_CHECKING:\n    import lorank.train.b", "train/b": ""}, None),
        ({"report/a": "if not TYPE_CHECKING:\n    import lorank.train.b", "train/b": ""}, "lorank/report/a.py:2 imports lorank.train.b; report may import train for annotations only"),
        ({"sites": "from . import table"}, "lorank/sites.py:1 imports lorank.table; table is above sites"),
        ({"methods/a": "from .. import table"}, "lorank/methods/a.py:1 imports lorank.table; table is above methods"),
        ({"methods/a": "from . import b", "methods/b": "from .a import x"}, "these modules import each other in a circle: lorank.methods.a, lorank.methods.b"),
        ({"methods/a": "import lorank.methods.b", "methods/b": "import lorank.methods.a"}, "these modules import each other in a circle: lorank.methods.a, lorank.methods.b"),
        ({"methods/a": "import lorank.optim.b", "optim/b": "", "optim/c": "import lorank.methods.a"}, "these rooms of one row import each other in a circle: methods, optim"),
        ({"comparison/a": "import lorank.federated.b", "federated/b": ""}, "lorank/comparison/a.py:1 imports lorank.federated.b; only cli may import federated"),
        ({"table": "def f():\n    import json"}, "lorank/table.py:2 imports json in a function; import it at the top"),
        ({"train/a": "f = lambda: __import__('json')"}, "lorank/train/a.py:1 imports 'json' by name; import it at the top"),
        ({"train/a": "from importlib import import_module as load\nload('json')"}, "lorank/train/a.py:2 imports 'json' by name; import it at the top"),
        ({"train/a": "def f():\n    import bitsandbytes"}, None),
        ({"cli/plan": "def f():\n    import json", "auto": "def f():\n    import lorank.table"}, None),
        ({"table": "\n" * 401}, "lorank/table.py has 401 lines; a file may have 400"),
        ({"optim/a": "\n" * 251}, None),
        ({"optim/a": '"""A paper.\n\nSource: somebody."""' + "\n" * 250}, "lorank/optim/a.py has 252 lines; the file of a paper may have 250"),
        ({"utils": ""}, "lorank/utils has no place in the plan; give it a row in docs/rooms.py"),
    ],
)  # fmt: skip
def test_a_violation_is_named(sources: dict[str, str], complaint: str | None, tmp_path: Path) -> None:
    for name, text in {"__init__": "", "table": "", **{f"cli/{c}": "" for c in rooms.COMMANDS}, **sources}.items():
        file = tmp_path / f"lorank/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert rooms.complaints(tmp_path) == ([complaint] if complaint else [])


def test_a_command_without_a_file_is_named(tmp_path: Path) -> None:
    assert "the command `lorank plan` must be in lorank/cli/plan.py" in rooms.complaints(tmp_path)


def test_the_map_has_every_room_and_only_arrows_of_the_sources() -> None:
    modules = rooms.read()
    drawn = drawing.svg(modules)
    for room in {module.room for module in modules.values()} & rooms.ROW.keys():
        assert f">{room}</text>" in drawn
    assert "<title>conversion → pretrained</title>" in drawn
    assert "<title>method → conversion</title>" not in drawn
    assert "<title>cli → method</title>" not in drawn, "it follows from others"
