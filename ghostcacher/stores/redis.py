"""Redis or Valkey, single or a cluster: ``redis://``, ``rediss://``, ``redis+cluster://``, ``rediss+cluster://``.

Every method is one pipeline. Values are whole strings: a reader sees the old one or the new one. Give the server a
memory limit and ``maxmemory-policy allkeys-lru``: what it evicts is a miss, and reading marks blocks as used.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ghostcacher.errors import ConfigurationError, MissingExtraError, StoreError, StoreRefusedError, StoreTimeoutError
from ghostcacher.stores.base import Blob, Buffer, StoredEntry, checked_key, is_key
from ghostcacher.stores.halves import AT_ONCE_SECONDS, Halves, asks_others, is_of_all

SCHEMES = frozenset({"redis", "rediss", "redis+cluster", "rediss+cluster"})
CONNECT_TIMEOUT_SECONDS = 0.5
VALUE_LIMIT_BYTES = 512 * 2**20
LISTED_AT_ONCE = 1000
_PREFIX = "ghostcacher/v1/"
_CLUSTER = "+cluster"
_OUTAGES = frozenset({"BusyLoadingError", "MasterDownError", "AuthenticationError"})
"""Answers of a server that will not do anything for a while; others say no to what was asked."""


class RedisStore:
    """Strings under ``ghostcacher/v1/<namespace>/<key>``.

    A server that does not accept a connection within 0.5 s, or does not answer within ``timeout_seconds``, is an error.
    Nothing is retried but what redis-py sends again to a cluster whose nodes have moved, and reads of a cluster: what
    one half of its nodes, masters or replicas, fails to give at once is asked of the other half, then and from then on;
    what it does not give in time is, too, from the next read on.
    Values never change: what a replica does not have yet is a miss.
    """

    name = "remote"

    def __init__(self, url: str, *, timeout_seconds: float = 5.0) -> None:
        """Connects on first use, not here. User, password and TLS options stand in ``url``, as redis-py takes them.

        Raises:
            ConfigurationError: ``url`` is not one of redis-py's, or names a database of a cluster.
            MissingExtraError: redis-py is not installed.
        """
        scheme, _, rest = url.partition("://")
        self._is_cluster = scheme.endswith(_CLUSTER)
        self._url = f"{scheme.removesuffix(_CLUSTER)}://{rest}"
        self._lock = threading.Lock()
        self._opened: Any = None
        self._has_moved = False
        self._halves = Halves()
        retry = importlib.import_module("redis.retry") if _redis() else None
        never = retry.Retry(importlib.import_module("redis.backoff").NoBackoff(), 0) if retry else None
        self._options: dict[str, Any] = {
            "socket_timeout": timeout_seconds, "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS, "retry": never,
            "decode_responses": False,
        }  # fmt: skip
        if self._is_cluster:
            # Connections to replicas must say so when they are made; which calls go there is for `_sent` to say.
            self._replicas = importlib.import_module("redis.cluster").LoadBalancingStrategy.ROUND_ROBIN_REPLICAS
        problem = self._problem()
        if problem:
            raise ConfigurationError(f"remote={_shown(url)!r} {problem}; write redis://host:6379/0")

    def __repr__(self) -> str:
        return f"RedisStore({_shown(self._url)})"

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`."""
        found = self._pipelined(
            "read", keys, lambda pipe, name: pipe.getrange(name, 0, limit_bytes - 1), timeout_seconds
        )
        values: dict[str, Buffer | StoreError] = {}
        for key, value in zip(keys, found, strict=True):
            if isinstance(value, Exception):
                values[key] = _error("read", value)
            elif value:
                values[key] = value
        return values

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`.

        Raises:
            StoreRefusedError: the server is full, or lets nobody write; or a value is above Redis' 512 MiB.
            StoreError: it is not there.
        """
        values = {key: b"".join(blob) for key, blob in items.items()}
        if any(len(value) > VALUE_LIMIT_BYTES for value in values.values()):
            raise StoreRefusedError(
                "a block above the 512 MiB that Redis takes: open the store with smaller block_tokens"
            )
        answers = self._all_well(
            "write", values, lambda pipe, name: pipe.set(name, values[name.removeprefix(_PREFIX)], nx=not replace)
        )
        return frozenset(key for key, is_written in zip(values, answers, strict=True) if not is_written)

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`."""
        found = self._all_well("look up", keys, lambda pipe, name: pipe.exists(name), timeout_seconds)
        return frozenset(key for key, is_there in zip(keys, found, strict=True) if is_there)

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        self._all_well("delete", keys, lambda pipe, name: pipe.unlink(name))

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`. Times are those of the last use, where the server keeps them."""
        with _as_store_errors("list"):
            found = list(self._client().scan_iter(f"{_PREFIX}{prefix}*", count=LISTED_AT_ONCE))
        names = (name.decode(errors="replace").removeprefix(_PREFIX) for name in found)
        keys = [key for key in dict.fromkeys(names) if is_key(key)]
        for begin in range(0, len(keys), LISTED_AT_ONCE):
            yield from self._entries(keys[begin : begin + LISTED_AT_ONCE])

    def close(self) -> None:
        """Close the connections; a later call opens them again."""
        with self._lock:
            client, self._opened = self._opened, None
        if client is not None:
            client.close()

    def _entries(self, keys: Sequence[str]) -> Iterator[StoredEntry]:
        sizes = self._pipelined("list", keys, lambda pipe, name: pipe.strlen(name))
        idle = self._pipelined("list", keys, lambda pipe, name: pipe.object("idletime", name))
        now = time.time()
        for key, size, seconds in zip(keys, sizes, idle, strict=True):
            if isinstance(size, int) and size:
                yield StoredEntry(key, size, now - seconds if isinstance(seconds, int) else now)

    def _problem(self) -> str | None:
        """What is wrong with the URL, without repeating any of it: a password may be what was misread."""
        redis = _redis()
        try:
            given = redis.connection.parse_url(self._url)
            made = redis.ConnectionPool.from_url(self._url, **self._options)
            made.connection_class(**made.connection_kwargs)
        except Exception as error:  # noqa: BLE001 (a URL's options go to constructors, which raise what they like)
            return f"is no URL that redis-py takes ({type(error).__name__}; / ? # @ in a password are written in %XX)"
        return "names a database, and a cluster has none" if self._is_cluster and given.get("db") else None

    def _client(self) -> Any:
        """The client, which makes its connections when they are needed; a cluster's asks for its nodes at once."""
        with self._lock:
            if self._opened is None:
                if self._is_cluster:
                    options = {**self._options, "load_balancing_strategy": self._replicas}
                    self._opened = _redis().RedisCluster.from_url(self._url, **options)
                else:
                    self._opened = _redis().Redis.from_url(self._url, **self._options)
            return self._opened

    def _current(self, *, of_replicas: bool) -> Any:
        """The client; of a cluster where the last call failed, once its nodes have said anew who has what.

        Asked for before a call, not after the failure: a breaker's probe comes when the cluster has changed again. So
        too, now and then, where replicas are wanted and none is known.
        """
        client = self._client()
        if self._has_moved or (of_replicas and not client.get_replicas() and self._halves.asks_for_names()):
            client.nodes_manager.initialize()
        return client

    def _pipelined(
        self, what: str, keys: Sequence[str], add: Callable[[Any, str], object], read_seconds: float | None = None
    ) -> list[Any]:
        """Answers to one command for each key, exceptions among them; in how many seconds the caller wants a read."""
        names = [_PREFIX + checked_key(key) for key in keys]
        if not names:
            return []
        with _as_store_errors(what):
            if read_seconds is None or not self._is_cluster:
                return self._sent(names, add, from_replicas=False)
            return self._read(names, add, read_seconds)

    def _read(self, names: Sequence[str], add: Callable[[Any, str], object], timeout_seconds: float) -> list[Any]:
        """From one half of a cluster; if it fails at once, from the other."""
        until = time.monotonic() + AT_ONCE_SECONDS
        with self._halves.reading(timeout_seconds) as from_replicas:
            try:
                answers = self._sent(names, add, from_replicas=from_replicas)
            except Exception as error:
                if not asks_others([error], until):
                    raise
            else:
                if not asks_others([answer for answer in answers if isinstance(answer, Exception)], until):
                    return answers
            answers = self._sent(names, add, from_replicas=not from_replicas)
            self._halves.are_replicas = not from_replicas
            return answers

    def _sent(self, names: Sequence[str], add: Callable[[Any, str], object], *, from_replicas: bool) -> list[Any]:
        try:
            pipe = self._current(of_replicas=from_replicas).pipeline(transaction=False)
            if self._is_cluster and not from_replicas:
                pipe.load_balancing_strategy = None
            for name in names:
                add(pipe, name)
            answers: list[Any] = pipe.execute(raise_on_error=False)
        except Exception as error:
            self._note([error])
            raise
        self._note([answer for answer in answers if isinstance(answer, Exception)])
        return answers

    def _all_well(
        self, what: str, keys: Sequence[str] | Mapping[str, object], add: Callable[[Any, str], object],
        read_seconds: float | None = None,
    ) -> list[Any]:  # fmt: skip
        answers = self._pipelined(what, list(keys), add, read_seconds)
        if failed := next((answer for answer in answers if isinstance(answer, Exception)), None):
            raise _error(what, failed)
        return answers

    def _note(self, failed: Sequence[Exception]) -> None:
        """Whether the next call must ask the nodes anew. After one that hung this one does: nobody waits for it now."""
        if not self._is_cluster:
            return
        hung = [error for error in failed if "Timeout" in type(error).__name__]
        self._has_moved = any(error not in hung and not is_of_all(error) for error in failed)
        if hung:
            with contextlib.suppress(Exception):
                self._client().nodes_manager.initialize()


def _redis() -> Any:
    try:
        return importlib.import_module("redis")
    except ImportError as error:
        raise MissingExtraError("redis", "redis", "remote=redis://") from error


@contextlib.contextmanager
def _as_store_errors(what: str) -> Iterator[None]:
    """Whatever the client raises as our own error, not chained to it: see `_error`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (redis-py's have several roots: RedisClusterException is no RedisError)
        raise _error(what, error) from None


def _error(what: str, error: BaseException) -> StoreError:
    """Without the client's words, and never chained to them: they may repeat what was sent, a password included."""
    name = type(error).__name__
    answers = importlib.import_module("redis.exceptions").ResponseError
    says_no = isinstance(error, answers) and name not in _OUTAGES
    kind = StoreRefusedError if says_no else StoreTimeoutError if "Timeout" in name else StoreError
    return kind(f"cannot {what} at Redis: {name}")


def _shown(url: str) -> str:
    """``url`` without user, password and options, however malformed."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
