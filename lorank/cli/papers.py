"""lorank papers: published costs next to ours."""

import click

from lorank.cli.flags import SETTINGS


@click.command(context_settings=SETTINGS)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values instead of tables.")
def papers(names: tuple[str, ...], as_json: bool, as_csv: bool) -> None:
    """Compare a paper's published costs with our counts.

    The tables show which figures do not follow from the paper's own formulas. NAME is a paper or a method; `all` means every
    paper. Without NAME, the papers are listed.
    """
    if as_json and as_csv:
        raise ValueError("give --json or --csv, not both")
    from lorank.cli.console import results_console
    from lorank.papers import PAPERS, find_paper
    from lorank.report import papers as report

    found = [find_paper(name) for name in (PAPERS if "all" in names or ((as_json or as_csv) and not names) else names)]
    if as_json:
        click.echo(report.papers_json(found))
    elif as_csv:
        click.echo(report.papers_csv(found))
    elif found:
        results_console().print(report.paper_tables(found), highlight=False)
    else:
        for paper in (find_paper(name) for name in PAPERS):
            click.echo(f"{paper.name:<12}{paper.title}, arXiv {paper.arxiv}")
