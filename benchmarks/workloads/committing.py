"""What the cache adds to a commit: `benchmarks.commits`, as figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from benchmarks import commits
from benchmarks.figures import MILLISECONDS
from benchmarks.stage import Stage

RAW: Final = "aiomcache alone: one round trip"
WAYS: Final = {
    commits.RAW: RAW,
    commits.PLAIN: commits.PLAIN,
    commits.CACHED: commits.CACHED,
    commits.SINGLY: commits.SINGLY,
    commits.UNREGISTERED: commits.UNREGISTERED,
}


def changing(rows: int) -> str:
    return f"commit of {rows} changed row{'s' * (rows > 1)}"


async def run(stage: Stage) -> None:
    def told(rounds: int) -> Iterator[int]:
        for number in range(rounds + 1):
            stage.tell(f"commits, round {number} of {rounds}")
            yield number

    rounds: Iterable[int] = told(stage.effort.rounds)
    times = {1: stage.effort.commits, commits.ROWS: max(stage.effort.commits // 4, 1)}
    for each in await commits.measure(stage.commits_url, stage.server, rounds, times):
        for way, name in WAYS.items():
            for rows, taken in each[way].items():
                stage.figures.add(changing(rows), name, MILLISECONDS, taken.commit_s * 1e3)
