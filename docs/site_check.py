"""Links of built pages: those within the site lead somewhere, those out of it are whole, and no page loads anything from there."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {
    *((tag, "src") for tag in ("script", "img", "source", "iframe", "video", "audio", "track", "embed", "input")),
    *(("link", "href"), ("object", "data"), ("video", "poster"), ("image", "href"), ("use", "href")),
}
STYLE = re.compile(r"""url\(\s*['"]?([^'")]+?)['"]?\s*\)|@import\s*['"]([^'"]+)['"]""")
OUTWARD = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/\S*)?")


class Page(HTMLParser):
    """What a page can be linked at, links to, and loads."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, bool]] = []
        """(target, whether a browser loads it unasked)."""
        self.styled = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value or "")
            elif (tag, name) == ("a", "href") or (tag, name) in LOADS:
                self.links.append((value or "", tag != "a"))
            elif name == "srcset":
                self.links += [(part.split()[0], True) for part in (value or "").split(", ") if part.strip()]
            elif name == "style":
                self.links += [(target, True) for target in loaded_by(value or "")]
        self.styled = tag == "style"

    def handle_data(self, data: str) -> None:
        if self.styled:
            self.links += [(target, True) for target in loaded_by(data)]

    def handle_endtag(self, tag: str) -> None:
        self.styled = False


def loaded_by(style: str) -> list[str]:
    """What a style sheet loads, but for its comments."""
    return [url or imported for url, imported in STYLE.findall(re.sub(r"/\*.*?\*/", "", style, flags=re.S))]


def complaints(site: Path) -> list[str]:
    """One sentence for each link that is wrong, and for each thing that a page or a style sheet loads from elsewhere."""
    found = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    styles = {
        path.resolve(): [(target, True) for target in loaded_by(path.read_text())] for path in site.rglob("*.css")
    }
    wrong = []
    for path, links in [*((path, page.links) for path, page in found.items()), *styles.items()]:
        where = path.relative_to(site.resolve())
        for target, loaded in links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if loaded and parts.scheme != "data":
                    wrong.append(f"{where} loads {target}")
                elif not loaded and not OUTWARD.fullmatch(target):
                    wrong.append(f"{where} links to {target}, which is no https address")
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                wrong.append(f"{where} links to {target}, and there is no such file")
            elif parts.fragment and file in found and unquote(parts.fragment) not in found[file].anchors:
                wrong.append(f"{where} links to {target}, and the page has no such place")
    return wrong


def check(site: Path) -> None:
    """Raises ValueError that lists what is wrong with the links of a built site."""
    if wrong := sorted(set(complaints(site))):
        raise ValueError("\n".join(wrong))
