"""A breaker: a store that keeps failing is left alone for a while, so that it costs nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from ghostcacher.errors import StoreError, StoreRefusedError
from ghostcacher.stores.base import Blob, Buffer, Store, StoredEntry, close

FAILURES = 3
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0
_Result = TypeVar("_Result")


class BreakerStore:
    """A store that is not asked after 3 failures in a row: for 5 s, then one call probes it, then for twice as long.

    While it is out every call raises StoreError at once. At most 300 s pass between probes; one success ends it. A
    store that is there but says no to what was asked (StoreRefusedError) has not failed. Calls about nothing count not.
    Reads and writes are counted apart: a cluster may give what it cannot take.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = store.name
        self._store = store
        self._reads, self._writes = _Circuit(store.name, clock), _Circuit(store.name, clock)

    @property
    def is_out(self) -> bool:
        """Whether the next read would be refused."""
        return self._reads.is_out

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`. Values that could not be read count as a failure of the call."""
        if not keys:
            return {}
        return self._reads.asked(
            lambda: self._store.get_many(keys, limit_bytes=limit_bytes, timeout_seconds=timeout_seconds),
            lambda values: any(map(_is_failure, values.values())),
        )

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`."""
        if not items:
            return frozenset()
        return self._writes.asked(lambda: self._store.put_many(items, timeout_seconds=timeout_seconds, replace=replace))

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`."""
        if not keys:
            return frozenset()
        return self._reads.asked(lambda: self._store.contains_many(keys, timeout_seconds=timeout_seconds))

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        if not keys:
            return
        self._writes.asked(lambda: self._store.delete_many(keys, timeout_seconds=timeout_seconds))

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`."""
        return iter(self._reads.asked(lambda: list(self._store.list_keys(prefix, timeout_seconds=timeout_seconds))))

    def close(self) -> None:
        """Close the wrapped store's connections."""
        close(self._store)


class _Circuit:
    """Of one kind of call: how many failed in a row, and until when there are none."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._out_until: float | None = None
        self._is_probed = False

    @property
    def is_out(self) -> bool:
        return self._out_until is not None and self._clock() < self._out_until

    def asked(self, call: Callable[[], _Result], has_failed: Callable[[_Result], bool] = lambda _: False) -> _Result:
        """What ``call`` gives, if it may be made; ``has_failed`` says of what it gives whether that is a failure."""
        is_probe = self._enter()
        try:
            result = call()
        except StoreRefusedError:
            self._leave(is_probe=is_probe, has_failed=False)
            raise
        except Exception:
            self._leave(is_probe=is_probe, has_failed=True)
            raise
        self._leave(is_probe=is_probe, has_failed=has_failed(result))
        return result

    def _enter(self) -> bool:
        """Refuse the call, or let it through: whether it is the one that probes a store that is out."""
        with self._lock:
            if self._out_until is None:
                return False
            if self._is_probed or self._clock() < self._out_until:
                raise StoreError(f"tier {self._name} is out after {self._failures} failures; asked again later")
            self._is_probed = True
            return True

    def _leave(self, *, is_probe: bool, has_failed: bool) -> None:
        with self._lock:
            if is_probe:
                self._is_probed = False
                self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
            if not has_failed:
                self._failures, self._pause_seconds, self._out_until = 0, FIRST_PAUSE_SECONDS, None
                return
            self._failures += 1
            if self._failures >= FAILURES and (is_probe or self._out_until is None):
                self._out_until = self._clock() + self._pause_seconds


def _is_failure(value: Buffer | StoreError) -> bool:
    return isinstance(value, StoreError) and not isinstance(value, StoreRefusedError)
