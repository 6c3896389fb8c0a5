"""No answer of the read channel belongs to another question, whatever the server, the network and callers do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager

import pytest

from asynccache.backends._aiomcache import KEYS_PER_GET
from asynccache.backends._endpoint import Address, Endpoint
from asynccache.backends._read_channel import READERS_AHEAD, STEPS, Answer, Pipeline, ReadChannel
from asynccache.backends.base import UNREADABLE, Change, Key, Write
from asynccache.backends.memcached import MemcachedBackend
from tests.servers import FaultProxy, Memcached

pytestmark = pytest.mark.without_sqlalchemy

PATIENT_S = 20.0  # for tests that are not about time
HASTY_S = 0.25
BOUND_S = 1.5  # what a timeout of 0.25 s may take on a busy machine


@asynccontextmanager
async def reading(
    host: str, port: int, timeout_s: float = PATIENT_S, on_failure: Callable[[Exception], None] = lambda _: None
) -> AsyncGenerator[ReadChannel, None]:
    channel = ReadChannel(Endpoint(Address(host, port), connect_timeout_s=PATIENT_S), timeout_s=timeout_s)
    channel.on_failure = on_failure
    try:
        yield channel
    finally:
        await channel.close()


@pytest.fixture
async def proxy(memcached_server: Memcached) -> AsyncIterator[FaultProxy]:
    """Between a channel and the server. Waits in the end until the channel has let go of its connection."""
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy
        await proxy.until(lambda: proxy.open == 0)


@pytest.fixture
async def channel(proxy: FaultProxy) -> AsyncIterator[ReadChannel]:
    async with reading(proxy.host, proxy.port) as channel:
        yield channel


@pytest.fixture
async def hasty(proxy: FaultProxy) -> AsyncIterator[ReadChannel]:
    async with reading(proxy.host, proxy.port, HASTY_S) as channel:
        yield channel


async def fill(server: Memcached, values: dict[bytes, bytes]) -> None:
    backend = MemcachedBackend([f"{server.host}:{server.port}"], timeout_s=PATIENT_S)

    def put(value: bytes) -> Callable[[bytes | None], Write]:
        return lambda _: Write(value, 600)

    for applied in await backend.apply([Change(Key(name, 0), put(value)) for name, value in values.items()]):
        assert applied.confirmed
    await backend.aclose()


class Fake:
    """A server that answers each connection's commands with the given bytes, exactly as they are given.

    replies: for each connection its chunks; each is sent when another `get` has come. None closes the connection.
    """

    def __init__(self, *replies: Sequence[bytes | None]) -> None:
        self.replies = list(replies)
        self.commands: list[bytes] = []
        self.accepted = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunks = list(self.replies[self.accepted]) if self.accepted < len(self.replies) else []
        self.accepted += 1
        while line := await reader.readline():
            self.commands.append(line)
            if chunks:
                chunk = chunks.pop(0)
                if chunk is None:
                    return
                writer.write(chunk)


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def accepting(serve: Serve, listening: socket.socket) -> AsyncGenerator[None, None]:
    """A server that is a function here. Ends once it has seen its connections end."""
    links: set[asyncio.Task[None]] = set()

    async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        links.add(asyncio.create_task(link(reader, writer)))

    async with await asyncio.start_server(accept, sock=listening):
        yield
        await asyncio.gather(*links)


@asynccontextmanager
async def serving(serve: Serve, timeout_s: float) -> AsyncGenerator[ReadChannel, None]:
    """A channel to such a server."""
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    async with accepting(serve, listening), reading(host, port, timeout_s) as channel:
        yield channel


@asynccontextmanager
async def faking(
    *replies: Sequence[bytes | None], timeout_s: float = PATIENT_S
) -> AsyncGenerator[tuple[Fake, ReadChannel], None]:
    fake = Fake(*replies)
    async with serving(fake.serve, timeout_s) as channel:
        yield fake, channel


# Sharing commands


async def test_a_thousand_tasks_over_few_keys_send_few_commands(
    memcached_server: Memcached, channel: ReadChannel
) -> None:
    names = [b"key-%d" % number for number in range(5)]
    await fill(memcached_server, {name: name for name in names})

    async def work(number: int) -> None:
        for turn in range(3):
            pair = [names[number % 5], names[(number + turn) % 5]]
            assert await channel.get_many(pair) == pair

    await asyncio.gather(*map(work, range(1_000)))
    assert channel.commands <= 6  # one a turn; a few more if the answers were read in pieces


async def test_a_command_names_no_more_keys_than_it_may() -> None:
    async with faking([b"END\r\n"] * 5) as (fake, channel):
        names = [b"key-%d" % number for number in range(300)]
        reads = [channel.get_many([*names, *names]), channel.get_many([b"other"]), channel.get_many([b"other"])]
        assert await asyncio.gather(*reads) == [[None] * 600, [None], [None]]
        assert [len(command.split()) - 1 for command in fake.commands] == [KEYS_PER_GET, KEYS_PER_GET, 300 - 256 + 1]
        assert channel.commands == 3


@pytest.mark.parametrize("crowd", [2, READERS_AHEAD])
async def test_a_lone_reader_sends_at_once_and_a_crowd_one_command_a_turn(channel: ReadChannel, crowd: int) -> None:
    assert await channel.get_many([b"k"]) == [None]
    alone = channel.ask([b"k"])
    assert channel.commands == 2  # before this turn of the loop has ended
    assert await alone == {b"k": None}
    for _ in range(10):
        await asyncio.gather(*(channel.get_many([b"k"]) for _ in range(crowd)))
    assert channel.commands == 2 + 10 + 1  # the first of the crowd was taken for a lone reader, once


async def test_the_first_of_a_large_crowd_go_ahead_while_the_server_has_nothing_else_to_do() -> None:
    async with faking([b"END\r\n"] * 4) as (fake, channel):
        await asyncio.gather(channel.get_many([b"a"]), channel.get_many([b"b"]))
        sent = channel.commands
        asked = [channel.ask([b"key-%d" % number, b"shared"]) for number in range(READERS_AHEAD - 1)]
        assert channel.commands == sent
        asked += [channel.ask([b"last"])]
        assert channel.commands == sent + 1  # before this turn of the loop has ended
        asked += [channel.ask([b"key-%d" % (number % 3)]) for number in range(2 * READERS_AHEAD)]
        assert channel.commands == sent + 1
        await asyncio.gather(*asked)
        first, second = fake.commands[sent:]
        assert (first.split()[-1], len(first.split()) - 1) == (b"last", READERS_AHEAD + 1)
        assert second == b"get key-0 key-1 key-2\r\n"


async def test_a_command_that_takes_no_more_keys_is_not_kept_waiting() -> None:
    async with faking([b"END\r\n"] * 4) as (_, channel):
        await asyncio.gather(channel.get_many([b"a"]), channel.get_many([b"b"]))
        sent = channel.commands
        asked = channel.ask_many([b"key-%d" % number for number in range(2 * KEYS_PER_GET)])
        assert channel.commands == sent + 1  # before this turn of the loop has ended
        await asyncio.gather(*asked)
        assert channel.commands == sent + 2


@pytest.mark.parametrize("key", [b"", b" ", b"a b", b"a ", b" b", b"k" * 251, b"k\r\n", b"k\0", b"k\x7f", b"\xe9"])
async def test_a_key_that_is_none_never_reaches_the_wire(proxy: FaultProxy, channel: ReadChannel, key: bytes) -> None:
    for names in ([key], [key, b"k"], [b"k", key], [b"k", key, b"l"], [key, key], [b"k"] * KEYS_PER_GET + [key]):
        with pytest.raises(ValueError, match="not a memcached key"):
            await channel.ask(names)
    assert await channel.get_many([b"k" * 250, b"!~"]) == [None, None]
    assert (channel.commands, proxy.bytes_up) == (1, len(b"get " + b"k" * 250 + b" !~\r\n"))


async def test_a_key_that_is_none_is_told_to_who_asked_for_it_and_to_nobody_else() -> None:
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    async with faking([b"VALUE k 0 1\r\n1\r\nEND\r\n"] * 2) as (fake, channel):
        for _ in range(2):  # on a connection that is made for them, then on that one
            cancelled = channel.ask([b"x" * 251])
            first, bad, second = channel.ask([b"k", b"l"]), channel.ask([b"m", b"a b"]), channel.ask([b"k"])
            cancelled.cancel()
            assert await first == await second == {b"k": b"1", b"l": None}
            with pytest.raises(ValueError, match="not a memcached key: b'a b'"):
                await bad
        assert fake.commands == [b"get k l\r\n"] * 2
        many = channel.get_many([b"a b", *(b"key-%d" % number for number in range(KEYS_PER_GET)), b"c d"])
        assert [str(error)[:25] for error in await asyncio.gather(many, return_exceptions=True)] == [
            "not a memcached key: b'a "  # the first of two, in a command each
        ]
    gc.collect()
    assert not unheard


async def test_who_asks_later_is_not_answered_by_an_earlier_command(
    memcached_server: Memcached, proxy: FaultProxy, channel: ReadChannel
) -> None:
    """1. A read is answered by the server. 2. A commit changes the slot. 3. Who asks now must not get the old value."""
    await fill(memcached_server, {b"k": b"old"})
    trap = proxy.hold_reply(b"get k")
    first = asyncio.create_task(channel.get_many([b"k"]))
    await trap.answered.wait()
    await fill(memcached_server, {b"k": b"new"})
    second = asyncio.create_task(channel.get_many([b"k"]))
    await asyncio.sleep(0)
    trap.released.set()
    assert (await first, await second) == ([b"old"], [b"new"])


async def test_values_of_a_mebibyte_and_those_that_look_like_protocol(
    memcached_server: Memcached, channel: ReadChannel
) -> None:
    values = {b"big-%d" % i: bytes([i]) * (1_000_000 + i) for i in range(8)}
    values |= {b"end": b"\r\nEND\r\n", b"value": b"VALUE end 0 1\r\nx\r\nEND\r\n", b"empty": b""}
    await fill(memcached_server, values)
    assert await channel.get_many([*values, b"missing"]) == [*values.values(), None]
    assert await asyncio.gather(*(channel.get_many([name]) for name in values)) == [[v] for v in values.values()]


# Answers, byte by byte

ANSWER = b"VALUE a 0 7\r\n\r\nEND\r\n\r\nVALUE b 77 0\r\n\r\nEND\r\n"


async def test_an_answer_may_be_split_anywhere() -> None:
    """Each piece is sent once the piece before was received, for that the channel's own loop reads it by itself."""
    for at in range(1, len(ANSWER)):
        async with faking() as (_, channel):
            asked = channel.ask([b"a", b"b", b"c"])
            await answered(channel, asked, [ANSWER[:at], ANSWER[at:]])
            assert asked.result() == {b"a": b"\r\nEND\r\n", b"b": b"", b"c": None}
    async with faking() as (_, channel):
        asked = channel.ask([b"a", b"b", b"c"])
        other = channel.ask([b"d"])
        await answered(channel, asked, [ANSWER[at : at + 1] for at in range(len(ANSWER))])
        assert asked.result() == other.result() == {b"a": b"\r\nEND\r\n", b"b": b"", b"c": None, b"d": None}


