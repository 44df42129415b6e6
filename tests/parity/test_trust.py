"""Stores sealed with a key: the same hits with it, nothing without it, and nothing from who lacks it."""

from __future__ import annotations

import json
import logging
import pickle
import tracemalloc

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.codecs.header import BlockHeader
from ghostcacher.errors import BlockError, ConfigurationError, StoreForgedError
from ghostcacher.stores.directory import DirectoryStore
from ghostcacher.stores.envelope import Sealing
from ghostcacher.stores.sealed import SealedDirectory
from ghostcacher.testing.models import random_prompt

KEY, OTHER = b"k" * 32, b"o" * 32
PROMPT = random_prompt(200, seed=8)


def opened(folder, **given):
    return ghostcacher.open_store(folder, memory=None, block_tokens=64, **{"key": KEY, **given})


def run(generate, model, store, new=4):
    cache = GhostCache(model, store)
    out = generate(model, PROMPT, cache, new=new)
    store.flush()
    return out, cache.report


def stored(tmp_path, generate, model, **given):
    with opened(tmp_path / "d", **given) as store:
        run(generate, model, store)
        return store.stats().tiers[0].stored


def files(tmp_path):
    return sorted((tmp_path / "d").rglob("*.safetensors"))


@pytest.mark.parametrize("codec", ["raw", "raw.z", "int8"])
def test_what_was_sealed_is_found_with_the_key_and_only_with_it(codec, tmp_path, models, generate):
    model = models("llama")
    expected = generate(model, PROMPT, new=4)
    assert stored(tmp_path, generate, model, codec=codec) > 0
    with opened(tmp_path / "d", codec=codec) as store:
        out, report = run(generate, model, store)
        assert report.cached_tokens == 199
        if codec != "int8":
            assert torch.equal(out, expected)
    for key in (OTHER, None):
        with opened(tmp_path / "d", codec=codec, key=key) as store:
            out, report = run(generate, model, store)
            assert report.cached_tokens == 0
            assert torch.equal(out, expected)


def test_sealed_and_plain_entries_share_a_directory_and_neither_deletes_the_other(tmp_path, models, generate):
    model = models("llama")
    stored(tmp_path, generate, model)
    sealed = set(files(tmp_path))
    with opened(tmp_path / "d", key=None, disk="256KiB") as store:
        for seed in range(5):
            generate(model, random_prompt(200, seed=seed + 50), GhostCache(model, store), new=1)
            store.flush()
        assert store.stats().tiers[0].evicted > 0
    assert sealed <= set(files(tmp_path))
    with opened(tmp_path / "d") as store:
        assert run(generate, model, store)[1].cached_tokens == 199


def test_remote_tiers_are_sealed_too(models, generate, redis_url):
    model = models("llama")
    given = {"memory": None, "disk": None, "block_tokens": 64, "remote": redis_url}
    with ghostcacher.open_store(**given, key=KEY) as store:
        run(generate, model, store, new=1)
        (namespace,) = {key.namespace.hex() for key in store.tiers[0].entries()}
    with ghostcacher.open_store(**given, key=[OTHER, KEY]) as store:
        out, report = run(generate, model, store)
        assert (report.tier, report.cached_tokens) == ("remote", 199)
        assert torch.equal(out, generate(model, PROMPT, new=4))
        assert "127.0.0.1" not in repr(store.config)
        inner = store.tiers[0].store._store
        assert not [entry for entry in inner.list_keys(timeout_seconds=5.0) if namespace in entry.key]
        assert store.purge(bytes.fromhex(namespace)) > 0
        assert not list(inner.list_keys(timeout_seconds=5.0))


