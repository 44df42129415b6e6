"""A store whose calls fail, hang or lie on command: for faults that a real one cannot show."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from ghostcacher.errors import StoreError
from ghostcacher.stores.base import Blob, Buffer, Store, StoredEntry


class FaultyStore:
    """Wraps ``store``. ``failing`` holds the methods that raise, ``delay_seconds`` is added to every call."""

    def __init__(self, store: Store, *, failing: frozenset[str] = frozenset(), delay_seconds: float = 0.0) -> None:
        self.name = store.name
        self.store = store
        self.failing = failing
        self.delay_seconds = delay_seconds
        self.calls: list[str] = []

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`."""
        self._enter("get_many")
        return self.store.get_many(keys, limit_bytes=limit_bytes, timeout_seconds=timeout_seconds)

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`."""
        self._enter("put_many")
        return self.store.put_many(items, timeout_seconds=timeout_seconds, replace=replace)

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`."""
        self._enter("contains_many")
        return self.store.contains_many(keys, timeout_seconds=timeout_seconds)

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        self._enter("delete_many")
        self.store.delete_many(keys, timeout_seconds=timeout_seconds)

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`."""
        self._enter("list_keys")
        return self.store.list_keys(prefix, timeout_seconds=timeout_seconds)

    def _enter(self, method: str) -> None:
        self.calls.append(method)
        time.sleep(self.delay_seconds)
        if method in self.failing:
            raise StoreError(f"{method} fails on command")