async def sent(channel: ReadChannel) -> Pipeline:
    while channel._pipeline is None or not channel._pipeline.in_flight:
        await asyncio.sleep(0.001)
    return channel._pipeline


async def answered(channel: ReadChannel, asked: asyncio.Future[Answer], pieces: Sequence[bytes]) -> None:
    pipeline = await sent(channel)
    for piece in pieces:
        assert not asked.done()
        pipeline.data_received(piece)
    assert asked.done()


async def test_a_long_answer_may_have_gaps_any_order_flags_and_any_values() -> None:
    names = [b"key-%d" % number for number in range(12)]
    bodies = [b"", b"x" * 200, b"\r\n", b"\r\nEND\r\n", b"\r\nVALUE ", b"\r\nVALUE key-3 0 1\r\nx", b"VALUE key-0 0 1"]
    dice = random.Random(1)
    async with faking() as (_, channel):
        for _ in range(500):
            hits = dice.uniform(0, 1.5)
            values = {name: dice.choice(bodies) for name in names if dice.random() < hits}
            found = dice.sample(list(values), len(values)) if dice.random() < 0.3 else values
            flags = dice.choice((0, 0, 17))
            answer = b"".join(
                b"VALUE %b %d %d\r\n%b\r\n" % (name, flags, len(values[name]), values[name]) for name in found
            )
            answer += b"END\r\n"
            at = dice.randrange(1, len(answer))
            asked = channel.ask(names)
            await answered(channel, asked, [answer[:at], answer[at:]])
            assert asked.result() == dict.fromkeys(names) | values


