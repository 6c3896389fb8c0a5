"""Counters of what the cache did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stats:
    """What one `Cache` did in this process since it was made. Plain numbers; read them, or subtract two copies."""

    hits: int = 0
    """Gets that were served from the cache with a row. `cached_get_by` looks twice, for the key and for the row, and
    each look counts, here and among the misses."""
    negative_hits: int = 0
    """Gets that were served from the cache with "there is no such row"."""
    misses: int = 0
    """Gets that looked into the cache and found nothing to serve."""
    loads: int = 0
    """SELECTs that misses led to; one for all misses of a `cached_get_many`."""
    coalesced: int = 0
    """Misses that were served by another task's load."""
    fills: int = 0
    """Rows, or their absence, that were stored."""
    fills_dropped: int = 0
    """Rows that were not stored: a commit came first, the lease was lost, or the server refused the value."""
    locks: int = 0
    """Slots that were locked before a COMMIT."""
    unlocks: int = 0
    """Slots that were unlocked, or destroyed, after one."""
    locks_failed: int = 0
    """Slots that could not be locked in time."""
    locks_lost: int = 0
    """Slots whose lock was gone when COMMIT had been answered: evicted, or the server was restarted. In memory neither
    happens, and nobody looks."""
    locks_unverified: int = 0
    """Slots that could not be looked at when COMMIT had been answered: the server went away meanwhile. Had it lost the
    lock before, other processes may read the old row until it is destroyed."""
    repairs: int = 0
    """Slots that were unlocked or destroyed later than at their commit: the server was away, or the outcome was not
    known."""
    repairs_failed: int = 0
    """Slots of which that was given up: `ttl` had passed, or the cache was closed."""
    garbage: int = 0
    """Values that could not be used: damaged, foreign, of another schema, or of a subclass that its base has loaded."""
    audited: int = 0
    """Rows that `Cache.audit` has looked at, cached or not."""
    audit_mismatches: int = 0
    """Rows that the cache would have served otherwise than the database had them."""
    backend_errors: int = 0
    """Slots that the cache server gave no answer about, each time it was asked."""
    breakers: Counter[str] = field(default_factory=Counter)
    """How often a cache server's circuit breaker became "open", "half-open" and "closed"."""
    bypassed: Counter[str] = field(default_factory=Counter)
    """Gets that read past the cache, by reason."""
