"""Small pieces of a page: cells and tables of HTML, and numbers in words."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def escape(text: object) -> str:
    return html.escape(visible(str(text)))


def visible(text: str) -> str:
    """Text whose control characters are visible and have no effect, for a page and for a terminal.

    >>> visible("a\\x00b\\x1b[2J"), visible("line\\n")
    ('a␀b␛[2J', 'line\\n')
    """

    def picture(found: re.Match[str]) -> str:
        code = ord(found[0])
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"\\x{code:02x}"

    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", picture, text)


def page(title: str, sections: Iterable[str], footer: str) -> str:
    """A whole page, which refers to nothing outside itself."""
    here = Path(__file__)
    css, script = here.with_name("page.css").read_text(), here.with_name("page.js").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + f'\n<footer>{escape(footer)}</footer>\n</main><div class="tip"></div>\n<script>\n{script}</script></body></html>\n'
    )


def cell(text: str, small: str = "", kind: str = "") -> str:
    """A table cell with a second, smaller line; `table(stacks=True)` puts the column's title into it for narrow windows."""
    under = f"<small>{escape(small)}</small>" if small else ""
    return f'<td class="{kind}">{escape(text)}{under}</td>' if kind else f"<td>{escape(text)}{under}</td>"


def bar_cell(share: float, text: str, small: str, style: str) -> str:
    """A table cell with a bar under its text, as long as `share` of its width, at most all of it."""
    bar = f'<i class="bar {style}" style="width:{100 * min(share, 1):.1f}%"></i>'
    return f"<td>{escape(text)}<small>{escape(small)}</small>{bar}</td>"


def name_cell(name: str, style: str) -> str:
    """The cell that begins a row, with the line it has in the charts."""
    return f'<th scope="row"><i class="key {style}"></i>{escape(name)}</th>'


def table(titles: Iterable[str], rows: Iterable[str], *, stacks: bool = False) -> str:
    """A table that scrolls sideways if it is too wide, or on a telephone stacks each row's cells under its name; `rows` hold
    finished cells."""
    titles = list(titles)
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(f"<tr>{_titled(row, titles) if stacks else row}</tr>" for row in rows)
    kind = ' class="stacks"' if stacks else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _titled(row: str, titles: Sequence[str]) -> str:
    """A row whose cells know the titles of their columns."""
    ahead = iter(titles[1:])
    return re.sub("<td", lambda _: f'<td data-title="{escape(next(ahead))}"', row)


def section(title: str, under: str, *parts: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<p class="under">{escape(under)}</p>\n' + "\n".join(parts)


def between(values: Mapping[str, Any], show: str) -> str:
    """An interval; empty if there is none."""
    if values["low"] is None:
        return ""
    return f"{show.format(values['low'])} to {show.format(values['high'])}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def percent(value: float, digits: int = 0) -> str:
    """A share in per cent.

    >>> percent(0.256), percent(0.256, 1)
    ('26 %', '25.6 %')
    """
    return f"{value * 100:.{digits}f} %"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Chosen settings in a few words.

    >>> settings_text({"lr": 0.003, "decay": "all"})
    'lr 0.003, decay all'
    """
    return ", ".join(
        f"{name} {value:.10g}" if is_number(value) else f"{name} {value}" for name, value in settings.items()
    )


def duration(seconds: float) -> str:
    """Seconds in a suitable unit.

    >>> duration(42), duration(200), duration(5000)
    ('42 s', '3.3 min', '1.4 h')
    """
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.3g} {unit}" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.3g} s"


def memory(gib: float) -> str:
    """GiB, or MiB below one GiB.

    >>> memory(0.25), memory(12)
    ('256 MiB', '12 GiB')
    """
    return f"{gib:.3g} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"
