"""A store in this process's memory: for tests, and for sharing blobs between models of one process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from ghostcacher.errors import StoreError
from ghostcacher.stores.base import Blob, Buffer, StoredEntry, checked_key


class MemoryStore:
    """Bytes in a dictionary. Gone with the process; no deadline is ever missed."""

    name = "memory"

    def __init__(self) -> None:
        self._values: dict[str, tuple[bytes, float]] = {}

    def get_many(
        self, keys: Sequence[str], *, limit_bytes: int, timeout_seconds: float
    ) -> Mapping[str, Buffer | StoreError]:
        """See `Store.get_many`."""
        found = {key: self._values.get(checked_key(key)) for key in keys}
        return {key: value[0][:limit_bytes] for key, value in found.items() if value is not None}

    def put_many(self, items: Mapping[str, Blob], *, timeout_seconds: float, replace: bool = True) -> frozenset[str]:
        """See `Store.put_many`."""
        stood = set()
        for key, blob in items.items():
            made = (b"".join(blob), time.time())
            if replace:
                self._values[checked_key(key)] = made
            elif self._values.setdefault(checked_key(key), made) is not made:
                stood.add(key)
        return frozenset(stood)

    def contains_many(self, keys: Sequence[str], *, timeout_seconds: float) -> frozenset[str]:
        """See `Store.contains_many`."""
        return frozenset(key for key in keys if checked_key(key) in self._values)

    def delete_many(self, keys: Sequence[str], *, timeout_seconds: float) -> None:
        """See `Store.delete_many`."""
        for key in keys:
            self._values.pop(checked_key(key), None)

    def list_keys(self, prefix: str = "", *, timeout_seconds: float) -> Iterator[StoredEntry]:
        """See `Store.list_keys`."""
        for key, (value, modified_seconds) in list(self._values.items()):
            if key.startswith(prefix):
                yield StoredEntry(key, len(value), modified_seconds)
