"""Where the memcached of a run listens, for processes that did not start it."""

from __future__ import annotations

from typing import NamedTuple


class Server(NamedTuple):
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"memcached://{self.host}:{self.port}"
