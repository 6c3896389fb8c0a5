"""The examples' applications, served in processes of their own as their users would serve them."""

from __future__ import annotations

import os
import re
import shlex
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.servers.process import HOST, Identity, Process, free_port, give_back_port

ROOT: Final = Path(__file__).parents[2]

SERVERS: Final[Mapping[str, str]] = {
    "fastapi-uvicorn": "uvicorn airports.app_fastapi:app --host {host} --port {port} --loop asyncio",
    "fastapi-uvloop": "uvicorn airports.app_fastapi:app --host {host} --port {port} --loop uvloop",
    "fastapi-hypercorn": "hypercorn airports.app_fastapi:app --bind {host}:{port}",
    "fastapi-granian": "granian airports.app_fastapi:app --interface asgi --host {host} --port {port}",
    "litestar-uvicorn": "uvicorn airports.app_litestar:app --host {host} --port {port}",
    "aiohttp": "tests.applications.under_aiohttp {host} {port}",
    "aiohttp-cancelling": "tests.applications.under_aiohttp {host} {port} --cancelling",
}
"""How an application is served, each a line for `python -m`. "cancelling" cancels a handler when its client is gone."""

LOUD: Final = "default::ResourceWarning,default::RuntimeWarning"
"""Warnings that say that something was left behind; Python does not show all of them by default."""

TROUBLE: Final = re.compile(
    r"^.*(?:Warning|Traceback|ERROR|CRITICAL|Exception|Error\b|never|leak|garbage|destroyed but|pending).*$",
    re.MULTILINE,
)

SUPERVISORS_SOCKET: Final = re.compile(
    r"(?:sys:1|<sys>:0): ResourceWarning: unclosed <(?!.*raddr).*\n.*tracemalloc.*\n"
)
"""What uvicorn leaves open that only starts others: the socket at which these listen."""


class Program:
    """A program of the examples, for as long as the `with` block.

    line: for `python -m`; `{host}` and `{port}` are where it is to listen, if it does.
    """

    def __init__(self, line: str, *, database_url: str, cache_url: str) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._line = line.format(host=HOST, port=self.port)
        self._environment = {
            "DATABASE_URL": database_url,
            "CACHE_URL": cache_url,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)]),
            "PYTHONWARNINGS": LOUD,
        }

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", *shlex.split(self._line)]
        self.process = Process(command, environment=self._environment, identity=Identity())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()
        give_back_port(self.port)

    def wait_until_served(self) -> None:
        self.process.wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=20) as answer:  # noqa: S310 (of our own)
                return bool(answer.status == 200)
        except OSError:
            return False

    @property
    def troubles(self) -> list[str]:
        """The lines of its log that speak of trouble."""
        return TROUBLE.findall(SUPERVISORS_SOCKET.sub("", self.process.log()))
