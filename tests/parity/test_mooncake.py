"""Mooncake Store as the remote tier: a master and a holder of memory on loopback."""

from __future__ import annotations

import sys

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.errors import ConfigurationError, MissingExtraError, StoreRefusedError
from ghostcacher.stores.mooncake import MooncakeAddress, MooncakeStore
from ghostcacher.testing import servers
from ghostcacher.testing.models import random_prompt
from ghostcacher.testing.store import key

PROMPT = random_prompt(200, seed=4)


def opened(url, **given):
    return ghostcacher.open_store(memory=None, disk=None, block_tokens=64, remote=url, **given)


@pytest.mark.parametrize("given", [{}, {"codec": "int8"}, {"key": b"k" * 32}])
def test_what_one_store_put_another_one_gets(given, models, generate, mooncake_pool):
    model = models("llama")
    with opened(mooncake_pool.url, **given) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with opened(mooncake_pool.url, **given) as other:
        cache = GhostCache(model, other)
        out = generate(model, PROMPT, cache)
        assert (cache.report.tier, cache.report.cached_tokens) == ("remote", 199)
        if "codec" not in given:
            assert torch.equal(out, generate(model, PROMPT))
        assert ghostcacher.forget(model, PROMPT[0].tolist(), other) == 4
        assert ghostcacher.lookup(model, PROMPT[0].tolist(), other).tokens == 0


def test_f39_a_master_that_is_gone_is_a_miss_and_soon_costs_nothing(models, generate, tmp_path, monkeypatch):
    model = models("llama")
    monkeypatch.setenv("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS", "1")
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    with servers.mooncake_pool(tmp_path) as pool, opened(pool.url) as store:
        expected = generate(model, PROMPT)
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        pool.master.kill()
        pool.master.wait()
        for _ in range(4):
            cache = GhostCache(model, store)
            assert torch.equal(generate(model, PROMPT, cache), expected)
            assert cache.report.cached_tokens == 0
        assert store.tiers[0].store.is_out


def test_f47_a_full_pool_refuses_and_still_gives(tmp_path):
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    with servers.mooncake_pool(tmp_path, segment_bytes=16 * 2**20) as pool:
        store = MooncakeStore(pool.url)
        values = {key(number): [bytes(4 * 2**20)] for number in range(8)}
        with pytest.raises(StoreRefusedError, match="segment"):
            store.put_many(values, timeout_seconds=5.0)
        held = list(store.contains_many(list(values), timeout_seconds=5.0))  # the pool may let go of old ones
        assert held
        assert {len(found) for found in store.get_many(held, limit_bytes=10, timeout_seconds=5.0).values()} == {10}
        store.close()


def test_addresses():
    parsed = MooncakeAddress.parse("mooncake://here?segment=1GiB&metrics=9003&protocol=rdma&devices=mlx5_0")
    assert (parsed.master, parsed.metrics, parsed.segment_bytes) == ("here:50051", "here:9003", 2**30)
    assert (parsed.protocol, parsed.devices) == ("rdma", "mlx5_0")
    for url in (
        "mooncake://",
        "mooncake://host?secret=canary",
        "mooncake://host?segment=much",
        "mooncake://host:99999",
        "mooncake://[h",
    ):
        with pytest.raises(ConfigurationError) as caught:
            MooncakeAddress.parse(url)
        assert "canary" not in str(caught.value)


def test_without_the_client_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"ghostcacher\[mooncake\]"):
        opened("mooncake://127.0.0.1:1")


class _Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mooncake":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
