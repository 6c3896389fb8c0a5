"""For mkdocs: what the pages link to outside of docs/ is told there, and not linked.

Pages are also read on a plain git host, where `[test](../tests/test_x.py)` leads to the file. The site has no such
file. And README.md, CHANGELOG.md and their like, which pages include, link from where they are: `docs/design.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INCLUDED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Files of the repository that are a page of the site as well."""


class Links(Treeprocessor):
    def run(self, root: Element) -> None:
        for anchor in root.iter("a"):
            path, hash_, fragment = anchor.get("href", "").partition("#")
            file = file_of(path)
            if file is None:
                continue  # a link to elsewhere; or to nowhere, of which mkdocs warns
            if file.is_relative_to(DOCS):
                anchor.set("href", f"{file.relative_to(DOCS)}{hash_}{fragment}")
            else:
                anchor.tag = "span"
                anchor.attrib = {"title": str(file.relative_to(ROOT))}


def file_of(path: str) -> Path | None:
    """The file or folder that a link leads to: from docs/ or, in what is included, from the repository's root."""
    found = next((each for each in ((DOCS / path).resolve(), (ROOT / path).resolve()) if each.exists()), None)
    if not path or found is None:
        return None
    return DOCS / INCLUDED[found.name] if found.parent == ROOT and found.name in INCLUDED else found


class RepositoryLinks(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.treeprocessors.register(
            Links(md), "repository-links", 15
        )  # after links are parsed (20), before mkdocs looks at them (10)


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(RepositoryLinks())
    return config
