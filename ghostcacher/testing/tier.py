"""What every tier must do."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.keys import Namespace, PrefixChain
from ghostcacher.tiers.base import Offer, Tier

LAYOUT = KVLayout.uniform(layers=2, heads=2, head_dim=8)
BLOCK_TOKENS = 16
BLOCK_BYTES = LAYOUT.token_bytes() * BLOCK_TOKENS
NAMESPACE = Namespace(bytes(range(32)))


def chain_of(tokens: int, first: int = 0) -> PrefixChain:
    """A chain of ``tokens`` distinct tokens."""
    return PrefixChain.of(list(range(first, first + tokens)), NAMESPACE, BLOCK_TOKENS)


def blocks_of(chain: PrefixChain, seed: int = 0) -> list[KVBlock]:
    """Random blocks for a whole chain."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [
        KVBlock(key, LAYOUT, tuple(_random(g.shape(key.length), generator) for g in LAYOUT.groups))
        for key in chain.covering(0, len(chain))
    ]


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


class TierContract:
    """Subclass it and give a fixture ``tier``: an exact tier that holds about 8 blocks of `BLOCK_BYTES`."""

    def fetched(self, tier: Tier, blocks: list[KVBlock]) -> dict[bytes, KVBlock]:
        found: dict[bytes, KVBlock] = {}
        lock = threading.Lock()

        def place(block: KVBlock) -> None:
            with lock:
                found[block.key.digest] = replace(block, tensors=tuple(tensor.clone() for tensor in block.tensors))

        placed = tier.fetch([block.key for block in blocks], LAYOUT, place, exact_only=True)
        assert placed == frozenset(found)
        return found

    def test_offered_blocks_come_back_bit_for_bit(self, tier: Tier) -> None:
        blocks = blocks_of(chain_of(40))
        assert all(tier.offer(Offer(block)) for block in blocks)
        found = self.fetched(tier, blocks)
        assert len(found) == 3
        for block in blocks:
            assert all(torch.equal(a, b) for a, b in zip(found[block.key.digest].tensors, block.tensors, strict=True))

    def test_unknown_blocks_are_left_out(self, tier: Tier) -> None:
        blocks = blocks_of(chain_of(48))
        tier.offer(Offer(blocks[0]))
        tier.offer(Offer(blocks[2]))
        assert set(self.fetched(tier, blocks)) == {blocks[0].key.digest, blocks[2].key.digest}

    def test_it_wants_only_what_it_lacks(self, tier: Tier) -> None:
        block = blocks_of(chain_of(16))[0]
        assert tier.wants(block.key, lossy=False)
        tier.offer(Offer(block))
        assert not tier.wants(block.key, lossy=False)

    def test_a_longer_tail_replaces_a_shorter_one(self, tier: Tier) -> None:
        short, long = blocks_of(chain_of(20))[1], blocks_of(chain_of(27))[1]
        tier.offer(Offer(blocks_of(chain_of(16))[0]))
        tier.offer(Offer(short))
        tier.offer(Offer(long))
        assert not tier.wants(short.key, lossy=False)
        assert {key.digest for key in tier.entries()} == {long.key.digest, long.key.parent}

    def test_another_layout_is_never_given(self, tier: Tier) -> None:
        block = blocks_of(chain_of(16))[0]
        tier.offer(Offer(block))
        other = KVLayout.uniform(layers=2, heads=2, head_dim=4)
        assert tier.fetch([block.key], other, lambda _: None, exact_only=True) == frozenset()

    def test_the_budget_holds_and_leaves_go_first(self, tier: Tier) -> None:
        blocks = blocks_of(chain_of(16 * 20))
        for block in blocks:
            tier.offer(Offer(block))
            budget_bytes = tier.stats().budget_bytes
            assert budget_bytes is None or tier.stats().size_bytes <= budget_bytes
            held = {key.digest: key for key in tier.entries()}
            assert all(key.parent in held or key.start == 0 for key in held.values())

    def test_a_full_tier_takes_a_new_prompt_in_place_of_an_old_one(self, tier: Tier) -> None:
        for block in blocks_of(chain_of(16 * 8)):
            tier.offer(Offer(block))
        fresh = blocks_of(chain_of(16, first=1000))[0]
        assert tier.offer(Offer(fresh))
        assert set(self.fetched(tier, [fresh])) == {fresh.key.digest}

    def test_removed_blocks_are_gone(self, tier: Tier) -> None:
        block = blocks_of(chain_of(16))[0]
        tier.offer(Offer(block))
        tier.remove([block.key])
        assert self.fetched(tier, [block]) == {}
        assert tier.wants(block.key, lossy=False)

    def test_stats_count(self, tier: Tier) -> None:
        blocks = blocks_of(chain_of(32))
        for block in blocks:
            tier.offer(Offer(block))
        self.fetched(tier, blocks)
        stats = tier.stats()
        assert (stats.blocks, stats.stored, stats.hits, stats.errors) == (2, 2, 2, 0)
        assert stats.size_bytes >= 2 * BLOCK_BYTES
