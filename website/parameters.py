"""For mkdocstrings: the lines `name: what it is` of a docstring become a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

PARAMETER = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.+(?:\n {4}.+)*)$", re.MULTILINE)


def as_list(text: str) -> str:
    """Make each `name: text` at the beginning of a line, with its indented lines, an item."""

    def item(match: re.Match[str]) -> str:
        names = ", ".join(f"`{name}`" for name in match[1].split(", "))
        return f"- {names}: {match[2]}"

    marked = PARAMETER.sub(item, text)
    return re.sub(r"(?m)^(?!- |    |$)(.+)\n(?=- )", r"\1\n\n", marked)  # a list begins a paragraph


class Parameters(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_attribute:
            obj.docstring.value = as_list(obj.docstring.value)