async def test_answers_that_come_together_are_each_commands_own() -> None:
    names = [b"key-%d" % number for number in range(10)]
    values = b"".join(b"VALUE %b 0 3\r\nabc\r\n" % name for name in names)
    async with faking([b"", b"", b"END\r\n" + values + b"END\r\nEND\r\n"]) as (_, channel):
        asked: list[asyncio.Future[Answer]] = []
        for _ in range(3):
            asked.append(channel.ask(names))
            await sent(channel)
            while channel._unsent:
                await asyncio.sleep(0)
        hits, misses = dict.fromkeys(names, b"abc"), dict.fromkeys(names)
        assert await asyncio.gather(*asked) == [misses, hits, misses]


@pytest.mark.parametrize(
    "lie",
    [
        b"VALUE key-0 0 3\r\nabc\r\n",  # twice
        b"VALUE other 0 3\r\nabc\r\n",
        b"VALUE key-5 0 2\r\nabc\r\n",
        b"VALUE key-5 0 4\r\nabc\r\n",
        b"VALUE key-5 0 +3\r\nabc\r\n",
        b"VALUE key-5 0 3 1\r\nabc\r\n",
        b"VALUE key-5 0 3\nabc\r\n",
        b"key-5 0 3\r\nabc\r\n",
    ],
)
async def test_a_lie_in_the_middle_of_a_long_answer_makes_all_of_it_unreadable(lie: bytes) -> None:
    names = [b"key-%d" % number for number in range(10)]
    values = [b"VALUE %b 0 3\r\nabc\r\n" % name for name in names]
    answer = b"".join([*values[:5], lie, *values[6:], b"END\r\n"])
    for at in range(1, len(answer), 9):
        async with faking() as (_, channel):
            asked = channel.ask(names)
            pipeline = await sent(channel)
            for piece in (answer[:at], answer[at:]):
                if not pipeline.ended:
                    pipeline.data_received(piece)
            assert asked.result() == dict.fromkeys(names, UNREADABLE)


