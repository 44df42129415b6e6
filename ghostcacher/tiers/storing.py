"""What is captured, on its way into the tiers: copied, admitted, coded within budgets, offered. The writer's thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeGuard

from ghostcacher.blocks import KVBlock
from ghostcacher.codecs.quality import QualityCodec
from ghostcacher.codecs.safetensors_format import Coded
from ghostcacher.events import CacheEvent, Observer
from ghostcacher.keys import BlockKey, PrefixChain
from ghostcacher.tiers.admission import SecondSight
from ghostcacher.tiers.base import Offer, Tier
from ghostcacher.tiers.certifying import Replayable, certify
from ghostcacher.tiers.decoded import DecodedTier
from ghostcacher.tiers.encoded import EncodedTier
from ghostcacher.tiers.shelf import Shelf


class Capture(Replayable, Protocol):
    """State of a model's cache that may be stored: read later, on the writer's thread."""

    @property
    def begun(self) -> PrefixChain:
        """The tokens known when it was captured."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes that it keeps alive."""
        ...

    def keys(self) -> Sequence[BlockKey]:
        """Keys of the blocks to store, parents first."""
        ...


class Storing:
    """Puts blocks into ``tiers``: the near ones, which hold tensors, first."""

    def __init__(
        self, tiers: Sequence[Tier], shelf: Shelf, observe: Observer, second_sight: SecondSight | None
    ) -> None:
        self._tiers = tuple(tiers)
        self._shelf = shelf
        self._observe = observe
        self._second_sight = second_sight
        self._near = [tier for tier in tiers if isinstance(tier, DecodedTier)]
        self._far = [tier for tier in tiers if not isinstance(tier, DecodedTier)]
        self.has_budget = any(map(has_budget, tiers))

    def store_near(self, capture: Capture, model: str) -> Sequence[BlockKey]:
        """Into the tiers that hold tensors; the keys that were captured, for `store_far`."""
        keys = capture.keys()
        self._store(self._near, capture, keys, model)
        return keys

    def store_far(self, capture: Capture, keys: Sequence[BlockKey], model: str) -> None:
        """Into the tiers that hold bytes, what they admit."""
        if self._far:
            admitted = keys if self._second_sight is None else self._second_sight.admitted(keys)
            self._store(self._far, capture, admitted, model)

    def offer(self, block: KVBlock, model: str) -> bool:
        """Into every tier that lacks it; whether any took it."""
        offer = self._offered(block, model)
        taken = [tier.offer(offer) for tier in self._tiers if tier.wants(block.key, lossy=block.lossy)]
        return any(taken)

    def _store(self, tiers: Iterable[Tier], capture: Capture, keys: Sequence[BlockKey], model: str) -> None:
        held = list(tiers)
        certified = [(tier.name, self._certified(tier, capture, keys, model)) for tier in held if has_budget(tier)]
        for key in keys:
            wanting = [tier for tier in held if tier.wants(key, lossy=False)]
            if not wanting:
                continue
            block = self._exact(key) or capture.block(key)
            wanting = [tier for tier in wanting if tier.wants(key, lossy=block.lossy)]
            if wanting:
                offer = self._offered(block, model)
                for name, coded in certified:
                    if key.digest in coded:
                        offer.add(name, coded[key.digest])
                for tier in wanting:
                    tier.offer(offer)

    def _certified(
        self, tier: EncodedTier, capture: Capture, keys: Sequence[BlockKey], model: str
    ) -> Mapping[bytes, Coded]:
        """What of ``keys`` the tier lacks, coded within its budget."""
        wanted = [key for key in keys if tier.wants(key, lossy=False) and not self._is_coded(key)]
        try:
            return certify(tier, capture, wanted, model)
        except Exception as error:  # noqa: BLE001 (the model's own: what cannot be replayed is stored exactly)
            self._observe(CacheEvent("error", f"cannot replay: {type(error).__name__}", tier.name))
            return {}

    def _is_coded(self, key: BlockKey) -> bool:
        """Whether a tier holds lossy bytes of it, which are passed on; lossy tensors may be coded."""
        entries = [tier.index.get(key.digest) for tier in self._far]
        return any(entry is not None and entry.lossy for entry in entries)

    def _offered(self, block: KVBlock, model: str) -> Offer:
        """``block``, or if it is lossy and a tier holds it already coded, that: nothing is coded twice."""
        holding = [tier for tier in self._tiers if block.lossy and block.key.digest in tier.index]
        found = next((coded for tier in holding if (coded := tier.stored(block.key, block.layout)) is not None), None)
        if found is not None:
            self._shelf.spread(found.header.codec.get("tables"))
        return Offer(block, model, found)

    def _exact(self, key: BlockKey) -> KVBlock | None:
        """The block as a near tier has it, if that is exact: it is copied already."""
        found = (tier.get(key) for tier in self._near)
        return next((block for block in found if block is not None and not block.lossy), None)


def has_budget(tier: Tier) -> TypeGuard[EncodedTier]:
    """Whether ``tier`` is told what its blocks may cost, rather than a codec."""
    return isinstance(tier, EncodedTier) and isinstance(tier.chain.codec, QualityCodec)
