"""How much of an encoded tier may be used, and what goes to make room: leaves first, in a policy's order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from ghostcacher.eviction import Entry, EvictionPolicy
from ghostcacher.index import PrefixIndex
from ghostcacher.keys import BlockKey
from ghostcacher.tiers.base import SNAPSHOT_SHARE

SWEEP_SHARE = 0.05
"""A sweep frees so much more than is needed, so that not every block that comes sweeps."""

Evict = Callable[[Sequence[Entry], str], None]


class Budget:
    """Of the tier with ``index``: ``size_bytes`` for all, ``quota_bytes`` for each namespace; None is no limit.

    The snapshots of one namespace get a quarter. ``evict`` takes entries out of index and store, for a reason.
    ``refresh`` brings the index in step with a store that others write to; only a sweep takes ``sweep_lock``, so that
    one process of many makes it.
    """

    def __init__(
        self, index: PrefixIndex, policy: EvictionPolicy, evict: Evict, refresh: Callable[[], None], *,
        size_bytes: int | None, quota_bytes: int | None, sweep_lock: AbstractContextManager[object] | None,
    ) -> None:  # fmt: skip
        self.size_bytes = size_bytes
        self.snapshot_limit_bytes = None if size_bytes is None else int(size_bytes * SNAPSHOT_SHARE)
        self._quota_bytes = quota_bytes
        self._index = index
        self._policy = policy
        self._evict = evict
        self._refresh = refresh
        self._sweep_lock = sweep_lock or contextlib.nullcontext()

    @contextlib.contextmanager
    def room_for(self, key: BlockKey, size_bytes: int) -> Iterator[str]:
        """Make room for a block that is written within this context; why there is none, or nothing if there is.

        Raises:
            StoreError: the store cannot be looked at.
        """
        if key.is_snapshot and not self._has_share(key, size_bytes):
            yield "snapshot larger than its share"
            return
        if self.size_bytes is not None:
            self._refresh()
        if not self._is_within_quota(key, size_bytes):
            yield "namespace over its quota"
            return
        with self._swept(key, size_bytes) as has_room:
            yield "" if has_room else "no room in the tier"

    def _has_share(self, key: BlockKey, size_bytes: int) -> bool:
        """Evict snapshots of the namespace until this one fits its share; False if it never does."""
        if self.snapshot_limit_bytes is None:
            return True
        if size_bytes <= self.snapshot_limit_bytes:
            needed_bytes = self._index.snapshot_bytes(key.namespace) + size_bytes - self.snapshot_limit_bytes
            self._evict(list(self._index.snapshot_victims(key.namespace, needed_bytes, self._policy)), "snapshots")
        return size_bytes <= self.snapshot_limit_bytes

    def _is_within_quota(self, key: BlockKey, size_bytes: int) -> bool:
        """Evict leaves of the namespace until this block fits its quota; False if it does not."""
        if self._quota_bytes is None or size_bytes > self._quota_bytes:
            return self._quota_bytes is None
        needed_bytes = self._index.namespace_bytes(key.namespace) + size_bytes - self._quota_bytes
        if needed_bytes > 0 and self._index.may_displace(key):
            with self._index.pinned([key.parent]):
                self._evict(list(self._index.victims(needed_bytes, self._policy, key.namespace)), "quota")
        return self._index.namespace_bytes(key.namespace) + size_bytes <= self._quota_bytes

    @contextlib.contextmanager
    def _swept(self, key: BlockKey, size_bytes: int) -> Iterator[bool]:
        if self.size_bytes is None:
            yield True
            return
        if self._index.size_bytes + size_bytes <= self.size_bytes or size_bytes > self.size_bytes:
            yield size_bytes <= self.size_bytes
            return
        with self._sweep_lock, self._index.pinned([key.parent]):
            if self._index.may_displace(key):
                self._sweep(size_bytes, self.size_bytes)
            yield self._index.size_bytes + size_bytes <= self.size_bytes

    def _sweep(self, size_bytes: int, budget_bytes: int) -> None:
        self._refresh()
        if self._index.size_bytes + size_bytes <= budget_bytes:
            return
        slack_bytes = int(budget_bytes * SWEEP_SHARE)
        needed_bytes = self._index.size_bytes + size_bytes + slack_bytes - budget_bytes
        self._evict(list(self._index.victims(needed_bytes, self._policy)), "budget")
