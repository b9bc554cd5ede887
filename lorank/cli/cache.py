"""lorank cache: what the cache of prepared text holds, and how it is emptied."""

import click

from lorank.cli.flags import SETTINGS


@click.command(context_settings=SETTINGS)
@click.option("--clear", is_flag=True, help="Delete all that no running process uses.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    default=None,
    help="Delete what has not been used for that many days.",
)
def cache(clear: bool, older_than: float | None) -> None:
    """List what the cache holds, or empty it.

    Texts that were read, vocabularies that were learnt and rows of tokens are kept in $XDG_CACHE_HOME/lorank, or
    ~/.cache/lorank, so that the next run on the same data begins at once. All of it can be deleted: it is made again when it
    is needed. What a running process uses is never deleted.
    """
    if clear and older_than is not None:
        raise ValueError("--clear deletes all, and --older-than only what is old; give one of them")
    from lorank.cli.console import results_console
    from lorank.report.cached import cache_table, total
    from lorank.train.data import cache as library
    from lorank.train.data.sources import cache_place

    console, place = results_console(), cache_place()
    if clear or older_than is not None:
        gone = library.clear(place, 86_400 * (older_than or 0.0))
        console.print(f"deleted {total(gone)}", highlight=False)
    left = library.entries(place)
    if left:
        console.print(cache_table(left), highlight=False)
    console.print(f"{place}: {total(left)}", markup=False, highlight=False, soft_wrap=True)