LIES = [
    b"VALUE other 0 3\r\nabc\r\nEND\r\n",  # a key that was not asked for
    b"VALUE k 0 3\r\nabc\r\nVALUE k 0 3\r\nabc\r\nEND\r\n",  # twice
    b"VALUE k 0 2\r\nabc\r\nEND\r\n",
    b"VALUE k 0 3\r\nabcdeEND\r\n",
    b"VALUE k 0 3\r\nabcde",
    b"VALUE k 0 4\r\nabc\r\nEND\r\nEND\r\n",
    b"VALUE k 0 -1\r\nabc\r\nEND\r\n",
    b"VALUE k 0 +3\r\nabc\r\nEND\r\n",
    b"VALUE k 0\r\nabc\r\nEND\r\n",
    b"VALUE k 0 3 1\r\nabc\r\nEND\r\n",  # an answer to gets
    b"VALUE  k 0 3\r\nabc\r\nEND\r\n",
    b"VALUE k 0 3\nabc\r\nEND\r\n",
    b"END\n",
    b"STORED\r\n",
    b"ERROR\r\n",
    b"CLIENT_ERROR bad command line format\r\n",
    b"SERVER_ERROR out of memory\r\n",
    b"\r\n",
    b"x" * 300,  # a line without an end
    b"VALUE " + b"k" * 300,
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: repr(lie[:30]))
async def test_an_answer_that_makes_no_sense_ends_the_connection(lie: bytes) -> None:
    async with faking([lie], [b"END\r\n"]) as (fake, channel):
        assert await channel.get_many([b"k"]) == [UNREADABLE]
        assert await channel.get_many([b"k"]) == [None]
        assert fake.accepted == 2


