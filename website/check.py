"""Is every link within the built site whole, and does a page load nothing from elsewhere? `check.py build/site`.

mkdocs checks what is written as Markdown. This checks what came of it: included pages, HTML, the API, the theme.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """What a page names, links to, and loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.names = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names |= {str(values[name]) for name in ("id", "name") if values.get(name)}
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif tag in LOADED and values.get("rel") != "canonical":
            self.loaded.append(values.get(LOADED[tag]) or "")


def main(site: Path) -> None:
    site = site.resolve()
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}  # its links are absolute
    wrong: list[str] = []
    for file, page in pages.items():
        where = file.relative_to(site)
        wrong += [f"{where} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            there = pages.get(target)
            if not target.is_file() or (there is not None and unquote(parts.fragment) not in there.names):
                wrong.append(f"{where} leads nowhere: {url}")
    if wrong or not pages:
        sys.exit("\n".join(wrong) or f"no pages in {site}")
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
