"""The recipes that come with lorank."""

import difflib
import functools
from pathlib import Path

import lorank
from lorank.train.yamls import load


def recipes_folder() -> Path:
    """Where recipes/ is: inside an installed package, or next to it in a checkout."""
    package = Path(lorank.__file__).parent
    return next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package / "recipes")


def recipe_path(name: str | Path) -> Path:
    """The file of that path, or else the recipe of that name that comes with lorank, cola-60m; or 60m-cola, as 0.2 called its reproduction."""
    files = (recipes_folder() / f"{one}.yaml" for one in _spellings(str(name)))
    ours = next((path for path in files if path.is_file()), None)
    return Path(name) if ours is None or Path(name).exists() else ours


def shipped_recipe(name: str) -> Path:
    """The file of the recipe that comes with lorank under that name; 60m-cola is cola-60m.

    Raises:
        ValueError: there is none.
    """
    names = recipe_names()
    for one in _spellings(name):
        if one in names:
            return recipes_folder() / f"{one}.yaml"
    begun = [one for one in names if one.startswith(f"{name}-")]
    near = begun or difflib.get_close_matches(name, names, n=1)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"NAME must be one of those that `lorank recipes` lists, got {name!r}{meant}")


def _spellings(name: str) -> tuple[str, str]:
    """A name, and that in which its first part comes last."""
    size, _, method = name.partition("-")
    return name, f"{method}-{size}"


def recipe_names() -> list[str]:
    """The recipes that come with lorank."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def recipe_file(method: str, size: str) -> Path:
    """Of a method at a size, whether it exists or not; CoLA-M has CoLA's."""
    return recipes_folder() / f"{method.removesuffix('-m')}-{size}.yaml"


@functools.cache
def published_lr(method: str, size: str) -> float | None:
    """The learning rate that the recipe of a method at a size names; None if there is no recipe, or it leaves the rate
    open because no source is known for it."""
    path = recipe_file(method, size)
    found = load(path.read_text(encoding="utf-8")).get("lr") if path.is_file() else None
    return None if found is None else float(found)
