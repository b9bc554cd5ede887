"""Published costs of the papers, cell by cell next to our own count. Each paper is one file with one object.

A published figure is kept as printed, so that its last digit shows its precision. It *follows* from the formula next to
it if the formula rounds to it; if the two differ by less than one unit of that digit, it was rounded another way. A
measured figure has no formula; it is *met* if our count is within `PaperTable.within` of it. The other cells are listed
with the reason as far as we know it. The tests check the mark of every cell.
"""

import difflib

from lorank.papers import apollo, cola, crnet, dct, eggroll, fira, galore, masa, relora, sltrain, sst, switchlora
from lorank.papers.table import Cell, Mark, Paper, PaperTable

__all__ = ["ALSO", "PAPERS", "Cell", "Mark", "Paper", "PaperTable", "find_paper"]

PAPERS: dict[str, Paper] = {
    module.PAPER.name: module.PAPER
    for module in (cola, crnet, sltrain, galore, fira, relora, switchlora, sst, masa, dct, apollo, eggroll)
}
ALSO = {"cola-m": "cola", "cr-net": "crnet", "dct-adamw": "dct", "trion": "dct", "apollo-mini": "apollo"}
"""Methods whose paper has another name."""


def find_paper(name: str) -> Paper:
    """The costs a paper publishes, by its name or a method's; ValueError with the known names if there is none."""
    if (found := PAPERS.get(ALSO.get(name, name))) is not None:
        return found
    known = [*PAPERS, *ALSO]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no published costs are known for {name!r}; {hint}choose {', '.join(known)} or all")