async def test_an_answer_to_another_command_of_the_pipeline_is_refused() -> None:
    async with faking([b"", b"VALUE b 0 1\r\n2\r\nEND\r\nVALUE a 0 1\r\n1\r\nEND\r\n"], [b"END\r\n"]) as (
        fake,
        channel,
    ):
        first = asyncio.create_task(channel.get_many([b"a"]))
        while not fake.commands:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(channel.get_many([b"b"]))
        assert (await first, await second) == ([UNREADABLE], [UNREADABLE])
        assert await channel.get_many([b"a"]) == [None]
        assert (fake.accepted, fake.commands) == (2, [b"get a\r\n", b"get b\r\n", b"get a\r\n"])


@pytest.mark.parametrize("extra", [b"END\r\n", b"VALUE k 0 3\r\nabc\r\nEND\r\n", b"x"])
async def test_bytes_that_nobody_asked_for_are_nobodys_answer(extra: bytes) -> None:
    async with faking([b"END\r\n" + extra], [b"END\r\n"]) as (fake, channel):
        assert await channel.get_many([b"k"]) == [None]
        assert await channel.get_many([b"k"]) == [None]
        assert fake.accepted == 2


@pytest.mark.parametrize("answer", [b"", b"VALUE k 0 3\r\nabc\r\n", b"VALUE k 0 3\r\nab", b"VALUE k"])
async def test_an_answer_without_its_end_costs_no_more_than_the_timeout(answer: bytes) -> None:
    async with faking([answer], [b"END\r\n"], timeout_s=HASTY_S) as (fake, channel):
        began_s = time.monotonic()
        assert await channel.get_many([b"k"]) == [UNREADABLE]
        assert HASTY_S * 0.9 < time.monotonic() - began_s < BOUND_S
        assert await channel.get_many([b"k"]) == [None]
        assert fake.accepted == 2


# Connections that end


@pytest.mark.parametrize("rst", [False, True], ids=["FIN", "RST"])
async def test_an_answer_that_is_cut_off_is_unreadable(
    memcached_server: Memcached, proxy: FaultProxy, channel: ReadChannel, rst: bool
) -> None:
    await fill(memcached_server, {b"k": b"END\r\nvalue"})
    whole = len(b"VALUE k 0 10\r\nEND\r\nvalue\r\nEND\r\n")
    for offset in range(whole):
        proxy.cut_after(offset, rst=rst)
        # On a connection that has answered, a cut before the first byte may have come while it was idle: asked again.
        expected = [b"END\r\nvalue"] if channel._pipeline is not None and offset == 0 else [UNREADABLE]
        assert await channel.get_many([b"k"]) == expected
        assert await channel.get_many([b"k", b"missing"]) == [b"END\r\nvalue", None]
        await channel._clear()


