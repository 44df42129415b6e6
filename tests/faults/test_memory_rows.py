"""Rows of the catalogue about blocks in use while others write and evict; the number in a name is the row's."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.blocks import KVBlock, KVLayout
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.eviction import LeastRecentlyUsed
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.testing.models import random_prompt, tiny_model
from ghostcacher.testing.tier import BLOCK_BYTES, LAYOUT, blocks_of, chain_of
from ghostcacher.tiers.base import Offer
from ghostcacher.tiers.decoded import DecodedTier
from ghostcacher.tiers.encoded import EncodedTier

PROMPT = random_prompt(100, seed=3)
MACHINES = 200


def opened(folder, **given):
    return ghostcacher.open_store(folder, **{"memory": None, "block_tokens": 16, **given})


def run(generate, model, store, prompt=PROMPT, new=3, **options):
    cache = GhostCache(model, store)
    out = generate(model, prompt, cache, new=new, **options)
    report = cache.report
    del cache  # an answer's last tokens are stored when its cache goes away
    store.flush()
    return out, report


def used_bytes(folder):
    sizes = []
    for file in folder.rglob("*.safetensors"):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:  # evicted since it was listed
            continue
    return sum(sizes)


def test_f35_readers_outlive_what_evicts_under_them(models, generate, tmp_path, record_property):
    """A reader of one prompt and a writer of many, on a disk with room for two: right answers within the budget."""
    model, other, budget_bytes, block_bytes = models("llama"), tiny_model("llama"), 300 * 1024, 20 * 1024
    expected, ends, found, used = generate(model, PROMPT, new=3), threading.Event(), [], []

    def flood():
        with opened(tmp_path / "d", disk=budget_bytes) as store:
            for seed in range(1000, 2000):
                if ends.is_set():
                    break
                run(generate, other, store, random_prompt(100, seed=seed), new=1)

    writer = threading.Thread(target=flood)
    writer.start()
    try:
        with opened(tmp_path / "d", disk=budget_bytes) as store:
            for turn in range(400):
                out, report = run(generate, model, store)
                assert torch.equal(out, expected)
                found.append(report.cached_tokens)
                used.append(used_bytes(tmp_path / "d"))
                evicted = store.stats().tiers[0].evicted
                if turn >= 40 and evicted > 10 and min(found[1:]) < 99 and max(found) > 0:
                    break
    finally:
        ends.set()
        writer.join()
    record_property("trials", len(found))
    assert evicted > 10
    assert min(found[1:]) < 99
    assert max(found) > 0
    assert max(used) <= budget_bytes + block_bytes


MODES = {"greedy": {}, "beams": {"num_beams": 2}, "rows": {"num_return_sequences": 2, "do_sample": True}, "again": {}}


@pytest.mark.parametrize("recipe", ["llama", "gemma2", "deepseek_v3", "qwen3_next", "falcon_h1", "lfm2"])
def test_f57_no_state_in_ram_changes_while_models_go_on(recipe, models, generate, memory_store, record_property):
    """Bytes of every entry, before and after other calls took it, went on from it and wrote over what they got."""
    try:
        model = models(recipe)
    except ValueError as error:
        pytest.skip(str(error)[:60])
    run(generate, model, memory_store)
    tier = memory_store.tiers[0]
    before = {key.digest: [tensor.clone() for tensor in tier.get(key).tensors] for key in tier.entries()}
    for options in MODES.values():
        cache = GhostCache(model, memory_store)
        out = generate(model, PROMPT, cache, new=6, **options)
        assert cache.report.cached_tokens > 90
        generate(model, torch.cat([out[:1], random_prompt(9, seed=1)], 1), GhostCache(model, memory_store), new=2)
        for layer in cache.layers:
            for state in (
                value for value in vars(layer).values() if torch.is_tensor(value) and value.is_floating_point()
            ):
                state.fill_(7.0)
        memory_store.flush()
    held = {key.digest: tier.get(key) for key in tier.entries() if key.digest in before}
    record_property("trials", len(held) * len(MODES))
    assert len(held) >= 6
    for digest, block in held.items():
        assert all(torch.equal(a, b) for a, b in zip(block.tensors, before[digest], strict=True))


def tier_of(kind):
    """With room for 8 blocks and a bit."""
    budget_bytes = 8 * BLOCK_BYTES + 12_000
    if kind is DecodedTier:
        return DecodedTier("t", budget_bytes, LeastRecentlyUsed(), lambda event: None)
    return EncodedTier(
        "t", MemoryStore(), CodecChain(RawCodec()), LeastRecentlyUsed(), lambda event: None, is_local=True,
        timeout_seconds=5.0, budget_bytes=budget_bytes,
    )  # fmt: skip


class Budgeted(RuleBasedStateMachine):
    """Any order of offers, reads, pins, removals: never above the budget, what is pinned stays, counts are exact."""

    @initialize(kind=st.sampled_from([DecodedTier, EncodedTier]))
    def begin(self, kind):
        self.tier = tier_of(kind)
        self.blocks = [block for n in range(4) for block in blocks_of(chain_of(70, first=1000 * n))]
        self.pins = []

    @rule(number=st.integers(0, 19))
    def offer(self, number):
        self.tier.offer(Offer(self.blocks[number]))

    @rule(numbers=st.lists(st.integers(0, 19), max_size=5))
    def fetch(self, numbers):
        keys = [self.blocks[number].key for number in numbers]
        self.tier.fetch(keys, LAYOUT, lambda block: None, exact_only=True)
        self.tier.touch(keys)

    @rule(number=st.integers(0, 19))
    def pin(self, number):
        digest = self.blocks[number].key.digest
        if digest in self.tier.index and len(self.pins) < 3:
            pinned = self.tier.index.pinned([digest])
            pinned.__enter__()
            self.pins.append((digest, pinned))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self):
        self.pins.pop()[1].__exit__(None, None, None)

    @precondition(lambda self: not self.pins)
    @rule(number=st.integers(0, 19))
    def remove(self, number):
        self.tier.remove([self.blocks[number].key])

    @rule(layers=st.integers(40, 60))
    def offer_what_never_fits(self, layers):
        before = set(self.tier.entries())
        layout = KVLayout.uniform(layers=layers, heads=2, head_dim=8)
        key = chain_of(16, first=9000).block(0)
        huge = KVBlock(key, layout, tuple(torch.zeros(group.shape(key.length)) for group in layout.groups))
        assert huge.size_bytes > self.tier.stats().budget_bytes
        assert not self.tier.offer(Offer(huge))
        assert set(self.tier.entries()) == before

    @invariant()
    def the_budget_holds(self):
        index, stats = self.tier.index, self.tier.stats()
        held = [entry.size_bytes for entry in index.entries()]
        assert index.size_bytes == stats.size_bytes == sum(held) <= stats.budget_bytes

    @invariant()
    def what_is_pinned_stays(self):
        assert all(digest in self.tier.index for digest, _ in self.pins)

    @invariant()
    def the_store_holds_what_is_counted(self):
        if isinstance(self.tier, DecodedTier):
            held = {digest: block.size_bytes for digest, block in self.tier._blocks.items()}
        else:
            held = {bytes.fromhex(e.key[-64:]): e.size_bytes for e in self.tier.store.list_keys(timeout_seconds=1.0)}
        assert held == {entry.key.digest: entry.size_bytes for entry in self.tier.index.entries()}


def test_f59_a_budget_holds_after_every_step(record_property):
    run_state_machine_as_test(Budgeted, settings=settings(max_examples=MACHINES, stateful_step_count=40, deadline=None))
    record_property("trials", MACHINES)


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_f60_what_is_evicted_between_match_and_inject_is_computed(
    tier, models, generate, tmp_path, monkeypatch, record_property
):
    """At every block of the prefix in turn: from there on everything is evicted after it was promised."""
    model, given = models("llama"), {"memory": {"memory": "64MiB", "disk": None}, "disk": {}}[tier]
    expected, found = generate(model, PROMPT, new=3), []
    with opened(tmp_path / "d", **given) as store:
        held, fetch = store.tiers[0], store.tiers[0].fetch
        for lost_from in range(7):
            run(generate, model, store)

            def evicted_first(keys, *args, lost_from=lost_from, **options):
                held.remove(keys[lost_from:])
                return fetch(keys, *args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(held, "fetch", evicted_first)
                out, report = run(generate, model, store)
            assert torch.equal(out, expected)
            found.append(report.cached_tokens)
    record_property("trials", len(found))
    assert found == [16 * lost_from for lost_from in range(7)]


def test_f60_what_is_being_injected_is_not_evicted(record_property):
    """A full tier is offered other blocks while one of its own is placed."""
    tier, blocks = tier_of(DecodedTier), blocks_of(chain_of(128))
    for block in blocks:
        assert tier.offer(Offer(block))
    others, seen, keys = iter(blocks_of(chain_of(128, first=5000))), [], [block.key for block in blocks]

    def place(block):
        tier.offer(Offer(next(others)))
        seen.append(all(key.digest in tier.index for key in keys))
        assert tier.stats().size_bytes <= tier.budget_bytes

    placed = tier.fetch(keys, LAYOUT, place, exact_only=True)
    record_property("trials", len(seen))
    assert len(placed) == 8
    assert seen == [True] * 8
    assert tier.offer(Offer(blocks_of(chain_of(16, first=9000))[0])), "afterwards they are"
    assert tier.stats().evicted > 0


def test_f61_two_models_and_four_threads_share_one_store(generate, tmp_path, record_property):
    built = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    prompts = [torch.cat([random_prompt(33, seed=1), random_prompt(20, seed=n)], 1) for n in range(2)]
    expected = {(m, p): generate(built[m], prompts[p], new=3) for m in range(2) for p in range(2)}
    wrong, reused = [], []

    def work(number):
        model = number % 2
        for turn in range(12):
            cache = GhostCache(built[model], store)
            out = generate(built[model], prompts[turn % 2], cache, new=3)
            wrong.extend([number] * (not torch.equal(out, expected[model, turn % 2])))
            reused.append(cache.report.cached_tokens)

    with opened(tmp_path / "d", memory="200KiB") as store:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    record_property("trials", len(reused))
    assert not wrong
    assert len(reused) == 48
    assert reused.count(52) > 10
