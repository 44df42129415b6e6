"""Several tiers as one."""

from __future__ import annotations

import logging
import time

import pytest
import torch

import ghostcacher
from ghostcacher.codecs.raw import RawCodec
from ghostcacher.codecs.safetensors_format import CodecChain
from ghostcacher.errors import ConfigurationError, MissingExtraError, StoreError
from ghostcacher.eviction import LeastRecentlyUsed
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.memory import MemoryStore
from ghostcacher.testing.faulty import FaultyStore
from ghostcacher.testing.tier import BLOCK_BYTES, BLOCK_TOKENS, LAYOUT, blocks_of, chain_of
from ghostcacher.tiers.catalog import ProbingCatalog
from ghostcacher.tiers.deadline import DeadlineStore
from ghostcacher.tiers.encoded import EncodedTier
from ghostcacher.tiers.stack import TierStack


def stacked(tmp_path, **options):
    return ghostcacher.open_store(tmp_path / "blocks", block_tokens=BLOCK_TOKENS, **options)


def offered(store, chain):
    blocks = blocks_of(chain)
    for block in blocks:
        store.offer(block)
    return blocks


def fetched(store, chain):
    found = {}
    matched = store.match(chain)
    outcome = store.fetch([c.key for c in matched], LAYOUT, lambda block: found.update({block.key.digest: block}))
    return outcome.leading(matched), outcome, found


def test_the_nearest_tier_that_holds_a_block_gives_it(tmp_path):
    with stacked(tmp_path, memory="1MiB") as store:
        chain = chain_of(33)
        offered(store, chain)
        _, outcome, _ = fetched(store, chain)
        assert set(outcome.sources.values()) == {"memory"}
        store.tiers[0].remove(list(store.tiers[0].entries())[:1])
        run, outcome, _ = fetched(store, chain)
        assert set(outcome.sources.values()) == {"memory", "disk"}
        assert len(run) == 2


def test_another_store_on_the_same_directory_sees_new_blocks(tmp_path):
    with stacked(tmp_path, memory=None) as one, stacked(tmp_path, memory=None) as two:
        assert two.match(chain_of(40)) == ()
        offered(one, chain_of(40))
        assert len(two.match(chain_of(40))) == 3
        offered(one, chain_of(60))
        found = two.match(chain_of(61))
        assert found[-1].key.start + found[-1].tokens == 60


def test_f48_a_hole_ends_the_prefix(tmp_path):
    with stacked(tmp_path, memory=None) as store:
        chain = chain_of(81)
        blocks = offered(store, chain)
        matched = store.match(chain)
        assert len(matched) == 5
        DirectoryStore(tmp_path / "blocks").delete_many([blocks[2].key.store_key], timeout_seconds=10)
        outcome = store.fetch([c.key for c in matched], LAYOUT, lambda block: None)
        assert [c.key.start for c in outcome.leading(matched)] == [0, 16]


def test_f35_disk_quota_holds_while_two_stores_write(tmp_path, record_property):
    budget_bytes = 10 * (BLOCK_BYTES + 1500)
    with (
        stacked(tmp_path, memory=None, disk=budget_bytes) as one,
        stacked(tmp_path, memory=None, disk=budget_bytes) as two,
    ):
        for turn in range(30):
            offered((one, two)[turn % 2], chain_of(32, first=1000 * turn))
            used = sum(path.stat().st_size for path in (tmp_path / "blocks").rglob("*.safetensors"))
            assert used <= budget_bytes + BLOCK_BYTES + 1500
        assert one.stats().tiers[0].evicted + two.stats().tiers[0].evicted > 20
        run, _, _ = fetched(two, chain_of(33, first=29_000))
        assert len(run) == 2, "the latest prompt is kept"
    record_property("trials", 30)


def remote_stack(tmp_path, remote, *, strict=False, timeout_seconds=0.3):
    store = ghostcacher.open_store(
        tmp_path / "blocks", memory="1MiB", disk=None, block_tokens=BLOCK_TOKENS, strict=strict
    )
    held = DeadlineStore(remote)
    tier = EncodedTier(
        "remote", held, CodecChain(RawCodec()), LeastRecentlyUsed(), store.observe, is_local=False,
        timeout_seconds=timeout_seconds, strict=strict,
    )  # fmt: skip
    tier.catalog = ProbingCatalog(held, timeout_seconds)
    return TierStack(store.config, [*store.tiers, tier], store._writer, store._readers, store.observers, store.shelf)


def test_a_remote_tier_is_asked_in_one_batch_for_each_reader_and_found_by_another_process(tmp_path):
    shared = FaultyStore(MemoryStore())
    with remote_stack(tmp_path, shared) as one:
        offered(one, chain_of(80))
    shared.calls.clear()
    with remote_stack(tmp_path, shared) as two:
        run, outcome, _ = fetched(two, chain_of(81))
    assert shared.calls == ["contains_many", "get_many", "get_many"]
    assert set(outcome.sources.values()) == {"remote"}
    assert len(run) == 5


