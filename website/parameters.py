"""For mkdocstrings: the lines `name: what it is` of a docstring become a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

PARAMETER = re.compile(r"^(\*{0,2}\w+(?:,\s\*{0,2}\w+)*): (.+(?:\n {4}.+)*)\n?", re.MULTILINE)


def as_list(text: str) -> str:
    """Make each `name: text` at the beginning of a line, with its indented lines, an item of a list."""

    def item(match: re.Match[str]) -> str:
        names = ", ".join(f"`{name}`" for name in match[1].replace(",", " ").split())
        return f"\n- {names}: {match[2]}\n\n"

    return PARAMETER.sub(item, text)


class Parameters(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_attribute:
            obj.docstring.value = as_list(obj.docstring.value)
