"""How an encoded tier learns what its store holds, including what other processes put there."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from ghostcacher.codecs.header import HEADER_LIMIT_BYTES, BlockHeader
from ghostcacher.errors import BlockError, StoreError, StoreForgedError
from ghostcacher.index import PrefixIndex
from ghostcacher.keys import BlockKey, PrefixChain, holds_no_block
from ghostcacher.stores.base import Buffer, Store, StoredEntry
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.sealed import SealedDirectory

HEAD_BYTES = 8192
TAIL_STEP_TOKENS = 16
_SETTLED_SECONDS = 2.0

Reject = Callable[[str, str], None]
"""Takes the store key and the reason of an entry that is no block."""


class Catalog(Protocol):
    """Keeps a tier's index in step with its store."""

    def refresh(
        self, chain: PrefixChain, index: PrefixIndex, *, snapshots: bool = False, timeout_seconds: float = math.inf
    ) -> None:
        """Add to ``index`` what the store holds of ``chain``, with its snapshots if they are of interest.

        A remote store is not waited for longer than ``timeout_seconds``.

        Raises:
            StoreError: the store did not answer.
        """
        ...

    def refresh_all(self, index: PrefixIndex) -> None:
        """Bring ``index`` in step with the whole store, as far as this catalog can.

        Raises:
            StoreError: the store did not answer.
        """
        ...


class ListingCatalog:
    """For a directory: lists the buckets that changed since the last look and reads the heads of new files."""

    def __init__(self, store: DirectoryStore | SealedDirectory, reject: Reject) -> None:
        self._store = store
        self._reject = reject
        self._seen: dict[str, int] = {}
        self._known: dict[str, set[str]] = {}
        self._foreign: set[str] = set()

    def refresh(
        self, chain: PrefixChain, index: PrefixIndex, *, snapshots: bool = False, timeout_seconds: float = math.inf
    ) -> None:
        """See `Catalog.refresh`."""
        self._refresh(self._store.buckets(chain.namespace.hex), index)

    def refresh_all(self, index: PrefixIndex) -> None:
        """See `Catalog.refresh_all`."""
        buckets = list(self._store.buckets())
        self._refresh(buckets, index)
        for gone in self._known.keys() - {bucket.path for bucket in buckets}:
            self._drop(self._known.pop(gone), index)
            self._seen.pop(gone, None)

    def _refresh(self, buckets: Iterable[os.DirEntry[str]], index: PrefixIndex) -> None:
        for bucket in buckets:
            try:
                changed_ns = os.stat(bucket.path).st_mtime_ns  # noqa: PTH116 (a bucket's path is a text; 256 of them at every look)
            except OSError:
                changed_ns = 0
            if self._seen.get(bucket.path) == changed_ns:
                continue
            self._list(bucket.path, index)
            # A file may arrive within the clock tick of the listing: only a bucket at rest counts as seen.
            if time.time() - changed_ns / 1e9 > _SETTLED_SECONDS:
                self._seen[bucket.path] = changed_ns

    def _list(self, bucket: str, index: PrefixIndex) -> None:
        entries = self._store.entries_in(bucket)
        found = {entry.key: entry for entry in entries if not holds_no_block(entry.key)}
        known = self._known.get(bucket, set())
        self._drop(known - found.keys(), index)
        self._foreign -= known - found.keys()
        for key, entry in found.items():
            if key not in self._foreign and bytes.fromhex(key[-64:]) not in index:
                self._read_head(entry, index)
        self._known[bucket] = set(found)

    def _read_head(self, entry: StoredEntry, index: PrefixIndex) -> None:
        try:
            header = next(heads(self._store, [entry.key]), None)
            if header is None:
                return
        except BlockError as error:
            if error.reason == "sealed":
                self._foreign.add(entry.key)
            else:
                self._reject(entry.key, error.reason)
            return
        if header.key.store_key != entry.key:
            self._reject(entry.key, "key_echo")
        else:
            index.add(header.key, entry.size_bytes, used_at_seconds=entry.modified_seconds, **header.coding)

    @staticmethod
    def _drop(keys: Iterable[str], index: PrefixIndex) -> None:
        for key in keys:
            index.remove(bytes.fromhex(key[-64:]))


class ProbingCatalog:
    """For a remote store: asks for the chain's own keys, in one batch.

    Partial matches are found for what this process stored; of what others did, tail blocks that end with the prompt
    or at a multiple of 16 tokens.
    """

    def __init__(self, store: Store, timeout_seconds: float) -> None:
        self._store = store
        self._timeout_seconds = timeout_seconds

    def refresh(
        self, chain: PrefixChain, index: PrefixIndex, *, snapshots: bool = False, timeout_seconds: float = math.inf
    ) -> None:
        """See `Catalog.refresh`."""
        ends = list(_candidates(chain))
        if snapshots:
            ends += [chain.snapshot(key.end) for key in ends]
        candidates = {key.store_key: key for key in ends if key.digest not in index}
        allowed_seconds = min(self._timeout_seconds, timeout_seconds)
        present = self._store.contains_many(list(candidates), timeout_seconds=allowed_seconds)
        for name in present:
            index.add(candidates[name], 0)

    def refresh_all(self, index: PrefixIndex) -> None:
        """Nothing: a remote store is not listed."""


def _candidates(chain: PrefixChain) -> Iterator[BlockKey]:
    whole = chain.reusable_tokens // chain.block_tokens * chain.block_tokens
    yield from chain.covering(0, whole)
    for end in range(whole + TAIL_STEP_TOKENS, len(chain) + 1, TAIL_STEP_TOKENS):
        yield chain.tail(end)
    if len(chain) % TAIL_STEP_TOKENS:
        yield chain.tail(len(chain))


def heads(store: Store, keys: list[str], timeout_seconds: float = 60.0) -> Iterator[BlockHeader]:
    """The headers of ``keys``; see `heads_of`."""
    return (header for header, _ in heads_of(store, keys, timeout_seconds))


def heads_of(store: Store, keys: list[str], timeout_seconds: float) -> Iterator[tuple[BlockHeader, Buffer]]:
    """The headers of ``keys`` and the bytes they were in, reading no more of each value than its header needs.

    Raises:
        BlockError: a value has no block's header.
        StoreError: a value could not be read.
    """
    for limit_bytes in (HEAD_BYTES, HEADER_LIMIT_BYTES + HEAD_BYTES):
        found = store.get_many(keys, limit_bytes=limit_bytes, timeout_seconds=timeout_seconds)
        again = []
        for key, value in found.items():
            if isinstance(value, StoreForgedError):
                raise BlockError("auth", "it does not open with the store's key")
            if isinstance(value, StoreError):
                raise value
            try:
                yield BlockHeader.parse(value), value
            except BlockError as error:
                if error.reason == "sealed" or len(value) < limit_bytes or limit_bytes > HEAD_BYTES:
                    raise
                again.append(key)
        keys = again
        if not keys:
            return
