"""Decoded blocks in RAM or on the model's device: a hit costs one copy."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

import torch

from ghostcacher.blocks import CPU, KVBlock, KVLayout
from ghostcacher.events import CacheEvent, Observer
from ghostcacher.eviction import Entry, EvictionPolicy
from ghostcacher.index import PrefixIndex
from ghostcacher.keys import BlockKey, PrefixChain
from ghostcacher.tiers.base import SNAPSHOT_SHARE, Offer, Place, TierStats, content_counts
from ghostcacher.tiers.counts import Counts
from ghostcacher.transfers import in_ram, settle

TENSORS = "decoded"
"""What stands for a codec where blocks are not coded."""


class DecodedTier:
    """Blocks as tensors, never above ``budget_bytes``.

    ``device`` is where blocks are kept: ``"cpu"``, or None for the device on which they were computed.
    """

    is_local = True
    is_lossy = False
    loading = None
    asking = None

    def __init__(
        self, name: str, budget_bytes: int, policy: EvictionPolicy, observe: Observer, *,
        device: str | None = "cpu",
    ) -> None:  # fmt: skip
        self.name = name
        self.budget_bytes = budget_bytes
        self.snapshot_limit_bytes = int(budget_bytes * SNAPSHOT_SHARE)
        self.index = PrefixIndex()
        self._policy = policy
        self._observe = observe
        self._device = device
        self._blocks: dict[bytes, KVBlock] = {}
        self._lock = threading.Lock()
        self._counts = Counts()

    def refresh(self, chain: PrefixChain, *, snapshots: bool = False, timeout_seconds: float | None = None) -> None:
        """Nothing to do: only this process stores here."""

    def get(self, key: BlockKey) -> KVBlock | None:
        """The block of ``key``, or None."""
        return self._blocks.get(key.digest)

    def fetch(
        self, keys: Sequence[BlockKey], layout: KVLayout, place: Place, *, exact_only: bool,
        timeout_seconds: float | None = None, device: torch.device = CPU,
    ) -> frozenset[bytes]:  # fmt: skip
        """See `Tier.fetch`."""
        found = [
            block for key in keys
            if (block := self._blocks.get(key.digest)) and block.key == key and block.layout == layout
            and not (exact_only and block.lossy)
        ]  # fmt: skip
        with self.index.pinned([block.key.digest for block in found]):
            for block in found:
                place(block)
        self._counts.add("hits", len(found))
        return frozenset(block.key.digest for block in found)

    def wants(self, key: BlockKey, *, lossy: bool) -> bool:
        """See `Tier.wants`: what is new, and exact blocks in place of lossy ones."""
        return not self.index.covers(key, exact_only=not lossy)

    def offer(self, offer: Offer) -> bool:
        """See `Tier.offer`. The tensors are kept as they are if they already lie on the tier's device."""
        block = self._moved(offer.block)
        limit_bytes = self.snapshot_limit_bytes if block.key.is_snapshot else self.budget_bytes
        if block.size_bytes > limit_bytes:
            self._observe(
                CacheEvent("dropped", "block larger than the tier", self.name, block.key.length, block.size_bytes)
            )
            return False
        with self._lock:
            self._limit_snapshots(block)
            if self.index.may_displace(block.key):
                with self.index.pinned([block.key.parent]):
                    self._make_room(block.size_bytes)
            if self.index.size_bytes + block.size_bytes > self.budget_bytes:
                self._observe(
                    CacheEvent("dropped", "tier full of blocks in use", self.name, block.key.length, block.size_bytes)
                )
                return False
            self._blocks[block.key.digest] = block
            outgrown = self.index.add(block.key, block.size_bytes, lossy=block.lossy, codec=TENSORS)
            self._forget(outgrown)
        self._counts.add("stored")
        return True

    def stored(self, key: BlockKey, layout: KVLayout) -> None:
        """See `Tier.stored`."""

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.touch`."""
        self.index.touch(key.digest for key in keys)

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """See `Tier.remove`."""
        with self._lock:
            self._forget(keys)

    def entries(self) -> Iterator[BlockKey]:
        """See `Tier.entries`."""
        return (entry.key for entry in self.index.entries())

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        counts, lossy = self._counts, any(entry.lossy for entry in self.index.entries())
        return TierStats(
            self.name, len(self.index), self.index.size_bytes, self.budget_bytes,
            counts["hits"], counts["stored"], counts["evicted"], 0, 0, TENSORS, lossy, *content_counts(self.index),
        )  # fmt: skip

    def _moved(self, block: KVBlock) -> KVBlock:
        if self._device is None or all(tensor.device == torch.device(self._device) for tensor in block.tensors):
            settle(block.tensors)
            return block
        return KVBlock(block.key, block.layout, tuple(map(in_ram, block.tensors)), block.lossy)

    def _make_room(self, size_bytes: int) -> None:
        needed_bytes = self.index.size_bytes + size_bytes - self.budget_bytes
        self._evict(self.index.victims(needed_bytes, self._policy), "budget")

    def _evict(self, victims: Iterable[Entry], reason: str) -> None:
        for entry in list(victims):
            self._forget([entry.key])
            self._counts.add("evicted")
            self._observe(CacheEvent("evicted", reason, self.name, entry.key.length, entry.size_bytes))

    def _limit_snapshots(self, block: KVBlock) -> None:
        if block.key.is_snapshot:
            held_bytes = self.index.snapshot_bytes(block.key.namespace)
            needed_bytes = held_bytes + block.size_bytes - self.snapshot_limit_bytes
            self._evict(self.index.snapshot_victims(block.key.namespace, needed_bytes, self._policy), "snapshots")

    def _forget(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self.index.remove(key.digest)
            self._blocks.pop(key.digest, None)
