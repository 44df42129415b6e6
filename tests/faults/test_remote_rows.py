"""Rows of the catalogue about stores that answer, but not as they should; the number in a name is the row's."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading
import time

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.models import random_prompt

PROMPT = random_prompt(200, seed=4)
CLIENT = shutil.which("redis-cli") or shutil.which("valkey-cli") or "redis-cli"


def opened(url, **given):
    return ghostcacher.open_store(memory=None, disk=None, block_tokens=16, remote=url, **given)


def ask(generate, model, store):
    cache = GhostCache(model, store)
    out = generate(model, PROMPT, cache, new=2)
    store.flush()
    return out, cache.report.cached_tokens


def test_f45_a_server_that_pauses_costs_its_deadline_and_comes_back(models, generate, redis_url, redis_server):
    redis = pytest.importorskip("redis")
    model = models("llama")
    expected = generate(model, PROMPT, new=2)
    with opened(redis_url) as store:
        ask(generate, model, store)
        assert ask(generate, model, store)[1] == 199
        redis.Redis(port=redis_server.port).execute_command("CLIENT", "PAUSE", "3000", "ALL")
        began = time.monotonic()
        assert torch.equal(ask(generate, model, store)[0], expected)
        assert time.monotonic() - began < 20
        time.sleep(3)
        store.tiers[0].store._reads._failures, store.tiers[0].store._reads._out_until = 0, None
        out, cached = ask(generate, model, store)
        assert torch.equal(out, expected)
        assert cached == 199


def test_f45_a_master_cut_off_from_its_cluster_and_back(models, generate, redis_cluster, monkeypatch):
    """Halted, as by a partition: nobody is told. Its replica is read, then elected, and it returns as one of these."""
    monkeypatch.setenv("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS", "0.5")
    model, url = models("llama"), redis_cluster[0].url.replace("redis://", "redis+cluster://")
    expected = generate(model, PROMPT, new=2)
    with opened(url) as store:
        ask(generate, model, store)
    time.sleep(1.5)  # replicas follow

    def until_whole(store):
        """Right answers, and hits again within five seconds."""
        began, found = time.monotonic(), 0
        while found < 199 and time.monotonic() - began < 5.0:
            out, found = ask(generate, model, store)
            assert torch.equal(out, expected)
        assert found == 199

    with opened(url) as store:
        until_whole(store)
        key = next(iter(store.tiers[0].entries())).store_key
        port = store.tiers[0].store._store._store._client().get_node_from_key(f"ghostcacher/v1/{key}").port
        holder = next(node for node in redis_cluster if node.port == port)
        holder.pause()
        try:
            until_whole(store)
            assert store.tiers[0].store._store._store._halves.are_replicas
        finally:
            holder.resume()
        for _ in range(3):
            until_whole(store)


def test_f46_slots_that_move_while_prompts_come(models, generate, redis_cluster):
    model, url = models("llama"), redis_cluster[0].url.replace("redis://", "redis+cluster://")
    expected, cached = generate(model, PROMPT, new=2), []
    with opened(url) as store:
        ask(generate, model, store)
        lines = subprocess.run(
            [CLIENT, "-p", str(redis_cluster[0].port), "cluster", "nodes"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        masters = [line.split()[0] for line in lines if "master" in line and "fail" not in line]
        moving = subprocess.Popen(
            [
                CLIENT, "--cluster", "reshard", f"127.0.0.1:{redis_cluster[0].port}", "--cluster-from", masters[0],
                "--cluster-to", masters[1], "--cluster-slots", "1500", "--cluster-yes",
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 60
        while moving.poll() is None and time.monotonic() < until:
            out, tokens = ask(generate, model, store)
            assert torch.equal(out, expected)
            cached.append(tokens)
        assert moving.wait(30) == 0
        store.tiers[0].store._reads._failures, store.tiers[0].store._reads._out_until = 0, None
        for _ in range(2):
            out, tokens = ask(generate, model, store)
            assert torch.equal(out, expected)
        assert tokens == 199
    assert len(cached) > 3


class Refusing(http.server.BaseHTTPRequestHandler):
    """Speaks HTTP and refuses: with ``status``, or with a body shorter than it says."""

    status = 503

    def answer(self):
        body = b"<Error><Code>SlowDown</Code></Error>"
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body) + 1000 * (self.status == 200)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 (the names that http.server calls)

    def log_message(self, *_):
        pass


@pytest.mark.filterwarnings("ignore")  # clients' own, of connections that were cut off
@pytest.mark.parametrize("status", [503, 409, 412, 200])
def test_f51_an_s3_that_refuses_slows_down_or_gives_half_is_a_miss(status, models, generate, monkeypatch, caplog):
    s3fs = pytest.importorskip("s3fs", reason='S3: pip install "ghostcacher[s3]"')
    s3fs.S3FileSystem.clear_instance_cache()  # one client for each environment
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Refusing,), {"status": status}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "canary", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "GHOSTCACHER_REMOTE_TIMEOUT_SECONDS": "0.5",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    model = models("llama")
    expected = generate(model, PROMPT, new=2)
    try:
        with opened(f"s3://bucket{status}/blocks") as store:
            began = time.monotonic()
            for _ in range(4):
                out, cached = ask(generate, model, store)
                assert torch.equal(out, expected)
                assert cached == 0
            assert time.monotonic() - began < 60
            assert store.stats().tiers[0].errors > 0
        assert "canary" not in caplog.text
    finally:
        server.shutdown()
        server.server_close()
        s3fs.S3FileSystem.clear_instance_cache()
