"""The two ways into the request path, as it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import Cache

from ghostcacher.adapters.base import FingerprintMode
from ghostcacher.adapters.state import CacheState
from ghostcacher.events import CacheReport
from ghostcacher.session import Session
from ghostcacher.tiers.stack import TierStack


class Door(Protocol):
    """A way in: one `GhostCache`, or everything inside an ``attach``."""

    store: TierStack
    fingerprint: FingerprintMode

    @property
    def boundaries(self) -> Sequence[int]:
        """Lengths in tokens after which snapshots are wanted."""
        ...

    def session_of(self, cache: Cache, state: CacheState | None) -> Session | None:
        """The session of ``cache``, made now if it is empty and ``state`` is given: it may be served."""
        ...

    def publish(self, report: CacheReport, replaces: CacheReport | None) -> None:
        """Take the report of one prompt, in place of an earlier one of the same prompt."""
        ...


class OwnDoor(Door, Protocol):
    """A cache that is its own door, and counts what was asked of it between forwards."""

    was_asked: bool
    in_forward: int

    def empty(self) -> None:
        """Drop all state, keeping the layers' kinds."""
        ...
