"""`make docs` finds links of the site that lead nowhere, and everything that a page loads from elsewhere."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import site_check


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="https://arxiv.org/abs/2502.10940">', None),
        ('<a href="c.html">', "a.html links to c.html, and there is no such file"),
        ('<a href="b.html#gone">', "a.html links to b.html#gone, and the page has no such place"),
        ('<a href="#gone">', "a.html links to #gone, and the page has no such place"),
        ('<a href="http:/arxiv">', "a.html links to http:/arxiv, which is no https address"),
        ('<img src="picture.png">', "a.html links to picture.png, and there is no such file"),
        ('<script src="https://cdn.example.org/x.js">', "a.html loads https://cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="//fonts.example.org/x">', "a.html loads //fonts.example.org/x"),
        ('<img srcset="b.html 1x, big.png 2x">', "a.html links to big.png, and there is no such file"),
        ('<source srcset="https://cdn.example.org/x.png">', "a.html loads https://cdn.example.org/x.png"),
        ('<video src="film.mp4">', "a.html links to film.mp4, and there is no such file"),
        ('<video><source src="film.mp4">', "a.html links to film.mp4, and there is no such file"),
        ('<object data="https://cdn.example.org/x.svg">', "a.html loads https://cdn.example.org/x.svg"),
        ("<p style=\"background: url('gone.png')\">", "a.html links to gone.png, and there is no such file"),
        ("<style>p { background: url(b.html) }</style>", None),
        ("<style>@import 'gone.css';</style>", "a.html links to gone.css, and there is no such file"),
        ("<style>@import url(//fonts.example.org/x)</style>", "a.html loads //fonts.example.org/x"),
        ("<p>a sheet may have url(gone.png)", None),
    ],
)
def test_a_broken_link_of_the_site_is_found(body: str, complaint: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f"<p id='here'>{body}")
    (tmp_path / "b.html").write_text("<p id='there'>")
    assert site_check.complaints(tmp_path) == ([complaint] if complaint else [])


def test_what_a_style_sheet_loads_is_found(tmp_path: Path) -> None:
    (tmp_path / "here.png").touch()
    style = "@import url('https://fonts.example.org/f.css'); a { background: url(here.png) } b { background: url(gone.png) }"
    (tmp_path / "s.css").write_text(f"/* url(old.png) */ {style} c {{ background: url(data:image/png;base64,AA) }}")
    assert site_check.complaints(tmp_path) == [
        "s.css loads https://fonts.example.org/f.css",
        "s.css links to gone.png, and there is no such file",
    ]
