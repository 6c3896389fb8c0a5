"""`Cache.check`: what an application asks about its cache."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from asynccache import Applied, Backend, Cache, CacheClosedError, Change, Key, Level, NodeReport, WrongLoopError
from tests.servers import Memcached


class Minimal(Backend):
    """A backend of a user's own that knows nothing of checks."""

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        return [None] * len(keys)

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        return [Applied(None, None)] * len(changes)

    async def aclose(self) -> None:
        pass


class Unrelated:
    """The same, of a time when no `check` was asked of it, and without inheriting anything."""

    get_many = Minimal.get_many
    apply = Minimal.apply
    aclose = Minimal.aclose


def locks_of(reports: Sequence[NodeReport]) -> list[bool | None]:
    return [report.locks_protected for report in reports]


async def test_every_server_is_reported(memcached: Memcached) -> None:
    node = f"{memcached.host}:{memcached.port}"
    async with Cache(f"memcached://{node},{node}?timeout=5") as cache:
        reports = await cache.check()
    assert [(report.node, report.usable) for report in reports] == [(node, True)] * 2


async def test_locks_are_judged_by_the_lock_ttl_of_this_cache() -> None:
    with Memcached("-o", "temporary_ttl=25") as server:
        for lock_ttl_s, protected in ((10, True), (13, False)):
            async with Cache(f"{server.url}?timeout=5", lock_ttl=lock_ttl_s) as cache:
                assert locks_of(await cache.check()) == [protected]


@pytest.mark.parametrize("kind", [Minimal, Unrelated])
async def test_a_backend_that_has_no_check_says_so(kind: type[Any]) -> None:
    backend = kind()
    async with Cache(backend) as cache:
        (report,) = await cache.check()
    assert (report.node, report.reachable, report.usable) == (repr(backend), None, True)
    assert [(finding.level, finding.topic) for finding in report.findings] == [(Level.WARNING, "check")]


async def test_a_closed_cache_is_not_checked() -> None:
    async with Cache("memory://") as cache:
        pass
    with pytest.raises(CacheClosedError):
        await cache.check()


async def test_a_cache_is_checked_on_its_own_event_loop() -> None:
    async with Cache("memory://") as cache:
        await cache.check()
        with pytest.raises(WrongLoopError):
            await asyncio.to_thread(asyncio.run, cache.check())
