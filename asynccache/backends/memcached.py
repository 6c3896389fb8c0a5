"""Slots in memcached: read through a channel of its own; changed by `gets`, then `add` or `cas`, over aiomcache.

A version (the id that `gets` gives and `cas` compares) means something only to the server process that gave it: after a
restart the numbers begin again, and an old one may fit a new slot by chance. So a `gets` and its `cas` travel on one
connection, which the restart breaks.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from asynccache.backends._aiomcache import KEYS_PER_GET, Client
from asynccache.backends._endpoint import Address, Credentials, Endpoint
from asynccache.backends._node import Node
from asynccache.backends._read_channel import Answer, ReadChannel
from asynccache.backends.base import UNREADABLE, Applied, Change, Key, NodeChanged, NodeState
from asynccache.backends.report import NodeReport
from asynccache.errors import CacheClosedError, ConfigurationError, WrongLoopError

DEFAULT_PORT: Final = 11211
_URL_FORMS: Final = (
    "memcached://host:port[,host:port...] or memcached+unix:///path, memcacheds:// for TLS, user:password@ before the "
    "hosts for authentication, then ?timeout=0.25&connect_timeout=1&pool_size=8"
)
_OPTIONS: Final = {
    "timeout": ("timeout_s", float),
    "connect_timeout": ("connect_timeout_s", float),
    "pool_size": ("pool_size", int),
}


class MemcachedBackend:
    """Keeps slots in memcached: one server, or several that share the keys by `Key.route`.

    nodes: `host:port`, `host` or the path of a unix socket. A key belongs to `nodes[route % len(nodes)]` and to no
        other: a node that is down is not routed around, since its old slots would come back with it.
    connect_timeout_s: seconds until an attempt to connect fails, TLS and authentication included.
    timeout_s: seconds that a call waits for a node in all. An attempt to connect goes on when the call that needed it
        has given up.
    pool_size: connections to each node at most, beside the one that `get_many` reads through.
    tls: True for TLS with the system's CAs and host names verified, or a context of your own, for a private CA or a
        client certificate.
    user, password: what memcached's authentication for the text protocol (`-Y`) wants, on all nodes the same.

    Raises ConfigurationError for arguments that cannot be, CacheClosedError after `aclose`, WrongLoopError while
    another event loop that it serves is running, and ValueError for a key that memcached could not read. Trouble with
    a server is never raised.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        *,
        connect_timeout_s: float = 1.0,
        timeout_s: float = 0.25,
        pool_size: int = 8,
        tls: ssl.SSLContext | bool = False,
        user: str | None = None,
        password: str | None = None,
    ) -> None:
        for name, value in (
            ("connect_timeout_s", connect_timeout_s),
            ("timeout_s", timeout_s),
            ("pool_size", pool_size),
        ):
            if not 0 < value < math.inf:
                raise ConfigurationError(f"{name} must be more than 0 and finite, not {value!r}")
        if isinstance(nodes, str) or not nodes:
            shown = without_password(nodes) if isinstance(nodes, str) else nodes
            raise ConfigurationError(f"nodes must be a list of at least one 'host:port' or socket path, not {shown!r}")
        if not isinstance(tls, (bool, ssl.SSLContext)):
            raise ConfigurationError(f"tls must be True, False or an ssl.SSLContext, not {tls!r}")
        context = ssl.create_default_context() if tls is True else tls or None
        credentials = None if user is None and password is None else Credentials(user or "", password or "")
        endpoints = [Endpoint(parse_address(node), context, credentials, connect_timeout_s) for node in nodes]
        self._nodes = [
            Node(
                Client(endpoint, pool_size=pool_size),
                ReadChannel(endpoint, timeout_s=timeout_s),
                timeout_s=timeout_s,
                tell=self._tell,
            )
            for endpoint in endpoints
        ]
        self.answers_within_s = timeout_s
        self._observers: list[Callable[[NodeChanged], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<MemcachedBackend {', '.join(self.states)}>"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one from `memcached://host:port[,host:port...]`, `memcacheds://` and the same for TLS with the system's
        CAs, or `memcached+unix:///path`.

        `user:password@` before the hosts authenticates; characters with a meaning in URLs are written %2F and so on.
        `?timeout=`, `connect_timeout=` (seconds) and `pool_size=` set what the constructor's arguments set. Raises
        ConfigurationError with the URL, less its password, and the accepted forms.
        """
        try:
            # The password leaves the URL first, so that no complaint about the rest can have it in its text or causes.
            url_without, credentials = _take_credentials(url)
            nodes, tls = _nodes_of(url_without)
            return cls(nodes, tls=tls, **credentials, **_options_of(url_without))
        except (ValueError, ConfigurationError) as error:
            raise ConfigurationError(
                f"bad memcached URL {without_password(url)!r}: {error}. Give {_URL_FORMS}"
            ) from error

    @property
    def commands(self) -> int:
        """How many commands were sent so far: each `add` and `cas` is one, a `get` or `gets` of up to 128 keys, too."""
        return sum(node.client.commands + node.channel.commands for node in self._nodes)

    @property
    def states(self) -> dict[str, NodeState]:
        """Each node's state, in the order in which they were given."""
        return {node.name: node.state for node in self._nodes}

    def observe(self, observer: Callable[[NodeChanged], None]) -> None:
        """Tell this observer of nodes that go away, are probed and come back."""
        self._observers.append(observer)

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        """Give each slot's bytes, in the order of `keys`, None where absent, `UNREADABLE` where the node did not
        answer in time. What is asked for within one turn of the event loop is one command to each node, or few: of
        128 keys at most; who is the first after a lone read, or among the first 32 while nothing is under way, is not
        kept waiting for the others."""
        if asyncio.get_running_loop() is not self._loop:
            self._enter_loop()
        nodes = self._nodes
        if len(nodes) == 1 and 0 < len(keys) <= KEYS_PER_GET:  # the usual case, where microseconds count
            if not nodes[0].is_closed:
                return [UNREADABLE] * len(keys)
            names = [key.name for key in keys]
            answer = await nodes[0].channel.ask(names)
            return [answer[name] for name in names]
        shares: dict[Node, dict[bytes, None]] = {}
        for key in keys:
            shares.setdefault(self._node_of(key), {})[key.name] = None
        found: dict[bytes, bytes | None] = {}
        asked: list[asyncio.Future[Answer]] = []
        for node, share in shares.items():
            if node.is_closed:
                asked += node.channel.ask_many(list(share))
            else:
                found |= dict.fromkeys(share, UNREADABLE)
        for each in asked:  # all are asked before the first is awaited
            found |= await each
        return [found[key.name] for key in keys]

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        """Apply each transition atomically to what its slot holds; changes of one slot one after the other.

        `UNCONFIRMED` means that no answer came in time, or that others were faster in all of `ROUNDS_MAX` rounds: a
        confirmed `Applied` says that the transition had its say, which one that lost every race never had. A write that
        was not answered is not repeated: it may be on its way still, and only its owner can tell it from another's.
        """
        self._enter_loop()
        shares: dict[Node, list[Change]] = {}
        for change in changes:
            shares.setdefault(self._node_of(change.key), []).append(change)
        if len(shares) == 1:  # the usual case does without tasks
            (node,) = shares
            return await node.apply(changes)
        async with asyncio.TaskGroup() as group:
            tasks = {node: group.create_task(node.apply(share)) for node, share in shares.items()}
        applied = {node: iter(task.result()) for node, task in tasks.items()}
        return [next(applied[self._node_of(change.key)]) for change in changes]

    async def check(self, *, lock_ttl_s: float) -> list[NodeReport]:
        """Ask all nodes at once, each within its time-outs, for their `stats`, in the order of `nodes`."""
        self._enter_loop()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(node.check(lock_ttl_s)) for node in self._nodes]
        return [task.result() for task in tasks]

    async def aclose(self) -> None:
        """Close all connections, also those in use: what waits on them gets `UNREADABLE` or `UNCONFIRMED`."""
        self._closed = True
        loop, self._loop = self._loop, None  # whoever calls from now on has to enter, and cannot
        if loop is asyncio.get_running_loop():
            await asyncio.gather(*(node.close() for node in self._nodes))

    def _node_of(self, key: Key) -> Node:
        return self._nodes[key.route % len(self._nodes)]

    def node_of(self, key: Key) -> str:
        """The name of the node that holds this slot."""
        return self._node_of(key).name

    def _tell(self, change: NodeChanged) -> None:
        for observer in self._observers:
            observer(change)

    def _enter_loop(self) -> None:
        if self._closed:
            raise CacheClosedError("this MemcachedBackend was closed; make a new one")
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._loop is not None and self._loop.is_running():
            raise WrongLoopError(
                "this MemcachedBackend serves another event loop that is running; make one for each loop"
            )
        self._loop = loop
        for node in self._nodes:
            node.start_over()


def parse_address(node: str) -> Address:
    """Read `host:port`, `host`, `[ipv6]:port` or the path of a unix socket. Raises ConfigurationError."""
    if "/" in node:
        return Address(node, None)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s\[\]:@]+))(?::(\d{1,5}))?", node)
    if match is None or not 0 < (port := int(match[3] or DEFAULT_PORT)) < 65536:
        shown = without_password(node)
        raise ConfigurationError(f"not a memcached node: {shown!r}; give 'host:port' or the path of a unix socket")
    return Address(match[1] or match[2], port)


