"""What to give up first when a tier is full.

Only leaves are ever given up (blocks that no other block of the tier chains from), so that parents outlive their
children; a policy orders the leaves. Measured on real traces, leaf-only costs nothing and parent-first strands
children.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ghostcacher.keys import BlockKey


@dataclass(slots=True)
class Entry:
    """What an index knows of one block: sizes in bytes, times in seconds since the epoch, KL in nats a token.

    ``codec`` is empty, and size and the rest as good as unknown, of what a store has named and nobody has read.
    """

    key: BlockKey
    size_bytes: int
    used_at_seconds: float
    lossy: bool = False
    codec: str = ""
    kl: float | None = None
    children: int = 0
    pins: int = 0

    @property
    def is_evictable(self) -> bool:
        """A leaf that nobody is reading."""
        return self.children == 0 and self.pins == 0


class EvictionPolicy(Protocol):
    """Orders evictable blocks."""

    def __call__(self, entry: Entry, /) -> float:
        """Worth of keeping ``entry``: the lowest goes first. Does not change the entry."""
        ...


class LeastRecentlyUsed:
    """The block unused for the longest time goes first."""

    def __call__(self, entry: Entry, /) -> float:
        """Time of the last use."""
        return entry.used_at_seconds