@pytest.mark.parametrize("forgery", ["plain", "other key", "flipped", "of another block", "empty"])
def test_f71_what_someone_without_the_key_puts_there_is_refused_and_healed(forgery, tmp_path, models, generate):
    model = models("llama")
    stored(tmp_path, generate, model)
    with opened(tmp_path / "d") as store:
        key = min(_keys(store, PROMPT, model), key=lambda key: key.start)
    sealed = SealedDirectory(DirectoryStore(tmp_path / "d", is_sealed=True), [Sealing.of(KEY)])
    value = sealed.get_many([key.store_key], limit_bytes=2**30, timeout_seconds=1.0)[key.store_key]
    (path,) = [file for file in files(tmp_path) if Sealing.of(KEY).name(key.store_key)[-64:] in file.name]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    other = next(file for file in files(tmp_path) if file != path)
    path.write_bytes({
        "plain": value, "other key": b"".join(Sealing.of(OTHER).seal(key.store_key, b"", value)), "flipped": content,
        "of another block": other.read_bytes(), "empty": b"",
    }[forgery])  # fmt: skip
    with opened(tmp_path / "d") as store:
        store.tiers[0].index.add(key, 1)  # as one who listed it before it was forged
        out, report = run(generate, model, store)
        assert report.cached_tokens == 0
        assert torch.equal(out, generate(model, PROMPT, new=4))
        assert store.stats().tiers[0].rejected == 1
        assert run(generate, model, store)[1].cached_tokens == 199
    with opened(tmp_path / "d") as store:
        assert run(generate, model, store)[1].cached_tokens == 199


def test_f78_a_sealed_store_and_its_logs_hold_no_canary(tmp_path, models, generate, caplog):
    caplog.set_level(logging.DEBUG)
    model, salt = models("llama"), "canary-salt-4711"
    tokens = json.dumps(PROMPT[0].tolist()[:8], separators=(",", ":"))[1:-1]
    with opened(tmp_path / "d", salt=salt) as store:
        run(generate, model, store)
        (namespace,) = {key.namespace.hex() for key in store.tiers[0].entries()}
        shown = f"{store!r} {store.config!r} {store.stats()} {store.tiers[0].store!r}"
    canaries = [tokens, namespace, salt, KEY.decode(), KEY.hex(), "llama", "safetensors"]
    assert len(files(tmp_path)) == 4
    for file in files(tmp_path):
        content = file.read_bytes()
        assert not [canary for canary in canaries if canary.encode() in content]
        assert not [canary for canary in canaries[:4] if canary in str(file)]
    assert not [canary for canary in canaries[:5] if canary in shown + caplog.text]


def test_f78_negative_control_an_unsealed_store_shows_the_canaries(tmp_path, models, generate):
    stored(tmp_path, generate, models("llama"), key=None)
    tokens = json.dumps(PROMPT[0].tolist()[:8], separators=(",", ":"))[1:-1]
    contents = [file.read_bytes() for file in files(tmp_path)]
    assert any(tokens.encode() in content for content in contents)
    assert all(b"llama" in content for content in contents)


def test_forgetting_and_reading_only_work_sealed(tmp_path, models, generate):
    model = models("llama")
    stored(tmp_path, generate, model)
    with opened(tmp_path / "d", role="reader") as reader:
        before = {file: file.read_bytes() for file in files(tmp_path)}
        assert run(generate, model, reader)[1].cached_tokens == 199
        assert {file: file.read_bytes() for file in files(tmp_path)} == before
    with opened(tmp_path / "d") as store:
        assert ghostcacher.forget(model, PROMPT[0].tolist(), store) == 4
        assert files(tmp_path) == []
        assert run(generate, model, store)[1].cached_tokens == 0


def test_f79_replacing_a_key(tmp_path, models, generate):
    model = models("llama")
    stored(tmp_path, generate, model, key=OTHER)
    with opened(tmp_path / "d", key=[KEY, OTHER]) as store:
        assert run(generate, model, store)[1].cached_tokens == 199
        generate(model, random_prompt(100, seed=3), GhostCache(model, store), new=1)
        store.flush()
    with opened(tmp_path / "d") as store:
        assert run(generate, model, store)[1].cached_tokens == 0
        cache = GhostCache(model, store)
        generate(model, random_prompt(100, seed=3), cache, new=1)
        assert cache.report.cached_tokens == 99


