"""One cache on three memcached processes: how the rows are spread, and what happens while one of them is away.

Each node is reached through a proxy of its own, so that what is asked of it can be counted, and so that it can be cut
off while it runs and keeps what it holds. A second cache on the same proxies, or past them, stands for another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import uvloop
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from asynccache import AsyncCachedSession, Cache, LockNotPlacedError, cached_get_many
from tests.conftest import Sessions, Statements
from tests.models import Author, Base
from tests.servers import FaultProxy, Memcached
from tests.session.slots import name_of
from tests.watch import Watch

LOCK_TTL_S = 1.0
LOCK_TIMEOUT_S = 0.4
ROWS = 30
IDS = range(1, ROWS + 1)


class Node:
    """A memcached and the proxy before it."""

    def __init__(self, server: Memcached, proxy: FaultProxy) -> None:
        self.server = server
        self.proxy = proxy

    async def kill(self) -> None:
        self.server.stop()
        self.proxy.refuse()
        self.proxy.cut(rst=True)

    async def come_back(self) -> None:
        """Empty, at the same address."""
        self.server.start()
        await self.proxy.accept()

    def statistic(self, name: str) -> int:
        with socket.create_connection((self.server.host, self.server.port), timeout=5) as connection:
            connection.sendall(b"stats\r\n")
            answer = b""
            while not answer.endswith(b"END\r\n"):
                answer += connection.recv(65536)
        found = re.search(rb"STAT %b (\d+)\r\n" % name.encode(), answer)
        assert found
        return int(found[1])

    @property
    def writes(self) -> int:
        return self.statistic("cmd_set")


Nodes = list[Node]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Memcached]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Memcached()) for _ in range(3)]


@asynccontextmanager
async def reached_through_proxies(servers: Sequence[Memcached]) -> AsyncGenerator[Nodes]:
    async with AsyncExitStack() as stack:
        for server in servers:
            server.revive()
        yield [Node(each, await stack.enter_async_context(FaultProxy((each.host, each.port)))) for each in servers]


@pytest.fixture
async def nodes(servers: list[Memcached]) -> AsyncIterator[Nodes]:
    async with reached_through_proxies(servers) as nodes:
        yield nodes


def url_of(nodes: Nodes) -> str:
    return "memcached://" + ",".join(f"{node.proxy.host}:{node.proxy.port}" for node in nodes)


def direct_url_of(nodes: Nodes) -> str:
    return "memcached://" + ",".join(f"{node.server.host}:{node.server.port}" for node in nodes)


def a_cache(url: str, **settings: Any) -> Cache:
    cache = Cache(url, lock_ttl=LOCK_TTL_S, lock_timeout=LOCK_TIMEOUT_S, **settings)
    cache.register(Author)
    return cache


def sessions_of(engine: AsyncEngine, cache: Cache) -> Sessions:
    return async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)


@pytest.fixture
async def cache(nodes: Nodes) -> AsyncIterator[Cache]:
    async with a_cache(url_of(nodes)) as cache:
        yield cache


async def names_of(sessions: async_sessionmaker[Any], ids: Sequence[int] = IDS) -> list[str | None]:
    return list(await asyncio.gather(*(name_of(sessions, id_) for id_ in ids)))


async def rename(sessions: async_sessionmaker[Any], id_: int, name: str) -> None:
    async with sessions.begin() as session:
        (await session.get_one(Author, id_)).name = name


async def fill(sessions: Sessions, cache: Cache, ids: Sequence[int] = IDS) -> None:
    """Have all these authors in the database and in the cache."""
    async with sessions.begin() as session:
        session.add_all(Author(id=id_, name="old") for id_ in ids)
    await cache.drain()
    async with sessions() as session:
        await cached_get_many(session, Author, ids)
    await cache.drain()
    before = cache.stats.hits
    async with sessions() as session:
        await cached_get_many(session, Author, ids)
    assert cache.stats.hits - before == len(ids)


async def homes_of(sessions: Sessions, nodes: Nodes, ids: Sequence[int] = IDS) -> list[list[int]]:
    """The rows that live on each node: those that are asked of it when they are read."""
    homes: list[list[int]] = [[] for _ in nodes]
    for id_ in ids:
        before = [node.proxy.chunks_up for node in nodes]
        await name_of(sessions, id_)
        asked = [home for home, node, chunks in zip(homes, nodes, before, strict=True) if node.proxy.chunks_up > chunks]
        assert len(asked) == 1, "an entity and its generation are one question to one node"
        asked[0].append(id_)
    return homes


# The spread


async def test_the_rows_of_one_table_are_spread_evenly(nodes: Nodes, engine: AsyncEngine) -> None:
    for node in nodes:
        node.server.restart()  # what was flushed is counted until it is found
    async with a_cache(f"{direct_url_of(nodes)}?timeout=5", lease_ttl=30) as cache:  # 3,000 rows take their time
        await fill(sessions_of(engine, cache), cache, range(1, 3_001))
    slots = [node.statistic("curr_items") for node in nodes]
    assert sum(slots) == 3_000 + cache.settings.buckets
    assert max(slots) / (sum(slots) / len(slots)) < 1.2


async def test_a_hit_is_one_question_to_one_node(nodes: Nodes, cache: Cache, sessions: Sessions) -> None:
    await fill(sessions, cache)
    gets, hits = sum(node.statistic("cmd_get") for node in nodes), cache.stats.hits
    homes = await homes_of(sessions, nodes)
    assert all(homes), "each node has its share"
    assert cache.stats.hits - hits == ROWS
    assert sum(node.statistic("cmd_get") for node in nodes) - gets == 2 * ROWS  # the entity's key and its generation's


@pytest.mark.parametrize("several", [False, True], ids=["one node", "three nodes"])
async def test_a_hit_makes_no_task_on_one_node_or_on_several(
    nodes: Nodes, engine: AsyncEngine, *, several: bool
) -> None:
    async with a_cache(url_of(nodes if several else nodes[:1])) as cache:
        sessions = sessions_of(engine, cache)
        await fill(sessions, cache)
        tasks: list[asyncio.Task[Any]] = []

        def counting(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
            tasks.append(task := asyncio.Task(work, loop=loop, **options))
            return task

        hits = cache.stats.hits
        loop = asyncio.get_running_loop()
        loop.set_task_factory(counting)
        try:
            for id_ in IDS:
                assert await name_of(sessions, id_) == "old"
        finally:
            loop.set_task_factory(None)
        proxies = [task for task in tasks if "FaultProxy" in task.get_coro().__qualname__]  # type: ignore[union-attr]
        assert (cache.stats.hits - hits, len(tasks) - len(proxies)) == (ROWS, 0)


async def test_one_read_of_many_rows_is_one_command_to_each_node(
    nodes: Nodes, cache: Cache, sessions: Sessions
) -> None:
    await fill(sessions, cache)
    before = [node.proxy.chunks_up for node in nodes]
    async with sessions() as session:
        assert len(await cached_get_many(session, Author, IDS)) == ROWS
    assert [node.proxy.chunks_up - chunks for node, chunks in zip(nodes, before, strict=True)] == [1, 1, 1]


# A node is gone


@pytest.mark.usefixtures("database_url")
async def test_a_dead_node_costs_its_share_of_the_hits_and_nothing_else(
    nodes: Nodes, cache: Cache, sessions: Sessions, statements: Statements
) -> None:
    await fill(sessions, cache)
    homes = await homes_of(sessions, nodes)
    writes = [node.writes for node in nodes[:2]]
    await nodes[2].kill()
    for _ in range(3):
        hits = cache.stats.hits
        statements.clear()
        assert await names_of(sessions) == ["old"] * ROWS
        assert cache.stats.hits - hits == ROWS - len(homes[2])
        assert len(statements.selects()) == len(homes[2])
    await cache.drain()
    assert [node.writes for node in nodes[:2]] == writes, "its rows went to no other node"


async def test_commits_go_on_while_a_node_is_dead_and_nothing_is_stale_when_it_is_back(
    nodes: Nodes, cache: Cache, sessions: Sessions, plain: async_sessionmaker[AsyncSession]
) -> None:
    await fill(sessions, cache)
    homes = await homes_of(sessions, nodes)
    dead, alive = homes[2][0], homes[0][0]
    await nodes[2].kill()
    await rename(sessions, dead, "new")
    assert cache.stats.locks_failed == 1
    await rename(sessions, alive, "new")
    assert cache.stats.locks_failed == 1, "a row of another node is locked as ever"
    assert (await name_of(sessions, dead), await name_of(sessions, alive)) == ("new", "new")

    await nodes[2].come_back()
    expected = await names_of(plain)
    assert await names_of(sessions) == expected
    await cache.drain()
    for _ in range(2):  # the first may fill what was doubtful before
        assert await names_of(sessions) == expected
        await cache.drain()
    hits = cache.stats.hits
    assert await names_of(sessions) == expected
    assert cache.stats.hits - hits == ROWS, "it is used again"


@pytest.mark.usefixtures("database_url")
async def test_a_commit_can_be_refused_while_its_node_is_dead(
    nodes: Nodes, cache: Cache, sessions: Sessions, engine: AsyncEngine, plain: async_sessionmaker[AsyncSession]
) -> None:
    await fill(sessions, cache)
    homes = await homes_of(sessions, nodes)
    await nodes[2].kill()
    async with a_cache(url_of(nodes), on_lock_failure="raise") as strict, sessions_of(engine, strict)() as session:
        watch = Watch(strict._store.backend)
        for id_ in (homes[0][0], homes[2][0]):
            (await session.get_one(Author, id_)).name = "new"
        with pytest.raises(LockNotPlacedError):
            await session.commit()
        await session.rollback()
        assert await names_of(plain) == ["old"] * ROWS

        (await session.get_one(Author, homes[0][0])).name = "new"
        await session.commit()
        await nodes[2].come_back()
        await watch.until_used()
        (await session.get_one(Author, homes[2][0])).name = "new"
        await session.commit()
    expected = ["new" if id_ in (homes[0][0], homes[2][0]) else "old" for id_ in IDS]
    assert await names_of(plain) == expected
    assert await names_of(sessions) == expected


# A node is there, holds what it held, and cannot be reached


async def refuse(proxy: FaultProxy) -> None:
    proxy.refuse()
    proxy.cut(rst=True)


async def fall_silent(proxy: FaultProxy) -> None:
    proxy.forward_requests.clear()
    proxy.forward_replies.clear()


async def speak(proxy: FaultProxy) -> None:
    """What was sent meanwhile arrives now."""
    proxy.forward_requests.set()
    proxy.forward_replies.set()


Fault = Callable[[FaultProxy], Awaitable[None]]
Partition = tuple[Fault, Fault]
REFUSED: Partition = refuse, FaultProxy.accept
SILENT: Partition = fall_silent, speak
partitions = pytest.mark.parametrize("partition", [REFUSED, SILENT], ids=["refused", "silent"])


READS_MIN = 40


async def read_on(sessions: Sessions, id_: int, until: asyncio.Event) -> list[str | None]:
    """What a task that does nothing else gets."""
    names: list[str | None] = []
    while len(names) < READS_MIN or not until.is_set():
        names.append(await name_of(sessions, id_))
    return names


async def live_through_a_partition(nodes: Nodes, engine: AsyncEngine, partition: Partition) -> None:
    """A row is changed here while its node, which keeps the old one, cannot be reached from here; then it can.

    1. This process commits; its lock, and its destruction of the row, do not get through.
    2. The node is back, and still holds the old row.
    3. Would this process read it now, it would get what it has itself replaced.
    """
    cut_off, heal = partition
    async with a_cache(url_of(nodes)) as cache, a_cache(direct_url_of(nodes)) as elsewhere:
        sessions, there = sessions_of(engine, cache), sessions_of(engine, elsewhere)
        await fill(sessions, cache)
        homes = await homes_of(sessions, nodes)
        changed, *neighbours = homes[2]
        await cut_off(nodes[2].proxy)
        await rename(sessions, changed, "new")
        assert await names_of(sessions, [changed] * 20) == ["new"] * 20
        assert await name_of(there, changed) == "old", "another process, which reaches the node, knows nothing of it"
        await asyncio.sleep(LOCK_TTL_S / 2)  # until the repair is tried less often: not right when the node is back
        done = asyncio.Event()
        readers = [asyncio.create_task(read_on(sessions, changed, done)) for _ in range(5)]
        await heal(nodes[2].proxy)
        await cache.drain()  # the repair
        done.set()
        seen = [name for names in await asyncio.gather(*readers) for name in names]
        assert set(seen) == {"new"}
        assert len(seen) >= 5 * READS_MIN

        assert await name_of(there, changed) == "new", "the repair is everybody's"
        await elsewhere.drain()
        loads = cache.stats.loads
        assert await name_of(sessions, changed) == "new"
        hits = cache.stats.hits
        assert await names_of(sessions, neighbours) == ["old"] * len(neighbours)
        assert cache.stats.hits - hits == len(neighbours), "what else the node holds is served again"
        assert cache.stats.loads == loads, "and so is the row, as another process has stored it"


@partitions
async def test_after_a_partition_no_process_gets_a_row_that_it_has_itself_replaced(
    nodes: Nodes, engine: AsyncEngine, partition: Partition
) -> None:
    await live_through_a_partition(nodes, engine, partition)


def test_the_same_on_uvloop(servers: list[Memcached], sqlite_url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(sqlite_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with reached_through_proxies(servers) as nodes:
            await live_through_a_partition(nodes, engine, REFUSED)
        await engine.dispose()

    uvloop.run(main())


async def test_while_a_node_cannot_be_reached_its_rows_are_read_from_the_database(
    nodes: Nodes, cache: Cache, sessions: Sessions
) -> None:
    await fill(sessions, cache)
    homes = await homes_of(sessions, nodes)
    writes = [node.writes for node in nodes]
    await refuse(nodes[2].proxy)
    await rename(sessions, homes[2][0], "new")
    hits = cache.stats.hits
    for _ in range(20):
        assert await names_of(sessions, homes[2]) == ["new"] + ["old"] * (len(homes[2]) - 1)
    assert cache.stats.hits == hits
    assert cache.stats.backend_errors
    assert [node.writes for node in nodes] == writes, "the node keeps what it held, and no other got it"
    await nodes[2].proxy.accept()


async def test_a_table_changed_while_a_node_cannot_be_reached_is_not_read_from_there_either(
    nodes: Nodes, cache: Cache, sessions: Sessions
) -> None:
    """The generations of its buckets are what could not be locked."""
    await fill(sessions, cache)
    await refuse(nodes[2].proxy)
    async with sessions.begin() as session:
        await session.execute(update(Author).values(name="new"))
    await asyncio.sleep(LOCK_TTL_S / 2)  # as above
    done = asyncio.Event()
    readers = [asyncio.create_task(read_on(sessions, id_, done)) for id_ in IDS]
    await nodes[2].proxy.accept()
    await cache.drain()
    done.set()
    assert {name for names in await asyncio.gather(*readers) for name in names} == {"new"}


async def test_what_another_process_serves_is_bounded_by_ttl_even_if_nobody_repairs_it(
    nodes: Nodes, engine: AsyncEngine
) -> None:
    """The process that committed ends before it reaches the node again."""
    ttl_s = 2.0
    async with a_cache(direct_url_of(nodes), ttl=ttl_s, ttl_jitter=0) as elsewhere:
        there = sessions_of(engine, elsewhere)
        await fill(there, elsewhere)
        cache = a_cache(url_of(nodes))
        sessions = sessions_of(engine, cache)
        homes = await homes_of(sessions, nodes)
        changed = homes[2][0]
        await rename(there, changed, "stored")
        await elsewhere.drain()
        assert await name_of(there, changed) == "stored"
        await elsewhere.drain()
        stored_s = time.monotonic()
        await refuse(nodes[2].proxy)
        await rename(sessions, changed, "new")
        await cache.aclose()
        assert await name_of(there, changed) == "stored"
        while await name_of(there, changed) == "stored":
            assert time.monotonic() - stored_s < ttl_s + 1.5  # memcached counts whole seconds
            await asyncio.sleep(0.05)
        assert await name_of(there, changed) == "new"


# The list of nodes is changed


async def test_processes_with_different_lists_do_not_see_each_others_commits_for_up_to_ttl(
    nodes: Nodes, engine: AsyncEngine
) -> None:
    """What the manual says of a rolling change, and why it says how to do it."""
    async with a_cache(url_of(nodes[:2])) as old, a_cache(url_of(nodes)) as new:
        before, after = sessions_of(engine, old), sessions_of(engine, new)
        await fill(after, new)
        async with before.begin() as session:
            for author in (await cached_get_many(session, Author, IDS)).values():
                assert author is not None
                author.name = "new"
        await old.drain()
        assert set(await names_of(after)) == {"old", "new"}


async def test_a_list_is_changed_process_by_process_while_none_of_them_reads_from_the_cache(
    nodes: Nodes, engine: AsyncEngine
) -> None:
    async with a_cache(url_of(nodes[:2])) as old, a_cache(url_of(nodes), namespace="3") as new:
        before, after = sessions_of(engine, old), sessions_of(engine, new)
        await fill(before, old)
        old.reading = new.reading = False
        for sessions, name in ((before, "by the old"), (after, "by the new"), (before, "by the last of the old")):
            await rename(sessions, 1, name)
            assert await name_of(before) == await name_of(after) == name
        new.reading = True  # no process has the old list any more
        assert await names_of(after) == ["by the last of the old"] + ["old"] * (ROWS - 1)
        await new.drain()
        assert await names_of(after) == ["by the last of the old"] + ["old"] * (ROWS - 1)
        assert new.stats.hits == ROWS