async def test_a_connection_that_died_idle_is_replaced_within_the_read(
    memcached_server: Memcached, hasty: ReadChannel
) -> None:
    async with reading(memcached_server.host, memcached_server.port) as channel:
        for noticed in (False, True):
            await fill(memcached_server, {b"k": b"1"})
            assert await channel.get_many([b"k"]) == [b"1"]
            memcached_server.restart()  # blocks: the loop has not seen the end of the connection when it sends
            if noticed:
                while channel._pipeline is not None:
                    await asyncio.sleep(0.001)
            assert await channel.get_many([b"k"]) == [None]


async def test_a_read_is_asked_again_only_once() -> None:
    async with faking([b"END\r\n", None], [None], [b"END\r\n"]) as (fake, channel):
        assert await channel.get_many([b"k"]) == [None]
        assert await channel.get_many([b"k"]) == [UNREADABLE]
        assert (fake.accepted, channel.commands) == (2, 3)
        assert await channel.get_many([b"k"]) == [None]


async def test_a_server_that_refuses_is_unreadable_until_it_is_back(
    memcached_server: Memcached, proxy: FaultProxy
) -> None:
    memcached_server.stop()
    async with reading(memcached_server.host, memcached_server.port) as channel:
        assert await asyncio.gather(*(channel.get_many([b"k"]) for _ in range(3))) == [[UNREADABLE]] * 3
        memcached_server.start()
        assert await channel.get_many([b"k"]) == [None]


async def test_a_paused_server_costs_no_more_than_the_timeout(memcached_server: Memcached, hasty: ReadChannel) -> None:
    assert await hasty.get_many([b"k"]) == [None]
    memcached_server.pause()
    for _ in range(2):  # on a warm connection, and on a new one
        began_s = time.monotonic()
        assert await asyncio.gather(*(hasty.get_many([b"k"]) for _ in range(50))) == [[UNREADABLE]] * 50
        assert time.monotonic() - began_s < BOUND_S
    memcached_server.resume()
    assert await hasty.get_many([b"k"]) == [None]


async def test_a_trickle_costs_no_more_than_the_timeout() -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"VALUE k 0 1000\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(trickle, HASTY_S) as channel:
        began_s = time.monotonic()
        assert await channel.get_many([b"k"]) == [UNREADABLE]
        assert time.monotonic() - began_s < BOUND_S


async def test_a_server_that_does_not_read_costs_bounded_memory_and_time(proxy: FaultProxy, hasty: ReadChannel) -> None:
    assert await hasty.get_many([b"k"]) == [None]
    proxy.forward_requests.clear()
    pipeline = hasty._pipeline
    assert pipeline is not None
    names = [b"%0250d" % number for number in range(60_000)]  # 15 MB
    began_s = time.monotonic()
    read = asyncio.create_task(hasty.get_many(names))
    while not pipeline.jammed:
        await asyncio.sleep(0)
    assert pipeline._transport.get_write_buffer_size() < 128 * 1024
    assert await read == [UNREADABLE] * len(names)
    assert time.monotonic() - began_s < BOUND_S
    proxy.forward_requests.set()
    assert await hasty.get_many([b"k"]) == [None]