def test_f69_a_directory_that_others_may_write_is_for_sealed_stores_alone(tmp_path, models, generate):
    root = tmp_path / "d"
    root.mkdir()
    root.chmod(0o770)
    with pytest.raises(ConfigurationError, match="chmod"):
        opened(root, key=None)
    stored(tmp_path, generate, models("llama"))
    assert {file.stat().st_mode & 0o060 for file in files(tmp_path)} == {0o060}


def test_a_remote_tier_without_a_key_is_warned_of_once(tmp_path, caplog, redis_url):
    def warnings(**given):
        caplog.clear()
        ghostcacher.open_store(memory=None, disk=None, **given).close()
        return [record.message for record in caplog.records if "not sealed" in record.message]

    assert len(warnings(remote=redis_url)) == 1
    assert warnings(remote=redis_url, key=KEY) == []
    assert warnings(remote="memory://here") == []


def test_an_unsealed_reader_says_that_a_block_is_sealed(tmp_path, models, generate):
    stored(tmp_path, generate, models("llama"))
    with pytest.raises(BlockError) as caught:
        BlockHeader.parse(files(tmp_path)[0].read_bytes())
    assert caught.value.reason == "sealed"


def test_f63_a_store_with_a_key_is_not_pickled(tmp_path):
    with opened(tmp_path / "d") as store, pytest.raises(TypeError):
        pickle.dumps(store)


def _keys(store, prompt, model):
    ghostcacher.lookup(model, prompt[0].tolist(), store)
    return list(store.tiers[0].entries())


def test_what_others_sealed_is_read_once_and_counted_by_nobody(tmp_path, models, generate):
    model = models("llama")
    stored(tmp_path, generate, model)
    with opened(tmp_path / "d", key=None, disk="1MiB") as store:
        reads, get_many = [], store.tiers[0].store.get_many
        store.tiers[0].store.get_many = lambda keys, **given: reads.extend(keys) or get_many(keys, **given)
        for seed in range(4):
            generate(model, random_prompt(70, seed=seed + 50), GhostCache(model, store), new=1)
            store.flush()
        sealed = {file.stem for file in files(tmp_path)} - {key.digest.hex() for key in store.tiers[0].entries()}
        assert len(sealed) == 4
        assert sorted(key[-64:] for key in reads if key[-64:] in sealed) == sorted(sealed)
        assert store.stats().tiers[0].rejected == 0


@pytest.mark.parametrize("limit_bytes", [100, 8192, 2**20])
def test_a_stretched_value_without_a_head_costs_little(limit_bytes, tmp_path):
    """A genuine label before a sparse file of 4 GiB whose size of the head was zeroed."""
    key, sealing = f"{1:064x}/{2:064x}", Sealing.of(KEY)
    directory = DirectoryStore(tmp_path / "d", is_sealed=True)
    store = SealedDirectory(directory, [sealing])
    store.put_many({key: [b"head", b"body" * 100]}, timeout_seconds=1.0)
    (file,) = files(tmp_path)
    with file.open("r+b") as changed:
        changed.seek(56)
        changed.write(bytes(4))
        changed.truncate(2**32)
    tracemalloc.start()
    found = store.get_many([key], limit_bytes=limit_bytes, timeout_seconds=1.0)
    assert isinstance(found[key], StoreForgedError)
    assert tracemalloc.get_traced_memory()[1] < 2 * limit_bytes + 2**20
    tracemalloc.stop()


def test_a_reader_deletes_nothing_and_says_so(tmp_path, models, generate):
    model = models("llama")
    stored(tmp_path, generate, model)
    partial = next((tmp_path / "d").rglob("*.safetensors")).with_name(".999999999-0123456789abcdef.partial")
    partial.touch()
    with opened(tmp_path / "d", role="reader") as reader:
        with pytest.raises(ConfigurationError, match="reader"):
            ghostcacher.forget(model, PROMPT[0].tolist(), reader)
        with pytest.raises(ConfigurationError, match="reader"):
            reader.purge(bytes(32))
    assert partial.exists()
    assert len(files(tmp_path)) == 4
