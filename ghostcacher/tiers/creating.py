"""Storing what may be there already: the first of two writers wins, and what differs from it is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ghostcacher.codecs.header import BlockHeader, recorded_digest
from ghostcacher.codecs.safetensors_format import Coded
from ghostcacher.errors import BlockError
from ghostcacher.stores.base import Buffer, Store
from ghostcacher.tiers.catalog import heads_of

KEPT = frozenset({"version", "lossy", "codec", "memory", "sealed"})
"""Reasons for which an entry that cannot be read here is left alone: another reader may need it."""

Outcome = Literal["stored", "stood", "conflict"]


@dataclass(frozen=True, slots=True)
class Created:
    """What came of storing a block; ``header`` and ``size_bytes`` are those of what the store holds now."""

    outcome: Outcome
    header: BlockHeader
    size_bytes: int


def create(
    store: Store, coded: Coded, blob: Sequence[Buffer], *, replace: bool, timeout_seconds: float
) -> Created | None:
    """Write ``blob``, which is ``coded``, unless a sound block of its key stands; ``replace`` it in any case.

    What stands and cannot be read, or is lossy where ``coded`` is exact, is replaced. ``conflict``: what stands says
    it is the same and holds other values. It stays: nobody can tell here who is right. None: what stands is another
    version's, or sealed, and stays too.

    Raises:
        StoreError: the store did not answer, or it was not written.
    """
    key, items = coded.header.key, {coded.header.key.store_key: blob}
    stored = Created("stored", coded.header, sum(map(len, blob)))
    if not store.put_many(items, timeout_seconds=timeout_seconds, replace=replace):
        return stored
    found = _standing(store, key.store_key, timeout_seconds)
    if isinstance(found, str):
        return None
    if found is None or found[0].key != key or (found[0].lossy and not coded.header.lossy):
        store.put_many(items, timeout_seconds=timeout_seconds)
        return stored
    standing, digest = found
    is_other = standing == coded.header and digest != recorded_digest(blob[0])
    size_bytes = len(standing.render()) + standing.data_bytes
    return Created("conflict" if is_other else "stood", standing, size_bytes)


def _standing(store: Store, store_key: str, timeout_seconds: float) -> tuple[BlockHeader, str] | str | None:
    """Header and digest of what stands; the reason why it is left alone; None if it is gone or no block."""
    try:
        return next(((header, recorded_digest(head)) for header, head in heads_of(store, [store_key], timeout_seconds)),
                    None)  # fmt: skip
    except BlockError as error:
        return error.reason if error.reason in KEPT else None
