"""Two writers of one block: the first stays, unless it is no sound block, and what differs is counted."""

from __future__ import annotations

import pytest
import torch

from ghostcacher.blocks import KVBlock
from ghostcacher.codecs.int8 import Int8Codec
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.eviction import LeastRecentlyUsed
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.envelope import Sealing
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.stores.redis import RedisStore
from ghostcacher.stores.sealed import SealedDirectory, SealedStore
from ghostcacher.testing.tier import blocks_of, chain_of
from ghostcacher.tiers.base import Offer
from ghostcacher.tiers.encoded import EncodedTier

BLOCK = blocks_of(chain_of(16))[0]
OTHER = KVBlock(BLOCK.key, BLOCK.layout, tuple(tensor + 1e-3 for tensor in BLOCK.tensors))


@pytest.fixture(params=["memory", "directory", "sealed", "sealed directory", "redis"])
def store(request, tmp_path):
    if request.param == "redis":
        made = RedisStore(request.getfixturevalue("redis_url"))
        yield made
        made.close()
        return
    ring, directory = [Sealing.of(b"k" * 32)], DirectoryStore(tmp_path / "d")
    yield {
        "memory": MemoryStore(), "directory": directory, "sealed": SealedStore(MemoryStore(), ring),
        "sealed directory": SealedDirectory(directory, ring),
    }[request.param]  # fmt: skip


def tier(store, codec=None, events=None):
    chain = CodecChain(codec or RawCodec())
    observe = (events if events is not None else []).append
    return EncodedTier("t", store, chain, LeastRecentlyUsed(), observe, is_local=True, timeout_seconds=5.0)


def stored(store):
    name = BLOCK.key.store_key
    return bytes(store.get_many([name], limit_bytes=2**30, timeout_seconds=5.0)[name])


def test_f26_f28_the_same_block_twice_is_one_block_and_no_conflict(store):
    first, second = tier(store), tier(store)
    assert first.offer(Offer(BLOCK))
    held = stored(store)
    assert second.offer(Offer(BLOCK))
    assert stored(store) == held
    assert (second.stats().stored, second.stats().conflicts) == (0, 0)
    assert BLOCK.key.digest in second.index


def test_f27_other_values_under_one_key_are_not_stored_and_counted(store):
    events = []
    first, second = tier(store), tier(store, events=events)
    first.offer(Offer(BLOCK))
    held = stored(store)
    assert second.offer(Offer(OTHER))
    assert stored(store) == held
    assert (second.stats().stored, second.stats().conflicts) == (0, 1)
    assert [(event.kind, event.reason.partition(":")[0]) for event in events] == [("dropped", "conflict")]


def test_another_codecs_block_is_no_conflict(store):
    tier(store, Int8Codec()).offer(Offer(BLOCK))
    other = tier(store, CodecChain(Int8Codec()).codec)
    other.offer(Offer(BLOCK))
    raw = tier(store)
    raw.offer(Offer(BLOCK))
    assert (raw.stats().stored, raw.stats().conflicts) == (1, 0)  # exact in place of lossy
    late = tier(store, Int8Codec())
    late.offer(Offer(BLOCK))
    assert (late.stats().stored, late.stats().conflicts) == (0, 0)
    found = {}
    tier_of = tier(store)
    tier_of.index.add(BLOCK.key, 1)
    tier_of.fetch([BLOCK.key], BLOCK.layout, lambda block: found.update({block.key.digest: block}), exact_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found[BLOCK.key.digest].tensors, BLOCK.tensors, strict=True))


@pytest.mark.parametrize("standing", [b"", b"rubbish", b"x" * 10_000])
def test_what_is_no_block_is_replaced(standing, store):
    store.put_many({BLOCK.key.store_key: [standing or b" "]}, timeout_seconds=5.0)
    first = tier(store)
    assert first.offer(Offer(BLOCK))
    assert first.stats().stored == 1
    assert len(stored(store)) > 500


def test_a_forged_value_is_replaced():
    inner = MemoryStore()
    store = SealedStore(inner, [Sealing.of(b"k" * 32)])
    inner.put_many({Sealing.of(b"k" * 32).name(BLOCK.key.store_key): [b"forged" * 50]}, timeout_seconds=1.0)
    assert tier(store).offer(Offer(BLOCK))
    assert len(stored(store)) > 500
