"""How figures are shown: medians with their middle half, as a table of the terminal or of a page."""

from __future__ import annotations

import os
import platform
import socket
import statistics
from collections.abc import Sequence
from datetime import date
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.servers import Memcached

LOG_COLUMNS: Final = 200


def shown(values: Sequence[float], form: str) -> str:
    """The median, and in brackets the middle half. One value is shown as it is."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:{form}} ({low:{form}}–{high:{form}})"


def conditions(*parts: str) -> str:
    """When and where something was measured, and `parts`: whatever else has a part in the figures."""
    return ", ".join(
        [
            f"{date.today()}, {os.cpu_count()} cores ({platform.system()} {platform.machine()})",  # noqa: DTZ011
            f"{platform.python_implementation()} {platform.python_version()} with asyncio's own event loop",
            *parts,
        ]
    )


def memcached_version(server: Memcached) -> str:
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall(b"version\r\n")
        return connection.recv(64).split()[1].decode()


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], under: str = "", *, texts: int = 1) -> str:
    """A table of a page, after the line `under`; so many columns from the left are text, the others figures."""
    figures = ["---:"] * (len(headings) - texts)
    lines = [headings, ["---"] * texts + figures, *rows]
    return "\n".join([under, "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], under: str, title: str | None = None) -> None:
    table = Table(*headings, caption=under, title=title)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a log, which cuts no lines
        console = Console(width=LOG_COLUMNS)
    console.print(table)
