"""What a run has: servers with rows in them, contenders, how long it may take, and where figures go."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.contenders import NAMES, Contender, Field, field_of
from benchmarks.figures import Figures
from benchmarks.server import Server
from benchmarks.shop import engine_of


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done. Rounds have a warm-up before them that is not counted."""

    rounds: int
    gets: int
    """Hits of a contender in a round, each of another row (at most `len(HOT)`)."""
    misses: int
    """Misses of a contender in a round."""
    crowd_rounds: int
    crowd_keys: int
    crowd_s: float
    """How long the 64 tasks work in a round."""
    herds: int
    """How often ours are measured with a herd. The others are measured once, since it takes long."""
    herd_tasks: int
    fleet_processes: int
    fleet_tasks: int
    commits: int
    entries: tuple[int, ...]
    web_rounds: int
    web_s: float


FULL: Final = Effort(
    rounds=15,
    gets=100,
    misses=40,
    crowd_rounds=4,
    crowd_keys=500,
    crowd_s=0.4,
    herds=2,
    herd_tasks=10_000,
    fleet_processes=8,
    fleet_tasks=1_000,
    commits=40,
    entries=(1_000, 100_000, 1_000_000),
    web_rounds=7,
    web_s=1.5,
)
QUICK: Final = Effort(
    rounds=3,
    gets=20,
    misses=8,
    crowd_rounds=2,
    crowd_keys=50,
    crowd_s=0.05,
    herds=1,
    herd_tasks=500,
    fleet_processes=2,
    fleet_tasks=100,
    commits=4,
    entries=(1_000, 20_000),
    web_rounds=2,
    web_s=0.3,
)


@dataclass(frozen=True, slots=True)
class Stage:
    effort: Effort
    figures: Figures
    postgres_url: str
    commits_url: str
    """An empty database."""
    sqlite_url: str
    server: Server
    engine: AsyncEngine
    field: Field
    """On PostgreSQL."""
    tell: Callable[[str], None]
    """What is going on, for who waits."""

    @property
    def contenders(self) -> Sequence[Contender]:
        return self.field.contenders

    def turns(self, rounds: int) -> list[tuple[int, list[Contender]]]:
        """So many rounds, the first of them (0) to warm up. Everybody is once the first of a round."""
        return [(number, rotated(self.contenders, number)) for number in range(rounds + 1)]


def rotated(contenders: Sequence[Contender], number: int) -> list[Contender]:
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


@asynccontextmanager
async def on(url: str, server: Server, names: Sequence[str] = NAMES) -> AsyncGenerator[tuple[AsyncEngine, Field]]:
    """An engine and the contenders on it."""
    engine = engine_of(url)
    field = await field_of(engine, server, names)
    try:
        yield engine, field
    finally:
        await field.aclose()
        await engine.dispose()
