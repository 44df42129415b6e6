"""One fetch of coded blocks: read, verified, decoded and placed on several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs.base import Spread, one_by_one
from ghostcacher.codecs.registry import Finder
from ghostcacher.codecs.safetensors_format import decode_blob
from ghostcacher.codecs.scratch import Scratch
from ghostcacher.errors import BlockError
from ghostcacher.keys import BlockKey
from ghostcacher.stores.base import Buffer
from ghostcacher.tiers.base import Place

BATCH_BLOCKS = 2
SHARED_BYTES = 2**23
"""Decoded. A smaller block takes one thread no longer than two, which first have to meet."""

Found = tuple[BlockKey, Buffer]


def alone(keys: Sequence[BlockKey]) -> list[Sequence[BlockKey]]:
    """Batches of one block."""
    return [[key] for key in keys]


def halves(keys: Sequence[BlockKey]) -> list[Sequence[BlockKey]]:
    """Two batches, so that one is decoded while the other is read; few keys stay together."""
    half = len(keys) // 2
    return [keys[:half], keys[half:]] if half >= BATCH_BLOCKS else [keys]


class _PerThread(threading.local):
    """What each thread decodes into."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = Scratch(device)


@dataclass(slots=True, kw_only=True)
class Fetch:
    """Blocks of ``layout`` from ``read`` to ``place``, decoded on ``device``, by the threads that ``spread`` has.

    Threads that have nothing to read decode, into RAM, what others have read: its blocks, and where torch leaves
    processors idle the layers of large ones. Each blob is told to ``verified``, or with the reason to ``rejected``.
    """

    layout: KVLayout
    exact_only: bool
    find: Finder | None
    read: Callable[[Sequence[BlockKey]], Iterable[Found]]
    verified: Callable[[BlockKey, Buffer], None]
    rejected: Callable[[str, str], None]
    place: Place
    spread: Spread
    device: torch.device
    _placed: set[bytes] = field(default_factory=set)
    _own: _PerThread = field(init=False)

    def __post_init__(self) -> None:
        self._own = _PerThread(self.device)

    def run(self, batches: Sequence[Sequence[BlockKey]]) -> frozenset[bytes]:
        """Fetch ``batches``, each with one call of ``read``, and give the digests of what was placed."""
        self._own.scratch.settle()  # what lay before in the memory to be filled may still be in use
        self.spread(self._take, batches)
        return frozenset(self._placed)

    @property
    def _shared(self) -> Spread:
        """A GPU's streams belong to threads: there, the one that reads a block also decodes and places it."""
        return self.spread if self.device.type == "cpu" else one_by_one

    def _take(self, batch: Sequence[BlockKey]) -> None:
        self._shared(self._place, list(self.read(batch)))
        self._own.scratch.settle()

    def _place(self, found: Found) -> None:
        block = self._decoded(*found)
        if block is not None:
            self.place(block)
            self._placed.add(block.key.digest)

    def _decoded(self, key: BlockKey, blob: Buffer) -> KVBlock | None:
        is_large = self.layout.bytes_of(key) >= SHARED_BYTES
        spread = self._shared if is_large and _has_idle_processors() else one_by_one
        room = self._own.scratch
        room.reuse()
        try:
            block = decode_blob(
                blob, key, self.layout, exact_only=self.exact_only, find=self.find, room=room, spread=spread
            )
        except BlockError as error:
            self.rejected(key.store_key, error.reason)
            return None
        self.verified(key, blob)
        return block


def _has_idle_processors() -> bool:
    """Torch's threads wait for each other in each operation: with more threads than processors they wait in vain."""
    return torch.get_num_threads() < (os.cpu_count() or 1)
