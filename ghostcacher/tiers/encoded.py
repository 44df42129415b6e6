"""Encoded blocks over a store: a codec chain, a catalog, a budget and a policy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from ghostcacher.blocks import CPU, KVLayout
from ghostcacher.codecs.base import Spread, one_by_one
from ghostcacher.codecs.header import HEADER_LIMIT_BYTES, BlockHeader
from ghostcacher.codecs.registry import record_of
from ghostcacher.codecs.safetensors_format import CodecChain, Coded
from ghostcacher.codecs.spoken import spoken
from ghostcacher.errors import BlockError, StoreError, StoreForgedError
from ghostcacher.events import CacheEvent, Observer
from ghostcacher.eviction import Entry, EvictionPolicy
from ghostcacher.gate import Line
from ghostcacher.index import PrefixIndex
from ghostcacher.keys import BlockKey, PrefixChain
from ghostcacher.stores.base import Buffer, Store, close
from ghostcacher.tiers.base import (
    Offer,
    Place,
    TierStats,
    certified_counts,
    content_counts,
)
from ghostcacher.tiers.budget import Budget
from ghostcacher.tiers.catalog import Catalog
from ghostcacher.tiers.counts import Counts
from ghostcacher.tiers.creating import KEPT, Created, create
from ghostcacher.tiers.fetching import Fetch, alone, halves


class EncodedTier:
    """Blobs in ``store``. A store that fails is a miss, or raises if ``strict``; ``is_read_only`` changes none."""

    def __init__(
        self, name: str, store: Store, chain: CodecChain, policy: EvictionPolicy, observe: Observer, *,
        is_local: bool, timeout_seconds: float, budget_bytes: int | None = None, strict: bool = False,
        sweep_lock: AbstractContextManager[object] | None = None, spread: Spread = one_by_one,
        touch_store: Callable[[Sequence[str]], None] | None = None, is_read_only: bool = False,
        quota_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.is_local = is_local
        self.chain = chain
        self.is_lossy = chain.codec.lossy
        self.index = PrefixIndex()
        self.budget = Budget(
            self.index, policy, self._evict, self._refresh_all, size_bytes=budget_bytes, quota_bytes=quota_bytes,
            sweep_lock=sweep_lock,
        )  # fmt: skip
        self.loading = Line()
        self.asking = Line()
        self.catalog: Catalog | None = None
        self.store = store
        self._observe = observe
        self.timeout_seconds = timeout_seconds
        self._strict = strict
        self._spread = spread
        self._touch_store = None if is_read_only else touch_store
        self._is_read_only = is_read_only
        self._counts = Counts()

    def refresh(self, chain: PrefixChain, *, snapshots: bool = False, timeout_seconds: float | None = None) -> None:
        """See `Tier.refresh`."""
        if self.catalog is None:
            return
        allowed_seconds = min(self.timeout_seconds, timeout_seconds or self.timeout_seconds)
        began, failures = time.monotonic(), list[StoreError]()
        with self._errors_counted("look up", failures):
            self.catalog.refresh(chain, self.index, snapshots=snapshots, timeout_seconds=allowed_seconds)
        elapsed_seconds = time.monotonic() - began
        if not failures or elapsed_seconds > allowed_seconds / 2:
            self.asking.add(1, 2 * elapsed_seconds if failures else elapsed_seconds)

    def fetch(
        self, keys: Sequence[BlockKey], layout: KVLayout, place: Place, *, exact_only: bool,
        timeout_seconds: float | None = None, device: torch.device = CPU,
    ) -> frozenset[bytes]:  # fmt: skip
        """See `Tier.fetch`: a local store is read block by block, a remote one in two batches."""
        limit_bytes = max(map(layout.bytes_of, keys), default=0) + HEADER_LIMIT_BYTES
        allowed_seconds = min(self.timeout_seconds, timeout_seconds or self.timeout_seconds)
        failures: list[StoreError] = []
        began = time.monotonic()
        with self.index.pinned([key.digest for key in keys]):
            fetch = Fetch(
                layout=layout, exact_only=exact_only, find=self.chain.find, verified=self._learn, rejected=self.reject,
                read=lambda batch: self._read(batch, limit_bytes, allowed_seconds, failures),
                place=place, spread=self._spread, device=device,
            )  # fmt: skip
            placed = fetch.run(alone(keys) if self.is_local else halves(keys))
        self._counts.add("hits", len(placed))
        elapsed_seconds = time.monotonic() - began
        if placed and not failures:
            self.loading.add(sum(layout.bytes_of(key) for key in keys if key.digest in placed), elapsed_seconds)
        elif failures and elapsed_seconds > allowed_seconds / 2:
            # Given up, not measured: it would have taken longer. What fails at once is the breaker's business.
            self.loading.add(sum(map(layout.bytes_of, keys)), 2 * max(elapsed_seconds, allowed_seconds))
        return placed

    def wants(self, key: BlockKey, *, lossy: bool) -> bool:
        """See `Tier.wants`: what is new, and exact blocks in place of lossy ones; nothing if it only reads."""
        return not self._is_read_only and not self.index.covers(
            key, exact_only=not lossy and not self.chain.codec.lossy
        )

    def offer(self, offer: Offer) -> bool:
        """See `Tier.offer`."""
        key = offer.block.key
        if self._is_read_only:
            return False
        try:
            coded = offer.coded(self.chain, self.name)
        except BlockError as error:
            self._observe(CacheEvent("dropped", error.reason, self.name, key.length))
            return False
        blob = coded.blob
        size_bytes = sum(len(part) for part in blob)
        created: Created | None = None
        with self._errors_counted("write"), self.budget.room_for(key, size_bytes) as refusal:
            if refusal:
                self._observe(CacheEvent("dropped", refusal, self.name, key.length, size_bytes))
            else:
                held = self.index.get(key.digest) is not None
                created = create(self.store, coded, blob, replace=held, timeout_seconds=self.timeout_seconds)
                if created is None:
                    self._observe(CacheEvent("dropped", "another version's block stands", self.name, key.length))
        if created is not None:
            self.remove(self.index.add(key, created.size_bytes, **created.header.coding))
            self._note(created, key.length, size_bytes)
        return created is not None

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """See `Tier.remove`."""
        gone = list(keys)
        for key in gone:
            self.index.remove(key.digest)
        if gone and not self._is_read_only:
            with self._errors_counted("delete"):
                self.store.delete_many([key.store_key for key in gone], timeout_seconds=self.timeout_seconds)

    def stored(self, key: BlockKey, layout: KVLayout) -> Coded | None:
        """See `Tier.stored`."""
        for _, blob in self._read([key], layout.bytes_of(key) + HEADER_LIMIT_BYTES, self.timeout_seconds, []):
            try:
                coded = Coded.parse(blob, key)
            except BlockError as error:
                self.reject(key.store_key, error.reason)
            else:
                self.index.learn(key.digest, len(blob), **coded.header.coding)
                return coded
        return None

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.touch`. In a directory the files' times are what other processes see of it."""
        held = [key for key in keys if key.digest in self.index]
        self.index.touch(key.digest for key in held)
        if self._touch_store:
            self._touch_store([key.store_key for key in held])

    def reject(self, store_key: str, reason: str) -> None:
        """Count an entry that does not verify, and delete it unless another version may need it."""
        self._counts.add("rejected")
        self._observe(CacheEvent("rejected", reason, self.name))
        self.index.remove(bytes.fromhex(store_key[-64:]))
        if reason not in KEPT and not self._is_read_only:
            with self._errors_counted("delete"):
                self.store.delete_many([store_key], timeout_seconds=self.timeout_seconds)

    def close(self) -> None:
        """Close the store's connections; the tier can still be read, which opens them again."""
        close(self.store)

    def entries(self) -> Iterator[BlockKey]:
        """See `Tier.entries`."""
        return (entry.key for entry in self.index.entries())

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        c, codec = self._counts, self.chain.codec
        name = spoken(record_of(codec))
        return TierStats(
            self.name, len(self.index), self.index.size_bytes, self.budget.size_bytes, c["hits"], c["stored"],
            c["evicted"], c["rejected"], c["errors"], name, codec.lossy, *content_counts(self.index),
            *certified_counts(self.index), conflicts=c["conflicts"],
        )  # fmt: skip

    def _read(
        self, batch: Sequence[BlockKey], limit_bytes: int, timeout_seconds: float, failures: list[StoreError]
    ) -> Iterator[tuple[BlockKey, Buffer]]:
        with self._errors_counted("read", failures):
            values = self.store.get_many(
                [key.store_key for key in batch], limit_bytes=limit_bytes, timeout_seconds=timeout_seconds
            )
            for key in batch:
                value = values.get(key.store_key)
                if isinstance(value, StoreForgedError):
                    self.reject(key.store_key, "auth")
                    continue
                if isinstance(value, StoreError):
                    raise value
                if value is None:
                    self.index.remove(key.digest)
                else:
                    yield key, value

    def _learn(self, key: BlockKey, blob: Buffer) -> None:
        """How a block was coded that was only named before; a verified blob tells."""
        entry = self.index.get(key.digest)
        if entry is not None and not entry.codec:
            self.index.learn(key.digest, len(blob), **BlockHeader.parse(blob).coding)

    def _note(self, created: Created, tokens: int, size_bytes: int) -> None:
        if created.outcome == "stored":
            self._counts.add("stored")
            self._observe(CacheEvent("stored", "", self.name, tokens, size_bytes))
        elif created.outcome == "conflict":
            self._counts.add("conflicts")
            self._observe(CacheEvent("dropped", "conflict: it stands with other values", self.name, tokens, size_bytes))

    def _refresh_all(self) -> None:
        if self.catalog:
            self.catalog.refresh_all(self.index)

    def _evict(self, victims: Sequence[Entry], reason: str) -> None:
        if victims:
            self.remove([entry.key for entry in victims])
            self._counts.add("evicted", len(victims))
            tokens, size_bytes = sum(e.key.length for e in victims), sum(e.size_bytes for e in victims)
            self._observe(CacheEvent("evicted", reason, self.name, tokens, size_bytes))

    @contextlib.contextmanager
    def _errors_counted(self, what: str, failures: list[StoreError] | None = None) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except StoreError as error:
            self._counts.add("errors")
            if failures is not None:
                failures.append(error)
            reason = f"cannot {what}: {error.strerror or error}"
            self._observe(CacheEvent("error", reason, self.name, seconds=time.monotonic() - started))
            if self._strict:
                raise