async def test_more_than_the_write_buffer_holds_is_sent_as_the_server_reads(channel: ReadChannel) -> None:
    names = [b"%0250d" % number for number in range(20_000)]
    assert await channel.get_many(names) == [None] * len(names)
    assert channel.commands == -(-len(names) // KEYS_PER_GET)


# Time


@contextmanager
def full_queue() -> Generator[socket.socket, None, None]:
    """A listening socket whose queue is full: who connects waits, until about a second after somebody accepts."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        with contextlib.suppress(TimeoutError):
            while True:
                with socket.socket() as client:
                    client.settimeout(0.1)
                    client.connect(listening.getsockname())
        yield listening


async def test_connecting_costs_no_more_than_the_timeout_and_goes_on_for_those_who_come_later() -> None:
    failures: list[Exception] = []
    with full_queue() as listening:
        host, port = listening.getsockname()
        async with reading(host, port, HASTY_S, failures.append) as channel:
            began_s = time.monotonic()
            reads = [asyncio.create_task(channel.get_many([b"k"])) for _ in range(50)]
            while channel._step < STEPS // 2:
                await asyncio.sleep(0.001)
            later = channel.ask([b"k"])
            assert await asyncio.gather(*reads) == [[UNREADABLE]] * 50
            assert HASTY_S * 0.9 < time.monotonic() - began_s < BOUND_S
            assert (channel.failures, [type(error) for error in failures]) == (1, [TimeoutError])
            assert not later.done()  # it has time left
            attempt = channel._connecting
            assert await later == {b"k": UNREADABLE}
            assert channel.failures == len(failures) == 2

            assert attempt is not None
            assert channel._connecting is attempt
            fake = Fake([], [b"END\r\n"])  # the first connection is the one that filled the queue
            async with accepting(fake.serve, listening):
                await attempt
                assert await channel.get_many([b"k"]) == [None]
                assert fake.commands == [b"get k\r\n"]  # those who gave up are not asked for
                assert (channel.failures, len(failures)) == (0, 2)
                await channel.close()


async def test_a_connection_that_came_late_is_not_given_up_with_those_who_waited_for_it() -> None:
    """1. A read asks. 2. Connecting takes most of its time. 3. It is sent, and given up. 4. The server answers, too
    late for this read, but in its own time. Whoever asks then is answered over the same connection."""
    timeout_s = 1.5  # the kernel tries to connect again after 1 s
    answers = asyncio.Event()
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            asked.append(line)
            await answers.wait()
            writer.write(b"VALUE %b 0 1\r\n1\r\nEND\r\n" % line.split()[1])

    with full_queue() as listening:
        host, port = listening.getsockname()
        async with reading(host, port, timeout_s) as channel:
            began_s = time.monotonic()
            late = channel.ask([b"late"])
            while not channel._step:
                await asyncio.sleep(0.001)
            async with accepting(answer, listening):
                assert await late == {b"late": UNREADABLE}
                assert timeout_s * 0.9 < time.monotonic() - began_s < timeout_s + BOUND_S / 2
                assert (channel.failures, asked) == (1, [b"get late\r\n"])
                connection, step = channel._pipeline, channel._step
                assert connection is not None
                while channel._step == step:
                    await asyncio.sleep(0.001)
                assert channel.failures == 1  # they are given up once
                answers.set()
                assert await channel.get_many([b"k"]) == [b"1"]
                assert (channel.failures, asked) == (0, [b"get late\r\n", b"get k\r\n"])
                assert channel._pipeline is connection
                await channel.close()


async def test_a_loop_that_stalls_does_not_use_up_the_time_of_its_reads(
    memcached_server: Memcached, hasty: ReadChannel
) -> None:
    """The answer comes after more than the time-out, and the loop is to blame: it let no server have that time."""
    async with reading(memcached_server.host, memcached_server.port, HASTY_S) as channel:
        assert await channel.get_many([b"k"]) == [None]
        memcached_server.pause()
        asked = channel.ask([b"k"])
        for stall_s in (2 * HASTY_S, *[HASTY_S / 4] * (STEPS - 3)):
            time.sleep(stall_s)  # noqa: ASYNC251
            await asyncio.sleep(0)
            assert not asked.done()
        memcached_server.resume()
        time.sleep(2 * HASTY_S)  # noqa: ASYNC251
        assert await asked == {b"k": None}
        assert channel.failures == 0


async def test_time_is_counted_only_while_somebody_waits(memcached_server: Memcached, channel: ReadChannel) -> None:
    async with reading(memcached_server.host, memcached_server.port, 0.8) as channel:
        assert await channel.get_many([b"k"]) == [None]
        while channel._timer is not None:
            await asyncio.sleep(0.001)
        assert channel._step <= STEPS  # one; more on a machine so busy that connecting took some


# Failures are counted


async def test_each_attempt_to_connect_that_fails_is_one_failure_and_an_answer_ends_the_count(
    memcached_server: Memcached,
) -> None:
    failures: list[Exception] = []
    memcached_server.stop()
    async with reading(memcached_server.host, memcached_server.port, PATIENT_S, failures.append) as channel:
        for number in (1, 2, 3):
            assert await asyncio.gather(*(channel.get_many([b"k"]) for _ in range(5))) == [[UNREADABLE]] * 5
            assert (channel.failures, len(failures)) == (number, number)
        assert all(isinstance(error, ConnectionRefusedError) for error in failures)
        memcached_server.start()
        assert await channel.get_many([b"k"]) == [None]
        assert (channel.failures, len(failures)) == (0, 3)


@pytest.mark.parametrize("answer", [b"ERROR\r\n", None, b""], ids=["nonsense", "closed", "silent"])
async def test_a_connection_that_ends_with_reads_unanswered_is_one_failure(answer: bytes | None) -> None:
    told: list[bool] = []
    async with faking([answer], [b"END\r\n"], timeout_s=HASTY_S) as (_, channel):
        channel.on_failure = lambda _: told.append(all(asked.done() for asked in reads))
        reads = [channel.ask([b"k"]) for _ in range(5)]
        assert await asyncio.gather(*reads) == [{b"k": UNREADABLE}] * 5
        assert (channel.failures, told) == (1, [True])
        assert await channel.get_many([b"k"]) == [None]
        assert (channel.failures, told) == (0, [True])


async def test_what_strands_no_reader_is_no_failure() -> None:
    """A connection that ended idle, be it with a read that is asked again, or for bytes that nobody asked for; and
    closing the channel."""
    failures: list[Exception] = []
    async with faking([b"END\r\n", None], [b"END\r\nEND\r\n"], [b"END\r\n", b""]) as (fake, channel):
        channel.on_failure = failures.append
        for _ in range(3):
            assert await channel.get_many([b"k"]) == [None]
        assert fake.accepted == 3
        unanswered = channel.ask([b"k"])
        await channel.close()
        assert await unanswered == {b"k": UNREADABLE}
        assert (channel.failures, failures) == (0, [])


# Cancelled readers, and the end


async def test_a_cancelled_reader_disturbs_no_neighbour(
    memcached_server: Memcached, proxy: FaultProxy, channel: ReadChannel
) -> None:
    names = [b"key-%d" % number for number in range(6)]
    await fill(memcached_server, {name: name for name in names})
    for turns in range(25):  # cancel in each turn of the loop that a read takes, cold at first, then warm
        if turns % 2:
            await channel._clear()
        reads = [asyncio.create_task(channel.get_many([name, names[0]])) for name in names]
        for _ in range(turns):
            await asyncio.sleep(0)
        reads[2].cancel()
        results = await asyncio.gather(*reads, return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            assert result == [name, names[0]] or (name == names[2] and isinstance(result, asyncio.CancelledError))


async def test_what_only_cancelled_readers_asked_for_is_not_sent(proxy: FaultProxy, channel: ReadChannel) -> None:
    read = asyncio.create_task(channel.get_many([b"k"]))
    await asyncio.sleep(0)
    read.cancel()
    while channel._pipeline is None:
        await asyncio.sleep(0.001)
    assert await channel.get_many([b"other"]) == [None]
    assert (channel.commands, proxy.bytes_up) == (1, len(b"get other\r\n"))


async def test_closing_ends_all_that_is_under_way_at_any_moment(proxy: FaultProxy) -> None:
    tasks_before = asyncio.all_tasks()
    proxy.forward_replies.clear()
    for turns in range(20):
        async with reading(proxy.host, proxy.port) as channel:
            read = asyncio.create_task(channel.get_many([b"k"]))
            for _ in range(turns):
                await asyncio.sleep(0)
            await channel.close()
            assert await read == [UNREADABLE]
            assert await channel.get_many([b"k"]) == [UNREADABLE]
    await proxy.until(lambda: proxy.open == 0)
    assert asyncio.all_tasks() == tasks_before
