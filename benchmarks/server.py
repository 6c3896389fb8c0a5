"""Where the memcached of a run listens, for processes that did not start it."""

from __future__ import annotations

import socket
from typing import NamedTuple


class Server(NamedTuple):
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"memcached://{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=5)
