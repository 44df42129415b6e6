"""Mooncake Store, a pool of memory spread over machines: ``mooncake://master:50051``. Needs ``ghostcacher[mooncake]``.

The master knows which machine holds what; values travel straight between machines. See https://kvcache.ai.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import socket
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from ghostcacher.errors import ConfigurationError, MissingExtraError, StoreError, StoreRefusedError
from ghostcacher.stores.base import Blob, Buffer, StoredEntry, checked_key, is_key
from ghostcacher.units import parse_bytes

SCHEME = "mooncake"
BUFFER_BYTES = 256 * 2**20
SEEN_BYTES = 4096
"""Values up to this size are read back when they were not to replace: the client does not say who was first."""

EXIT_SECONDS = 10.0
"""How long the end of the process waits for calls that were given up and have not come back."""

_PREFIX = "ghostcacher/v1/"
_PORT = 50051
_NO_ROOM = frozenset({-200, -600})
_OPTIONS = frozenset({"host", "segment", "buffer", "protocol", "devices", "metadata", "metrics"})


@dataclass(frozen=True, slots=True)
class MooncakeAddress:
    """A master, and how this process takes part: ``segment_bytes`` of its memory join the pool."""

    master: str
    metrics: str | None = None
    host: str | None = None
    segment_bytes: int = 0
    buffer_bytes: int = BUFFER_BYTES
    protocol: str = "tcp"
    devices: str = ""
    metadata: str = field(default="P2PHANDSHAKE", repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """``mooncake://master:50051?segment=4GiB&metrics=9003&protocol=rdma&devices=mlx5_0``.

        Raises:
            ConfigurationError: there is no master, or an option is not known or malformed.
        """
        try:
            parts, options = urlsplit(url), dict(parse_qsl(urlsplit(url).query))
            host, port = parts.hostname, parts.port or _PORT
        except ValueError:
            raise ConfigurationError(f"remote={SCHEME}://… is no URL; write {SCHEME}://host:{_PORT}") from None
        unknown = set(options) - _OPTIONS
        if not host or unknown:
            why = f"has options {sorted(unknown)}; it takes {sorted(_OPTIONS)}" if unknown else "names no master"
            raise ConfigurationError(f"remote={SCHEME}://… {why}; write mooncake://host:{_PORT}")
        metrics = options.get("metrics")
        return cls(
            f"{host}:{port}", f"{host}:{metrics}" if metrics else None,
            options.get("host"), parse_bytes(options.get("segment", 0)),
            parse_bytes(options.get("buffer", BUFFER_BYTES)), options.get("protocol", "tcp"),
            options.get("devices", ""), options.get("metadata", "P2PHANDSHAKE"),
        )  # fmt: skip


class MooncakeStore:
    """Objects under ``ghostcacher/v1/<namespace>/<key>``. The client blocks; the tier above it keeps the deadline.

    What lies in this process's own segment goes with the process. Values are never empty.
    """

    name = "remote"

    def __init__(self, url: str) -> None:
        """Joins the pool on first use, not here.

        Raises:
            ConfigurationError: ``url`` is malformed; see `MooncakeAddress.parse`.
            MissingExtraError: the client is not installed.
        """
        self._address = MooncakeAddress.parse(url)
        self._make = _client_class()
        self._joining = threading.Lock()
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._opened: Any = None
        self._calls = 0
        atexit.register(_await_calls, weakref.ref(self))

    def __repr__(self) -> str:
        return f"MooncakeStore({self._address.master})"

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`. Values are read whole; one that stands and is not given is an error."""
        if not keys:
            return {}
        names = _names(keys)
        with self._client() as client:
            found = dict(zip(keys, client.get_batch(names), strict=True))
        empty = [key for key, value in found.items() if not value]
        standing = self.contains_many(empty, timeout_seconds=timeout_seconds)  # raises if nobody answers
        values: dict[str, Buffer | StoreError] = {key: bytes(found[key])[:limit_bytes] for key in keys if found[key]}
        return values | {key: StoreError("cannot read from Mooncake: it gives nothing") for key in standing}

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`. A value that is replaced is absent for a moment.

        Two at once who do not replace are told apart up to 4 KiB; above, by looking before.

        Raises:
            StoreRefusedError: the pool is full, or the value is larger than this client's buffer.
            StoreError: the master is not there.
        """
        values = {key: b"".join(blob) for key, blob in items.items()}
        keys, stood = list(values), set[str]()
        names = dict(zip(keys, _names(keys), strict=True))
        before = frozenset[str]() if replace else self.contains_many(keys, timeout_seconds=timeout_seconds)
        with self._client() as client:
            for key in [key for key in values if key not in before]:
                value = values[key]
                _check("write", client.upsert(names[key], value) if replace else client.put(names[key], value))
                if not replace and len(value) <= SEEN_BYTES and bytes(client.get(names[key])) != value:
                    stood.add(key)
        return before | stood

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`."""
        if not keys:
            return frozenset()
        with self._client() as client:
            found = client.batch_is_exist(_names(keys))
        for code in found:
            _check("look up", min(code, 0))
        return frozenset(key for key, code in zip(keys, found, strict=True) if code)

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`: at once, whoever reads them."""
        if not keys:
            return
        names = _names(keys)
        with self._client() as client:
            codes = client.batch_remove(names, force=True)
        failed = [key for key, code in zip(keys, codes, strict=True) if code]
        if self.contains_many(failed, timeout_seconds=timeout_seconds):
            raise StoreError("cannot delete at Mooncake: an object still stands")

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`. Asks the master's HTTP port, the URL's ``metrics=``; times of use are not known.

        Raises:
            StoreError: it does not answer, or the URL does not name it.
        """
        if self._address.metrics is None:
            raise StoreError("Mooncake lists its objects at the master's HTTP port: add ?metrics=<port> to the URL")
        url = f"http://{self._address.metrics}/get_all_keys"
        try:
            with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:
                names = answer.read().decode(errors="replace").split()
        except OSError as error:
            raise StoreError(f"cannot list at Mooncake: {type(error).__name__}") from None
        keys = [name.removeprefix(_PREFIX) for name in names if name.startswith(f"{_PREFIX}{prefix}")]
        with self._client() as client:
            sizes = {key: client.get_size(_PREFIX + key) for key in keys if is_key(key)}
        now = time.time()
        yield from (StoredEntry(key, size_bytes, now) for key, size_bytes in sizes.items() if size_bytes > 0)

    def close(self) -> None:
        """Leave the pool; a later call joins it again. A call that hangs keeps its client: to close it would abort."""
        with self._lock:
            client, self._opened = self._opened, None
            is_used = self._calls > 0
        if client is not None and not is_used:
            client.close()

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        """The client, which finds a master that is back by itself."""
        with self._lock:
            self._calls += 1
        try:
            client = self._joined_once()
            yield client
        finally:
            with self._lock:
                self._calls -= 1
                self._ended.notify_all()

    def await_calls(self) -> None:
        """At exit: a thread that comes back from the client to an interpreter that is gone aborts the process."""
        with self._lock:
            self._ended.wait_for(lambda: not self._calls, EXIT_SECONDS)

    def _joined_once(self) -> Any:
        with self._joining:
            client = self._opened
            if client is None:
                client = self._opened = self._joined()
            return client

    def _joined(self) -> Any:
        address, client = self._address, self._make()
        here = f"{address.host or _own_address(address.master)}:{_free_port()}"
        code = client.setup(
            here, address.metadata, address.segment_bytes, address.buffer_bytes, address.protocol, address.devices,
            address.master,
        )  # fmt: skip
        if code:
            raise StoreError(f"cannot join the Mooncake pool of {address.master}: code {code}")
        return client


def _check(what: str, code: int) -> None:
    """Raise for a code that is none of success."""
    if code in _NO_ROOM:
        raise StoreRefusedError(f"cannot {what} at Mooncake: no room (code {code}); see ?segment= and ?buffer=")
    if code:
        raise StoreError(f"cannot {what} at Mooncake: code {code}")


def _await_calls(store: weakref.ref[MooncakeStore]) -> None:
    found = store()
    if found is not None:
        found.await_calls()


def _names(keys: Sequence[str]) -> list[str]:
    return [_PREFIX + checked_key(key) for key in keys]


def _client_class() -> Any:
    try:
        return importlib.import_module("mooncake.store").MooncakeDistributedStore
    except ImportError as error:
        if getattr(error, "name", None) in {"mooncake", "mooncake.store"}:
            raise MissingExtraError("mooncake-transfer-engine-non-cuda", "mooncake", "remote=mooncake://") from error
        raise ConfigurationError(
            f"Mooncake's client does not load ({error}); on Debian: apt-get install libibverbs1 librdmacm1 libnuma1"
        ) from error


def _own_address(master: str) -> str:
    """The address of this machine that the master sees."""
    host, _, port = master.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StoreError(f"cannot find the way to Mooncake's master {master}: {error.strerror}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
