"""What restoring from a tier costs in quality, as far as it was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import fsum

from ghostcacher.codecs.planes import PlaneCodec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.tables import TablesSource
from ghostcacher.eviction import Entry
from ghostcacher.index import PrefixIndex
from ghostcacher.tiers.base import Tier, TierStats
from ghostcacher.tiers.decoded import TENSORS

Calibrated = Callable[[bytes, str], float | None]
"""What the model of a namespace's state loses by a codec, as far as its calibration says."""

UNCODED = frozenset({TENSORS, RawCodec.name, PlaneCodec.name})
NAMESPACE_LIMIT = 1024
"""Of so many namespaces it is remembered whose state they hold, the newest."""


class Costs:
    """Knows which model's state a namespace holds, and asks ``source`` what was measured when it was calibrated."""

    def __init__(self, source: TablesSource) -> None:
        self._source = source
        self._weights: dict[bytes, str] = {}

    def note(self, namespace: bytes, weights: str) -> None:
        """``namespace`` holds state of the model with ``weights``; see `KVLayout.weights`."""
        if self._weights.get(namespace) != weights:
            self._weights = {**dict(list(self._weights.items())[1 - NAMESPACE_LIMIT :]), namespace: weights}

    def stats_of(self, tiers: Sequence[Tier]) -> tuple[TierStats, ...]:
        """What each of ``tiers`` says of itself, and what it costs."""
        indexes = [tier.index for tier in tiers]
        return tuple(replace(tier.stats(), kl_expected=self.expected(tier.index, indexes)) for tier in tiers)

    def expected(self, index: PrefixIndex, all_indexes: Sequence[PrefixIndex]) -> float | None:
        """Mean over the tokens of the blocks of ``index`` that were stored or read, in nats a token; 0 if none were.

        What was certified counts as it was replayed, what is exact as 0, the rest as the calibration says of its codec;
        what was not coded but is lossy, as the coded block in one of ``all_indexes``, or else as what it was computed
        on. None if that of any block is not known. May read the store.
        """
        calibrated = lru_cache(None)(self._calibrated)
        costs: list[float] = []
        tokens = 0
        for entry in index.entries():
            if entry.codec and not entry.key.is_snapshot:
                kl = _cost(entry, index, all_indexes, calibrated)
                if kl is None:
                    return None
                costs.append(kl * entry.key.length)
                tokens += entry.key.length
        # Blocks arrive in any order, and it must not show in the last digit.
        return fsum(costs) / tokens if tokens else 0.0

    def _calibrated(self, namespace: bytes, codec: str) -> float | None:
        weights = self._weights.get(namespace)
        tables = self._source.of_model(weights) if weights is not None else None
        return tables.cost(codec) if tables is not None else None


def _cost(
    entry: Entry | None, index: PrefixIndex, all_indexes: Sequence[PrefixIndex], calibrated: Calibrated
) -> float | None:  # fmt: skip
    while entry is not None:
        copies = [entry] if entry.codec not in UNCODED else [entry, *_lossy(entry.key.digest, all_indexes)]
        kl = next((kl for copy in copies if (kl := _measured(copy, calibrated)) is not None), None)
        if kl is not None or entry.codec not in UNCODED:
            return kl
        entry = index.get(entry.key.parent)
    return None


def _lossy(digest: bytes, indexes: Sequence[PrefixIndex]) -> list[Entry]:
    """What ``indexes`` know of a block, where it is lossy."""
    return [entry for index in indexes if (entry := index.get(digest)) is not None and entry.lossy]


def _measured(entry: Entry, calibrated: Calibrated) -> float | None:
    if entry.kl is not None:
        return entry.kl
    return calibrated(entry.key.namespace, entry.codec) if entry.lossy else 0.0
