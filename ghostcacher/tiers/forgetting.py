"""Deleting by content: everything a store holds of some tokens, and of what followed them; or of a whole namespace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ghostcacher.errors import BlockError
from ghostcacher.keys import BlockKey, PrefixChain, common_tokens
from ghostcacher.stores.base import Store
from ghostcacher.tiers.base import Tier
from ghostcacher.tiers.catalog import heads
from ghostcacher.tiers.encoded import EncodedTier

HEADS_AT_ONCE = 64


def forget(tiers: Iterable[Tier], chain: PrefixChain, keep_tokens: int) -> int:
    """Remove what holds any token of ``chain`` after the first ``keep_tokens``, with all that goes on from it.

    Whole blocks are removed: what is kept may end before ``keep_tokens``. How many blocks and snapshots were removed.

    Raises:
        StoreError: a store did not answer, or an entry still stands.
    """
    removed: set[bytes] = set()
    for tier in tiers:
        held = list(_held(tier, chain.namespace.digest))
        gone = list(_affected(held, chain, keep_tokens))
        _remove(tier, gone)
        removed.update(key.digest for key in gone)
    return len(removed)


def purge(tiers: Iterable[Tier], namespace: bytes) -> int:
    """Remove everything of ``namespace``, by its digest. How many blocks and snapshots were removed.

    Raises:
        StoreError: a store did not answer, or an entry still stands.
    """
    removed: set[bytes] = set()
    for tier in tiers:
        gone = list(_held(tier, namespace))
        _remove(tier, gone)
        removed.update(key.digest for key in gone)
    return len(removed)


def _held(tier: Tier, namespace: bytes) -> Iterator[BlockKey]:
    """Keys of a namespace, from the store itself where there is one: an index knows what was looked at."""
    if not isinstance(tier, EncodedTier):
        yield from (key for key in list(tier.entries()) if key.namespace == namespace)
        return
    store, timeout_seconds = tier.store, tier.timeout_seconds
    names = [entry.key for entry in store.list_keys(f"{namespace.hex()}/", timeout_seconds=timeout_seconds)]
    for begin in range(0, len(names), HEADS_AT_ONCE):
        yield from _keys_of(store, names[begin : begin + HEADS_AT_ONCE], timeout_seconds)


def _keys_of(store: Store, names: list[str], timeout_seconds: float) -> Iterator[BlockKey]:
    """What the headers of ``names`` say; one by one if any of them is damaged."""
    try:
        yield from [header.key for header in heads(store, names, timeout_seconds)]
    except BlockError:
        if len(names) > 1:
            for name in names:
                yield from _keys_of(store, [name], timeout_seconds)


def _affected(held: list[BlockKey], chain: PrefixChain, keep_tokens: int) -> Iterator[BlockKey]:
    """Those that share a token with ``chain`` after ``keep_tokens``, and their descendants."""
    parents = {chain.namespace.digest, *(key.digest for key in chain.covering(0, len(chain)))}
    gone: set[bytes] = set()
    for key in sorted(held, key=lambda key: (key.start, key.is_snapshot)):
        follows = key.parent in parents and common_tokens(key.tokens, chain.run(key.start, len(chain))) > 0
        if key.parent in gone or (follows and key.end > keep_tokens):
            gone.add(key.digest)
            yield key


def _remove(tier: Tier, keys: list[BlockKey]) -> None:
    """Children first, so that nothing is ever left without its parent."""
    last_first = sorted(keys, key=lambda key: -key.start)
    if isinstance(tier, EncodedTier):
        names = [key.store_key for key in last_first]
        tier.store.delete_many(names, timeout_seconds=tier.timeout_seconds)
    tier.remove(last_first)
