"""What a server says about itself, and what that means for the slots in it: pure functions of `stats`.

memcached tells in `stats` what it does, in `stats settings` how it was started (its doc/protocol.txt names each line).
What is behind a name is never guessed: a proxy or a hosted memcached may leave any of them out, and then it is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

ROUND_TRIP_S_MAX: Final = 0.010
"""A SELECT by primary key takes a millisecond or two beside its database. A cache that is further away than several of
them saves no time, and each commit that changes something waits for up to four round trips."""

ITEM_BYTES_MIN: Final = 64 * 1024
"""The default is 1 MiB. Rows are some hundred bytes, with a few long texts some ten thousand."""

MEMORY_USED_MAX: Final = 0.8
"""`bytes` counts what items hold, not what is lost between them and their slab's chunks: a server that was filled with
slots of 60 bytes until it evicted said 84 %."""

CONNECTIONS_USED_MAX: Final = 0.8
"""Those that come beyond the limit are refused, and a deployment that starts new processes before it ends the old ones
needs up to twice as many."""

VERSION_MIN: Final = (1, 5, 0)
"""Of July 2017: from here on the segmented LRU, without which `temporary_ttl` is refused, needs no `-o modern`
(https://github.com/memcached/memcached/wiki/ReleaseNotes150)."""

_ROUND_S: Final = 5  # a temporary_ttl that one remembers: 25, not 21


class Level(Enum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # the node serves, but slower, or less safely, than it could
    ERROR = "error"  # the node cannot be used: its rows come from the database


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found out about a node.

    topic: what it is about, in a word or two: the same for one thing whatever its level.
    found: how it is.
    way_out: what to do about it. Empty if all is well.
    """

    level: Level
    topic: str
    found: str
    way_out: str = ""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One server, as it was when it was asked. None stands for what it did not tell.

    node: its address, without a password.
    reachable: whether it answered at all, be it with a refusal.
    error: why nothing else is known.
    round_trip_s: the shorter of the two exchanges that it was asked by.
    cas_enabled: False under `-C`: it gives no versions to compare, so that nothing can be changed safely.
    evicts: False under `-M`: a full server refuses values, instead of dropping others for them.
    temporary_ttl_s: items that live at most so long are never evicted; 0 if there is no such rule.
    locks_protected: whether a lock is safe from eviction, as `locks_are_protected` tells.
    evictions, refusals: how many slots were dropped, and writes refused, for want of memory since the server started.
    connections_max: how many connections it takes, or a few less; `-c` also counts what it needs for itself.
    findings: what that means and what to do, the most fundamental first.
    """

    node: str
    reachable: bool | None = None
    error: str | None = None
    version: str | None = None
    uptime_s: int | None = None
    round_trip_s: float | None = None
    cas_enabled: bool | None = None
    evicts: bool | None = None
    temporary_ttl_s: int | None = None
    locks_protected: bool | None = None
    item_size_max_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_max_bytes: int | None = None
    evictions: int | None = None
    refusals: int | None = None
    connections: int | None = None
    connections_max: int | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether rows can be cached there: it answers, lets us in, and compares before it sets."""
        return all(finding.level is not Level.ERROR for finding in self.findings)


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """What a `MemoryBackend` keeps now, and what it has dropped since it was made.

    entries, bytes_used: all that it keeps, expired slots that were not met yet included; `bytes_used` as `bytes_max`
        bounds it.
    pinned: how many of them are locks and generations.
    evictions, pinned_evictions: slots that were dropped for want of room; locks and generations among them.
    expirations: slots that were dropped after their ttl.
    refusals: values that were too large.
    """

    entries: int
    entries_max: int
    pinned: int
    bytes_used: int
    bytes_max: int
    value_bytes_max: int
    evictions: int
    pinned_evictions: int
    expirations: int
    refusals: int

    @property
    def bound(self) -> str:
        """Which of the two bounds is nearer."""
        return "entries_max" if self.entries * self.bytes_max >= self.bytes_used * self.entries_max else "bytes_max"


def report_on(
    node: str, stats: Mapping[str, str], settings: Mapping[str, str], *, round_trip_s: float, lock_ttl_s: float
) -> NodeReport:
    """Say what a memcached server's `stats` and `stats settings` mean to a cache with this `lock_ttl`, in seconds."""
    report = NodeReport(
        node,
        reachable=True,
        version=stats.get("version"),
        uptime_s=_number(stats, "uptime"),
        round_trip_s=round_trip_s,
        cas_enabled=_switch(settings, "cas_enabled"),
        evicts=_switch(settings, "evictions"),
        temporary_ttl_s=0 if _switch(settings, "temp_lru") is False else _number(settings, "temporary_ttl"),
        locks_protected=locks_are_protected(settings, lock_ttl_s),
        item_size_max_bytes=_number(settings, "item_size_max"),
        memory_used_bytes=_number(stats, "bytes"),
        memory_max_bytes=_number(stats, "limit_maxbytes"),
        evictions=_number(stats, "evictions"),
        refusals=_number(stats, "store_no_memory"),
        connections=_number(stats, "curr_connections"),
        connections_max=_connections_max(stats, settings),
    )
    life_s = lock_life_s(lock_ttl_s)
    findings = (
        _reachable(report),
        _version(report),
        _cas(report),
        _locks(report, life_s),
        _temporary(report, life_s),
        _item_size(report),
        _memory(report),
        _evictions(report, life_s),
        _connections(report),
    )
    return replace(report, findings=tuple(finding for finding in findings if finding is not None))


def report_on_memory(stats: MemoryStats) -> NodeReport:
    """Say what the slots in this process's memory come to."""
    return NodeReport(
        "the memory of this process",
        reachable=True,
        cas_enabled=True,
        evicts=True,
        locks_protected=not stats.pinned_evictions,
        item_size_max_bytes=stats.value_bytes_max,
        memory_used_bytes=stats.bytes_used,
        memory_max_bytes=stats.bytes_max,
        evictions=stats.evictions,
        refusals=stats.refusals,
        findings=(
            _locks_in_memory(stats),
            _ok("item size", f"up to {_size(stats.value_bytes_max)}"),
            _entries_in_memory(stats),
            _ok("memory", f"{_size(stats.bytes_used)} of {_size(stats.bytes_max)} used"),
            _evictions_in_memory(stats),
        ),
    )


def report_failure(node: str, error: str, *, reachable: bool) -> NodeReport:
    """Tell of a server that did not answer, or that refused to say anything."""
    if reachable:
        found = f"refused: {error}"
        way_out = "look at what it says: it may want a name and a password, or have all the connections that it takes"
    else:
        found = f"no: {error}"
        way_out = "start it, correct the URL, or give it more time there; until then its rows come from the database"
    return NodeReport(node, reachable=reachable, error=error, findings=(_error("reachable", found, way_out),))


def report_cas_disabled(node: str) -> NodeReport:
    """Tell of a server that is not even connected to, since nothing could be stored there safely."""
    report = NodeReport(node, reachable=True, cas_enabled=False)
    return replace(report, findings=tuple(filter(None, [_cas(report)])))


def report_unchecked(backend: object) -> NodeReport:
    """Tell of a backend that has no `check` of its own."""
    finding = _warning("check", "this backend cannot be checked", "give its class a method check(), as Backend has it")
    return NodeReport(repr(backend), findings=(finding,))


def lock_life_s(lock_ttl_s: float) -> int:
    """Give how many seconds a lock lives at most: until its owner's deadline (`protocol.lock`), in memcached's whole
    seconds and one more (`memcached.exptime_of`)."""
    return math.ceil(2 * lock_ttl_s) + 1


def locks_are_protected(settings: Mapping[str, str], lock_ttl_s: float) -> bool | None:
    """Say whether a memcached that tells these `stats settings` never evicts a lock that lives.

    It does not if it evicts nothing (`-M`), or if what lives at most `temporary_ttl` has an LRU of its own, from which
    nothing is evicted: an item goes there if its time to live is that or less (`do_item_alloc` in memcached's items.c).
    None: the server does not tell.
    """
    if _switch(settings, "evictions") is False:
        return True
    separate = _switch(settings, "temp_lru")
    temporary_ttl_s = _number(settings, "temporary_ttl")
    if separate is False:
        return False
    if separate is None or temporary_ttl_s is None:
        return None
    return temporary_ttl_s >= lock_life_s(lock_ttl_s)


# ------------------------------------------------------------------------------------------------------------- judges


def _reachable(report: NodeReport) -> Finding | None:
    assert report.round_trip_s is not None
    found = f"yes, in {1000 * report.round_trip_s:.1f} ms"
    if report.round_trip_s <= ROUND_TRIP_S_MAX:
        return _ok("reachable", found)
    return _warning("reachable", found, "run it closer to the application: a query to the database may be as fast")


def _version(report: NodeReport) -> Finding | None:
    if report.version is None:
        return None
    found = report.version if report.uptime_s is None else f"{report.version}, up for {_span(report.uptime_s)}"
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", report.version)
    if numbers is None or tuple(map(int, numbers.groups())) >= VERSION_MIN:
        return _ok("version", found)
    oldest = ".".join(map(str, VERSION_MIN))
    return _warning("version", found, f"install memcached {oldest} or newer, which can protect locks as it is")


def _cas(report: NodeReport) -> Finding | None:
    if report.cas_enabled is None:
        return None
    if report.cas_enabled:
        return _ok("cas", "enabled")
    return _error("cas", "disabled: nothing can be stored there safely, and nothing is", "start memcached without -C")


def _locks(report: NodeReport, life_s: int) -> Finding | None:
    ttl_s = report.temporary_ttl_s
    if report.evicts is False:
        return _ok("locks", "not evicted: evictions are off")
    if report.locks_protected:
        return _ok("locks", f"not evicted: they live at most {life_s} s, and temporary_ttl is {ttl_s} s")
    if report.locks_protected is None:
        found = "the server does not tell whether it may evict them"
    elif ttl_s == 0:
        found = "may be evicted: temporary_ttl is not set"
    else:
        found = f"may be evicted: temporary_ttl is {ttl_s} s, less than they may live"
    return _warning("locks", found, f"start memcached with {_protection(life_s)}")


def _temporary(report: NodeReport, life_s: int) -> Finding | None:
    """Protected rows are as bad as none: what the server cannot evict, it cannot make room in."""
    ttl_s = report.temporary_ttl_s
    if ttl_s is None or ttl_s <= 2 * life_s or report.evicts is False:
        return None
    return _warning(
        "temporary_ttl",
        f"{ttl_s} s: rows with a ttl of at most that are never evicted either, and a server full of them refuses more",
        f"start memcached with {_protection(life_s)}",
    )


def _item_size(report: NodeReport) -> Finding | None:
    size = report.item_size_max_bytes
    if size is None:
        return None
    if size >= ITEM_BYTES_MIN:
        return _ok("item size", f"up to {_size(size)}")
    return _warning(
        "item size", f"up to {_size(size)}: larger rows are not cached", "raise -I, whose default is 1 MiB (-I 1m)"
    )


def _memory(report: NodeReport) -> Finding | None:
    used, limit = report.memory_used_bytes, report.memory_max_bytes
    if used is None or not limit:
        return None
    found = f"{_size(used)} of {_size(limit)} used"
    more = f"raise -m, now {limit >> 20}"
    if report.refusals:
        return _warning("memory", f"{found}, and {report.refusals:,} writes were refused for want of it", more)
    if used > MEMORY_USED_MAX * limit:
        end = "refuses writes" if report.evicts is False else "evicts rows"
        return _warning("memory", f"{found}: nearly full, where it {end}", more)
    return _ok("memory", found)


def _evictions(report: NodeReport, life_s: int) -> Finding | None:
    if report.evicts is False:
        return _warning(
            "evictions",
            "off: a full server refuses locks as well as rows",
            f"start memcached without -M, and with {_protection(life_s)}",
        )
    if report.evictions is None:
        return None
    if report.evictions == 0:
        return _ok("evictions", "none")
    since = "" if report.uptime_s is None else f" in {_span(report.uptime_s)}"
    return _warning(
        "evictions", f"{report.evictions:,}{since}: not all that is cached finds room", "raise -m, or shorten ttl"
    )


def _connections(report: NodeReport) -> Finding | None:
    now, limit = report.connections, report.connections_max
    if now is None or not limit:
        return None
    found = f"{now:,} of {limit:,}"
    if now <= CONNECTIONS_USED_MAX * limit:
        return _ok("connections", found)
    return _warning("connections", f"{found}: more are refused", "raise -c, or lower pool_size in the URL")


def _locks_in_memory(stats: MemoryStats) -> Finding:
    if not stats.pinned_evictions:
        return _ok("locks", "not evicted")
    return _warning(
        "locks",
        f"{stats.pinned_evictions:,} locks or generations were evicted, since nothing else was left",
        f"raise {stats.bound}: a writer that dies after its lock was evicted leaves an old row behind",
    )


def _entries_in_memory(stats: MemoryStats) -> Finding:
    found = f"{stats.entries:,} of {stats.entries_max:,}"
    if stats.entries < stats.entries_max:
        return _ok("entries", found)
    return _warning("entries", f"{found}: each new one takes the place of another", "raise entries_max")


def _evictions_in_memory(stats: MemoryStats) -> Finding:
    if not stats.evictions:
        return _ok("evictions", "none")
    found = f"{stats.evictions:,}: not all that is cached finds room"
    return _warning("evictions", found, f"raise {stats.bound}, or shorten ttl")


def _ok(topic: str, found: str) -> Finding:
    return Finding(Level.OK, topic, found)


def _warning(topic: str, found: str, way_out: str) -> Finding:
    return Finding(Level.WARNING, topic, found, way_out)


def _error(topic: str, found: str, way_out: str) -> Finding:
    return Finding(Level.ERROR, topic, found, way_out)


def _protection(life_s: int) -> str:
    ttl_s = _ROUND_S * math.ceil(life_s / _ROUND_S)
    return f"-o temporary_ttl={ttl_s}, so that locks, which live at most {life_s} s, are not evicted"


# ------------------------------------------------------------------------------------------- reading, and saying again


def _number(told: Mapping[str, str], name: str) -> int | None:
    value = told.get(name, "")
    return int(value) if re.fullmatch(r"[0-9]+", value) else None


def _switch(told: Mapping[str, str], name: str) -> bool | None:
    return {"yes": True, "on": True, "no": False, "off": False}.get(told.get(name, ""))


def _connections_max(stats: Mapping[str, str], settings: Mapping[str, str]) -> int | None:
    """`-c` counts files, and the server needs some for itself: those that it has reserved, and then a few."""
    files = _number(settings, "maxconns")
    return None if files is None else max(files - (_number(stats, "reserved_fds") or 0), 0)


def _size(size: int) -> str:
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << bits:
            return f"{size / (1 << bits):.4g} {unit}"
    return f"{size} bytes"


def _span(span_s: int) -> str:
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if span_s >= 2 * seconds:
            return f"{span_s // seconds} {unit}"
    return f"{span_s} s"
