"""Redis or Valkey, single or a cluster: ``redis://``, ``rediss://``, ``redis+cluster://``, ``rediss+cluster://``.

Every method is one pipeline. Values are whole strings: a reader sees the old one or the new one. Give the server a
memory limit and ``maxmemory-policy allkeys-lru``: what it evicts is a miss, and reading marks blocks as used.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ghostcacher.errors import ConfigurationError, MissingExtraError, StoreError, StoreTimeoutError
from ghostcacher.stores.base import Blob, Buffer, StoredEntry, checked_key

SCHEMES = frozenset({"redis", "rediss", "redis+cluster", "rediss+cluster"})
CONNECT_TIMEOUT_SECONDS = 0.5
VALUE_LIMIT_BYTES = 512 * 2**20
_PREFIX = "ghostcacher/v1/"
_SCAN_COUNT = 1000
_CLUSTER = "+cluster"


class RedisStore:
    """Strings under ``ghostcacher/v1/<namespace>/<key>``.

    No call is retried, and a server that does not accept a connection within 0.5 s, or does not answer within
    ``timeout_seconds``, is an error. After a failover a cluster's nodes are looked up again by the client.
    """

    name = "remote"

    def __init__(self, url: str, *, timeout_seconds: float = 5.0) -> None:
        """Connects on first use, not here. User, password and TLS options stand in ``url``, as redis-py takes them.

        Raises:
            ConfigurationError: ``url`` is not one of redis-py's.
            MissingExtraError: redis-py is not installed.
        """
        self.scheme = url.partition("://")[0]
        self._url = url.replace(_CLUSTER, "", 1)
        self._timeout_seconds = timeout_seconds
        redis = _redis()
        try:
            redis.connection.parse_url(self._url)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"remote={_shown(url)!r} is no URL for Redis: redis://host:6379/0") from error

    def __repr__(self) -> str:
        return f"RedisStore({_shown(self._url)})"

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`."""
        found = self._pipelined("read", keys, lambda pipe, name: pipe.getrange(name, 0, limit_bytes - 1))
        values: dict[str, Buffer | StoreError] = {}
        for key, value in zip(keys, found, strict=True):
            if isinstance(value, Exception):
                values[key] = _error("read", value)
            elif value:
                values[key] = value
        return values

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float) -> None:
        """See `Store.put_many`.

        Raises:
            StoreError: not every value was written: the server is full, read-only, or not there; or a value is
                above Redis' 512 MiB.
        """
        values = {key: b"".join(blob) for key, blob in items.items()}
        if any(len(value) > VALUE_LIMIT_BYTES for value in values.values()):
            raise StoreError("a block above 512 MiB, the limit of Redis: open the store with smaller block_tokens")
        self._all_well("write", values, lambda pipe, name: pipe.set(name, values[name.removeprefix(_PREFIX)]))

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`."""
        found = self._all_well("look up", keys, lambda pipe, name: pipe.exists(name))
        return frozenset(key for key, is_there in zip(keys, found, strict=True) if is_there)

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        self._all_well("delete", keys, lambda pipe, name: pipe.unlink(name))

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`. Times are those of the last use, where the server keeps them."""
        try:
            names = [name.decode() for name in self._client.scan_iter(f"{_PREFIX}{prefix}*", count=_SCAN_COUNT)]
        except _failures() as error:
            raise _error("list", error) from error
        keys = [name.removeprefix(_PREFIX) for name in names]
        sizes = self._pipelined("list", keys, lambda pipe, name: pipe.strlen(name))
        idle = self._pipelined("list", keys, lambda pipe, name: pipe.object("idletime", name))
        now = time.time()
        for key, size, seconds in zip(keys, sizes, idle, strict=True):
            if isinstance(size, int) and size:
                yield StoredEntry(key, size, now - seconds if isinstance(seconds, int) else now)

    def close(self) -> None:
        """Close the connections; a later call opens them again."""
        client = self.__dict__.pop("_client", None)
        if client is not None:
            client.close()

    @functools.cached_property
    def _client(self) -> Any:
        redis, never = _redis(), importlib.import_module("redis.retry")
        options: dict[str, Any] = {
            "socket_timeout": self._timeout_seconds, "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "retry": never.Retry(importlib.import_module("redis.backoff").NoBackoff(), 0),
        }  # fmt: skip
        make = redis.RedisCluster if self.scheme.endswith(_CLUSTER) else redis.Redis
        try:
            return make.from_url(self._url, **options)
        except _failures() as error:
            raise _error("connect", error) from error

    def _pipelined(self, what: str, keys: Sequence[str], add: Callable[[Any, str], object]) -> list[Any]:
        """Answers to one command for each key, exceptions among them."""
        names = [_PREFIX + checked_key(key) for key in keys]
        if not names:
            return []
        try:
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                add(pipe, name)
            answers: list[Any] = pipe.execute(raise_on_error=False)
        except _failures() as error:
            raise _error(what, error) from error
        return answers

    def _all_well(
        self, what: str, keys: Sequence[str] | Mapping[str, object], add: Callable[[Any, str], object]
    ) -> list[Any]:
        answers = self._pipelined(what, list(keys), add)
        if failed := next((answer for answer in answers if isinstance(answer, Exception)), None):
            raise _error(what, failed) from failed
        return answers


def _redis() -> Any:
    try:
        return importlib.import_module("redis")
    except ImportError as error:
        raise MissingExtraError("redis", "redis", "remote=redis://") from error


def _failures() -> tuple[type[BaseException], ...]:
    """What redis-py raises for a server that does not do what it was asked; a cluster without nodes has its own."""
    exceptions = importlib.import_module("redis.exceptions")
    return (exceptions.RedisError, OSError)


def _error(what: str, error: BaseException) -> StoreError:
    """Without the client's words: they may repeat what was sent."""
    kind = StoreTimeoutError if "Timeout" in type(error).__name__ else StoreError
    return kind(f"cannot {what} at Redis: {type(error).__name__}")


def _shown(url: str) -> str:
    """``url`` without user, password and options, however malformed."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
