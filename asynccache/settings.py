"""Every time and every bound of the protocol, each with its default and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Literal

from asynccache.errors import ConfigurationError

Duration = float | timedelta
"""Seconds, or a timedelta."""

OnLockFailure = Literal["commit", "raise"]


def seconds(name: str, value: Duration, *, zero: bool = False) -> float:
    """A duration in seconds.

    Raises ConfigurationError if it is not a number of seconds or a timedelta, not finite, negative, or 0 unless `zero`.
    """
    if isinstance(value, timedelta):
        number = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        raise ConfigurationError(f"{name} must be a number of seconds or a timedelta, not {value!r}")
    if not (0 <= number < float("inf")) or (number == 0 and not zero):
        bound = "0 or more" if zero else "more than 0"
        raise ConfigurationError(f"{name} must be {bound} seconds, not {value!r}")
    return number


@dataclass(frozen=True, slots=True)
class Policy:
    """How long the rows of one model are served, and which of its attributes are not stored."""

    ttl_s: float
    ttl_jitter: float
    negative_ttl_s: float
    exclude_columns: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        seconds("ttl", self.ttl_s)
        seconds("negative_ttl", self.negative_ttl_s)
        if not 0 <= self.ttl_jitter < 1:
            raise ConfigurationError(f"ttl_jitter must be at least 0 and below 1, not {self.ttl_jitter!r}")


@dataclass(frozen=True, slots=True)
class Settings:
    """The protocol's settings. All times are in seconds."""

    policy: Policy = Policy(ttl_s=300.0, ttl_jitter=0.1, negative_ttl_s=30.0)
    """For models that are registered without times of their own. The ttl bounds any staleness that no lock could
    prevent. Each is shortened at random by up to the fraction `ttl_jitter`, so that what was filled together expires
    apart. "There is no such row" is served for less long: whoever asks for any key could fill the cache with it."""

    lease_ttl_s: float = 3.0
    """How long a reader may take to load a row and store it. Seconds, not milliseconds: with 150 ms one slow query
    was made eight times."""

    lease_timeout_s: float = 3.0
    """How long a reader waits for the row that another process is loading, before it loads it too: as long as that
    other one's lease may last."""

    poll_min_s: float = 0.002
    poll_max_s: float = 0.05
    """Between these, with jitter, another process's lease is looked at again: often at first, most loads are quick."""

    lock_ttl_s: float = 10.0
    """How long a COMMIT may take under its locks. A lock outlives its writer by at most twice this."""

    lock_timeout_s: float = 1.0
    """How long a commit tries to lock what it changes, before `on_lock_failure` decides."""

    retry_min_s: float = 0.01
    retry_max_s: float = 1.0
    """Between these, doubling with jitter, a backend that gave no answer is asked again."""

    flight_timeout_s: float = 0.25
    """How long a session that holds a connection waits for another's load: the other may be queueing for just that
    connection. Sessions that hold none wait as long as it takes."""

    hold_off_s: float = 0.0
    """How long after a commit its slots stay closed. For reads from replicas: their usual lag."""

    buckets: int = 16
    """Generations to a mapped hierarchy: a hot one is spread over as many servers, and a bulk write locks them all."""

    slots_max: int = 64
    """Beyond so many changed rows of one hierarchy, a transaction locks its generations instead of each slot."""

    repairs_max: int = 10_000
    """So many slots, at most, are remembered that could not be locked or released, to be destroyed when the server is
    back. Beyond that the generations of their rows are renewed."""

    on_lock_failure: OnLockFailure = "commit"
    """What happens when a slot cannot be locked: "commit" and destroy it in the background until that is done or `ttl`
    has passed, or "raise" before COMMIT, with nothing written."""

    bypass_listeners: bool = True
    """Whether a session with `do_orm_execute` listeners, or whose engine has `begin` listeners, reads past the cache,
    since they may filter, rewrite or redirect what it reads (tenants, soft deletes). Set it to False if yours do
    not."""

    rewrite_pk_selects: bool = False
    """Whether `execute`, `scalar` and `scalars` of a session answer `select(Model).where(Model.id == 5)`, with exactly
    the primary key and nothing else, as a get does. So do repositories read. Asked for, since a SELECT is then not
    executed although one was written."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.endswith("_s"):
                seconds(field.name.removesuffix("_s"), getattr(self, field.name), zero=field.name == "hold_off_s")
        if self.buckets < 1:
            raise ConfigurationError(f"buckets must be at least 1, not {self.buckets!r}")
        if self.slots_max < 1:
            raise ConfigurationError(f"slots_max must be at least 1, not {self.slots_max!r}")
        if self.repairs_max < 1:
            raise ConfigurationError(f"repairs_max must be at least 1, not {self.repairs_max!r}")
        if self.on_lock_failure not in ("commit", "raise"):
            raise ConfigurationError(f'on_lock_failure must be "commit" or "raise", not {self.on_lock_failure!r}')
        if self.lock_timeout_s > self.lock_ttl_s / 2:
            raise ConfigurationError(
                f"lock_timeout ({self.lock_timeout_s} s) must be at most half of lock_ttl ({self.lock_ttl_s} s): "
                "a COMMIT is refused under a lock that is older than that"
            )
