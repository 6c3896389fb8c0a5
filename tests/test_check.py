"""`Cache.check`: what an application asks about its cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from asynccache import Applied, Backend, Cache, CacheClosedError, Change, Key, Level, NodeReport, WrongLoopError
from asynccache.settings import OnLockFailure
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


@pytest.mark.parametrize(
    ("arguments", "on_lock_failure", "told"),
    [([], "raise", 1), ([], "commit", 0), (["-o", "temporary_ttl=25"], "raise", 0), (["-M"], "raise", 0)],
    ids=["raise", "commit", "protected", "never evicts"],
)
async def test_who_wants_commits_refused_is_told_once_of_a_server_that_can_evict_locks(
    arguments: list[str], on_lock_failure: OnLockFailure, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Memcached(*arguments) as server:
        async with Cache(f"{server.url}?timeout=5", on_lock_failure=on_lock_failure) as cache:
            for _ in range(2):
                cache.bound()
                await cache.drain()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == told
    assert all(f"{server.port} may evict locks" in each and "temporary_ttl=21" in each for each in warnings)


async def test_a_server_that_is_down_is_no_reason_for_a_warning(
    memcached_server: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    memcached_server.stop()
    async with Cache(memcached_server.url, on_lock_failure="raise") as cache:
        cache.bound()
        await cache.drain()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
