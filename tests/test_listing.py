"""The page of all papers has a row for each method and file of a paper, and names only what is there."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import listing  # noqa: E402
import pages  # noqa: E402

from lorank.cli import cli  # noqa: E402

ROWS = [row for rows in listing.SECTIONS.values() for row in rows]


def test_every_paper_of_the_table_and_of_the_folders_has_a_row() -> None:
    methods = pages.method_pages()
    named = {one for row in ROWS for one in row.where}
    assert not [names for names in methods.values() if not named & set(names)]
    files = {file for row in ROWS for file in listing.files(row)}
    for folder in ("lorank/methods", "lorank/adapters", "lorank/fit", "lorank/federated", "examples/blocks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            paper = re.search(r"^Sources?: ", path.read_text(), re.M)
            assert not paper or name in files, f"docs/listing.py has no row for {name}"


def test_rows_name_what_is_there_and_say_what_is_not() -> None:
    text = listing.tables(pages.method_pages())
    for name in re.findall(r"`((?:lorank|tests|benchmarks|examples)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
    for command in re.findall(r"`lorank ([^` ]+)", text):
        assert command in cli.commands, command
    for row in ROWS:
        shown = listing.line(row, pages.method_pages())
        if listing.files(row):
            assert listing.tests(row), f"{row.paper} has no test"
        else:
            assert "**not in the repository**" in shown
    for page in re.findall(r"\(methods/([\w-]+)\.md\)", text):
        assert (ROOT / f"docs/methods/{page}.md").exists(), page
