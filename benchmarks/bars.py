"""What asynccache aims at, and whether this run reached it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks import commits
from benchmarks.claims import Claims
from benchmarks.contenders import OURS, OURS_MEMCACHED, PLAIN
from benchmarks.figures import BYTES, MICROSECONDS, MILLISECONDS, PER_SECOND, SELECTS, STALE, Figures, ratios
from benchmarks.workloads import committing, crowd, fleet, herd, hits, many, misses, size

PAYLOAD_AND: Final = 500
"""Bytes that an entry in memory may take besides its own."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What is aimed at. One value for each round; the median decides.

    at_most: else at least `limit`.
    form: how limit and value are written; "1/" writes them as fractions.
    """

    aim: str
    limit: float
    rounds: tuple[float, ...]
    at_most: bool = True
    form: str = ".2f"

    @property
    def value(self) -> float:
        return median(self.rounds)

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def written(self, value: float) -> str:
        return f"1/{1 / value:.0f}" if self.form == "1/" else f"{value:{self.form}}"


def bars_of(figures: Figures, claims: Mapping[str, Claims]) -> list[Bar]:
    """All bars of which everything was measured."""
    every = [
        *_of_hits(figures, claims),
        *_of_many(figures),
        *_of_herds(figures),
        *_of_misses(figures),
        *_of_commits(figures),
        *_of_size(figures),
    ]
    return [bar for bar in every if bar.rounds]


def _of_hits(figures: Figures, claims: Mapping[str, Claims]) -> Iterator[Bar]:
    def us(workload: str, contender: str) -> Sequence[float]:
        return figures.rounds(workload, contender, MICROSECONDS)

    plain = us(hits.FRESH, PLAIN)
    same = ratios(us(hits.SAME, OURS), plain)
    yield Bar("hit in memory, same session / PostgreSQL get, fresh session", 1 / 90, (*same,), form="1/")
    fresh = ratios(us(hits.FRESH, OURS), plain)
    yield Bar("hit in memory, fresh session / PostgreSQL get, fresh session", 1 / 25, (*fresh,), form="1/")
    peers = {
        name: ratios(us(hits.SAME, name), us(hits.SAME, OURS))
        for name, claim in claims.items()
        if claim.persistent and name not in (PLAIN, OURS, OURS_MEMCACHED) and us(hits.SAME, name)
    }
    for what, them in {
        "a persistent instance": peers,
        "a persistent instance with values of its own": {n: peers[n] for n in peers if claims[n].isolated},
    }.items():
        if them:
            name = min(them, key=lambda each: median(them[each]))
            aim = f"the fastest other that gives {what} ({name}) / hit in memory, same session"
            yield Bar(aim, 8, (*them[name],), at_most=False, form=".1f")
    raw = ratios(us(hits.SAME, OURS_MEMCACHED), us(hits.SAME, hits.RAW))
    yield Bar("hit in memcached, same session / aiomcache's multi_get of the same two keys", 1.15, (*raw,))
    for workload in (crowd.KEPT, crowd.READING):
        rates = [figures.rounds(workload, name, PER_SECOND) for name in (OURS_MEMCACHED, PLAIN)]
        yield Bar(f"{workload}, on memcached / on PostgreSQL", 20, (*ratios(*rates),), at_most=False, form=".1f")


def _of_many(figures: Figures) -> Iterator[Bar]:
    plain = figures.rounds(many.MANY, PLAIN, MICROSECONDS)
    for name in (OURS, OURS_MEMCACHED):
        ours = ratios(figures.rounds(many.MANY, name, MICROSECONDS), plain)
        yield Bar(f"100 at once ({name}) / SELECT ... IN", 1 / 3, (*ours,))


def _of_herds(figures: Figures) -> Iterator[Bar]:
    for workload, names in ((herd.HERD, (OURS, OURS_MEMCACHED)), (fleet.FLEET, (OURS_MEMCACHED,))):
        for name in names:
            selects = figures.rounds(workload, name, SELECTS)
            if selects:
                yield Bar(f"SELECTs for {workload} ({name})", 1, (max(selects),), form=".0f")
    for workload in (each for each, mix in crowd.MIXES.items() if mix.writes):
        for name in (OURS, OURS_MEMCACHED):
            stale = figures.rounds(workload, name, STALE)
            if stale:
                yield Bar(f"stale reads, {workload} ({name})", 0, (sum(stale),), form=".0f")


def _of_misses(figures: Figures) -> Iterator[Bar]:
    plain = figures.rounds(misses.MISS, PLAIN, MICROSECONDS)
    for name, limit in ((OURS, 1.1), (OURS_MEMCACHED, 1.5)):
        ours = ratios(figures.rounds(misses.MISS, name, MICROSECONDS), plain)
        yield Bar(f"miss ({name}) / get without a cache", limit, (*ours,))


def _of_commits(figures: Figures) -> Iterator[Bar]:
    def ms(rows: int, way: str) -> Sequence[float]:
        return figures.rounds(committing.changing(rows), way, MILLISECONDS)

    for rows in (1, commits.ROWS):
        other = ratios(ms(rows, commits.UNREGISTERED), ms(rows, commits.PLAIN))
        yield Bar(f"{committing.changing(rows)} of a model that is not cached / without a cache", 1.05, (*other,))
    one, hundred = (
        [cached - plain for cached, plain in zip(ms(rows, commits.CACHED), ms(rows, commits.PLAIN), strict=True)]
        for rows in (1, commits.ROWS)
    )
    trips = ratios(one, ms(1, committing.RAW))
    yield Bar("what a commit of 1 cached row costs more / one round trip of aiomcache", 4, (*trips,), form=".1f")
    more = ratios(hundred, one)
    yield Bar("what a commit of 100 cached rows costs more / of 1", 5, (*more,), form=".1f")


def _of_size(figures: Figures) -> Iterator[Bar]:
    sizes = figures.contenders(size.HIT, MICROSECONDS)
    if len(sizes) < 2:
        return
    taken = figures.rounds(size.SIZE, sizes[-1], BYTES)
    payload = figures.rounds(size.SIZE, size.PAYLOAD, BYTES)
    above = tuple(entry - own for entry, own in zip(taken, payload, strict=False))
    yield Bar(f"bytes in memory besides its own of one of {sizes[-1]}", PAYLOAD_AND, above, form=".0f")
    for workload in (size.HIT, size.STORE):  # a few thousand would be in the processor's own caches
        fewer, most = (figures.rounds(workload, each, MICROSECONDS) for each in sizes[-2:])
        yield Bar(f"{workload}: {sizes[-1]} / {sizes[-2]}", 1.25, (*ratios(most, fewer),))
