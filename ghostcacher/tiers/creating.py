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

Outcome = Literal["stored", "stood", "conflict"]


@dataclass(frozen=True, slots=True)
class Created:
    """What came of storing a block; ``header`` is that of what the store holds now."""

    outcome: Outcome
    header: BlockHeader


def create(store: Store, coded: Coded, blob: Sequence[Buffer], *, replace: bool, timeout_seconds: float) -> Created:
    """Write ``blob``, which is ``coded``, unless a sound block of its key stands; ``replace`` it in any case.

    What stands and cannot be read, or is lossy where ``coded`` is exact, is replaced. ``conflict``: what stands says
    it is the same and holds other values. It stays: nobody can tell here who is right.

    Raises:
        StoreError: the store did not answer, or it was not written.
    """
    key, items = coded.header.key, {coded.header.key.store_key: blob}
    if not store.put_many(items, timeout_seconds=timeout_seconds, replace=replace):
        return Created("stored", coded.header)
    found = _standing(store, key.store_key, timeout_seconds)
    if found is None or found[0].key != key or (found[0].lossy and not coded.header.lossy):
        store.put_many(items, timeout_seconds=timeout_seconds)
        return Created("stored", coded.header)
    standing, digest = found
    is_other = standing == coded.header and digest != recorded_digest(blob[0])
    return Created("conflict" if is_other else "stood", standing)


def _standing(store: Store, store_key: str, timeout_seconds: float) -> tuple[BlockHeader, str] | None:
    """Header and digest of what stands; None if it is gone or no block."""
    try:
        return next(((header, recorded_digest(head)) for header, head in heads_of(store, [store_key], timeout_seconds)),
                    None)  # fmt: skip
    except BlockError:
        return None
