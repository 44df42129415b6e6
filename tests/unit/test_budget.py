"""Who pays for a block: first its own namespace's quota, then the least recently used of all."""

from __future__ import annotations

import pytest

from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.eviction import LeastRecentlyUsed
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.testing.tier import BLOCK_TOKENS, blocks_of
from ghostcacher.tiers.base import Offer
from ghostcacher.tiers.encoded import EncodedTier

ONE, TWO = Namespace(bytes(32)), Namespace(b"\1" * 32)


def block(namespace, first):
    chain = PrefixChain.of(list(range(first, first + BLOCK_TOKENS)), namespace, BLOCK_TOKENS)
    return blocks_of(chain)[0]


SIZE = sum(map(len, CodecChain(RawCodec()).encode(block(ONE, 0))))


def tier(budget_blocks, quota_blocks):
    return EncodedTier(
        "t", MemoryStore(), CodecChain(RawCodec()), LeastRecentlyUsed(), lambda event: None, is_local=True,
        timeout_seconds=5.0, budget_bytes=int(budget_blocks * SIZE), quota_bytes=int(quota_blocks * SIZE),
    )  # fmt: skip


def held(made):
    return {namespace: made.index.namespace_bytes(namespace.digest) // SIZE for namespace in (ONE, TWO)}


@pytest.fixture
def full():
    """Four blocks of either namespace: the budget and both quotas are used up."""
    made = tier(8.5, 4.2)
    for number in range(4):
        for namespace in (ONE, TWO):
            assert made.offer(Offer(block(namespace, 100 * number)))
    assert held(made) == {ONE: 4, TWO: 4}
    return made


def test_a_namespace_at_its_quota_pays_with_its_own(full):
    assert full.offer(Offer(block(ONE, 1000)))
    assert held(full)[TWO] == 4


def test_a_block_above_a_quota_evicts_nobody():
    made = tier(8.5, 4.2)
    for number in range(4):
        made.offer(Offer(block(TWO, 100 * number)))
    made.budget._quota_bytes = SIZE // 2
    assert not made.offer(Offer(block(ONE, 0)))
    assert held(made) == {ONE: 0, TWO: 4}


def test_a_block_above_the_budget_evicts_nobody():
    made = tier(4.5, 100)
    for number in range(4):
        made.offer(Offer(block(TWO, 100 * number)))
    made.budget.size_bytes = SIZE - 1
    assert not made.offer(Offer(block(ONE, 0)))
    assert held(made) == {ONE: 0, TWO: 4}
