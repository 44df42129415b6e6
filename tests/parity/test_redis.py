"""Redis as the remote tier: another process's blocks, a server that goes away and comes back, a cluster's failover."""

from __future__ import annotations

import shutil
import subprocess
import time
import traceback

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.errors import ConfigurationError, MissingExtraError, StoreError
from ghostcacher.stores import redis as redis_store
from ghostcacher.stores.redis import RedisStore
from ghostcacher.testing import servers
from ghostcacher.testing.models import random_prompt
from ghostcacher.testing.store import key

PROMPT = random_prompt(200, seed=4)


def opened(url, **given):
    return ghostcacher.open_store(memory=None, disk=None, block_tokens=64, remote=url, **given)


@pytest.mark.parametrize("codec", ["raw", "int8", "ec(0.25)"])
def test_what_one_store_put_another_one_gets(codec, models, generate, redis_url):
    model = models("llama")
    with opened(redis_url, codec=codec) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with opened(redis_url, codec=codec) as other:
        cache = GhostCache(model, other)
        out = generate(model, PROMPT, cache)
        assert (cache.report.tier, cache.report.cached_tokens) == ("remote", 199)
        if codec == "raw":
            assert torch.equal(out, generate(model, PROMPT))


def test_f44_a_cluster_serves_and_outlives_a_master(models, generate, redis_cluster):
    model, url = models("llama"), redis_cluster[0].url.replace("redis://", "redis+cluster://")
    expected = generate(model, PROMPT)
    with opened(url) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        time.sleep(1.5)  # replicas follow
        client = store.tiers[0].store._store._store._client()
        key = next(iter(store.tiers[0].entries())).store_key  # the cluster holds other tests' blocks too
        port = client.get_node_from_key(f"ghostcacher/v1/{key}").port
        victim = next(node for node in redis_cluster if node.port == port)
        victim.stop()
        try:
            cached, halves = [], []
            for _ in range(16):
                cache = GhostCache(model, store)
                assert torch.equal(generate(model, PROMPT, cache), expected)
                cached.append(cache.report.cached_tokens)
                halves.append(store.tiers[0].store._store._store._halves.are_replicas)
                assert not store.tiers[0].store.is_out
                time.sleep(0.25)
            assert any(halves), "replicas were read"
            assert cached[0] == 199, "a replica has it"
            assert cached[-1] == 199, "and is the master now"
        finally:
            victim.start()


def test_f46_a_cluster_without_nodes_is_a_miss_beside_a_disk_that_has_it(models, generate, tmp_path):
    model = models("llama")
    given = {"memory": None, "block_tokens": 64, "remote": "redis+cluster://127.0.0.1:1"}
    with ghostcacher.open_store(tmp_path, **given) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        for turn in range(4):  # each with an end that the disk does not know either
            longer = torch.cat([PROMPT, random_prompt(60, seed=6 + turn)], dim=1)
            cache = GhostCache(model, store)
            assert torch.equal(generate(model, longer, cache), generate(model, longer))
            assert cache.report.cached_tokens >= 200
        assert store.stats().failed == 0
        assert store.tiers[1].store.is_out
        assert store.tiers[1].store._writes.is_out


def test_f39_a_server_that_is_gone_is_a_miss_and_soon_costs_nothing(models, generate, tmp_path):
    if servers.redis_binary() is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    model = models("llama")
    expected = generate(model, PROMPT)
    with servers.redis_server(tmp_path) as server, opened(server.url) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        server.stop()
        for _ in range(4):
            cache = GhostCache(model, store)
            assert torch.equal(generate(model, PROMPT, cache), expected)
            assert cache.report.cached_tokens == 0
        store.flush()
        assert store.tiers[0].store.is_out
        began = time.perf_counter()
        with pytest.raises(StoreError):
            store.tiers[0].store.contains_many([key(1)], timeout_seconds=1.0)
        assert time.perf_counter() - began < 0.1


