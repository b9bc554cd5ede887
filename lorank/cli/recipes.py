"""lorank recipes: the recipes that come with lorank."""

import re

import click

from lorank.cli.flags import SETTINGS


@click.command(context_settings=SETTINGS)
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes that come with lorank, or print one.

    `lorank pretrain NAME` trains it, and flags change it. To have a file to edit: lorank recipes NAME > mine.yaml
    """
    from lorank.train.shipped import recipe_names, recipes_folder, shipped_recipe

    if name is not None:
        click.echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    names = recipe_names()
    width = max(map(len, names)) + 2
    for one in names:
        text = (recipes_folder() / f"{one}.yaml").read_text(encoding="utf-8")
        click.echo(f"{one:<{width}}{_headline(text)}")


def _headline(recipe: str) -> str:
    """The beginning of the comment at its top, up to the first colon or end of a sentence.

    >>> _headline("# CoLA 60M on C4, 1.1B tokens: the settings of\\n# a paper. Run: ...\\nsize: 60m\\n")
    'CoLA 60M on C4, 1.1B tokens'
    """
    [comment] = re.findall(r"\A(?:#.*\n)+", recipe)
    return re.split(r"[.:;]\s", re.sub(r"\n?# ?", " ", comment).strip())[0]
