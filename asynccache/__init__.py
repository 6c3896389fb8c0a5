"""An asyncio-native second-level cache for SQLAlchemy."""

from asynccache.audit import Mismatch
from asynccache.backends.base import Applied, Backend, Change, Key, NodeChanged, NodeState, Transition, Write
from asynccache.backends.memcached import MemcachedBackend
from asynccache.backends.memory import MemoryBackend
from asynccache.backends.report import Finding, Level, MemoryStats, NodeReport
from asynccache.cache import Cache
from asynccache.errors import (
    AsyncCacheError,
    AsyncCacheWarning,
    BackendError,
    CacheClosedError,
    ConfigurationError,
    LockNotPlacedError,
    NotCacheableError,
    NotRegisteredError,
    WrongLoopError,
)
from asynccache.events import Event, Observer
from asynccache.inspection import Inspection, SlotView
from asynccache.metrics import Stats
from asynccache.session import (
    AsyncCachedSession,
    cached_get,
    cached_get_by,
    cached_get_many,
    cached_invalidate,
    cached_prefetch,
)
from asynccache.settings import Settings
from asynccache.sync_session import CachedSession

__all__ = [
    "Applied",
    "AsyncCacheError",
    "AsyncCacheWarning",
    "AsyncCachedSession",
    "Backend",
    "BackendError",
    "Cache",
    "CacheClosedError",
    "CachedSession",
    "Change",
    "ConfigurationError",
    "Event",
    "Finding",
    "Inspection",
    "Key",
    "Level",
    "LockNotPlacedError",
    "MemcachedBackend",
    "MemoryBackend",
    "MemoryStats",
    "Mismatch",
    "NodeChanged",
    "NodeReport",
    "NodeState",
    "NotCacheableError",
    "NotRegisteredError",
    "Observer",
    "Settings",
    "SlotView",
    "Stats",
    "Transition",
    "Write",
    "WrongLoopError",
    "cached_get",
    "cached_get_by",
    "cached_get_many",
    "cached_invalidate",
    "cached_prefetch",
]