def test_a_remote_tail_is_found_at_every_16_tokens(tmp_path):
    config = {"memory": None, "disk": None, "block_tokens": 64}
    with ghostcacher.open_store(remote=f"file://{tmp_path}/r", **config) as one:
        from ghostcacher.blocks import KVBlock
        from ghostcacher.keys import PrefixChain
        from ghostcacher.testing.tier import NAMESPACE

        chain = PrefixChain.of(list(range(96)), NAMESPACE, 64)
        for key in chain.covering(0, 96):
            one.offer(KVBlock(key, LAYOUT, tuple(torch.randn(g.shape(key.length)) for g in LAYOUT.groups)))
    with ghostcacher.open_store(remote=f"file://{tmp_path}/r", **config) as two:
        longer = PrefixChain.of(list(range(110)), NAMESPACE, 64)
        found = two.match(longer)
        assert found[-1].key.end == 96


@pytest.mark.parametrize(
    "failing", [{"contains_many"}, {"get_many"}, {"put_many"}, {"contains_many", "get_many", "put_many"}]
)
def test_f39_a_failing_remote_is_a_miss_and_counted(tmp_path, failing, caplog):
    remote = FaultyStore(MemoryStore(), failing=frozenset())
    with remote_stack(tmp_path, remote) as store:
        offered(store, chain_of(32))
        store.tiers[0].remove(list(store.tiers[0].entries()))
        store.tiers[1].index.__init__()
        remote.failing = frozenset(failing)
        with caplog.at_level(logging.WARNING, "ghostcacher"):
            offered(store, chain_of(32, first=500))
            run, _, _ = fetched(store, chain_of(33))
        assert len(run) == (0 if failing != {"put_many"} else 2)
        assert store.stats().tiers[1].errors >= 1
        remote.failing = frozenset()
        run, _, _ = fetched(store, chain_of(33))
        assert len(run) == 2


def test_strict_raises(tmp_path):
    remote = FaultyStore(MemoryStore(), failing=frozenset({"contains_many"}))
    with remote_stack(tmp_path, remote, strict=True) as store, pytest.raises(StoreError):
        store.match(chain_of(33))


def test_f40_a_hanging_remote_costs_its_deadline_and_no_more(tmp_path):
    remote = FaultyStore(MemoryStore(), delay_seconds=3.0)
    with remote_stack(tmp_path, remote, timeout_seconds=0.2) as store:
        started = time.monotonic()
        assert store.match(chain_of(33)) == ()
        assert time.monotonic() - started < 1.0
        assert store.stats().tiers[1].errors == 1
        for _ in range(20):
            store.match(chain_of(33))
        assert remote.calls == ["contains_many"] * 8, "with 8 calls hanging, no ninth is begun"


def test_a_hit_in_a_far_tier_is_taken_into_the_near_one(tmp_path, llama, generate):
    from ghostcacher import GhostCache
    from ghostcacher.testing.models import random_prompt

    prompt = random_prompt(40)
    with stacked(tmp_path, memory=None) as store:
        generate(llama, prompt, GhostCache(llama, store))
    with stacked(tmp_path, memory="1MiB") as store:
        tiers = []
        for _ in range(2):
            cache = GhostCache(llama, store)
            generate(llama, prompt, cache)
            tiers.append(cache.report.tier)
            store.flush()
        assert tiers == ["disk", "memory"]


def test_a_device_tier_keeps_blocks_where_they_were_computed(tmp_path, llama, generate):
    from ghostcacher import GhostCache
    from ghostcacher.testing.models import random_prompt

    with stacked(tmp_path, device="1MiB", memory=None, disk=None) as store:
        for _ in range(2):
            cache = GhostCache(llama, store)
            generate(llama, random_prompt(40), cache)
            store.flush()
        assert cache.report.tier == "device"


def test_observers_see_everything(tmp_path, llama, generate):
    from ghostcacher import GhostCache
    from ghostcacher.testing.models import random_prompt

    seen = []
    with stacked(tmp_path) as store:
        store.observers.append(seen.append)
        for _ in range(2):
            generate(llama, random_prompt(40), GhostCache(llama, store))
            store.flush()
        stats = store.stats()
    kinds = [event.kind for event in seen]
    assert kinds.count("miss") == 1
    assert kinds.count("hit") == 1
    assert kinds.count("stored") >= 3
    assert (stats.prompts, stats.hits, stats.prompt_tokens, stats.cached_tokens) == (2, 1, 80, 39)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "much"),
        ({"disk": "-3"}, "-3"),
        ({"block_tokens": 8}, "16 to 4096"),
        ({"block_tokens": "128"}, "whole number"),
        ({"codec": "zip"}, "int8, kvt, quality, raw"),
        ({"remote": "no url"}, "s3://"),
        ({"remote": "nonsense://x"}, "nonsense"),
    ],
)
def test_bad_settings_name_the_value_and_the_next_step(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        ghostcacher.open_store(tmp_path, **options)


def test_f80_a_missing_extra_names_the_install_line(tmp_path, monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("no s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "ghostcacher\[s3\]"'):
        ghostcacher.open_store(tmp_path, remote="s3://user:hunter2@bucket/x")


def test_the_timeout_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS", "soon")
    with pytest.raises(ConfigurationError, match="soon"):
        ghostcacher.open_store(tmp_path)


def test_the_default_store_is_one_per_process(tmp_path, monkeypatch, llama):
    from ghostcacher.tiers import opening

    monkeypatch.setattr(opening, "_default", None)
    monkeypatch.setenv("GHOSTCACHER_HOME", str(tmp_path / "home"))
    cache = ghostcacher.GhostCache(llama)
    assert cache.store is ghostcacher.default_store()
    assert cache.store.config.directory == tmp_path / "home"
    cache.store.close()