def without_password(url: str) -> str:
    """Give a URL as it may be shown, whatever is wrong with it: without all that is before its last @."""
    return re.sub(r"^([a-z+]*://)?.*@", r"\1***@", url, flags=re.DOTALL)


def _take_credentials(url: str) -> tuple[str, dict[str, Any]]:
    head, at, tail = url.rpartition("@")
    if not at:
        return url, {}
    scheme, separator, user_and_password = head.partition("://")
    if not separator or re.search("[/?#@]", user_and_password):
        raise ValueError("write @ as %40, and in a user or password / ? # as %2F %3F %23")
    user, _, password = user_and_password.partition(":")
    # What is no UTF-8 is left to Credentials to refuse: a UnicodeDecodeError would carry the password.
    decoded = {"user": unquote(user, errors="surrogateescape"), "password": unquote(password, errors="surrogateescape")}
    return f"{scheme}://{tail}", decoded


def _nodes_of(url: str) -> tuple[list[str], bool]:
    """Give the nodes, and whether they speak TLS."""
    parts = urlsplit(url)
    if parts.fragment:
        raise ValueError("it has a fragment (#)")
    if parts.scheme == "memcached+unix":
        if parts.netloc or not parts.path.strip("/"):
            raise ValueError("a socket needs three slashes and its path")
        return [unquote(parts.path)], False
    if parts.scheme not in ("memcached", "memcacheds"):
        raise ValueError("the scheme is none of memcached, memcacheds and memcached+unix")
    if parts.path.strip("/"):
        raise ValueError(f"it names a path, {parts.path!r}, and memcached has no databases")
    return parts.netloc.split(","), parts.scheme == "memcacheds"


def _options_of(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True, strict_parsing=True):
        if name not in _OPTIONS or _OPTIONS[name][0] in options:
            raise ValueError(f"parameter {name!r} is not one of {', '.join(_OPTIONS)}, or is there twice")
        argument, number = _OPTIONS[name]
        options[argument] = number(value)
    return options