def test_f47_a_full_server_drops_what_does_not_fit_and_goes_on(models, generate, tmp_path):
    if servers.redis_binary() is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    model = models("llama")
    full = ("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    with servers.redis_server(tmp_path, *full) as server, opened(server.url) as store:
        for seed in range(30):
            prompt = random_prompt(200, seed=seed)
            cache = GhostCache(model, store)
            assert torch.equal(generate(model, prompt, cache, new=1), generate(model, prompt, new=1))
            store.flush()
        stats = store.stats().tiers[0]
        cache = GhostCache(model, store)
        generate(model, random_prompt(200, seed=0), cache, new=1)
    assert stats.errors > 0
    assert store.stats().failed == 0
    assert cache.report.cached_tokens >= 192  # a server that takes no more still gives


def test_f49_credentials_are_never_shown(models, generate, tmp_path, caplog):
    if servers.redis_binary() is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    model = models("llama")
    with servers.redis_server(tmp_path, "--requirepass", "right") as server:
        url = server.url.replace("redis://", "redis://:hunter2@")
        assert "hunter2" not in repr(RedisStore(url))
        with opened(url) as store:
            cache = GhostCache(model, store)
            generate(model, PROMPT, cache, new=1)
            store.flush()
            assert store.stats().tiers[0].errors > 0
        with pytest.raises(StoreError) as caught:
            RedisStore(url).contains_many([key(1)], timeout_seconds=1.0)
        with opened(server.url.replace("redis://", "redis://:right@")) as store:
            generate(model, PROMPT, GhostCache(model, store), new=1)
            store.flush()
            assert store.stats().tiers[0].stored == 4
    said = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in f"{said}{caplog.text}{store!r}"


def test_what_a_server_repeats_of_a_password_ends_here(monkeypatch, redis_url):
    """One without HELLO answers with its arguments."""
    store = RedisStore(redis_url)

    def echo():
        raise RuntimeError("unknown command HELLO, with args beginning with: 3 AUTH user hunter2")

    monkeypatch.setattr(store, "_client", echo)
    for call in (lambda: store.contains_many([key(1)], timeout_seconds=1.0),
                 lambda: list(store.list_keys(timeout_seconds=1.0))):  # fmt: skip
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host:port/0", "redis://[::1", "redis+cluster://h:x", "redis+cluster://:hunter2@h/3",
        "redis://:hun?ter2@h:6379", "redis://:hun/ter2@h", "redis://:hunter2@h/0?foo=bar",
    ],
)  # fmt: skip
def test_f49_urls_that_mean_nothing_are_refused_without_repeating_a_password(url):
    with pytest.raises(ConfigurationError, match="remote=") as caught:
        opened(url)
    said = "".join(traceback.format_exception(caught.value))
    assert not any(part in said.split("test_redis.py")[-1] for part in ("hunter2", "ter2", ":hun"))


def test_f50_a_block_beyond_what_redis_takes_is_refused_by_name(redis_url, monkeypatch):
    monkeypatch.setattr(redis_store, "VALUE_LIMIT_BYTES", 10)
    with pytest.raises(StoreError, match="block_tokens"):
        RedisStore(redis_url).put_many({key(1): [b"x" * 11]}, timeout_seconds=1.0)


def test_without_the_client_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(redis_store.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(MissingExtraError, match=r"ghostcacher\[redis\]"):
        opened("redis://127.0.0.1:1")


def test_f49_a_user_who_may_only_read_reads(models, generate, tmp_path):
    if servers.redis_binary() is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    model = models("llama")
    client = pytest.importorskip("redis")
    rights = ["on", ">guest", "~*", "-@all", "+@connection", "+getrange", "+exists"]
    with servers.redis_server(tmp_path) as server:
        client.Redis(port=server.port).execute_command("ACL", "SETUSER", "guest", *rights)
        with opened(server.url) as store:
            generate(model, PROMPT, GhostCache(model, store), new=1)
        with opened(server.url.replace("redis://", "redis://guest:guest@")) as store:
            for prompt in (PROMPT, random_prompt(200, seed=5), PROMPT):
                cache = GhostCache(model, store)
                assert torch.equal(generate(model, prompt, cache), generate(model, prompt))
                store.flush()
            assert cache.report.cached_tokens == 199
            assert store.stats().tiers[0].stored == 0
            assert not store.tiers[0].store.is_out


def test_f49_an_encrypted_connection(models, generate, tmp_path):
    if servers.redis_binary() is None or shutil.which("openssl") is None:
        pytest.skip("no redis-server, or no openssl to make a certificate")
    key_file, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key_file, "-out", certificate]
    subprocess.run([*request, *names], check=True, capture_output=True)
    tls_port = servers.free_port()
    options = ("--tls-port", tls_port, "--tls-cert-file", certificate, "--tls-key-file", key_file,
               "--tls-auth-clients", "no")  # fmt: skip
    model = models("llama")
    with servers.redis_server(tmp_path / "redis", *map(str, options)):
        url = f"rediss://127.0.0.1:{tls_port}/0"
        for _ in range(2):
            with opened(f"{url}?ssl_ca_certs={certificate}") as store:
                cache = GhostCache(model, store)
                generate(model, PROMPT, cache, new=1)
        assert cache.report.cached_tokens == 199
        with pytest.raises(StoreError):  # nobody vouches for it
            RedisStore(url).contains_many([key(1)], timeout_seconds=1.0)


def test_a_closed_store_leaves_no_connection_and_can_still_be_read(models, generate, tmp_path):
    if servers.redis_binary() is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    client, model = pytest.importorskip("redis"), models("llama")
    with servers.redis_server(tmp_path) as server:
        watching = client.Redis(port=server.port)
        with opened(server.url) as store:
            generate(model, PROMPT, GhostCache(model, store), new=1)
            store.flush()
            assert len(watching.client_list()) > 1
        assert len(watching.client_list()) == 1
        cache = GhostCache(model, store)
        generate(model, PROMPT, cache, new=1)
        assert cache.report.cached_tokens == 199
        store.close()
