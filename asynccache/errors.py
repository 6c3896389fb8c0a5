"""Everything that this library raises: one base class, and a leaf where a caller can act differently."""


class AsyncCacheError(Exception):
    """The base of every error of this library."""


class ConfigurationError(AsyncCacheError):
    """Raised when the library is put together wrongly: an unknown URL scheme, a time that is not positive,
    something that is no mapped class, a session that is not ours."""


class NotRegisteredError(AsyncCacheError):
    """Raised when a model is asked for through the cache that was never registered with it."""


class NotCacheableError(AsyncCacheError):
    """Raised by `Cache.register` when a model cannot be cached, with the model, the column and the reason."""


class CacheClosedError(AsyncCacheError):
    """Raised when a cache is used after `Cache.aclose`."""


class WrongLoopError(AsyncCacheError):
    """Raised when a cache is used from one event loop while another, which it serves, is still running."""


class LockNotPlacedError(AsyncCacheError):
    """Raised before COMMIT when a slot could not be locked and `on_lock_failure="raise"`: nothing was written."""


class BackendError(AsyncCacheError):
    """Raised when the cache server could not be reached or gave no proper answer.

    Reads and commits never raise it: they go on without the cache. `Cache.invalidate` and
    `Cache.invalidate_all` do, since doing nothing in silence would be a lie.
    """


class AsyncCacheWarning(UserWarning):
    """Given once when something is not cached that its owner may believe to be."""
