"""What one machine stored another finds, through a real server that speaks S3."""

from __future__ import annotations

import socket

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.testing.models import random_prompt

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
PROMPT = random_prompt(70, seed=1)


@pytest.fixture
def url(s3_endpoint, s3_bucket, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "GHOSTCACHER_REMOTE_TIMEOUT_SECONDS": "30",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_bucket}/blocks"


def test_another_machine_finds_it_and_keeps_it(llama, generate, url, tmp_path):
    expected = generate(llama, PROMPT)
    with ghostcacher.open_store(memory=None, disk=None, remote=url, block_tokens=16) as store:
        generate(llama, PROMPT, GhostCache(llama, store), new=1)
    with ghostcacher.open_store(tmp_path / "other", memory=None, remote=url, block_tokens=16) as store:
        tiers = []
        for _ in range(2):
            cache = GhostCache(llama, store)
            assert torch.equal(generate(llama, PROMPT, cache), expected)
            assert cache.report.cached_tokens == 69
            tiers.append(cache.report.tier)
            store.flush()
    assert tiers == ["remote", "disk"]


def test_a_server_that_is_gone_costs_no_answer(llama, generate, url, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS", "0.5")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with ghostcacher.open_store(memory=None, disk=None, remote=url, block_tokens=16) as store:
        cache = GhostCache(llama, store)
        assert torch.equal(generate(llama, PROMPT, cache), generate(llama, PROMPT))
        assert cache.report.reason == "miss: first seen"
        store.flush()
        assert store.stats().tiers[0].errors >= 1
    s3fs.S3FileSystem.clear_instance_cache()
