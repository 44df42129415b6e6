"""Tables of codecs, kept in the stores beside the blocks that need them.

An asset lies under ``<TABLES>/<SHA-256 of its bytes>``, which of them a model's newest is under
``<TABLES>/<SHA-256 of the model's weights id>``.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ghostcacher.codecs.kvt import KvtCodec
from ghostcacher.codecs.quality import QualityCodec
from ghostcacher.codecs.registry import Factory, factory_of
from ghostcacher.codecs.tables import Tables, is_digest
from ghostcacher.errors import BlockError, StoreError
from ghostcacher.keys import TABLES
from ghostcacher.stores.base import Store

ASSET_LIMIT_BYTES = 2**30
LOOK_AGAIN_SECONDS = 30.0
_NAME_BYTES = 64
_Found = TypeVar("_Found")


class Shelf:
    """See `TablesSource`, over ``stores``, nearest first. What was found is kept, what was not is asked for again."""

    def __init__(self, stores: Sequence[Store], timeout_seconds: float, *, is_read_only: bool = False) -> None:
        self._stores = tuple(stores)
        self._timeout_seconds = timeout_seconds
        self._is_read_only = is_read_only
        self._tables: dict[str, Tables] = {}
        self._names: dict[str, str] = {}
        self._spread: set[str] = set()
        self._missed: dict[str, float] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> Factory | None:
        """See `factory_of`: makes codecs that look here for their tables."""
        factory = factory_of(name)
        needs_tables = name in {KvtCodec.name, QualityCodec.name}
        return functools.partial(factory, source=self) if factory is not None and needs_tables else factory

    def of_model(self, weights: str) -> Tables | None:
        """See `TablesSource.of_model`."""
        with self._lock:
            name = self._names.get(weights) or self._found(_pointer(weights), _NAME_BYTES, _name_in)
        found = self.named(name) if name is not None else None
        if name is not None and found is not None:
            self._names[weights] = name
        return found

    def named(self, digest: str) -> Tables | None:
        """See `TablesSource.named`."""
        with self._lock:
            if digest not in self._tables:
                found = self._found(digest, ASSET_LIMIT_BYTES, lambda blob: _tables_in(blob, digest))
                if found is None:
                    return None
                self._tables[digest] = found
            return self._tables[digest]

    def put(self, tables: Tables, weights: str) -> None:
        """Keep ``tables`` in every store, as the newest of the model with ``weights``.

        Raises:
            StoreError: a store did not take them.
        """
        for store in self._stores:
            for name, value in ((tables.digest, tables.blob), (_pointer(weights), tables.digest.encode())):
                store.put_many({f"{TABLES.hex}/{name}": [value]}, timeout_seconds=self._timeout_seconds)
        with self._lock:
            self._tables[tables.digest], self._names[weights] = tables, tables.digest
            self._missed.clear()

    def spread(self, digest: object) -> None:
        """Keep the tables named ``digest``, if that is a name, in every store that will take them."""
        if (
            self._is_read_only
            or not is_digest(digest)
            or digest in self._spread
            or (found := self.named(str(digest))) is None
        ):
            return
        key = f"{TABLES.hex}/{found.digest}"
        try:
            for store in self._stores:
                if not store.contains_many([key], timeout_seconds=self._timeout_seconds):
                    store.put_many({key: [found.blob]}, timeout_seconds=self._timeout_seconds)
        except StoreError:
            return
        self._spread.add(found.digest)

    def _found(self, name: str, limit_bytes: int, parse: Callable[[bytes], _Found | None]) -> _Found | None:
        """What the first store has that has it whole; not asked for again soon if none does."""
        if self._missed.get(name, 0.0) > time.monotonic():
            return None
        key = f"{TABLES.hex}/{name}"
        for store in self._stores:
            try:
                blob = store.get_many([key], limit_bytes=limit_bytes, timeout_seconds=self._timeout_seconds).get(key)
            except StoreError:
                continue
            found = parse(bytes(blob)) if blob is not None and not isinstance(blob, StoreError) else None
            if found is not None:
                return found
        self._missed[name] = time.monotonic() + LOOK_AGAIN_SECONDS
        return None


def _name_in(blob: bytes) -> str | None:
    name = blob.decode("ascii", "replace")
    return name if is_digest(name) else None


def _tables_in(blob: bytes, digest: str) -> Tables | None:
    try:
        return Tables.parse(blob, digest)
    except BlockError:
        return None


def _pointer(weights: str) -> str:
    return hashlib.sha256(weights.encode()).hexdigest()
