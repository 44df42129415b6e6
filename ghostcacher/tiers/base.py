"""Tiers: blocks within a budget. A tier knows no other tier."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from ghostcacher.blocks import CPU, KVBlock, KVLayout
from ghostcacher.codecs.safetensors_format import CodecChain, Coded
from ghostcacher.gate import Line
from ghostcacher.index import PrefixIndex
from ghostcacher.keys import BlockKey, PrefixChain

Place = Callable[[KVBlock], None]
"""Takes one verified block, on any thread; blocks of one fetch never overlap.

What it wants to keep it copies: the block's memory is used again for the next one.
"""

SNAPSHOT_SHARE = 0.25
"""How much of a tier's budget the snapshots of one namespace may take."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counts since the tier was opened, and what it holds now (of the namespaces looked at so far).

    ``tokens`` are those of blocks that were stored or read here: of what a remote store has only named, neither size
    nor codec is known. ``kl_expected`` is what a prefix restored from them costs in quality, in nats a token: 0 if all
    are exact, None if it was not measured (``ghostcacher calibrate`` measures it).
    ``kl_quartiles`` are over the ``certified`` blocks: of the KL in nats a token that was replayed when they were
    stored, the least, the quartiles and the most; empty if there are none.
    ``conflicts`` counts blocks that were not stored because the store holds other values under their key.
    """

    name: str
    blocks: int
    size_bytes: int
    budget_bytes: int | None
    hits: int
    stored: int
    evicted: int
    rejected: int
    errors: int
    codec: str
    lossy: bool
    snapshots: int = 0
    snapshot_bytes: int = 0
    tokens: int = 0
    certified: int = 0
    kl_quartiles: tuple[float, ...] = ()
    kl_expected: float | None = None
    conflicts: int = 0

    @property
    def bytes_per_token(self) -> float:
        """What one token of a prefix takes here, snapshots not counted; 0 if the tier is empty."""
        return (self.size_bytes - self.snapshot_bytes) / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For printing as JSON."""
        return {**asdict(self), "bytes_per_token": self.bytes_per_token}


class Offer:
    """One block on its way into the tiers; encoded once per codec, when a tier first asks.

    ``stored`` is how another tier holds it: what went through a lossy codec is passed on as it is, never coded again.
    """

    def __init__(self, block: KVBlock, model: str = "", stored: Coded | None = None) -> None:
        self.block = block
        self._model = model
        self._stored = stored
        self._coded: dict[CodecChain, Coded] = {}
        self._certified: dict[str, Coded] = {}

    def add(self, tier: str, coded: Coded) -> None:
        """What `coded` shall answer to the tier of that name."""
        self._certified[tier] = coded

    def coded(self, chain: CodecChain, tier: str) -> Coded:
        """The block for ``tier``, encoded by ``chain``; raises what `CodecChain.code` raises."""
        if self._stored is not None:
            return self._stored
        if tier in self._certified:
            return self._certified[tier]
        if chain not in self._coded:
            self._coded[chain] = chain.code(self.block, model=self._model)
        return self._coded[chain]


class Tier(Protocol):
    """What the stack asks of each of its tiers. Every method may be called from several threads."""

    name: str
    index: PrefixIndex
    is_local: bool
    is_lossy: bool
    """Whether blocks come back otherwise than they were offered."""

    @property
    def loading(self) -> Line | None:
        """Seconds to load, by bytes of state; None if it takes as good as none."""
        ...

    @property
    def asking(self) -> Line | None:
        """Seconds that a `refresh` takes; None if it takes as good as none."""
        ...

    def refresh(self, chain: PrefixChain, *, snapshots: bool = False, timeout_seconds: float | None = None) -> None:
        """Bring the index up to date with what others may have stored of ``chain``. Raises in strict tiers only.

        ``snapshots``: whether state without a token axis is of interest too. A remote store is not waited for longer
        than ``timeout_seconds``, or its own limit.
        """
        ...

    def fetch(
        self, keys: Sequence[BlockKey], layout: KVLayout, place: Place, *, exact_only: bool,
        timeout_seconds: float | None = None, device: torch.device = CPU,
    ) -> frozenset[bytes]:  # fmt: skip
        """Hand the verified blocks of ``keys`` to ``place``; returns the digests of those handed over.

        ``device`` is where they are wanted: what is to be computed may be computed there.
        A block that is missing, does not verify, or is not there within ``timeout_seconds`` is left out. An exception
        of ``place`` is raised.

        Raises:
            StoreError: only in strict tiers.
        """
        ...

    def wants(self, key: BlockKey, *, lossy: bool) -> bool:
        """Whether an offer of ``key`` would change anything."""
        ...

    def offer(self, offer: Offer) -> bool:
        """Take a block, evicting others within the budget; False if it was not stored.

        Raises:
            StoreError: only in strict tiers.
        """
        ...

    def stored(self, key: BlockKey, layout: KVLayout) -> Coded | None:
        """A block as it lies here, verified but not decoded; None if it is not here, or held as tensors.

        Raises:
            StoreError: only in strict tiers.
        """
        ...

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Mark blocks as used now, parents as later than their children."""
        ...

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """Give blocks up."""
        ...

    def entries(self) -> Iterator[BlockKey]:
        """Keys held, as far as known."""
        ...

    def stats(self) -> TierStats:
        """Counts and sizes."""
        ...


def content_counts(index: PrefixIndex) -> tuple[int, int, int]:
    """How many snapshots ``index`` holds, their bytes, and how many tokens the blocks whose size is known."""
    entries = index.entries()
    tokens = sum(entry.key.length for entry in entries if entry.codec and not entry.key.is_snapshot)
    return sum(entry.key.is_snapshot for entry in entries), index.snapshot_bytes(), tokens


def certified_counts(index: PrefixIndex) -> tuple[int, tuple[float, ...]]:
    """How many blocks of ``index`` have a certificate, and least, quartiles and most of their KL."""
    found = sorted(entry.kl for entry in index.entries() if entry.kl is not None)
    if not found:
        return 0, ()
    inner = statistics.quantiles(found, method="inclusive") if len(found) > 1 else 3 * found
    return len(found), (found[0], *inner, found[-1])
