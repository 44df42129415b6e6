"""Thirteen faults of a network between the store and a real Redis, in each a right answer within the deadline."""

from __future__ import annotations

import time

import pytest
import torch

import ghostcacher
from ghostcacher import GhostCache
from ghostcacher.gate import Line
from ghostcacher.testing.models import random_prompt
from ghostcacher.testing.proxy import FAULTS, fault_proxy

PROMPT = random_prompt(300, seed=4)
TIMEOUT_SECONDS = 0.5
MERCY_SECONDS = 4.0
"""A busy machine may be so much slower; what hangs, hangs for longer."""


def opened(url, **given):
    return ghostcacher.open_store(memory=None, disk=None, block_tokens=64, remote=url, **given)


@pytest.fixture
def proxied(models, generate, redis_url, redis_server, monkeypatch):
    """A store behind a proxy, which holds the prompt; the proxy; and what a cold model answers."""
    monkeypatch.setenv("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))
    model = models("llama", num_hidden_layers=4)
    with opened(redis_url) as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
    with fault_proxy(redis_server.port) as proxy, opened(f"redis://127.0.0.1:{proxy.port}/0") as store:
        yield model, store, proxy, generate(model, PROMPT)


def answer(generate, model, store):
    cache = GhostCache(model, store)
    began = time.monotonic()
    out = generate(model, PROMPT, cache)
    return out, cache.report, time.monotonic() - began


def forgive(tier):
    """As 15 s and more without trouble would: the breaker asks again, the gate has forgotten how slow it was."""
    for circuit in (tier.store._reads, tier.store._writes):
        circuit._failures, circuit._out_until = 0, None
    tier.loading, tier.asking = Line(), Line()


def test_the_proxy_itself_lets_hits_through(proxied, generate):
    model, store, _, expected = proxied
    out, report, _ = answer(generate, model, store)
    assert torch.equal(out, expected)
    assert report.cached_tokens == 299


@pytest.mark.parametrize("fault", FAULTS)
def test_f39_to_f43_a_faulty_network_costs_its_deadline_and_no_token(fault, proxied, generate):
    model, store, proxy, expected = proxied
    proxy.fault = fault
    for _ in range(2):
        out, _, seconds = answer(generate, model, store)
        assert torch.equal(out, expected)
        # Looking up and two attempts to fetch, each within its limit.
        assert seconds < 3 * TIMEOUT_SECONDS + MERCY_SECONDS
    assert proxy.connections > 0
    # The network is well again: nothing that was on its way is taken for an answer to something else.
    proxy.fault = "pass"
    forgive(store.tiers[0])
    for _ in range(2):
        out, report, _ = answer(generate, model, store)
        assert torch.equal(out, expected)
        store.flush()
    assert report.cached_tokens == 299


@pytest.mark.parametrize("fault", ["flip", "swap", "garbage", "cut"])
def test_f43_what_the_wire_changed_is_never_taken(fault, proxied, generate):
    """Found by its digest, or by a client that no longer understands: the tier counts either."""
    model, store, proxy, expected = proxied
    ghostcacher.lookup(model, PROMPT[0].tolist(), store)
    proxy.fault = fault
    changed = 0
    for _ in range(3):
        out, report, _ = answer(generate, model, store)
        assert torch.equal(out, expected)
        changed += report.cached_tokens < 299
        store.flush()
        forgive(store.tiers[0])
    counts = store.stats().tiers[0]
    assert changed > 0
    assert counts.rejected + counts.errors > 0


def test_f34_a_slow_network_keeps_nobody_waiting_to_store(models, generate, redis_url, redis_server, monkeypatch):
    monkeypatch.setenv("GHOSTCACHER_REMOTE_TIMEOUT_SECONDS", "30")
    model = models("llama", num_hidden_layers=4)
    with fault_proxy(redis_server.port) as proxy, opened(f"redis://127.0.0.1:{proxy.port}/0") as store:
        generate(model, PROMPT, GhostCache(model, store), new=1)
        store.flush()
        proxy.fault = "latency"
        for seed in range(5):
            generate(model, random_prompt(300, seed=100 + seed), GhostCache(model, store), new=1)
        assert store.stats().queued > 0
