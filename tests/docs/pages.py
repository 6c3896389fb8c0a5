"""The pages for readers, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]

_FENCE = re.compile(
    r"(?:^<!-- (?:not run: (?P<reason>[^\n]+?)|(?P<source>[\w./-]+)) -->\n+)?"
    r'^(?P<indent> *)```(?P<language>[\w-]*)(?: title="(?P<title>[^"\n]+)")?\n(?P<text>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    title: the file that it is, as the page shows it, or None.
    source: the file of this repository that it is taken from, as a comment before it says, or None: `<!-- path -->`.
    reason: why it is not run, as a comment before it says, or None: `<!-- not run: reason -->`.
    line: where it begins.
    """

    page: Path
    line: int
    language: str
    title: str | None
    source: str | None
    reason: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks = [
        Block(
            page=page,
            line=text.count("\n", 0, match.start("indent")) + 1,
            language=match["language"],
            title=match["title"],
            source=match["source"],
            reason=match["reason"],
            text=match["text"] if match["source"] else dedent(match["text"]),
        )
        for match in _FENCE.finditer(text)
    ]
    fences = len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE))
    assert fences == 2 * len(blocks), f"{name_of(page)} has a fence that is written otherwise than the others"
    return blocks


def text_without_blocks(page: Path) -> str:
    return _FENCE.sub("", page.read_text())
