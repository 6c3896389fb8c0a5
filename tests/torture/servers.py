"""What happens to memcached in a run. All of it is done by the parent, between two looks at its processes."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from tests.servers import Memcached
from tests.torture.mixes import Fault, Mix
from tests.torture.worker import LOCK_S_MAX

PAGE_BYTES: Final = 1 << 20
ITEM_BYTES: Final = 70
"""What memcached needs for an item beside its value: its header, and a short key."""
BALLAST_BYTES: Final = (10, 35, 60, 90, 150, 200, 260, 330)
"""The sizes of values that others store: memcached keeps items of about one size in pages of their own, so that only
such of the size of a lock can evict a lock."""


def memcached_for(mix: Mix) -> Memcached:
    arguments = ["-m", "1", "-I", "512k"] if Fault.EVICT in mix.faults else []
    if mix.protects_locks:
        arguments += ["-o", f"temporary_ttl={LOCK_S_MAX:.0f}"]
    return Memcached(*arguments)


@dataclass(slots=True)
class ServerFaults:
    """
    injected: how often each was.
    evictions: what the server itself has counted, over its restarts.
    """

    memcached: Memcached
    mix: Mix
    injected: Counter[Fault] = field(default_factory=Counter)
    evictions: int = 0
    _random: random.Random = field(init=False)
    _seen: int = 0
    _due: list[tuple[float, Iterator[float]]] = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.mix.seed)
        scripts: dict[Fault, Callable[[], Iterator[float]]] = {
            Fault.RESTART: self._restart,
            Fault.PAUSE: self._pause,
            Fault.EVICT: self._evict,
        }
        began_s = time.monotonic()
        self._due = [(began_s, script()) for fault, script in scripts.items() if fault in self.mix.faults]

    def go_on(self) -> None:
        """Do what is due."""
        for i, (due_s, script) in enumerate(self._due):
            if due_s <= time.monotonic():
                self._due[i] = time.monotonic() + next(script), script

    def heal(self) -> None:
        """The server runs, and is left alone from here on."""
        self._due = []
        self.memcached.start()
        self.memcached.resume()
        self.count_evictions()

    def count_evictions(self) -> None:
        stats = self._stats()
        if "evictions" in stats:
            now = int(stats["evictions"])
            self.evictions += now - self._seen if now >= self._seen else now
            self._seen = now

    # Each yields the seconds until it goes on.

    def _restart(self) -> Iterator[float]:
        yield 0.5
        while True:
            self.count_evictions()
            self.memcached.resume()
            self.memcached.stop()
            self._seen = 0
            yield self._random.choice([0.0, 0.02, 0.2])
            self.memcached.start()
            self.injected[Fault.RESTART] += 1
            yield self._random.uniform(0.7, 1.1) * self.mix.rarity

    def _pause(self) -> Iterator[float]:
        yield 0.5
        while True:
            with suppress(RuntimeError):  # it is away just now
                self.memcached.pause()
                self.injected[Fault.PAUSE] += 1
            yield self._random.choice([0.1, 0.35, 0.8])
            with suppress(RuntimeError):
                self.memcached.resume()
            yield self._random.uniform(0.3, 1.5) * self.mix.rarity

    def _evict(self) -> Iterator[float]:
        while True:
            self._fill_up()
            self.injected[Fault.EVICT] += 1
            self.count_evictions()
            yield self._random.uniform(0.03, 0.1) * self.mix.rarity

    def _fill_up(self) -> None:
        """Store as much of one size as there is room for."""
        size = self._random.choice(BALLAST_BYTES)
        first = self._random.randrange(10**9)
        store = b"set ballast:%%d 0 600 %d noreply\r\n%b\r\n" % (size, b"x" * size)
        self._command(b"".join([store % number for number in range(first, first + PAGE_BYTES // (size + ITEM_BYTES))]))

    def _stats(self) -> dict[str, str]:
        lines = self._command(b"stats\r\n").decode().splitlines()
        return dict(line.split(" ", 2)[1:] for line in lines if line.startswith("STAT "))

    def _command(self, command: bytes) -> bytes:
        answer = b""
        with (
            suppress(OSError),  # it is away, or frozen
            socket.create_connection((self.memcached.host, self.memcached.port), timeout=0.2) as connection,
        ):
            connection.sendall(command + b"version\r\n")
            while not answer.endswith(b"\r\n") or b"VERSION " not in answer:
                part = connection.recv(65536)
                if not part:
                    break
                answer += part
        return answer
